"""Trainings of several lengths: their figures, and whose they are."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from vllm_propd.resume import alone_in
from vllm_propd.training.model.checkpoint import FILE, Progress
from vllm_propd.training.settings import TrainSettings

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_training.py"
SETTINGS = TrainSettings(steps=40, batch_size=2, length=32)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The script, whose trainings have ended after 40 steps in 64 seconds."""
    found = runpy.run_path(str(SCRIPT))

    class Loop:
        progress = Progress(40, 64.0, 1.0, 1.0)
        windows = range(9)

        def __init__(self, *args: Any, **keys: Any) -> None: ...

    def save_trained(
        trainee: object, model: str, work: Path, out: Path, for_vllm: bool
    ) -> None:
        out.mkdir(exist_ok=True)
        (work / FILE).touch()

    names = found["main"].__globals__
    others = ("load_data", "load_trainee", "run_with_bar", "write_inputs", "table")
    for name in others:
        monkeypatch.setitem(names, name, lambda *args: "")
    monkeypatch.setitem(names, "Loop", Loop)
    monkeypatch.setitem(names, "save_trained", save_trained)
    return found


def trained(script: dict[str, Any], out: Path, **more: Any) -> None:
    script["main"]("model", out, minutes="1", **more)


def test_the_speed_is_that_of_the_whole_training(
    script: dict[str, Any], tmp_path: Path
) -> None:
    """Also where this process had but its last steps to do, or none."""
    inputs = SimpleNamespace(model="model", self_distill=True)
    script["train"](inputs, SETTINGS, 1.0, tmp_path, tmp_path / "1")
    figures = json.loads((tmp_path / "1" / "training.json").read_text())
    assert (figures["tokens"], figures["speed"]) == (40 * 64, 40.0)


def test_a_row_of_other_settings_is_not_taken_for_these(
    script: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    out = tmp_path / "out"
    for text in ("num_heads: 2", "num_heads: 2\nsave_every: 5.0"):
        recipe.write_text(text)
        trained(script, out, recipe=recipe)
    recipe.write_text("num_heads: 3")
    with pytest.raises(typer.Exit) as failed:
        trained(script, out, recipe=recipe)
    said = str(failed.value.__cause__)
    assert "1 was trained with other settings (num_heads 2 -> 3)" in said
    figures = json.loads((out / "1" / "training.json").read_text())
    del figures["settings"]  # as before they were noted
    (out / "1" / "training.json").write_text(json.dumps(figures))
    trained(script, out, recipe=recipe)


def test_one_process_trains(script: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    with (
        alone_in(tmp_path / "training", "OUT"),
        pytest.raises(typer.Exit) as failed,
    ):
        trained(script, tmp_path)
    assert "another process is at work" in str(failed.value.__cause__)


def test_what_was_not_trained_stays_on_the_page(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- variants: how -->\n| old |\n<!-- end of variants -->\n")
    monkeypatch.setitem(script["write"].__globals__, "PAGE", page)
    script["write"]("variants", "\n")
    assert "| old |" in page.read_text()
    script["write"]("variants", "| new |\n")
    assert "| old |" not in page.read_text() and "| new |" in page.read_text()
