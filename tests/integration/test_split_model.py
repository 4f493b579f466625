"""A model cut after several layers in turn: each cut has halves, and keeps them."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PRUNING, Ties, engine, greedy, prompts_of, run, use
from torch import nn
from vllm.config import set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.sequence import IntermediateTensors

from vllm_propd.config import ProPDConfig
from vllm_propd.engine.pruning import split_model
from vllm_propd.engine.pruning.split_model import (
    SplitModel,
    UnsplittableError,
    _BoundedStack,
)
from vllm_propd.engine.pruning.splitting import Splitting


def test_halves_are_compiled_under_their_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code is found by vLLM by tag and config: never another cut's."""
    names: list[tuple[str, str]] = []

    def compile_anew(module: Any, tag: str, vllm_config: Any) -> None:
        names.append((tag, f"{module.start_layer} to {module.end_layer}"))

    monkeypatch.setattr(split_model, "_compile_anew", compile_anew)
    with engine() as llm:
        runner = llm.collective_rpc(lambda worker: worker.model_runner)[0]
        model = runner.get_model()
        monkeypatch.setattr(model.model, "do_not_compile", False, raising=False)
        with set_current_vllm_config(runner.vllm_config):
            for layer in (1, 2, 3):
                split_model.SplitModel(model, layer, runner.vllm_config)
    assert len(names) == len({tag for tag, _ in names}) == 6
    assert all(bounds.replace(" ", "_") in tag for tag, bounds in names), names


def test_settings_come_back_to_the_same_halves(tmp_path: Path) -> None:
    with engine(16, propd=PRUNING["top_k"]) as llm:
        runner = llm.collective_rpc(lambda worker: worker.model_runner)[0]
        first = runner._pruned_forward
        first.run = first.run  # as those who measure wrap it: theirs alone
        use(llm, 16, {**PRUNING["top_k"], "top_k": 3})
        same_cut = runner._pruned_forward
        assert same_cut.halves is first.halves and same_cut.graphs is first.graphs
        assert same_cut.judge.config.top_k == 3 and first.judge.config.top_k == 10
        assert "run" in vars(first) and "run" not in vars(same_cut)
        use(llm, 16, PRUNING["path_probability"])
        other = runner._pruned_forward
        assert other.halves is not first.halves
        use(llm, 16, {**PRUNING["path_probability"], "keep_nodes": 3})
        assert runner._pruned_forward.graphs is other.graphs
        use(llm, 16, PRUNING["top_k"])
        assert runner._pruned_forward is first
        run(llm, prompts_of([40]), greedy(8))


def test_what_switched_itself_off_is_not_built_again() -> None:
    """`auto` without an early head, say: asked for again, it is what it was."""
    with engine(8, propd={"sizing": "dynamic"}) as llm:
        runner = llm.collective_rpc(lambda worker: worker.model_runner)[0]
        asked = runner.propd
        runner.propd = asked.without_pruning()  # as `_split` leaves it
        sizing = runner.sizing
        use(llm, 8, {"sizing": "fixed"})
        assert runner.sizing is not sizing
        runner.use_settings(asked)
        assert runner.sizing is sizing


class SkippingLayers(nn.Module):
    """Layers of which the third adds what the first was given, from a variable (Solar)."""

    start_layer, end_layer = 0, 4

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> Any:
        kept: Any = None
        if parallel_state.get_pp_group().is_first_rank:
            hidden = torch.ones(len(positions), 1)
        else:
            assert intermediate_tensors is not None
            hidden = intermediate_tensors["hidden_states"]
        for layer in range(self.start_layer, self.end_layer):
            if layer == 0:
                kept = hidden.clone()
            if layer == 2:
                hidden = kept * 0.5 + hidden
            hidden = 2 * hidden
        if parallel_state.get_pp_group().is_last_rank:
            return hidden
        return IntermediateTensors({"hidden_states": hidden})


class FeatureLayers(SkippingLayers):
    """Layers given features, which their model wipes after a pass (Granite 4 Vision)."""

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        deepstack_input_embeds: IntermediateTensors | None = None,
        **kwargs: Any,
    ) -> Any:
        raise AssertionError("never run in halves")


