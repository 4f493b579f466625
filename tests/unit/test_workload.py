"""Prompt sets, points and report of ``bench --workload``, without an engine."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path
from statistics import mean

import pytest
from bench_rows import measured

from vllm_propd.bench.report import COLUMNS, LATENCY_COLUMNS, cells, write_report
from vllm_propd.bench.results import Machine, Results, Row
from vllm_propd.bench.settings import BenchSettings
from vllm_propd.bench.workloads import tasks
from vllm_propd.bench.workloads.points import (
    Point,
    batch_points,
    cut_prompts,
    workload_points,
)
from vllm_propd.bench.workloads.tasks import task_texts, text_of
from vllm_propd.corpus import held_out_snippets

SETTINGS = BenchSettings(
    batch_sizes=(1, 2, 8), prompt_tokens=24, lengths=(8, 32), workload=True
)


def tokenize(text: str) -> list[int]:
    """Four characters a token."""
    return [hash(text[i : i + 4]) for i in range(0, len(text), 4)]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three packages, and a system with documentation."""
    library, share = tmp_path / "library", tmp_path / "share"
    texts = {
        library / "one" / "guide.rst": prose("guide"),
        library / "two" / "LICENSE": prose("licence"),
        library / "two" / "tests" / "data.txt": prose("test"),
        library / "one-1.dist-info" / "METADATA": f"Name: one\n\n{prose('metadata')}",
        library / "one" / "rows.csv": "\n".join(f"{i},{i * i}" for i in range(200)),
        library / "two" / "keys.json": json.dumps({str(i): i for i in range(99)}, indent=1),
        share / "common-licenses" / "GPL": prose("gpl"),
        share / "doc" / "three" / "README": prose("readme"),
    }
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    page = share / "man" / "man1" / "four.1.gz"
    page.parent.mkdir(parents=True)
    page.write_bytes(gzip.compress(f".TH FOUR 1\n\\fBfour\\fR\n{prose('man')}".encode()))
    (share / "doc" / "three" / "binary").write_bytes(b"\0" * 5000)
    (share / "doc" / "three" / "nowhere").symlink_to(share / "missing")
    monkeypatch.setattr(tasks, "LIBRARIES", [library])
    monkeypatch.setattr(tasks, "SHARES", [share, tmp_path / "absent"])
    return share


def prose(name: str) -> str:
    return "\n".join(f"{name}, line {i} of the text." for i in range(60))


def test_prose_is_docs_licences_and_man_pages(machine: Path) -> None:
    first = [text.partition(",")[0] for text in islice(task_texts("prose", 400), 6)]
    assert sorted(first) == ["gpl", "guide", "licence", "man", "metadata", "readme"]


def test_tables_are_json_and_csv(machine: Path) -> None:
    first = list(islice(task_texts("tables", 400), 2))
    assert sorted(set(text.strip()[0] == '"' for text in first)) == [False, True]


def test_code_is_the_library_s_unseen_files() -> None:
    assert list(islice(task_texts("code", 400, 5), 3)) == held_out_snippets(3, 5)


def test_texts_repeat_with_their_seed_and_go_on_in_the_same_files(machine: Path) -> None:
    some = list(islice(task_texts("prose", 400, 1), 20))
    assert some == list(islice(task_texts("prose", 400, 1), 20))
    assert some != list(islice(task_texts("prose", 400, 2), 20))
    assert min(map(len, some)) >= 400


def test_too_little_text_is_said(machine: Path) -> None:
    with pytest.raises(ValueError, match="task tables: too little text on this machine"):
        next(task_texts("tables", 1_000_000))


def test_a_text_has_no_markup_of_its_kind(machine: Path, tmp_path: Path) -> None:
    assert text_of(machine / "man" / "man1" / "four.1.gz").startswith("four\nman, line 0")
    assert text_of(machine / "doc" / "three" / "binary") == ""
    assert text_of(machine / "doc" / "three" / "nowhere") == ""
    broken = tmp_path / "broken.gz"
    broken.write_bytes(gzip.compress(b"text" * 999)[:30])
    assert text_of(broken) == ""


def test_batch_points_share_their_prompts() -> None:
    one, two, eight = batch_points(tokenize, [], SETTINGS)
    assert [point.name for point in (one, two, eight)] == ["batch 1", "batch 2", "batch 8"]
    assert eight.prompts[:6] == two.prompts == one.prompts
    assert [len(point.groups) for point in (one, two, eight)] == [6, 3, 1]
    assert two.groups[1] == eight.prompts[2:4]
    assert {len(ids) for ids in eight.prompts} == {24}


def test_others_than_those_measured_warm_up(machine: Path) -> None:
    points = batch_points(tokenize, [], SETTINGS) + workload_points(tokenize, [], SETTINGS)
    for point in points[:-1]:  # the last is the trace
        assert len(point.warm_up) >= 2
        assert all(len(group) == point.batch_size for group in point.warm_up)
        assert not any(ids in point.prompts for group in point.warm_up for ids in group)


