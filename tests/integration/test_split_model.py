"""A model cut after several layers in turn: each cut has halves, and keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import PRUNING, engine, greedy, prompts_of, run, use
from vllm.config import set_current_vllm_config

from vllm_propd.engine.pruning import split_model


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
