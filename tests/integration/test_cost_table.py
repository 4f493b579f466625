"""How the start-up table of step costs is timed."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_propd.config import ProPDConfig
from vllm_propd.engine.startup import cost_table
from vllm_propd.engine.startup.cost_table import CostTable
from vllm_propd.heads.checkpoint import EARLY_FILE, WEIGHT_FILES

SIZES = {1: 0.05, 8: 0.06, 48: 0.2, 256: 0.9}


class Clock:
    """A machine whose steps take what ``SIZES`` says; five times so for four of them."""

    def __init__(self, slow_from: int = -10, times: float = 1.0):
        self.now, self.calls, self.times, self.slow_from = 0.0, 0, times, slow_from
        self.works = {("step_s", size): partial(self.work, size) for size in SIZES}

    def work(self, size: int) -> None:
        self.calls += 1
        slow = self.slow_from <= self.calls < self.slow_from + 4
        self.now += SIZES[size] * self.times * (5 if slow else 1)

    def timed(self, monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
        clock = SimpleNamespace(perf_counter=lambda: self.now)
        alone = SimpleNamespace(rank_in_group=1, broadcast_object=lambda said: said)
        monkeypatch.setattr(cost_table, "time", clock)
        found = cost_table._timed(self.works, lambda: None, alone)
        return {size: seconds for (_, size), seconds in found.items()}


@pytest.mark.parametrize("slow_from", range(0, 40, 3))
def test_a_slow_moment_spoils_no_size(
    monkeypatch: pytest.MonkeyPatch, slow_from: int
) -> None:
    clock = Clock(slow_from)
    assert clock.timed(monkeypatch) == pytest.approx(SIZES)
    assert clock.calls == 3 * cost_table.OFTEN + cost_table.REPEATS


@pytest.mark.parametrize("times", [10, 100])
def test_timing_ends_on_a_slow_machine(
    monkeypatch: pytest.MonkeyPatch, times: float
) -> None:
    clock = Clock(times=times)
    found = clock.timed(monkeypatch)
    assert found == pytest.approx({size: times * SIZES[size] for size in SIZES})
    a_round = times * sum(SIZES.values())
    assert (
        cost_table.ENOUGH_S < clock.now < cost_table.ENOUGH_S + a_round or clock.calls == 4
    )


def test_a_table_of_a_bad_minute_does_not_stay() -> None:
    known = CostTable(
        tokens=[1, 16, 256], step_s=[0.05, 0.25, 0.9], sequences=[1, 8],
        draft_s=[9e-3, 0.1], lower_s=[0.02, 0.03, 0.2], upper_s=[0.04, 0.05, 0.7],
    )  # fmt: skip
    again = CostTable(
        tokens=[1, 16], step_s=[0.06, 0.08], sequences=[1, 8], draft_s=[0.02, 0.03],
        lower_s=[0.01, 0.04], upper_s=[0.05, 0.05],
    )  # fmt: skip
    assert known.least(again) == CostTable(
        tokens=[1, 16, 256], step_s=[0.05, 0.08, 0.9], sequences=[1, 8],
        draft_s=[9e-3, 0.03], lower_s=[0.01, 0.03, 0.2], upper_s=[0.04, 0.05, 0.7],
    )  # fmt: skip


def test_engines_that_start_together_leave_a_whole_table(tmp_path: Path) -> None:
    """Whoever reads while others write finds one of their tables."""
    path = tmp_path / "costs" / "host.json"
    tables = [
        CostTable(tokens=[*range(1, n + 2)], step_s=[0.1] * (n + 1), sequences=[1])
        for n in range(1, 400, 40)
    ]
    cost_table._keep(path, tables[0])
    with ThreadPoolExecutor(len(tables)) as writers:
        writing = [
            writers.submit(cost_table._keep, path, t) for t in tables for _ in range(30)
        ]
        while not all(one.done() for one in writing):
            assert cost_table._cached(path) in tables
        for one in writing:
            one.result()
    assert [found.name for found in path.parent.iterdir()] == ["host.json"]


TABLE = CostTable(tokens=[1], step_s=[0.1], sequences=[1])


def test_a_folder_that_cannot_be_written_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "file"))
    path = cost_table._cache_file(runner_with(ProPDConfig(heads=False)))
    assert path is not None and tmp_path / "file" in path.parents
    monkeypatch.setattr(cost_table.logger, "propagate", True)
    with caplog.at_level(logging.WARNING):
        assert cost_table._cached(path) is None
        assert not caplog.records
        cost_table._keep(path, TABLE)
        cost_table._keep(path, TABLE)
    (line,) = {one.getMessage() for one in caplog.records}
    assert "Not a directory" in line and "set VLLM_CACHE_ROOT" in line


def test_a_full_disk_keeps_no_half_of_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "costs" / "host.json"
    cost_table._keep(path, TABLE)
    write = Path.write_text

    def half(self: Path, text: str, *args: Any, **kwargs: Any) -> int:
        write(self, text[:9])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    cost_table._keep(path, TABLE.model_copy(update={"step_s": [0.2]}))
    assert [found.name for found in path.parent.iterdir()] == ["host.json"]
    assert cost_table._cached(path) == TABLE


def test_a_table_that_is_no_text_is_timed_anew(tmp_path: Path) -> None:
    path = tmp_path / "host.json"
    path.write_bytes(b"\xff\xfe{}")
    assert cost_table._cached(path) is None


def runner_with(config: ProPDConfig) -> Any:
    """As much of a runner as names its table."""
    parallel = SimpleNamespace(world_size=1)
    engine = SimpleNamespace(compute_hash=lambda: "1a2b", parallel_config=parallel)
    return SimpleNamespace(vllm_config=engine, propd=config, _pruned_forward=None)


@pytest.mark.parametrize("name", [*WEIGHT_FILES, EARLY_FILE])
def test_heads_that_are_trained_anew_have_a_table_of_their_own(
    name: str, tmp_path: Path
) -> None:
    """In the folder of those before: their time would stay for ever, if it was less."""
    runner = runner_with(ProPDConfig(model=str(tmp_path)))
    (tmp_path / "model.safetensors").write_bytes(b"heads")
    weights = tmp_path / name
    names = []
    for size, time in ((5, 1), (6, 1), (6, 2)):
        weights.write_bytes(b"x" * size)
        os.utime(weights, (time, time))
        names += [cost_table._cache_file(runner)] * 2
        (tmp_path / "calibration.json").write_text(f"{size}")  # says nothing of prices
        assert cost_table._cache_file(runner) == names[-1]
    names.append(cost_table._cache_file(runner_with(ProPDConfig(heads=False))))
    assert len({*names}) == 4
