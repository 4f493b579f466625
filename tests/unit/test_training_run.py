"""``train`` and ``calibrate`` as a whole: their order, and what they leave behind."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_targets import (
    one_thread,  # noqa: F401
    token_ids,
    trainee,
)
from tokenizers_on_disk import MODEL, target_in

from vllm_propd.heads.calibration import Calibration
from vllm_propd.heads.checkpoint import HeadsError
from vllm_propd.training import run
from vllm_propd.training.data.documents import DataError
from vllm_propd.training.model.target import check_trained
from vllm_propd.training.settings import TrainSettings
from vllm_propd.training.text import CONTINUATIONS, SPOKEN, Inputs, write_inputs

FOUND = Calibration(
    positions=9, rank_accuracy=[[0.5] * 10], early_recall={}, tokens_per_step={1: 1.5}
)


def test_a_target_is_loaded_when_its_engine_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU may have no room for it twice."""
    calls: list[str] = []

    def noted(name: str, result: Any = None) -> None:
        monkeypatch.setattr(run, name, lambda *args: (calls.append(name), result)[1])

    for name in ("check_trained", "check_writable", "load_trained", "save_calibration"):
        noted(name)
    noted("write_held_out", ([], []))
    noted("_measure", FOUND)
    run.measure_heads("model", tmp_path, [], 64)
    assert calls == [
        "check_trained", "check_writable", "write_held_out",
        "load_trained", "_measure", "save_calibration",
    ]  # fmt: skip


def test_heads_of_another_target_are_refused_without_loading_it(tmp_path: Path) -> None:
    model = target_in(tmp_path / "model")  # it has no weights
    check_trained(str(model), MODEL / "propd")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "hidden_size": 512}))
    with pytest.raises(HeadsError, match="belong to another model"):
        check_trained(str(model), MODEL / "propd")


def test_old_heads_for_vllm_do_not_stay_beside_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads, work = trainee(), tmp_path / "work"
    work.mkdir()
    rows = token_ids(2).tolist()
    (work / CONTINUATIONS).write_text(json.dumps(dict.fromkeys(SPOKEN, rows)))
    monkeypatch.setattr(run, "_measure", lambda *args: FOUND)
    monkeypatch.setattr(run, "plot", lambda *args: None)
    monkeypatch.setattr(run, "heads_dtype", lambda model: heads.output.weight.dtype)
    exported = tmp_path / "propd" / "vllm-medusa"
    for for_vllm in (True, True, False, False):
        run.save_trained(heads, "model", work, tmp_path / "propd", for_vllm)
        assert exported.exists() == for_vllm


def busy(path: str | Path, *args: Any, **keys: Any) -> None:
    """How NFS removes a folder with an open file: the file gets another name."""
    raise OSError(39, "Directory not empty", str(path))


def test_a_work_folder_that_stays_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, settings = Inputs(str(MODEL)), TrainSettings(length=32, early_layers=())
    monkeypatch.setattr(os, "rmdir", busy)
    with pytest.raises(DataError, match="no --data"):
        write_inputs(inputs, settings, tmp_path / "work")


def test_a_work_folder_that_stays_takes_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / run.WORK).mkdir()
    for name in ("write_inputs", "load_data", "load_trainee", "Loop", "run_with_bar"):
        monkeypatch.setattr(run, name, lambda *args: None)
    monkeypatch.setattr(run, "save_trained", lambda *args: FOUND)
    monkeypatch.setattr(os, "rmdir", busy)
    settings = TrainSettings(length=32)
    assert run._train(Inputs("model"), tmp_path, settings, 1, False) == FOUND


def test_several_workers_need_ray_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray.train.torch", None)
    settings = TrainSettings(length=32)
    with pytest.raises(ValueError, match="--num-workers above 1 needs Ray Train: pip"):
        run.train_heads(Inputs(str(MODEL)), tmp_path / "out", settings, num_workers=2)
    assert not (tmp_path / "out").exists()