def test_workload_points_vary_one_thing_at_a_time(machine: Path) -> None:
    points = workload_points(tokenize, [], SETTINGS)
    assert [point.workload for point in points] == [
        "length 8", "length 32", "task code", "task prose", "task tables", "trace"
    ]  # fmt: skip
    *others, trace = points
    assert {point.batch_size for point in others} == {2}
    assert [{len(ids) for ids in point.prompts} for point in others] == [
        {8}, {32}, {24}, {24}, {24}
    ]  # fmt: skip
    assert all(point.arrivals is None and point.rate is None for point in others)
    assert trace.batch_size == 8 and len(trace.prompts) == 16
    assert {len(ids) for ids in trace.prompts} == {8, 32}
    assert points == workload_points(tokenize, [], SETTINGS)


def test_arrivals_are_poisson_at_the_rate_asked_for(machine: Path) -> None:
    settings = BenchSettings(prompt_tokens=8, lengths=(8,), trace_requests=600)
    trace = workload_points(tokenize, [], settings)[-1].at(4.0)
    assert trace.rate == 4 and trace.arrivals is not None and trace.arrivals[0] == 0
    pairs = zip(trace.arrivals, trace.arrivals[1:], strict=False)
    gaps = [after - before for before, after in pairs]
    assert min(gaps) >= 0
    assert mean(gaps) == pytest.approx(1 / 4, rel=0.15)
    # Exponential gaps: their standard deviation is their mean.
    assert mean(gap**2 for gap in gaps) == pytest.approx(2 / 16, rel=0.3)


def test_too_few_tokens_are_said() -> None:
    texts = ["word " * 24, "word " * 16]
    assert len(cut_prompts(tokenize, texts, 5, 10, 0)) == 5
    with pytest.raises(ValueError, match="--prompts: 50 tokens; 6 prompts of 10 need more"):
        cut_prompts(tokenize, texts, 6, 10, 0)
    with pytest.raises(ValueError, match="too little text: 0 pieces of 10 tokens"):
        cut_prompts(lambda text: [1], [], 2, 10, 0)


def row(arm: str, workload: str, batch_size: int) -> Row:
    ratio = 1.0 if arm == "plain" else 1.5
    names = "requests_per_s first_token_ms first_token_ms_p90 per_token_ms per_token_ms_p90"
    latencies = dict.fromkeys(names.split(), 12.5) if workload == "trace" else {}
    return measured(
        arm,
        ratio,
        workload=workload,
        batch_size=batch_size,
        kept_per_step=24,
        work_ratio=0.75,
        acceptance_by_depth=[0.5],
        step_ms={} if workload == "trace" else {"forward": 5.0, "rest": 1.0, "step": 6.0},
        identical_to_plain=2,
        prompts=2,
        **latencies,
    )


def results(*workloads: str) -> Results:
    points = [("batch", 1), ("batch", 2), *((name, 2) for name in workloads)]
    arms = ("plain", "propd", "chain")
    return Results(
        model="model",
        parameters=1_000_000,
        inflated=False,
        dtype="float32",
        prompt_tokens=32,
        max_tokens=8,
        rounds=3,
        temperature=0.0,
        machine=Machine(processor="P", cores=2, system="S"),
        versions={"vllm": "0.32.0"},
        rows=[row(arm, *point) for point in points for arm in arms],
    )


def test_results_tell_workloads_apart() -> None:
    found = results("task code", "trace")
    assert Results.model_validate_json(found.model_dump_json()) == found
    assert found.batch_sizes == [1, 2] and found.workloads == ["task code", "trace"]
    batch = found.row("propd", 2)
    assert batch is not None and batch.workload == "batch"
    assert [one.point for one in found.rows[::3]] == [
        "batch 1", "batch 2", "task code", "trace"
    ]  # fmt: skip
    for one in found.rows:
        assert (one.first_token_ms is None) == (one.workload != "trace")


@pytest.mark.parametrize("workloads", [(), ("length 8", "task code", "trace")])
def test_the_report_has_what_was_measured(tmp_path: Path, workloads: list[str]) -> None:
    found = results(*workloads)
    assert all(len(line) == len(COLUMNS) for line in cells(found))
    write_report(found, tmp_path)
    page = (tmp_path / "report.html").read_text()
    latencies = 1 + 3 if workloads else 0
    assert page.count("<tr>") == 1 + len(found.rows) + latencies
    assert (LATENCY_COLUMNS[2] in page) == bool(workloads)
    assert page.count("data:image/png;base64,") == (3 if workloads else 2)
    assert (tmp_path / "workloads.png").exists() == bool(workloads)


def test_a_trace_at_a_rate_keeps_its_prompts() -> None:
    trace = Point("trace", 2, [[1], [2]], (0.0, 3.0), rate=1.0)
    assert trace.at(2.0) == Point("trace", 2, [[1], [2]], (0.0, 1.5), rate=2.0)
