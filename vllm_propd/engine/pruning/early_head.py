"""The early head in a worker: judges the nodes after the lower half.

No rank gathers logits: each counts, or sums, over its share of the vocabulary, and the
ranks exchange one number for each node.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from vllm_propd.config import ProPDConfig
from vllm_propd.core.pruning import keep_best_paths, keep_top_k, node_log_probs, own_part
from vllm_propd.core.tree import Ints
from vllm_propd.engine.step.tree_step import Early, TreeStep
from vllm_propd.heads.early import load_early_head
from vllm_propd.kernels.early_head_ranks import log_probs, ranks
from vllm_propd.kernels.transfer import Arrays, to_device, to_host

if TYPE_CHECKING:
    from vllm_propd.kernels.pruning_triton import DeviceTreeBatch


class EarlyHeadJudge:
    """Says which rows of a step go on.

    Args:
        config: layer and rule.
        vllm_config: of the engine.
        target: vLLM's model, whose output layer the early head may share.

    Attributes:
        reading: ``said`` tells what the head says of each node, for a recording.
    """

    def __init__(self, config: ProPDConfig, vllm_config: VllmConfig, target: Any):
        self.config = config
        self.reading = False
        model = vllm_config.model_config
        assert config.model is not None and config.early_layer is not None
        head = load_early_head(Path(config.model), config.early_layer, model.hf_text_config)
        device = vllm_config.device_config.device
        self.head = head.to(dtype=model.dtype, device=device)
        if self.head.up is None:
            self._output = _TargetOutput(
                target, model.get_hidden_size(), model.dtype, device
            )
            self.start = self._output.start
        else:
            self.start = self.head.keep_share(
                get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
            )

    def arrays(self, step: TreeStep, most: int | None, on_device: bool) -> Arrays:
        """Returns what the device has to know of a step beside ``TreeStep.arrays``.

        Args:
            step: this step's trees.
            most: see ``keep``.
            on_device: it chooses the nodes of ``path_probability``.
        """
        edges = step.edges
        arrays: dict[str, np.ndarray] = {
            "parents": edges.parents,
            "place": edges.place,
            "child_token": step.token[edges.child],
        }
        if self.config.pruning == "top_k":
            return arrays
        drafted = np.concatenate([tree.score for tree in step.trees])
        arrays["draft"] = own_part(drafted, edges, step.parent_row)
        arrays["looked_up"] = step.looked_up
        if on_device:
            arrays["child"], arrays["taken"] = edges.child, self._taken(step, most)
        return arrays

    def _taken(self, step: TreeStep, most: int | None) -> Ints:
        """Returns ``[kept]`` int64 which places go on (``DeviceTreeBatch.best_paths``)."""
        if most is not None:
            return np.arange(min(len(step.rows), len(step.first) + most))
        sizes = np.minimum(step.sizes, 1 + self.config.keep_nodes)
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        taken: Ints = np.repeat(step.first, sizes) + within
        return taken

    def keep(
        self,
        step: TreeStep,
        stream: torch.Tensor,
        most: int | None = None,
        tree_batch: DeviceTreeBatch | None = None,
    ) -> torch.Tensor:
        """Chooses which rows of the step's trees go on.

        Args:
            step: this step's trees, whose ``arrays`` are on the device.
            stream: ``[tree rows, hidden]`` the residual stream after the early layer.
            most: nodes of all trees together that a plan wants to keep; None: what the
                config's rule says of each tree.
            tree_batch: the trees on the device, where paths wait for nothing.

        Returns:
            ``[kept]`` int64 of tree rows, ascending, on the device; roots are always kept.
        """
        here, edges, shares = step.here, step.edges, self._shares(step, stream)
        if self.config.pruning == "top_k":
            rank = to_host(ranks(*shares))
            kept = keep_top_k(rank(), edges, step.parent_row, step.depth, self.config.top_k)
            return _to_rows(kept, stream.device)
        draft = here["draft"]
        log_prob = node_log_probs(log_probs(*shares), draft, self.config.draft_weight)
        # A shallow layer knows less than a text that repeats itself.
        log_prob = torch.where(here["looked_up"], draft, log_prob)
        if tree_batch is not None:
            own = log_prob.new_zeros(len(step.rows)).index_copy(0, here["child"], log_prob)
            best: torch.Tensor = tree_batch.best_paths(own, here["taken"], most is not None)
            return best
        if most is None:
            group, most = step.tree, self.config.keep_nodes
        else:
            group = np.zeros(len(step.depth), np.int64)
        kept = keep_best_paths(
            log_prob.numpy(), edges, step.parent_row, step.depth, group, most
        )
        return _to_rows(kept, stream.device)

    def said(self, step: TreeStep, stream: torch.Tensor) -> Early | None:
        """Returns what the head says of all drafted nodes; None if it is not ``reading``.

        Args:
            step, stream: see ``keep``.
        """
        if not self.reading:
            return None
        shares = self._shares(step, stream)
        rank, said = to_host(ranks(*shares)), to_host(log_probs(*shares).float())
        return rank(), said()

    def _shares(self, step: TreeStep, stream: torch.Tensor) -> tuple[Any, ...]:
        """Returns the arguments of ``ranks`` and ``log_probs``, of this rank's share."""
        here = step.here
        logits = self.logits(stream[here["parents"]])
        return logits, here["child_token"], here["place"], self.start, _sum_over_ranks

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Computes this rank's logits, ``[parents, hidden]`` to ``[parents, tokens]``."""
        if self.head.up is None:
            return self._output(self.head(states))
        return self.head.own_logits(states)


class _TargetOutput:
    """This rank's part of the target's output layer, never gathered."""

    def __init__(self, target: Any, hidden_size: int, dtype: Any, device: Any):
        processors = [m for m in target.modules() if isinstance(m, LogitsProcessor)]
        self.processor = processors[0]
        seen: list[tuple[Any, ...]] = []
        # Where a model keeps its output layer is its own affair: one call shows it.
        hook = self.processor.register_forward_pre_hook(lambda _, args: seen.append(args))
        target.compute_logits(torch.zeros(1, hidden_size, dtype=dtype, device=device))
        hook.remove()
        self.layer, _, *self.bias = seen[0]
        indices = self.layer.shard_indices
        self.start = indices.org_vocab_start_index
        self.tokens = indices.num_org_elements

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        logits = self.processor(self.layer, states, *self.bias, skip_gather=True)
        return logits[:, : self.tokens]


def _to_rows(kept: np.ndarray, device: torch.device) -> torch.Tensor:
    return to_device({"kept": np.flatnonzero(kept)}, device)["kept"]


def _sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    if get_tensor_model_parallel_world_size() == 1:
        return values
    return tensor_model_parallel_all_reduce(values)
