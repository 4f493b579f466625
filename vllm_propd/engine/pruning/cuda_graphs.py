"""CUDA graphs for both halves of a pruned step. No GPU has run them yet.

vLLM captures what lies between a model's attention layers, for some numbers of tokens, and
pads a batch to the next of them. Each half is compiled as the model is, so its pieces are
captured the same way: vLLM's own capture runs again with both halves in the model's place.
A graph reads its inputs where they were when it was captured: the lower half's lie in
vLLM's buffers; rows that go on are gathered into ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import (
    BatchDescriptor,
    ForwardContext,
    get_forward_context,
    set_forward_context,
)

from vllm_propd.engine.integration.patches import replaced

Inputs = dict[str, torch.Tensor | None]


class HalfGraphs:
    """Knows which graphs the halves have, and where the upper half's find their inputs.

    Args:
        runner: vLLM's model runner; its dispatcher says to which size a batch is padded.

    Attributes:
        captured: the sizes there are graphs for. None on a CPU.
    """

    def __init__(self, runner: Any):
        self._dispatcher = runner.cudagraph_dispatcher
        self._most = max(runner.cudagraph_batch_sizes, default=0)
        self._buffers: dict[str, torch.Tensor] = {}
        self.captured: set[BatchDescriptor] = set()

    def enter_lower(self, context: ForwardContext) -> None:
        """Leaves vLLM's choice for this batch alone, if the lower half has that graph."""
        if context.batch_descriptor not in self.captured:
            context.cudagraph_runtime_mode = CUDAGraphMode.NONE

    def enter_upper(self, context: ForwardContext, rows: int) -> int:
        """Chooses the graph for the rows that go on; returns their number with padding."""
        mode, descriptor = self._dispatcher.dispatch(
            rows, valid_modes={CUDAGraphMode.PIECEWISE, CUDAGraphMode.NONE}
        )
        if descriptor not in self.captured:
            mode, descriptor = CUDAGraphMode.NONE, BatchDescriptor(rows)
        context.cudagraph_runtime_mode, context.batch_descriptor = mode, descriptor
        padded: int = descriptor.num_tokens
        return padded

    def gather(self, inputs: Inputs, rows: torch.Tensor, padded: int) -> Inputs:
        """Gathers rows of the upper half's inputs; padding is what earlier steps left.

        Args:
            inputs: ``[batch rows, ...]`` each; None stays None.
            rows: ``[going on]`` int64.
            padded: rows that the half runs on.
        """
        gathered: Inputs = dict.fromkeys(inputs)
        in_graphs = get_forward_context().cudagraph_runtime_mode != CUDAGraphMode.NONE
        for name, values in inputs.items():
            if values is None:
                continue
            if not in_graphs:
                gathered[name] = values[rows]
                continue
            if name not in self._buffers:
                self._buffers[name] = values.new_zeros(self._most, *values.shape[1:])
            buffer = self._buffers[name]
            torch.index_select(values, 0, rows, out=buffer[: len(rows)])
            gathered[name] = buffer[:padded]
        return gathered


@dataclass(frozen=True)
class ModelCall:
    """Holds how vLLM would run its model on a batch of some size.

    Attributes:
        inputs: the model's, as keywords, with padding.
        mode: whether graphs are replayed.
        descriptor: for which size.
    """

    inputs: dict[str, Any]
    mode: CUDAGraphMode
    descriptor: BatchDescriptor | None

    @contextmanager
    def context(self, vllm_config: VllmConfig) -> Iterator[ForwardContext]:
        """Enters vLLM's context of such a call, without attention metadata."""
        with set_forward_context(
            None,
            vllm_config,
            num_tokens=len(self.inputs["positions"]),
            cudagraph_runtime_mode=self.mode,
            batch_descriptor=self.descriptor,
        ):
            yield get_forward_context()


def model_call(runner: Any, rows: int) -> ModelCall:
    """Returns what vLLM's dummy run of so many rows gives the model, which does not run."""
    calls = []

    def model(intermediate_tensors: None, **inputs: Any) -> torch.Tensor:
        context = get_forward_context()
        mode, descriptor = context.cudagraph_runtime_mode, context.batch_descriptor
        calls.append(ModelCall(inputs, mode, descriptor))
        positions: torch.Tensor = inputs["positions"]
        return positions.new_empty(len(positions), 1)

    with in_the_models_place(runner, model):
        runner._dummy_run(rows)
    (call,) = calls
    return call


@contextmanager
def in_the_models_place(runner: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Lets the runner run ``forward`` instead of its model, inside."""
    with replaced(runner, "model", _StandIn(runner.model, forward)):
        yield


class _StandIn:
    """Is called like a model, and has a model's attributes."""

    def __init__(self, model: Any, forward: Callable[..., Any]):
        self._model, self._forward = model, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
