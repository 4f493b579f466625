"""The benchmark on real engines, and the inflated model that it measures."""

import json
import shutil
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
from vllm_propd.config import parse_config

pytestmark = pytest.mark.alone

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
    pruned = "static:pruning=top_k,top_k=5"
    options = ["--arms", f"plain medusa {pruned}", "--batch-sizes", "4"]
    options += ["--dtype", "float32", "--max-tokens", "24", "--out", str(tmp_path)]
    options += ["--chunks", "2", "--most-chunks", "2"]
    done = CliRunner().invoke(app, ["bench", str(inflated), *options])
    assert done.exit_code == 0, done.output
    results = Results.model_validate_json((tmp_path / "results.json").read_text())
    assert results.inflated
    assert len(results.rows) == 3
    for row in results.rows:
        assert row.identical_to_plain == row.prompts == 8
        prunes = row.arm == pruned
        halves = {"split", "lower half", "prune", "upper half"}
        forward = halves if prunes else {"forward"}
        assert {"prepare", "verify", "rest", "step"} | forward <= row.step_ms.keys()
        assert 0 < sum(row.step_ms[part] for part in forward) < row.step_ms["step"]
        assert (row.work_ratio < 0.9) == prunes
        assert (row.kept_per_step < 0.9 * row.drafted_per_step) == prunes
        assert len(row.chunks) == 2 and row.wall_ratio_median is not None
        assert row.peak_rss_mib > 300
        assert 0 < row.host_ms_per_step < row.step_ms["step"]
        assert len(row.measured_step_ms) == len(row.tree_sizes) == 0
        assert row.tokens_per_s_min <= row.tokens_per_s <= row.tokens_per_s_max
        if row.arm == "plain":
            assert row.tokens_per_step == row.ratio_to_plain == 1
            continue
        assert row.drafted_per_step > 0
        accepted = sum(row.acceptance_by_depth)
        assert row.tokens_per_step == pytest.approx(1 + accepted, rel=0.1)
    by_arm = {row.arm: row.tokens_per_step for row in results.rows}
    assert by_arm[pruned] > by_arm["medusa"] > 1
    assert (tmp_path / "report.html").exists()


@pytest.mark.long
def test_chunks_may_be_all_that_is_measured(inflated: Path, tmp_path: Path) -> None:
    options = ["--arms", "plain control propd", "--batch-sizes", "2", "--dtype", "float32"]
    options += ["--max-tokens", "12", "--prompt-tokens", "24", "--rounds", "0"]
    options += ["--chunks", "3", "--most-chunks", "3", "--starts", "2"]
    options += ["--out", str(tmp_path)]
    done = CliRunner().invoke(app, ["bench", str(inflated), *options])
    assert done.exit_code == 0, done.output
    results = Results.model_validate_json((tmp_path / "results.json").read_text())
    plain, control, ours = results.rows
    for row in results.rows:
        assert len(row.chunks) == row.rounds == 6
        assert row.identical_to_plain == row.prompts == 6
    assert plain.wall_ratio is not None and control.wall_ratio is not None
    # Each is compared with both together: one is above 1, the other below.
    assert (plain.wall_ratio - 1) * (control.wall_ratio - 1) <= 0
    assert ours.drafted_per_step > 0


def test_arms_take_steps_in_turn(inflated: Path, tmp_path: Path) -> None:
    options = ["--arms", "plain control ngram propd-no-lookup propd"]
    options += [
        "--batch-sizes",
        "2",
        "--max-tokens",
        "12",
        "--prompt-tokens",
        "24",
        "--in-turn",
    ]
    options += ["--dtype", "float32", "--chunks", "3", "--most-chunks", "3"]
    # In a process of its own: this one's engines are in processes of theirs.
    command = [sys.executable, "-m", "vllm_propd.cli", "bench", str(inflated), *options]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = Results.model_validate_json((tmp_path / "results.json").read_text())
    assert results.in_turn and "a step of each in turn" in results.caption()
    assert len(results.rows) == 5
    for row in results.rows:
        assert len(row.chunks) == row.rounds == 3
        assert row.identical_to_plain == row.prompts == 6
        # What stopwatches would tell is not made up without them.
        assert row.kept_per_step is row.work_ratio is row.host_ms_per_step is None
    assert results.rows[4].drafted_per_step > 0


