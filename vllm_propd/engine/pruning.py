"""A step in two halves: what the early head rejects never enters the upper one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig
from vllm.forward_context import get_forward_context, set_forward_context
from vllm.sequence import IntermediateTensors

from vllm_propd.config import ProPDConfig
from vllm_propd.core.tree import TokenTree
from vllm_propd.engine.early import EarlyJudge
from vllm_propd.engine.halves import ModelHalves, residual_stream
from vllm_propd.engine.pruned import Pruned
from vllm_propd.engine.split import TreeMetadata
from vllm_propd.engine.step import TreeStep
from vllm_propd.engine.transfer import sent

if TYPE_CHECKING:
    from vllm_propd.core.pruning_triton import Forest

WARM_UP_ROWS = 8

PARENTS = 0.4
"""Of a tree's rows, that have children which the early head judges; about."""


class PrunedForward:
    """Runs a step with trees in two halves.

    Args:
        config: early layer and rule.
        vllm_config: of the engine.
        model: vLLM's.

    Attributes:
        on_device: nodes are chosen where the logits are; what a host chooses, a GPU has to
            wait for.
    """

    def __init__(self, config: ProPDConfig, vllm_config: VllmConfig, model: Any):
        assert config.early_layer is not None
        self.halves = ModelHalves(model, config.early_layer, vllm_config)
        self.judge = EarlyJudge(config, vllm_config, model)
        self.vllm_config = vllm_config
        self.on_device = vllm_config.device_config.device.type != "cpu"

    def run(
        self,
        step: TreeStep,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None,
        most: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, TreeStep]:
        """Lower half, pruning, upper half; inside vLLM's forward context.

        Args:
            step: this step's trees.
            input_ids, positions, inputs_embeds, kwargs: the model's.
            most: nodes to keep; see ``EarlyJudge.keep``.

        Returns:
            The model's output ``[batch rows, hidden]``, undefined in pruned rows, and
            the step that is left.
        """
        context = get_forward_context()
        before = context.attn_metadata, context.slot_mapping, context.cudagraph_runtime_mode
        context.cudagraph_runtime_mode = CUDAGraphMode.NONE  # halves have none of their own
        try:
            between = self.halves.run_lower(
                input_ids=input_ids,
                positions=positions,
                inputs_embeds=inputs_embeds,
                **kwargs,
            )
            stream = residual_stream(between, sent(step.rows, positions.device))
            forest = self._forest(step)
            kept = self.judge.keep(step, stream, most, forest)
            pruned = Pruned(step, kept, len(positions), forest)
            rows = pruned.rows
            context.attn_metadata = _each(before[0], lambda meta: _narrowed(meta, pruned))
            context.slot_mapping = _each(before[1], lambda slots: slots[rows])
            upper = self.halves.run_upper(
                IntermediateTensors({k: v[rows] for k, v in between.tensors.items()}),
                input_ids=None if input_ids is None else input_ids[rows],
                positions=positions[rows],
                inputs_embeds=None if inputs_embeds is None else inputs_embeds[rows],
                **kwargs,
            )
        finally:
            (
                context.attn_metadata,
                context.slot_mapping,
                context.cudagraph_runtime_mode,
            ) = before
        out = upper.new_empty(len(positions), upper.shape[-1])
        out[rows] = upper
        return out, pruned.left

    def _forest(self, step: TreeStep) -> Forest | None:
        """The step's trees on the device, if nodes are chosen there."""
        if not self.on_device:
            return None
        from vllm_propd.core.pruning_triton import Forest

        device = self.vllm_config.device_config.device
        return Forest.of(step.masks, step.first, step.sizes, device)

    def warm_up(self) -> None:
        """Compiles both halves, where the engine compiles its model."""
        if self.vllm_config.compilation_config.mode != CompilationMode.NONE:
            self.dummy_run(WARM_UP_ROWS)

    @torch.inference_mode()
    def dummy_run(self, rows: int) -> tuple[Callable[[], Any], Callable[[], torch.Tensor]]:
        """Both halves on ``rows`` rows without context, once; to be timed again.

        Returns:
            The lower half with the early head's judgement, and the upper half.
        """
        device = self.vllm_config.device_config.device
        ids = torch.zeros(rows, dtype=torch.int32, device=device)
        inputs = {"input_ids": ids, "positions": ids.long(), "inputs_embeds": None}
        step = one_tree(rows)
        forest = self._forest(step)

        def lower() -> IntermediateTensors:
            with set_forward_context(None, self.vllm_config, num_tokens=rows):
                between = self.halves.run_lower(**inputs)
            if rows > 1:
                stream = residual_stream(between, sent(step.rows, device))
                self.judge.keep(step, stream, rows // 2, forest)
            return between

        between = lower()

        def upper() -> torch.Tensor:
            with set_forward_context(None, self.vllm_config, num_tokens=rows):
                return self.halves.run_upper(between, **inputs)

        upper()
        return lower, upper


def one_tree(rows: int) -> TreeStep:
    """A step of one tree like those that are drafted, of so many rows; for timing."""
    parent = np.zeros(rows, np.int64)
    parent[1:] = PARENTS * np.arange(rows - 1)
    depth = np.zeros(rows, np.int64)
    for node in range(1, rows):
        depth[node] = depth[parent[node]] + 1
    token = np.zeros(rows, np.int64)
    tree = TokenTree(token[1:], parent[1:], depth[1:], np.zeros(rows - 1, np.float32))
    root = np.zeros(1, np.int64)
    return TreeStep(
        trees=[tree], request=root, first=root, sizes=root + rows, rows=np.arange(rows),
        parent=parent, depth=depth, token=token, root_position=root,
    )  # fmt: skip


def _each(by_layer: Any, change: Any) -> dict[str, Any]:
    """A dict by layer, changed; layers that share a value go on sharing one."""
    changed = {id(value): change(value) for value in by_layer.values()}
    return {name: changed[id(value)] for name, value in by_layer.items()}


def _narrowed(meta: Any, pruned: Pruned) -> Any:
    assert isinstance(meta, TreeMetadata)
    return meta.after_pruning(pruned)
