"""The benchmark from its settings to its results, with engines that only count."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_rows import measured
from heads_on_disk import HIDDEN, VOCAB, blocks, write
from rich.console import Console
from rich.progress import Progress
from tokenizers_on_disk import MODEL, target_in, tokenizer
from vllm import SamplingParams

from vllm_propd.bench import engines, run
from vllm_propd.bench.arms import Arm, Heads, parse_arms, shared_config
from vllm_propd.bench.engines import seeded, start_engines
from vllm_propd.bench.results import Results, Row
from vllm_propd.bench.run import prepare_heads, run_bench
from vllm_propd.bench.settings import BenchSettings
from vllm_propd.bench.timing.rows import rows_at
from vllm_propd.bench.timing.turn import Turn
from vllm_propd.bench.timing.turns import Turns
from vllm_propd.bench.workloads.points import Point
from vllm_propd.bench.workloads.trace import TraceTurn
from vllm_propd.heads.checkpoint import HeadsError, load_heads


@pytest.fixture
def heads(tmp_path: Path) -> Heads:
    """Medusa heads, without early ones."""
    folder = tmp_path / "heads"
    folder.mkdir()
    return Heads(write(folder, blocks()), tmp_path / "medusa", 3)


def targets(folder: Path, name: str) -> Path:
    """A target's folder, whose output layer has such a name."""
    folder.mkdir()
    return write(folder, {name: torch.ones(VOCAB, HIDDEN)})


def test_the_output_layer_is_read_for_vllms_own_method_only(
    tmp_path: Path, heads: Heads
) -> None:
    other = targets(tmp_path / "other", "embed_out.weight")
    prepare_heads(other, parse_arms("plain propd", heads), heads)
    assert not heads.for_vllm.exists()
    with pytest.raises(ValueError, match="vLLM's own medusa need a copy"):
        prepare_heads(other, parse_arms("plain propd medusa", heads), heads)
    usual = targets(tmp_path / "usual", "lm_head.weight")
    prepare_heads(usual, parse_arms("plain medusa", heads), heads)
    assert load_heads(heads.for_vllm).output_size == VOCAB


def test_heads_that_are_wanted_and_not_there_are_refused_at_once(tmp_path: Path) -> None:
    nowhere = Heads(tmp_path / "nowhere", tmp_path / "medusa", 4)
    prepare_heads(tmp_path, parse_arms("plain ngram propd-no-heads", nowhere), nowhere)
    with pytest.raises(HeadsError, match="nowhere"):
        prepare_heads(tmp_path, parse_arms("plain propd", nowhere), nowhere)


class Started:
    """Stands for an engine: what it was started with."""

    def __init__(self, config: dict[str, Any] | None, options: Any, timed: bool = False):
        self.config = config

    def settings(self, keys: dict[str, Any]) -> dict[str, Any]:
        return keys


def test_arms_of_other_heads_need_engines_of_their_own(
    tmp_path: Path, heads: Heads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "Engine", Started)
    (folder := tmp_path / "others").mkdir()
    others = f"propd:model={write(folder, blocks())}"
    arms = parse_arms(f"plain propd-no-heads propd {others}", heads)
    options = {"model": str(tmp_path)}
    with Progress(disable=True) as bar:
        found = start_engines(arms, options, bar, shared=False)
        configs = [one.engine.config for one in found]  # type: ignore[attr-defined]
        assert configs == [arm.speculative_config for arm in arms]
        message = (
            rf"arm '{others}' wants the heads in .*others, .*heads \('propd'\): .*turn"
        )
        with pytest.raises(ValueError, match=message):
            start_engines(arms, options, bar)


def test_arms_share_an_engine_with_heads_for_the_largest_tree(
    tmp_path: Path, heads: Heads
) -> None:
    (preset := tmp_path / "wide.yaml").write_text("num_speculative_tokens: 64\n")
    (bare := tmp_path / "bare.yaml").write_text("heads: false\n")
    spelled = f"{heads.folder}/../heads"
    ours = parse_arms(
        f"plain propd-no-heads:config={bare} propd:config={preset} propd:model={spelled}",
        heads,
    )[1:]
    shared = shared_config(ours, str(tmp_path))
    assert shared["model"] == str(heads.folder)
    assert shared["num_speculative_tokens"] == 64
    alone = shared_config(ours[:1], str(tmp_path))
    assert alone == {
        "method": "propd", "heads": False, "config": str(bare), "num_speculative_tokens": 48
    }  # fmt: skip


