"""The first ten minutes on a GPU, rehearsed: its items run, fail and run out of time."""

from __future__ import annotations

import importlib
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


def report_of(tmp_path: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    out = tmp_path / "report.json"
    command = [sys.executable, str(FOLDER), "--device", "cpu", "--model", str(MODEL)]
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


def item_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> Any:
    """An item that runs some code, which may leave processes."""
    monkeypatch.setattr(first_run, "LAST_LINES", 3)
    script = tmp_path / "__main__.py"
    script.write_text(code)
    monkeypatch.setattr(first_run, "__file__", str(script))
    return first_run.Item("an item", 1, "")


LEAVES_ONE = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
"""


@pytest.mark.parametrize(
    ("ending", "outcome", "limit"),
    [
        ("time.sleep(600)", "timed out", 1.0),
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