class RenamedLayers(SkippingLayers):
    """Layers that call positions otherwise, and are given what is embedded (ChatGLM)."""

    def forward(self, hidden_states: Any, position_ids: Any, **more: Any) -> Any:
        """Is cut as it is."""


class Model(nn.Module):
    """A model around its layers."""

    def __init__(self, layers: nn.Module):
        super().__init__()
        self.model = layers

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


@pytest.fixture
def one_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """VLLM's pipeline group, where no engine has made one."""
    group = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(parallel_state, "_PP", group)


@pytest.mark.parametrize(
    ("module", "name", "more"),
    [
        ("gemma4", "Gemma4Model", {"per_layer_inputs"}),
        ("llama", "LlamaModel", set()),
        ("gpt2", "GPT2Model", set()),
        ("chatglm", "GLMTransformer", set()),
    ],
)
def test_what_vllms_layers_are_given(module: str, name: str, more: set[str]) -> None:
    models = import_module(f"vllm.model_executor.models.{module}")
    layers = object.__new__(getattr(models, name))
    assert _BoundedStack([], 0, 4).more_than_passes(layers) == more


@pytest.mark.usefixtures("one_stage")
def test_layers_that_are_given_more_than_stages_pass_on_are_not_cut() -> None:
    config: Any = SimpleNamespace()
    with pytest.raises(UnsplittableError, match=r"given deepstack_input_embeds: set prun"):
        SplitModel(Model(FeatureLayers()), 2, config)
    for layers in (SkippingLayers(), RenamedLayers()):
        assert SplitModel(Model(layers), 2, config).num_layers == 4


def stub_runner(pruning: str, layer: int) -> Any:
    """As much of a runner as tries the halves of a model whose layers skip some."""
    model, config = Model(SkippingLayers()), SimpleNamespace()
    halves = SplitModel(model, layer, config)  # type: ignore[arg-type]
    positions = torch.arange(3)

    def warm_up() -> None:
        between = halves.run_lower(input_ids=None, positions=positions)
        halves.run_upper(between, input_ids=None, positions=positions)

    runner: Any = object.__new__(Splitting)
    runner.model = model
    runner.propd = ProPDConfig(model="heads", pruning=pruning, early_layer=layer)
    runner._pruned_forward = SimpleNamespace(halves=halves, warm_up=warm_up)
    runner._cuts = {layer: runner._pruned_forward}
    return runner


@pytest.mark.usefixtures("one_stage")
def test_halves_that_fail_switch_pruning_off_before_the_first_request() -> None:
    runner = stub_runner("auto", 2)
    runner.try_halves()
    assert runner._pruned_forward is None
    assert not runner.propd.prunes
    assert not runner._cuts
    runner.try_halves()  # there is nothing left to try
    with pytest.raises(UnsplittableError, match=r"Model after layer 2.*TypeError"):
        stub_runner("top_k", 2).try_halves()
    whole = stub_runner("auto", 3)  # what the third layer adds is in the lower half
    whole.try_halves()
    assert whole.propd.prunes and whole._pruned_forward is not None


@pytest.mark.usefixtures("one_stage")
def test_memory_that_is_short_is_no_reason_to_prune_nothing() -> None:
    """One rank alone would go on without."""

    def short() -> None:
        raise torch.OutOfMemoryError("no room")

    runner = stub_runner("auto", 2)
    runner._pruned_forward.warm_up = short
    with pytest.raises(torch.OutOfMemoryError):
        runner.try_halves()


def test_an_engine_whose_halves_fail_serves_without_pruning(
    monkeypatch: pytest.MonkeyPatch, ties: Ties
) -> None:
    prompts = prompts_of([40, 25], seed=15)
    with engine() as llm:
        expected = run(llm, prompts, greedy(24, logprobs=2))

    def fails(self: SplitModel, between: Any, **inputs: Any) -> Any:
        raise TypeError("unsupported operand type(s) for *: 'NoneType' and 'float'")

    monkeypatch.setattr(SplitModel, "run_upper", fails)
    with engine(16, propd={"sizing": "dynamic"}) as llm:
        runner = llm.collective_rpc(lambda worker: worker.model_runner)[0]
        assert runner._pruned_forward is None
        assert not runner.propd.prunes
        ties.check(expected, run(llm, prompts, greedy(24)))
