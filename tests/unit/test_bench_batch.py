"""The benchmark of batch jobs: what it times, and that the node it loses had an engine."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("ray")

import bench_batch


class Nodes:
    """A cluster of which nothing runs."""

    address = "here:1"
    worker_nodes = ["node"]

    def __init__(self, **_: object) -> None:
        self.lost: list[str] = []

    def remove_node(self, node: str, allow_graceful: bool) -> None:
        self.lost.append(node)

    def add_node(self, num_cpus: int) -> None: ...
    def wait_for_nodes(self) -> None: ...
    def shutdown(self) -> None: ...


def run(
    patch: pytest.MonkeyPatch, out: Path, seen: list[int], lose: bool, engine: bool = True
) -> float | None:
    """A job of ten rows of which so many are answered, second by second."""
    cluster, left, seconds = Nodes(), iter(seen), itertools.count()
    ends = itertools.chain([None] * len(seen), itertools.repeat(0))
    process = SimpleNamespace(poll=lambda: next(ends), returncode=0)
    patch.setattr(bench_batch, "Cluster", lambda **_: cluster)
    patch.setattr(bench_batch.subprocess, "Popen", lambda *_, **__: process)
    patch.setattr(bench_batch, "answered", lambda _: next(left))
    patch.setattr(bench_batch, "has_engine", lambda _: engine)
    patch.setattr(bench_batch, "Progress", Bar)
    clock = SimpleNamespace(perf_counter=lambda: next(seconds), sleep=lambda _: None)
    patch.setattr(bench_batch, "time", clock)
    speed = bench_batch.job(out / "rows", out / "job", 8, lose, 10)
    assert cluster.lost == ["node"] * lose
    return speed


class Bar:
    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None: ...
    def add_task(self, *_: object, **__: object) -> None: ...
    def update(self, *_: object, **__: object) -> None: ...


def test_rows_of_the_first_block_have_no_time_and_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, tmp_path, [0, 4, 6, 6, 10], lose=False) == 3.0
    assert run(monkeypatch, tmp_path, [0, 4, 6, 10], lose=True) == 3.0


@pytest.mark.parametrize("seen", [[], [0], [0, 10, 10]])
def test_a_job_that_is_over_at_once_has_no_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[int]
) -> None:
    assert run(monkeypatch, tmp_path, seen, lose=False) is None


@pytest.mark.parametrize("seen", [[0, 4], [0, 4, 10], [0, 10]])
def test_a_job_that_loses_no_node_has_not_shown_that_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[int]
) -> None:
    with pytest.raises(RuntimeError, match="over before a node was lost"):
        run(monkeypatch, tmp_path, seen, lose=True)


def test_an_engine_is_known_by_its_process() -> None:
    here = SimpleNamespace(process=SimpleNamespace(pid=os.getpid()))
    node = SimpleNamespace(all_processes={"raylet": [here]})
    assert not bench_batch.has_engine(node)
    code = "print(flush=True); input()"
    call = [sys.executable, "-c", code, "MapWorker(MapBatches(vLLMEngineStageUDF))"]
    pipe = subprocess.PIPE
    with subprocess.Popen(call, stdin=pipe, stdout=pipe) as engine:
        assert engine.stdout is not None
        engine.stdout.readline()  # a process that begins has no command line for a moment
        assert bench_batch.has_engine(node)
        engine.communicate(b"\n")


def test_a_node_without_an_engine_is_no_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match="has no engine"):
        run(monkeypatch, tmp_path, [0, 6], lose=True, engine=False)