class Counting:
    """Stands for an arm's engine: two tokens a second, of any prompts."""

    params: list[SamplingParams] = []

    def __init__(self, arm: Arm):
        self.arm, self.turns = arm, 0

    def run(self, prompts: list[list[int]], params: Any, full: bool = False) -> Turn:
        self.turns += 1
        Counting.params.append(params)
        return Turn(
            began=float(self.turns), seconds=1.0, whole_s=1.5, tokens=2, steps=2,
            texts=[[1, 2, 3] for _ in prompts],
        )  # fmt: skip

    def peak_rss_mib(self) -> float:
        return 1.0


def test_a_trace_has_a_round_where_points_have_chunks_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    async def run_trace(
        arms: list[Arm], options: Any, point: Point, params: Any, rounds: int, bar: Any
    ) -> tuple[Turns[TraceTurn], dict[str, float]]:
        asked.append(rounds)
        turns: Turns[TraceTurn] = Turns()
        turn = TraceTurn(began=0.0, seconds=1.0, tokens=2, texts=[[1, 2]])
        turn.first_token_seconds = turn.per_token_seconds = [0.5]
        for arm in arms:
            turns.add(arm.name, turn)
        return turns, {arm.name: 1.0 for arm in arms}

    def started(arms: list[Arm], *args: Any, **keys: Any) -> list[Counting]:
        return [Counting(arm) for arm in arms]

    points = [Point("batch", 1, [[1]])], [Point("trace", 1, [[1]], (0.0,), rate=1.0)]
    monkeypatch.setattr(run, "run_trace", run_trace)
    monkeypatch.setattr(run, "start_engines", started)
    monkeypatch.setattr(run, "close_engines", lambda engines: None)
    monkeypatch.setattr(run, "batch_points", lambda *args: points[0])
    monkeypatch.setattr(run, "workload_points", lambda *args: points[1])
    settings = BenchSettings(
        "plain control", (1,), rounds=0, chunks=1, most_chunks=1, workload=True
    )
    found = run_bench(MODEL, tmp_path / "no heads", [], tmp_path / "out", settings)
    assert asked == [1]
    assert found.workloads == ["trace"] and len(found.rows) == 4
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_requests_that_are_sampled_have_the_benchmarks_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    monkeypatch.setattr(Counting, "params", [])
    monkeypatch.setattr(run, "start_engines", lambda arms, *a, **k: [*map(Counting, arms)])
    monkeypatch.setattr(run, "close_engines", lambda engines: None)
    monkeypatch.setattr(run, "batch_points", lambda *args: [Point("batch", 1, [[1]])])
    settings = BenchSettings(
        "plain", (1,), rounds=1, chunks=1, most_chunks=1, temperature=temperature, seed=5
    )
    run_bench(MODEL, tmp_path / "no heads", [], tmp_path / "out", settings)
    seeds = {params.seed for params in Counting.params}
    assert seeds == ({5} if temperature else {None})


def test_each_request_has_a_seed_of_its_own_and_all_arms_the_same() -> None:
    prompts = [[1, 2], [1, 2], [3]]
    params = SamplingParams(temperature=0.7, seed=5)
    seeds = [own.seed for own in seeded(params, prompts)]
    assert len({*seeds}) == 3 and params.seed == 5
    assert seeds == [own.seed for own in seeded(params, prompts)]
    other = SamplingParams(temperature=0.7, seed=6)
    assert not {*seeds} & {own.seed for own in seeded(other, prompts)}
    assert seeded(SamplingParams(temperature=0.7), prompts)[0].seed is None


