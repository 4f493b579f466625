"""The benchmark on real engines, and the inflated model that it measures."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import MODEL, prompts_of
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from vllm_propd.bench.results import Results
from vllm_propd.cli import app

SCRIPT = Path(__file__).parents[2] / "scripts" / "inflate_model.py"


@pytest.fixture(scope="module")
def inflated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model, four times as wide and with a layer more."""
    out = tmp_path_factory.mktemp("inflated")
    options = ["--factor", "4", "--layers", "7", "--dtype", "float32"]
    command = [sys.executable, str(SCRIPT), str(MODEL), str(out), *options]
    subprocess.run(command, check=True, capture_output=True)
    return out


@torch.inference_mode()
def test_an_inflated_model_computes_the_small_ones_logits(inflated: Path) -> None:
    ids = torch.tensor([prompts_of([300], seed=61)[0]["prompt_token_ids"]])
    logits = [
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits
        for model in (MODEL, inflated)
    ]
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-4)


def test_arms_are_measured_and_lossless(inflated: Path, tmp_path: Path) -> None:
    options = ["--arms", "plain medusa static propd", "--batch-sizes", "1,4"]
    options += ["--dtype", "float32", "--max-tokens", "32", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, ["bench", str(inflated), *options])
    assert done.exit_code == 0, done.output
    results = Results.model_validate_json((tmp_path / "results.json").read_text())
    assert results.inflated
    assert len(results.rows) == 8
    for row in results.rows:
        assert row.identical_to_plain == row.prompts == max(row.batch_size, 2)
        assert {"prepare", "forward", "verify", "rest", "step"} <= row.step_ms.keys()
        assert 0 < row.step_ms["forward"] < row.step_ms["step"]
        assert row.peak_rss_mib > 300
        assert row.tokens_per_s_min <= row.tokens_per_s <= row.tokens_per_s_max
        if row.arm == "plain":
            assert row.tokens_per_step == row.ratio_to_plain == 1
            continue
        assert row.drafted_per_step > 0
        accepted = sum(row.acceptance_by_depth)
        assert row.tokens_per_step == pytest.approx(1 + accepted, rel=0.1)
    by_arm = {row.arm: row.tokens_per_step for row in results.rows if row.batch_size == 4}
    assert by_arm["propd"] > by_arm["medusa"] > 1
    assert (tmp_path / "report.html").exists()
