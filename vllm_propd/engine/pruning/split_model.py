"""One model run in two halves: the pipeline-stage trick.

Every vLLM model with pipeline parallelism can stop after a layer and go on from there.
Two shallow copies of it get the bounds of two stages, and while a copy runs, vLLM's
pipeline group answers for that stage. Layers, weights and KV cache are shared; no model
needs code of its own. Models on vLLM's Transformers backend know no bounds: as there, each
copy lacks the other stage's layers.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.sequence import IntermediateTensors

BETWEEN_STAGES = {
    "input_ids", "positions", "position_ids", "inputs_embeds", "intermediate_tensors",
    "hidden_states", "residual",
}  # fmt: skip
"""What a stack of layers may be given: the halves are given the same, or pass it on."""


class UnsplittableError(ValueError):
    """The model cannot be run in two halves."""


class _Stage:
    """Answers like vLLM's pipeline group for one of two stages."""

    def __init__(self, group: Any, is_first_rank: bool):
        self.group = group
        self.is_first_rank = is_first_rank
        self.is_last_rank = not is_first_rank

    def __getattr__(self, name: str) -> Any:
        return getattr(self.group, name)


class _Stack(Protocol):
    """Knows where a model's layers are, and how a copy of their owner is left with some.

    Attributes:
        path: names from the model down to the module that owns the layers.
        num_layers: all of them.
    """

    path: list[str]
    num_layers: int

    def cut(self, owner: Any, first: int, end: int) -> None:
        """Leaves a copy of the owner with layers ``first`` to ``end - 1``."""

    def more_than_passes(self, model: nn.Module) -> set[str]:
        """Returns what the layers are given beside what passes between the halves."""


@dataclass(frozen=True)
class _BoundedStack:
    """The layers of vLLM's own models, whose owner runs those between its bounds."""

    path: list[str]
    start: int
    num_layers: int

    def cut(self, owner: Any, first: int, end: int) -> None:
        owner.start_layer, owner.end_layer = self.start + first, self.start + end

    def more_than_passes(self, model: nn.Module) -> set[str]:
        # Features of images, say, that a model keeps for one forward pass only.
        owner = type(model.get_submodule(".".join(self.path)))
        given = inspect.signature(owner.forward).parameters.values()
        rest = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        named = {one.name for one in given if one.kind not in rest}
        return named - {"self"} - BETWEEN_STAGES


@dataclass(frozen=True)
class _ListedStack:
    """The layers of the Transformers backend, whose owner runs a list and what follows it.

    Attributes:
        layers: the list's name.
        after: the names of modules that only the last stage has.
    """

    path: list[str]
    num_layers: int
    layers: str
    after: list[str]

    def cut(self, owner: Any, first: int, end: int) -> None:
        owner._modules[self.layers] = nn.ModuleList(
            layer if first <= i < end else PPMissingLayer()
            for i, layer in enumerate(owner._modules[self.layers])
        )
        for name in self.after if end < self.num_layers else ():
            owner._modules[name] = PPMissingLayer()

    def more_than_passes(self, model: nn.Module) -> set[str]:
        return set()  # Hugging Face's decoders take much; the backend gives none of it.


class SplitModel:
    """The lower and the upper half of a model.

    Args:
        model: vLLM's.
        layer: after which the lower half ends, counted from 1.
        vllm_config: of the engine.

    Attributes:
        have_run: whether both halves have run once.

    Raises:
        UnsplittableError: the model has no stack of layers that a pipeline stage could cut,
            or one that is given more than pipeline stages pass on.
    """

    have_run = False

    def __init__(self, model: nn.Module, layer: int, vllm_config: VllmConfig):
        stack = _bounded_stack(model) or _listed_stack(model)
        if stack is None:
            raise UnsplittableError(
                f"early pruning cannot split {type(model).__name__}, which has no pipeline "
                "stages: set pruning to 'off'"
            )
        if more := stack.more_than_passes(model):
            raise UnsplittableError(
                f"early pruning cannot split {type(model).__name__}, whose layers are also "
                f"given {', '.join(sorted(more))}: set pruning to 'off'"
            )
        self.num_layers = stack.num_layers
        group = parallel_state.get_pp_group()
        self._first, self._last = _Stage(group, True), _Stage(group, False)
        self.lower, self.upper = _copied(model, stack.path), _copied(model, stack.path)
        for half, stage, *bounds in (
            (self.lower, self._first, 0, layer),
            (self.upper, self._last, layer, stack.num_layers),
        ):
            if hasattr(half, "pp_group"):  # the Transformers backend keeps it
                half.pp_group = stage
            owner = half.get_submodule(".".join(stack.path))
            stack.cut(owner, *bounds)
            if not getattr(owner, "do_not_compile", True):
                _compile_anew(owner, "propd_layers_{}_to_{}".format(*bounds), vllm_config)

    def run_lower(self, **inputs: Any) -> IntermediateTensors:
        """Runs the lower half, to what passes between pipeline stages."""
        with _running(self._first):
            return self.lower(intermediate_tensors=None, **inputs)

    def run_upper(self, between: IntermediateTensors, **inputs: Any) -> torch.Tensor:
        """Runs the upper half, from there to ``[rows, hidden]``, the model's output."""
        with _running(self._last):
            return self.upper(intermediate_tensors=between, **inputs)


def residual_stream(between: IntermediateTensors, rows: torch.Tensor) -> torch.Tensor:
    """Returns the residual stream after the lower half's last layer, ``[rows, hidden]``."""
    hidden = between.tensors["hidden_states"][rows]
    residual = between.tensors.get("residual")
    return hidden if residual is None else hidden + residual[rows]


def _bounded_stack(model: nn.Module) -> _BoundedStack | None:
    for name, module in model.named_modules():
        start, end = (getattr(module, f"{side}_layer", None) for side in ("start", "end"))
        if isinstance(start, int) and isinstance(end, int):
            return _BoundedStack(name.split(".") if name else [], start, end - start)
    return None


def _listed_stack(model: Any) -> _ListedStack | None:
    """Returns the decoder's only list of modules; None where there are others, or none."""
    inner: Any = getattr(model, "model", None)
    if not hasattr(model, "pp_group") or not hasattr(inner, "get_decoder"):
        return None
    decoder = inner.get_decoder()
    (path,) = (name for name, module in model.named_modules() if module is decoder)
    children = dict(decoder.named_children())
    lists = [name for name, child in children.items() if isinstance(child, nn.ModuleList)]
    if len(lists) != 1:
        return None
    names = list(children)
    after = [
        name
        for name in names[names.index(lists[0]) + 1 :]
        if any(True for _ in children[name].parameters())
    ]
    return _ListedStack(path.split("."), len(children[lists[0]]), lists[0], after)


def _copied(module: Any, path: list[str]) -> Any:
    """Copies a model; all is shared but the modules at and above ``path``."""
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    if path:
        clone._modules[path[0]] = _copied(module._modules[path[0]], path[1:])
    return clone


def _compile_anew(module: Any, tag: str, vllm_config: VllmConfig) -> None:
    """Gives a copy a compiled forward of its own."""
    # vLLM names cached artifacts by config, class and tag, and knows of no cut: each half
    # of each cut needs its own.
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
