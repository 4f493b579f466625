"""One model run in two halves: the pipeline-stage trick.

Every vLLM model with pipeline parallelism can stop after a layer and go on from there.
Two shallow copies of it get the bounds of two stages, and while a copy runs, vLLM's
pipeline group answers for that stage. Layers, weights and KV cache are shared; no model
needs code of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.sequence import IntermediateTensors


class _Stage:
    """Vllm's pipeline group, answering for one of two stages."""

    def __init__(self, group: Any, is_first_rank: bool):
        self.group = group
        self.is_first_rank = is_first_rank
        self.is_last_rank = not is_first_rank

    def __getattr__(self, name: str) -> Any:
        return getattr(self.group, name)


class ModelHalves:
    """The lower and the upper half of a model.

    Args:
        model: vLLM's.
        layer: after which the lower half ends, counted from 1.
        vllm_config: of the engine.

    Raises:
        ValueError: the model has no stack of layers that a pipeline stage could cut.
    """

    def __init__(self, model: nn.Module, layer: int, vllm_config: VllmConfig):
        path, stack = _layer_stack(model)
        self.num_layers = stack.end_layer - stack.start_layer
        cut = stack.start_layer + layer
        lower, upper = (stack.start_layer, cut), (cut, stack.end_layer)
        self.lower = _copy(model, path, lower, "propd_lower_half", vllm_config)
        self.upper = _copy(model, path, upper, "propd_upper_half", vllm_config)
        group = parallel_state.get_pp_group()
        self._first, self._last = _Stage(group, True), _Stage(group, False)

    def run_lower(self, **inputs: Any) -> IntermediateTensors:
        """The model's inputs to what passes between pipeline stages."""
        with _running(self._first):
            return self.lower(intermediate_tensors=None, **inputs)

    def run_upper(self, between: IntermediateTensors, **inputs: Any) -> torch.Tensor:
        """From there to ``[rows, hidden]``, the model's output."""
        with _running(self._last):
            return self.upper(intermediate_tensors=between, **inputs)


def residual_stream(between: IntermediateTensors, rows: torch.Tensor) -> torch.Tensor:
    """``[rows, hidden]`` of some rows, after the lower half's last layer."""
    hidden = between.tensors["hidden_states"][rows]
    residual = between.tensors.get("residual")
    return hidden if residual is None else hidden + residual[rows]


def _layer_stack(model: nn.Module) -> tuple[list[str], Any]:
    """The module that owns the layers, and its name from the model down."""
    for name, module in model.named_modules():
        bounds = getattr(module, "start_layer", None), getattr(module, "end_layer", None)
        if all(isinstance(bound, int) for bound in bounds):
            return name.split(".") if name else [], module
    raise ValueError(
        f"early pruning cannot split {type(model).__name__}, which has no pipeline stages: "
        "set pruning to 'off'"
    )


def _copy(
    module: Any,
    path: list[str],
    bounds: tuple[int, int],
    tag: str,
    vllm_config: VllmConfig,
) -> Any:
    """A copy that shares everything but the bounds of the stack at ``path``."""
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    if path:
        inner = _copy(module._modules[path[0]], path[1:], bounds, tag, vllm_config)
        clone._modules[path[0]] = inner
        return clone
    clone.start_layer, clone.end_layer = bounds
    if not getattr(clone, "do_not_compile", True):
        _compile_anew(clone, tag, vllm_config)
    return clone


def _compile_anew(module: Any, tag: str, vllm_config: VllmConfig) -> None:
    """Gives a copy a compiled forward of its own."""
    # vLLM names cached artifacts by config and class: each half needs its own config.
    own = copy.copy(vllm_config)
    own.additional_config = {**vllm_config.additional_config, "half": tag}
    module.aot_compiled_fn = None
    module.was_aot_compile_fn_loaded_from_disk = False
    with set_current_vllm_config(own), set_model_tag(tag):
        module._compile_tag = tag
        TorchCompileWithNoGuardsWrapper.__init__(module)


@contextmanager
def _running(stage: _Stage) -> Iterator[None]:
    group = parallel_state._PP
    parallel_state._PP = stage
    try:
        yield
    finally:
        parallel_state._PP = group
