"""Dynamic sizing in real engines: sizes follow what steps cost; the text stays plain."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import (
    BUSY,
    HEADS_ALONE,
    Ties,
    engine,
    greedy,
    metric,
    mixed_prompts,
    prompts_of,
    run,
)
from prices import AnySizes, Line, ask_always, sizing_of, watch_plans

from vllm_propd.core.sizing.pruning_recall import START
from vllm_propd.engine.startup import cost_table
from vllm_propd.engine.startup.cost_table import SHORT, CostTable


@pytest.mark.parametrize("rule", ["off", "auto", "path_probability"])
def test_text_is_plain_vllms_with_any_sizes(rule: str, ties: Ties) -> None:
    options, prompts = {**BUSY, "max_num_batched_tokens": 400}, mixed_prompts(36, seed=31)
    pruning: dict[str, Any] = {"pruning": rule}
    if rule == "path_probability":
        pruning["keep_nodes"] = 6
    with engine(**options) as llm:
        expected = run(llm, prompts, greedy(logprobs=2))
    with engine(48, propd={**HEADS_ALONE, **pruning}, **options) as llm:
        AnySizes(prunes=rule == "auto").take_over(sizing_of(llm))
        llm.collective_rpc("start_sizing_records")
        ours = run(llm, prompts, greedy(logprobs=2))
        records = llm.collective_rpc("take_sizing_records")[0]
        assert metric(llm, "spec_decode_num_accepted_tokens") > 0
    ties.check(expected, ours)
    nodes = [record["nodes"] for record in records]
    kept = sum(record["kept"] for record in records) / sum(nodes)
    assert kept == 1 if rule == "off" else kept < 0.7
    assert 0 in nodes and max(nodes) > 100 and len(set(nodes)) > 30
    emitted = sum(record["emitted"] for record in records)
    taken = sum(len(output.token_ids) for output in ours)
    # A request's last step may put out more than the request may still take.
    assert taken <= emitted <= taken + 4 * len(prompts)


def test_free_nodes_are_all_verified_and_dear_ones_are_not_even_drafted() -> None:
    prompts = prompts_of([50, 60, 70], seed=32)
    with engine(24, propd=HEADS_ALONE) as llm:
        sizing = sizing_of(llm)
        drafts: list[int] = []
        watch_plans(sizing, lambda drafted, choice: drafts.append(len(drafted.trees.sizes)))
        found = {}
        for slope in (0.0, 1.0):
            sizing.planner.step = Line(0.01, slope, below=1.0)
            sizing.draft = Line(1e-4 + slope)
            drafts.clear()
            llm.collective_rpc("start_sizing_records")
            run(llm, prompts, greedy(96, ignore_eos=True))
            records = llm.collective_rpc("take_sizing_records")[0]
            found[slope] = records, len(drafts)
    free, dear = found[0.0], found[1.0]
    # Not after the last one or two: nobody is left who may put out more than one token.
    assert len(free[0]) - 2 <= free[1] < len(free[0])
    assert np.median([r["nodes"] / r["sequences"] for r in free[0]]) == 24
    # The last plan of before still stands at the first step.
    assert sum(r["nodes"] for r in dear[0][2:]) == 0
    assert len(dear[0]) > 90 and dear[1] < 12


def test_the_load_changes_the_size() -> None:
    """Where a step's price bends at 24 tokens, one sequence has them all, eight share."""
    prompts = prompts_of([40 + 5 * i for i in range(8)], seed=33)
    sizes = {}
    with engine(48, propd=HEADS_ALONE) as llm:
        sizing = sizing_of(llm)
        sizing.planner.step = Line(0.1, 0.02, flat=24, below=1.0)
        sizing.draft = Line(1e-4)
        for count in (1, 8, 1):
            llm.collective_rpc("start_sizing_records")
            run(llm, prompts[:count], greedy(96, ignore_eos=True))
            records = llm.collective_rpc("take_sizing_records")[0][10:60]
            now = [r["nodes"] / count for r in records if r["sequences"] == count]
            sizes.setdefault(count, []).append(float(np.mean(now)))
    assert sizes[8][0] < 4 < 12 < min(sizes[1])
    assert sizes[1][0] == pytest.approx(sizes[1][1], rel=0.15)


