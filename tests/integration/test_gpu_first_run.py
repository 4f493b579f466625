"""The first ten minutes on a GPU, rehearsed: its items run, fail and run out of time."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import MODEL
from gpu_first_run.setting import Setting
from rich.console import Console

first_run = importlib.import_module("gpu_first_run.__main__")
FOLDER = Path(first_run.__file__).parent
ROOT = FOLDER.parents[1]


def report_of(tmp_path: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    out = tmp_path / "report.json"
    command = [sys.executable, str(FOLDER), "--device", "cpu", "--model", str(MODEL)]
    command += ["--work", str(tmp_path / "work")]
    done = subprocess.run(
        [*command, "--out", str(out), *options], capture_output=True, text=True, check=False
    )
    return done.returncode, json.loads(out.read_text()), done.stdout


def test_some_items_are_rehearsed(tmp_path: Path) -> None:
    code, report, shown = report_of(
        tmp_path, "--items", "imports,plain eager,propd eager", "--patience", "4"
    )
    outcomes = {item["name"]: item for item in report["items"]}
    assert code == 0, report
    assert {item["outcome"] for item in outcomes.values()} == {"ok"}
    assert outcomes["imports"]["found"]["vllm"] and "propd eager" in shown
    found = outcomes["propd eager"]["found"]
    assert found["batch 8"].startswith("8 of 8 equal") and found["tokens per step"] > 1
    log = (tmp_path / "report.log").read_text()
    assert all(f"======== {name}\n" in log for name in outcomes)
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.json", "report.log", "work",
    }  # fmt: skip
    # Once more, alone: what it is compared with is still there.
    _, report, _ = report_of(tmp_path, "--items", "propd eager", "--patience", "4")
    (item,) = report["items"]
    assert item["found"]["batch 8"].startswith("8 of 8 equal"), item


def item_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> Any:
    """An item that runs some code, which may leave processes."""
    monkeypatch.setattr(first_run, "LAST_LINES", 3)
    script = tmp_path / "__main__.py"
    script.write_text(code)
    monkeypatch.setattr(first_run, "__file__", str(script))
    return first_run.Item("an item", 1, "")


LEAVES_ONE = f"""
import os, subprocess, sys, time
sys.path.insert(0, {str(FOLDER.parent)!r})
from gpu_first_run.child import LIMIT, ends_in_order
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
"""

HANGS = """
def waits_for_nothing():
    try:
        time.sleep(600)
    finally:
        print("cleaned up", flush=True)

ends_in_order(float(os.environ[LIMIT]))
waits_for_nothing()
"""


@pytest.mark.parametrize(
    ("ending", "outcome", "limit"),
    [
        ("time.sleep(600)", "timed out", 1.0),
        (HANGS, "timed out", 4.0),
        ("raise SystemExit('no luck')", "failed", 30.0),
        ("", "ok", 30.0),
    ],
)
def test_an_item_leaves_no_process(
    ending: str,
    outcome: str,
    limit: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    item = item_of(tmp_path, monkeypatch, LEAVES_ONE + ending)
    began = time.monotonic()
    found = first_run.run_item(item, Setting("cpu", tmp_path, tmp_path), limit)
    assert found.outcome == outcome and time.monotonic() - began < 25
    pid = int((tmp_path / "an item.log").read_text().split()[0])
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie"
    if outcome == "failed":
        assert found.log[-1] == "no luck"
    if ending == HANGS:  # where it was is said, and its engine would be shut down
        text = (tmp_path / "an item.log").read_text()
        assert "in waits_for_nothing" in text and found.log[-1] == "cleaned up"


def test_what_an_item_finds_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tracebacks without boxes, and one copy of ours: the checkout's, before others."""
    code = """
import os, sys
from importlib.util import find_spec
print(os.environ["TYPER_STANDARD_TRACEBACK"], find_spec("vllm_propd").origin)
sys.exit(1)
"""
    item, setting = item_of(tmp_path, monkeypatch, code), Setting("cpu", tmp_path, tmp_path)
    other = tmp_path / "site" / "vllm_propd"
    other.mkdir(parents=True)
    (other / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(other.parent))
    setting.notes(item.name)["left"] = "by an earlier run"
    setting.log = tmp_path / "all.log"
    for number in (1, 2):
        found = first_run.run_item(item, setting, 30.0)
        assert found.log == [f"1 {ROOT / 'vllm_propd' / '__init__.py'}"]
        assert found.found == {}
        assert setting.log.read_text().count("======== an item") == number


def test_what_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = item_of(tmp_path, monkeypatch, "raise SystemExit('no')")
    out, seen = tmp_path / "report.json", []
    run_item = first_run.run_item

    def watched(*args: Any) -> Any:
        seen.append(len(json.loads(out.read_text())["items"]) if out.exists() else 0)
        return run_item(*args)

    monkeypatch.setattr(first_run, "run_item", watched)
    items = [first_run.Item(name, 1, item.function) for name in ("one", "two", "three")]
    setting = Setting("cpu", tmp_path, tmp_path, patience=20)
    done = first_run.run_all(items, setting, 120, out, Console(quiet=True))
    assert [one.outcome for one in done] == ["failed"] * 3 and seen == [0, 1, 2]


def test_where_time_runs_short_kernel_times_go_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {}

    def quick(item: Any, setting: Setting, limit: float) -> Any:
        limits[item.name] = limit, setting.short
        return first_run.Outcome(item.name, "ok")

    monkeypatch.setattr(first_run, "run_item", quick)
    whole = sum(item.seconds for item in first_run.ITEMS)
    default = inspect.signature(first_run.main).parameters["seconds"].default
    assert whole <= default + first_run.UNCOUNTED_S
    for seconds, dropped, short in (
        (whole + 5, 0, False),
        (whole, 0, False),
        (whole - 30, 1, False),
        (70, 1, True),
    ):
        limits.clear()
        done = first_run.run_all(
            list(first_run.ITEMS), Setting("cpu", tmp_path, tmp_path), seconds,
            tmp_path / "report.json", Console(quiet=True),
        )  # fmt: skip
        assert [one.name for one in done if one.outcome == "dropped"] == (
            [first_run.DROPPED_FIRST] * dropped
        )
        assert limits["sizing"][1] == short
        assert all(limit <= seconds for limit, _ in limits.values())
        if seconds >= whole:  # a cold start is no failure
            wanted = {item.name: 3 * item.seconds for item in first_run.ITEMS}
            assert {name: limit for name, (limit, _) in limits.items()} == wanted


@pytest.mark.parametrize(
    ("broken", "outcome", "skipped"),
    [
        ("imports", "failed", 7),
        ("plain eager", "failed", 6),
        ("plain eager", "timed out", 0),
        ("propd eager", "failed", 0),
        ("kernel tests", "failed", 0),
    ],
)
def test_what_is_hopeless_is_skipped(
    broken: str,
    outcome: str,
    skipped: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def quick(item: Any, setting: Setting, limit: float) -> Any:
        assert item.name == broken or not skipped or broken not in item.needs
        return first_run.Outcome(item.name, outcome if item.name == broken else "ok")

    monkeypatch.setattr(first_run, "run_item", quick)
    done = first_run.run_all(
        list(first_run.ITEMS), Setting("cpu", tmp_path, tmp_path), 1000,
        tmp_path / "report.json", Console(quiet=True),
    )  # fmt: skip
    found = [one for one in done if one.outcome == "skipped"]
    assert len(found) == skipped
    if skipped:
        assert found[0].log == [f"needs {broken}, which was failed"]
    assert done[-1].outcome == "ok"  # kernel times need no engine
    first_run.show(done, Console(quiet=True))
