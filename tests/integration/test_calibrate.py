"""`vllm-propd calibrate`: heads that others trained are measured for serving."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import MODEL
from made_heads import write_own_outputs
from typer.testing import CliRunner

from vllm_propd.cli import app
from vllm_propd.corpus import held_out_snippets
from vllm_propd.heads.calibration import Calibration, load_calibration

SCRIPTS = Path(__file__).parents[2] / "scripts"
pytestmark = pytest.mark.alone


def arguments(folder: Path, held_out: Path) -> list[str]:
    options = ["--held-out", str(held_out), "--length", "64"]
    return ["calibrate", str(MODEL), str(folder), *options]


def calibration_of(folder: Path) -> Calibration:
    found = load_calibration(folder, num_heads=4)
    assert found is not None
    return found


def write_held_out(file: Path) -> Path:
    texts = held_out_snippets(12, seed=4, min_chars=2000)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


@pytest.mark.usefixtures("engines_in_this_process")
def test_the_same_heads_in_two_formats_are_worth_the_same(tmp_path: Path) -> None:
    held_out = write_held_out(tmp_path / "held_out.jsonl")
    ours, published = tmp_path / "ours", tmp_path / "published"
    for folder in (ours, published):
        folder.mkdir()
    for path in (MODEL / "propd").iterdir():
        if path.name != "calibration.json":
            (ours / path.name).write_bytes(path.read_bytes())
    write_own_outputs(published)
    command = [sys.executable, "-m", "vllm_propd.cli", *arguments(ours, held_out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    again = CliRunner().invoke(app, arguments(published, held_out))
    assert again.exit_code == 0, again.output
    first, second = calibration_of(ours), calibration_of(published)
    assert first.positions == second.positions > 300
    assert first.expected_tokens(16) > 1.5  # they were trained for this target
    np.testing.assert_allclose(
        first.rank_accuracy, second.rank_accuracy, atol=2 / first.positions
    )
    assert first.early_recall and not second.early_recall
    assert first.sureness() is not None


@pytest.mark.usefixtures("engines_in_this_process")
def test_trees_are_walked_along_greedy_and_sampled_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = write_held_out(tmp_path / "held_out.jsonl")
    heads = tmp_path / "heads"
    shutil.copytree(MODEL / "propd", heads)
    done = CliRunner().invoke(app, arguments(heads, held_out))
    assert done.exit_code == 0, done.output
    script = runpy.run_path(str(SCRIPTS / "bench_heads.py"))
    capsys.readouterr()
    script["main"](str(MODEL), [heads], [held_out], "0,1", 64)
    table = capsys.readouterr().out.rpartition("\n\n")[2].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    named = [dict(zip(cells[0], line, strict=True)) for line in cells[2:]]
    assert [one["temperature"] for one in named] == ["0", "1"]
    known = calibration_of(heads).tokens_per_step
    for nodes in script["SHOWN"]:
        assert named[0][f"{nodes} nodes"] == f"{known[nodes]:.2f}"
    for one in named:
        walked = [float(one[f"{nodes} nodes"]) for nodes in script["SHOWN"]]
        assert 1 < float(one["chain"]) < walked[-1]
    # What is drawn is likely to be the likeliest, and is not always.
    assert float(named[1]["32 nodes"]) < float(named[0]["32 nodes"])