def test_expected_tokens_are_what_steps_put_out() -> None:
    prompts = prompts_of([100 + i for i in range(24)], seed=34)
    with engine(32, propd=HEADS_ALONE, max_num_seqs=4) as llm:
        run(llm, prompts[:8], greedy(96, ignore_eos=True))  # learn
        ask_always(sizing_of(llm))
        sizing = sizing_of(llm)
        sizing.planner.step = Line(0.01, 0.0005, below=1.0)
        sizing.draft = Line(1e-4)
        llm.collective_rpc("start_sizing_records")
        run(llm, prompts[8:], greedy(96, ignore_eos=True))
        records = llm.collective_rpc("take_sizing_records")[0]
        curves = np.array(llm.collective_rpc("reliability")[0])
    assert curves.shape == (4, 16, 2) and (np.diff(curves, axis=1) >= 0).all()
    sure = curves[:, -1]  # said and found, of what the heads are surest of
    assert (sure[:, 0] > 0.7).all() and (sure[:, 1] > 0.4).all()
    planned = [r for r in records if r["expected_tokens"] > 0]
    assert len(planned) > 100
    expected = sum(r["expected_tokens"] for r in planned)
    assert expected == pytest.approx(sum(r["emitted"] for r in planned), rel=0.1)


def test_early_pruning_is_planned_where_it_pays() -> None:
    """Cheap shallow layers and dear deep ones: many nodes are judged, few are kept."""
    prompts = prompts_of([50 + i for i in range(8)], seed=35)
    kept = {}
    with engine(48, propd=HEADS_ALONE) as llm:
        sizing = sizing_of(llm)
        sizing.draft = Line(1e-4)
        for below in (1.0, 0.02):
            sizing.planner.step = Line(0.01, 0.0005, below=below)
            llm.collective_rpc("start_sizing_records")
            run(llm, prompts, greedy(96, ignore_eos=True))
            records = llm.collective_rpc("take_sizing_records")[0]
            nodes = sum(record["nodes"] for record in records)
            kept[below] = sum(record["kept"] for record in records) / nodes
        assert sizing_of(llm).recall.share != START
    assert kept[1.0] == 1
    assert kept[0.02] < 0.7


def test_long_steps_are_timed_once_for_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))

    def table() -> tuple[Path, CostTable]:
        with engine(8, propd=HEADS_ALONE, max_num_seqs=4):
            pass
        (path,) = (tmp_path / "propd" / "costs").iterdir()
        return path, CostTable.model_validate_json(path.read_text())

    path, found = table()
    is_long = [n > SHORT for n in found.tokens]
    found.step_s = [
        10.0 if long else seconds
        for long, seconds in zip(is_long, found.step_s, strict=True)
    ]
    path.write_text(found.model_dump_json())
    path, again = table()
    assert any(is_long) and [seconds == 10.0 for seconds in again.step_s] == is_long
    # Where short ones were slow as well, long ones are not believed; nor is what is none.
    slow = found.model_copy(update={"step_s": [10.0 for _ in found.step_s]})
    for kept in (slow.model_dump_json(), "{}"):
        path.write_text(kept)
        path, anew = table()
        assert max(anew.step_s) < 10.0 and anew.upper_s is not None


def test_a_slow_machine_times_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_if_slow(work: Any, finish: Callable[[], None]) -> float:
        """Of whole steps, a second per token."""
        seconds = real(work, finish)
        is_step = isinstance(work, partial) and work.func.__name__ == "whole"
        return float(work.args[0]) if is_step else seconds

    real = cost_table._seconds
    prompts = prompts_of([24, 40], seed=3)
    with engine() as llm:
        expected = run(llm, prompts, greedy())
    monkeypatch.setattr(cost_table, "_seconds", as_if_slow)
    with engine(8, propd=HEADS_ALONE) as llm:
        (table,) = llm.collective_rpc("step_costs")
        found = run(llm, prompts, greedy())
    # A step of four tokens is the first to take over three times as long as one of one.
    assert table["tokens"] == [1, 2, 4]
    assert found == expected