@pytest.mark.long
def test_workloads_are_measured_and_lossless(inflated: Path, tmp_path: Path) -> None:
    options = ["--arms", "plain propd-no-dynamic", "--batch-sizes", "2"]
    options += [
        "--prompt-tokens",
        "24",
        "--workload",
        "--lengths",
        "16,48",
        "--max-tokens",
        "12",
    ]
    options += ["--trace-requests", "6", "--trace-rate", "20", "--dtype", "float32"]
    options += ["--out", str(tmp_path), "--chunks", "0"]
    done = CliRunner().invoke(app, ["bench", str(inflated), *options])
    assert done.exit_code == 0, done.output
    results = Results.model_validate_json((tmp_path / "results.json").read_text())
    tasks = ["task code", "task prose", "task tables"]
    assert results.workloads == ["length 16", "length 48", *tasks, "trace"]
    assert results.batch_sizes == [2] and len(results.rows) == 14
    for row in results.rows:
        assert row.identical_to_plain == row.prompts == 6
        assert (row.tokens_per_step == 1) == (row.arm == "plain")
        assert row.peak_rss_mib > 300
        if row.workload != "trace":
            assert row.first_token_ms is row.requests_per_s is None
            continue
        assert row.requests_per_s == 20
        assert (row.drafted_per_step > 0) == (row.arm == "propd-no-dynamic")
        assert row.first_token_ms is not None and row.first_token_ms_p90 is not None
        assert row.per_token_ms is not None and row.per_token_ms_p90 is not None
        assert 0 < row.first_token_ms <= row.first_token_ms_p90
        assert 0 < row.per_token_ms <= row.per_token_ms_p90
        # Six requests at 20 per second, and the last one's own time.
        assert row.tokens_per_s < 6 * 12 * 20
    assert (tmp_path / "workloads.png").stat().st_size > 10_000


def test_tuning_writes_a_preset_that_serves(tmp_path: Path) -> None:
    preset = tmp_path / "tuned.yaml"
    options = ["--nodes", "16", "--batch-size", "2", "--num-prompts", "2"]
    options += ["--rounds", "1", "--max-tokens", "8", "--layers", "1,3"]
    options += ["--top-k", "2,2048", "--keep-nodes", "4,16", "--least-acceptance", "0"]
    done = CliRunner().invoke(app, ["tune", str(MODEL), *options, "--out", str(preset)])
    assert done.exit_code == 0, done.output
    config = parse_config({"config": str(preset)})
    assert config.num_speculative_tokens == 16
    assert preset.read_text().startswith("# Written by `vllm-propd tune`: batch size 2,")
    assert preset.with_suffix(".png").stat().st_size > 10_000
    rows = json.loads(preset.with_suffix(".json").read_text())["rows"]
    # No pruning; K 2 and 2048 and m 4 after both layers. A tree of 16 has no best 16.
    assert len(rows) == 7
    off, all_ranks = rows[0], [r for r in rows if r["config"].get("top_k") == 2048]
    assert off["work_ratio"] == 1
    for row in all_ranks:
        assert row["kept_per_step"] == pytest.approx(off["kept_per_step"])
    assert sum(row["work_ratio"] < 0.8 for row in rows) == 4


def test_tuning_after_a_layer_without_a_head_is_refused(tmp_path: Path) -> None:
    options = ["--layers", "1,5", "--out", str(tmp_path / "tuned.yaml")]
    done = CliRunner().invoke(app, ["tune", str(MODEL), *options])
    assert done.exit_code == 1
    assert "no early head after layer 5; it has some after" in " ".join(done.output.split())


def test_tuning_heads_without_early_heads_is_refused(tmp_path: Path) -> None:
    shutil.copy(MODEL / "propd" / "model.safetensors", tmp_path)
    options = ["--heads", str(tmp_path), "--out", str(tmp_path / "tuned.yaml")]
    done = CliRunner().invoke(app, ["tune", str(MODEL), *options])
    assert done.exit_code == 1
    assert not (tmp_path / "tuned.yaml").exists()
