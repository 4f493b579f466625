"""Outputs that cannot be written are refused before any work, and what is there is kept."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from tokenizers_on_disk import MODEL

from vllm_propd.bench import tune
from vllm_propd.bench.run import run_bench
from vllm_propd.bench.settings import BenchSettings
from vllm_propd.bench.tune import OFF, Search, run_tune
from vllm_propd.demo import chat, run
from vllm_propd.heads.calibration import Calibration
from vllm_propd.outputs import check_writable
from vllm_propd.training import run as training

SCRIPTS = Path(__file__).parents[2] / "scripts"
SETTINGS = BenchSettings(arms="plain")
FOUND = Calibration(
    positions=9, rank_accuracy=[[0.5] * 10], early_recall={}, tokens_per_step={1: 1.5}
)


def search(**fields: Any) -> Search:
    given = {"layers": (), "top_k": (5,), "keep_nodes": (4,), "nodes": 16, "num_prompts": 2}
    return Search(**{**given, "least_acceptance": 0.9, **fields})


@pytest.fixture
def nowhere(tmp_path: Path) -> Path:
    """A folder that cannot be made: a file is in its place."""
    (tmp_path / "file").write_text("mine")
    return tmp_path / "file" / "out"


def test_a_folder_that_can_be_written_is_made_and_left_empty(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b", "--out a/b")
    assert not list((tmp_path / "a" / "b").iterdir())


COMMANDS: dict[str, Callable[[Path], object]] = {
    "bench": lambda out: run_bench(MODEL, MODEL / "propd", [], out, SETTINGS),
    "tune": lambda out: run_tune(
        MODEL, MODEL / "propd", [], out / "a.yaml", SETTINGS, search()
    ),
    "demo": lambda out: run.run_demo(MODEL, out, 1, 2, 1, 4),
    "demo, chat": lambda out: chat.run_chat_demo(MODEL, MODEL / "propd", out, 2),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_try_their_output_first(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    for module in (run, chat):
        monkeypatch.setattr(module, "start_engines", pytest.fail)
    with pytest.raises(OSError, match=r"^--out .* cannot be written \(.*: give a folder"):
        COMMANDS[command](nowhere)


def test_calibrating_tries_the_heads_folder_first(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "check_trained", lambda model, heads: None)
    monkeypatch.setattr(training, "load_trained", lambda model, heads: None)
    monkeypatch.setattr(training, "write_held_out", pytest.fail)
    with pytest.raises(OSError, match=r"^HEADS .* cannot be written"):
        training.measure_heads("model", nowhere, [], 64)


def test_calibrating_draws_what_it_has_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "check_trained", lambda model, heads: None)
    monkeypatch.setattr(training, "load_trained", lambda model, heads: None)
    monkeypatch.setattr(training, "write_held_out", lambda *args: ([], []))
    monkeypatch.setattr(training, "_measure", lambda *args: FOUND)
    (tmp_path / "calibration.png").write_text("of the heads before")
    training.measure_heads("model", tmp_path, [], 64)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"calibration.json", "calibration.png"}
    assert (tmp_path / "calibration.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["tuned.json", "tuned.png", "tuned", "folder.yaml"])
def test_a_preset_is_no_file_that_its_curve_replaces(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(
        ValueError, match=rf"^--out .*{name}: give a file that ends in .yaml"
    ):
        run_tune(MODEL, MODEL / "propd", [], tmp_path / name, SETTINGS, search())


def test_amounts_that_prune_nothing_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(record=True, width=200)
    monkeypatch.setattr(tune, "wide_console", lambda: console)
    monkeypatch.setattr(tune, "Engine", lambda *args, **keys: exit())
    with pytest.raises(SystemExit):
        run_tune(
            MODEL, MODEL / "propd", [], tmp_path / "a.yaml", SETTINGS,
            search(keep_nodes=(8, 16, 24)),
        )  # fmt: skip
    assert "--keep-nodes 16, 24: left out, since nothing of a tree of --nodes 16" in (
        console.export_text()
    )


def test_there_is_something_to_tune() -> None:
    heads = MODEL / "propd"
    assert len(search(layers=(1,)).tried(heads)) == 3
    assert search(layers=(1,), keep_nodes=()).tried(heads)[0] == OFF
    with pytest.raises(ValueError, match="--top-k has no K, and --keep-nodes none below"):
        search(top_k=(), keep_nodes=(16, 32)).tried(heads)


@pytest.fixture(scope="module")
def script() -> SimpleNamespace:
    pytest.importorskip("ray")
    return SimpleNamespace(**runpy.run_path(str(SCRIPTS / "bench_batch.py")))


def test_a_folder_of_somebody_elses_is_not_emptied(
    tmp_path: Path, script: SimpleNamespace
) -> None:
    (mine := tmp_path / "mine").mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for out in (mine, mine / "thesis.txt"):
        with pytest.raises(SystemExit, match="holds what this script has not written"):
            script.make_empty(out)
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_a_folder_of_an_earlier_run_is_emptied(
    tmp_path: Path, script: SimpleNamespace
) -> None:
    (empty := tmp_path / "empty").mkdir()
    for out in (tmp_path / "new" / "out", empty):
        script.make_empty(out)
        (out / "prompts.jsonl").write_text("rows")
        script.make_empty(out)
        assert [path.name for path in out.iterdir()] == [script.MADE]
