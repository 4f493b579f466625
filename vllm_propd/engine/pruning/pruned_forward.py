"""A step in two halves: what the early head rejects never enters the upper one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.sequence import IntermediateTensors

from vllm_propd.config import ProPDConfig
from vllm_propd.engine.attention.tree_split import TreeMetadata
from vllm_propd.engine.pruning.cuda_graphs import HalfGraphs, Inputs, model_call
from vllm_propd.engine.pruning.early_head import EarlyHeadJudge
from vllm_propd.engine.pruning.pruned_step import Pruned
from vllm_propd.engine.pruning.split_model import SplitModel, residual_stream
from vllm_propd.engine.startup.dummy_step import one_tree
from vllm_propd.engine.step.tree_step import TreeStep
from vllm_propd.kernels.transfer import Arrays, to_device

if TYPE_CHECKING:
    from vllm_propd.kernels.pruning_triton import DeviceTreeBatch

WARM_UP_ROWS = 8

PER_ROW = ("input_ids", "positions", "inputs_embeds")
"""The model's inputs that have a row for each of the batch's."""

CHANGED = ("attn_metadata", "slot_mapping", "cudagraph_runtime_mode", "batch_descriptor")
"""The fields of vLLM's forward context that the upper half needs to be others."""


class PrunedForward:
    """Runs a step with trees in two halves.

    Args:
        config: early layer and rule.
        runner: vLLM's model runner, its model loaded.
        same_cut: after the same layer, by another rule: its halves, compiled and captured,
            are used.

    Attributes:
        on_device: nodes are chosen where the logits are; what a host chooses, a GPU has to
            wait for.
    """

    def __init__(
        self, config: ProPDConfig, runner: Any, same_cut: PrunedForward | None = None
    ):
        assert config.early_layer is not None
        self.runner, self.vllm_config = runner, runner.vllm_config
        model = runner.get_model()
        self.halves: SplitModel
        self.graphs: HalfGraphs
        if same_cut is not None:
            self.halves, self.graphs = same_cut.halves, same_cut.graphs
        else:
            self.halves = SplitModel(model, config.early_layer, self.vllm_config)
            self.graphs = HalfGraphs(runner)
        self.judge = EarlyHeadJudge(config, self.vllm_config, model)
        self.on_device = runner.device.type != "cpu"

    def run(
        self,
        step: TreeStep,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None,
        most: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, TreeStep]:
        """Runs lower half, pruning and upper half, inside vLLM's forward context.

        Args:
            step: this step's trees.
            input_ids, positions, inputs_embeds, kwargs: the model's.
            most: nodes to keep; see ``EarlyHeadJudge.keep``.

        Returns:
            The model's output ``[batch rows, hidden]``, undefined in pruned rows, and
            the step that is left.
        """
        context = get_forward_context()
        before = {name: getattr(context, name) for name in CHANGED}
        inputs: Inputs = {
            "input_ids": input_ids,
            "positions": positions,
            "inputs_embeds": inputs_embeds,
        }
        try:
            self.graphs.enter_lower(context)
            between = self.halves.run_lower(**inputs, **kwargs)
            stream = residual_stream(between, step.here["rows"])
            tree_batch = self._tree_batch(step)
            kept = self.judge.keep(step, stream, most, tree_batch)
            pruned = Pruned(step, kept, tree_batch, self.judge.said(step, stream))
            rows = pruned.rows
            padded = self.graphs.enter_upper(context, len(rows))
            context.attn_metadata = _each(
                before["attn_metadata"], lambda meta: _narrowed(meta, pruned)
            )
            context.slot_mapping = _each(
                before["slot_mapping"],
                lambda slots: pad(slots[rows], (0, padded - len(rows)), value=-1),
            )
            upper = self._run_upper(between, inputs, rows, padded, **kwargs)
        finally:
            for name, value in before.items():
                setattr(context, name, value)
        out = upper.new_empty(len(positions), upper.shape[-1])
        out[rows] = upper[: len(rows)]
        return out, pruned.left

    def _run_upper(
        self,
        between: IntermediateTensors,
        inputs: Inputs,
        rows: torch.Tensor,
        padded: int,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Runs the upper half on some rows; returns ``[padded, hidden]``."""
        stream = self.graphs.gather(between.tensors, rows, padded)
        others = self.graphs.gather(inputs, rows, padded)
        return self.halves.run_upper(IntermediateTensors(stream), **others, **kwargs)

    def unpruned(self, intermediate_tensors: None, **inputs: Any) -> torch.Tensor:
        """Runs both halves on all rows in the model's place: so vLLM captures graphs."""
        context = get_forward_context()
        if context.cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE:
            self.graphs.captured.add(context.batch_descriptor)
        own, others = _per_row(inputs)
        between = self.halves.run_lower(**own, **others)
        positions = inputs["positions"]
        rows = torch.arange(len(positions), device=positions.device)
        return self._run_upper(between, own, rows, len(rows), **others)

    def arrays(self, step: TreeStep, most: int | None) -> Arrays:
        """Returns what the device has to know of a step beside ``TreeStep.arrays``.

        Args:
            step: its trees, which are to be pruned.
            most: see ``run``.
        """
        arrays = self.judge.arrays(step, most, self.on_device)
        if not self.on_device:
            return arrays
        from vllm_propd.kernels.pruning_triton import DeviceTreeBatch

        return {**arrays, **DeviceTreeBatch.arrays(step.masks, step.first, step.sizes)}

    def _tree_batch(self, step: TreeStep) -> DeviceTreeBatch | None:
        """Returns the step's trees on the device; None where the host chooses nodes."""
        if not self.on_device:
            return None
        from vllm_propd.kernels.pruning_triton import DeviceTreeBatch

        return DeviceTreeBatch.at(step.here)

    def warm_up(self) -> None:
        """Runs both halves once: compiles them, if the engine does, and all kernels."""
        reading, self.judge.reading = self.judge.reading, True  # runs every rule's
        try:
            self.dummy_run(min(WARM_UP_ROWS, self.runner.max_num_tokens))
        finally:
            self.judge.reading = reading
        self.halves.have_run = True

    @torch.inference_mode()
    def dummy_run(self, rows: int) -> tuple[Callable[[], Any], Callable[[], torch.Tensor]]:
        """Runs both halves once on ``rows`` rows without context; they are timed again.

        Returns:
            The lower half with the early head's judgement, and the upper half.
        """
        call = model_call(self.runner, rows)
        step, most = one_tree(rows), rows // 2
        arrays = {**step.arrays(), **self.arrays(step, most)}
        step = step.on_device(to_device(arrays, self.runner.device))
        every = step.here["rows"]
        tree_batch = self._tree_batch(step)
        own, others = _per_row(call.inputs)

        def lower() -> IntermediateTensors:
            with call.context(self.vllm_config) as context:
                self.graphs.enter_lower(context)
                between = self.halves.run_lower(**own, **others)
            if rows > 1:
                stream = residual_stream(between, every)
                self.judge.keep(step, stream, most, tree_batch)
                self.judge.said(step, stream)
            return between

        between = lower()

        def upper() -> torch.Tensor:
            with call.context(self.vllm_config) as context:
                padded = self.graphs.enter_upper(context, rows)
                return self._run_upper(between, own, every, padded, **others)

        upper()
        return lower, upper


def _per_row(inputs: dict[str, Any]) -> tuple[Inputs, dict[str, Any]]:
    """Parts the model's inputs: those that have a row for each token, and the others."""
    own = {name: inputs.get(name) for name in PER_ROW}
    others = {name: value for name, value in inputs.items() if name not in PER_ROW}
    return own, others


def _each(by_layer: Any, change: Any) -> dict[str, Any]:
    """Changes a dict by layer; layers that share a value go on sharing one."""
    changed = {id(value): change(value) for value in by_layer.values()}
    return {name: changed[id(value)] for name, value in by_layer.items()}


def _narrowed(meta: Any, pruned: Pruned) -> Any:
    assert isinstance(meta, TreeMetadata)
    return meta.after_pruning(pruned)
