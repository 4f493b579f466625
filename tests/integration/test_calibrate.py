"""`vllm-propd calibrate`: heads that others trained are measured for serving."""

import json
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

pytestmark = pytest.mark.alone


def arguments(folder: Path, held_out: Path) -> list[str]:
    options = ["--held-out", str(held_out), "--length", "64"]
    return ["calibrate", str(MODEL), str(folder), *options]


def calibration_of(folder: Path) -> Calibration:
    found = load_calibration(folder, num_heads=4)
    assert found is not None
    return found


@pytest.mark.usefixtures("engines_in_this_process")
def test_the_same_heads_in_two_formats_are_worth_the_same(tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.jsonl"
    texts = held_out_snippets(12, seed=4, min_chars=2000)
    held_out.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
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
