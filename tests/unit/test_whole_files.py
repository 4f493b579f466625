"""Files that are written anew while work goes on: whole, whenever the writer is killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gpu_first_run.setting import Notes

from vllm_propd.batch.run import Summary, save
from vllm_propd.bench import run
from vllm_propd.bench.results import Machine, Results
from vllm_propd.heads.calibration import Calibration
from vllm_propd.training.history import History
from vllm_propd.training.model.checkpoint import Progress


class Killed(Exception):
    """Ends a writer in the middle of a file."""


def results(folder: Path, time: int) -> None:
    found = Results(
        model=f"model {time}", parameters=1, inflated=False, dtype="float32",
        prompt_tokens=8, max_tokens=8, rounds=1, temperature=0.0, versions={}, rows=[],
        machine=Machine(processor="P", cores=2, system="S"),
    )  # fmt: skip
    run._save(found, folder)


def losses(folder: Path, time: int) -> None:
    history = History(folder, time)
    if not time:
        for step in (1, 2):
            history.add(Progress(step, 1.0, 0.0, 1.0))


def calibration(folder: Path, time: int) -> None:
    found = Calibration(
        positions=9 + time, rank_accuracy=[[0.5]], early_recall={}, tokens_per_step={1: 1.5}
    )
    found.save(folder)


def summary(folder: Path, time: int) -> None:
    save(Summary(time, 0, 5, 5, None, 1.0, time), folder)


def notes(folder: Path, time: int) -> None:
    Notes(folder / "item.json")["found"] = time


@pytest.mark.parametrize("write", [results, losses, calibration, summary, notes])
def test_a_kill_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, int], None]
) -> None:
    write(tmp_path, 0)
    (path,) = tmp_path.iterdir()
    before, whole = path.read_text(), Path.write_text

    def half(self: Path, text: str, *args: Any, **keys: Any) -> int:
        whole(self, text[: len(text) // 2], *args, **keys)
        raise Killed

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(Killed):
        write(tmp_path, 1)
    assert path.read_text() == before
    monkeypatch.undo()
    write(tmp_path, 1)
    assert list(tmp_path.iterdir()) == [path] and path.read_text() != before