def test_trees_are_recorded_of_texts_that_are_not_known() -> None:
    """They have been measured by then."""
    called: list[str] = []
    tree = {"accepted": [1], "parent": [0], "verified": 1}

    def record(prompts: Any, params: Any) -> Any:
        called.append(f"record {prompts}")
        return Turn(), [[tree]]

    ours = Arm("propd", {"method": "propd"})
    engine: Any = SimpleNamespace(
        arm=ours, call=called.append, record=record, reliability=lambda: []
    )
    fields = {"kept_per_step": 0, "work_ratio": 1, "acceptance_by_depth": [], "step_ms": {}}
    row = measured(
        "propd", 1.0, workload="batch", batch_size=1, identical_to_plain=1, prompts=1,
        **fields,
    )  # fmt: skip
    found, point = Results.model_construct(rows=[row]), Point("batch", 1, [[1], [2]])
    run._tell_of_trees(found, [engine], point, SamplingParams(max_tokens=4))
    assert called == ["forget_texts", "record [[1]]", "forget_texts", "record [[2]]"]
    assert row.accepted_by_rank == [[1.0]]
    called.clear()
    many = Point("batch", 1, [[i] for i in range(64)])
    run._tell_of_trees(found, [engine], many, SamplingParams(max_tokens=4))
    assert called[1::2] == [f"record [[{4 * i}]]" for i in range(run.TOLD_OF)]


def test_texts_that_end_at_once_have_rows_that_load_again() -> None:
    arms = [Arm("plain", None), Arm("other", None)]
    turns: Turns[Turn] = Turns()
    for arm in arms:
        turns.add(arm.name, Turn(whole_s=0.1, texts=[[7]]))
    point = Point("batch", 1, [[1]])
    rows = rows_at(arms, point, turns, {arm.name: 1.0 for arm in arms}, BenchSettings())
    for one in rows:
        assert one.tokens_per_s == one.tokens_per_s_max == one.ratio_to_plain == 0.0
        assert one.turns == one.step_times == [] and one.identical_to_plain == 1
        assert Row.model_validate_json(one.model_dump_json()) == one


def test_without_a_speed_requests_of_a_trace_arrive_each_second() -> None:
    fields = {"kept_per_step": 0, "work_ratio": 1, "acceptance_by_depth": [], "step_ms": {}}
    row = measured(
        "plain", 0.0, workload="batch", batch_size=1, identical_to_plain=1, prompts=1,
        **fields,
    )  # fmt: skip
    found = Results.model_construct(rows=[row])
    assert run._rate(found, BenchSettings(batch_sizes=(1,))) == 1.0
    row.tokens_per_s = 256.0
    assert run._rate(found, BenchSettings(batch_sizes=(1,))) == 2.0


def test_options_that_chats_have_no_use_for_are_named() -> None:
    assert BenchSettings().unused_by_chats() == []
    given = BenchSettings(workload=True, lengths=(8,), rounds=1, chunks=2, most_chunks=3)
    expected = ["--workload", "--lengths", "--rounds", "--chunks", "--most-chunks"]
    assert given.unused_by_chats() == expected
    assert BenchSettings(rounds=0, in_turn=True).unused_by_chats() == []
    # What chats are asked with is used.
    others = BenchSettings(batch_sizes=(2,), max_tokens=9, prompts_each=3, starts=2)
    assert others.unused_by_chats() == []


def test_text_says_once_what_it_has_no_use_for(tmp_path: Path) -> None:
    assert BenchSettings().unused_by_text() == []
    tokenizer().save_pretrained(tmp_path)
    console = Console(record=True, width=200)
    settings = BenchSettings(
        batch_sizes=(1,), prompt_tokens=8, prompts_each=3, longest_chat=9
    )
    points, trace = run._of_text(tmp_path, [], settings, console)
    assert len(points) == 1 and trace is None
    said = console.export_text()
    assert said.count("no use for --prompts-each, --longest-chat\n") == 1


def test_chats_say_once_what_they_have_no_use_for(tmp_path: Path) -> None:
    (asked := tmp_path / "asked.jsonl").write_text('{"question": "2 + 2?"}\n')
    console = Console(record=True, width=200)
    settings = BenchSettings(batch_sizes=(1,), workload=True, chunks=4)
    points, _ = run._of_chats(target_in(tmp_path / "t"), [asked], settings, console)
    assert len(points) == 1
    said = console.export_text()
    assert said.count("no use for --workload, --chunks\n") == 1
