"""`vllm-propd batch`: every row once, whatever is killed; plain vLLM's greedy texts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from bench_batch import has_engine
from clusters import ENGINE, cluster_of
from conftest import MODEL, Prompt, Ties, engine, greedy, mixed_prompts, run
from typer.testing import CliRunner

from vllm_propd.cli import app

pytestmark = pytest.mark.alone

ROWS, TOKENS, CPUS = 24, 24, 3
NO_PROMPTS = ("no json", '{"answer": 42}', '{"text": "a", "top_k": -7}')
"""Rows that cannot be read, that ask nothing, and that vLLM refuses."""


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return mixed_prompts(ROWS, seed=71)


@pytest.fixture(scope="module")
def rows(prompts: list[Prompt], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts as OpenAI's batch format and as text, and between them what is none."""
    from transformers import AutoTokenizer

    tokenizer, lines = AutoTokenizer.from_pretrained(MODEL), []
    for at, prompt in enumerate(prompts):
        text = tokenizer.decode(prompt["prompt_token_ids"])
        body = {"custom_id": f"q-{at}", "url": "/v1/completions", "body": {"prompt": text}}
        lines.append(json.dumps(body if at % 2 else {"id": f"q-{at}", "text": text}))
    lines[5:5] = NO_PROMPTS
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def command(rows: Path, out: Path, *more: str) -> list[str]:
    options = ["--temperature", "0", "--max-tokens", str(TOKENS), "--out", str(out)]
    options += ["--engine-kwargs", json.dumps(ENGINE), "--rows-at-once", "4", *more]
    call = [sys.executable, "-m", "vllm_propd.cli", "batch", str(MODEL), str(rows)]
    return [*call, *options]


def answers(out: Path) -> dict[int, dict[str, Any]]:
    """The rows that are written, by number: none is there twice."""
    lines = [
        json.loads(line)
        for path in (out / "rows").glob("*.json")
        for line in path.read_text().splitlines()
    ]
    found = {row["row"]: row for row in lines}
    assert len(found) == len(lines)
    return found


def check(out: Path, prompts: list[Prompt], ties: Ties) -> None:
    """All rows are there, with plain vLLM's texts; what is no prompt has an error."""
    found = answers(out)
    assert sorted(found) == list(range(ROWS + len(NO_PROMPTS)))
    failed = [row for row in found.values() if row["error"] is not None]
    assert [row["finish_reason"] for row in failed] == ["error"] * len(NO_PROMPTS)
    assert sorted(row["row"] for row in failed) == [5, 6, 7]
    assert "top_k" in found[7]["error"]
    with engine() as llm:
        plain = run(llm, prompts, greedy(TOKENS, logprobs=2))
    good = {row["id"]: row for row in found.values() if row["error"] is None}
    for at, expected in enumerate(plain):
        row = good[f"q-{at}"]
        assert row["text"] == expected.text
        assert row["token_ids"] == list(expected.token_ids)
        assert row["finish_reason"] == expected.finish_reason
        assert row["num_tokens"] == len(expected.token_ids)
    lengths = [row["acceptance_length"] for row in good.values() if row["num_drafts"]]
    assert lengths and all(length >= 1.0 for length in lengths)
    assert max(lengths) > 1.0


def test_all_rows_are_answered(
    rows: Path, prompts: list[Prompt], tmp_path: Path, ties: Ties
) -> None:
    """Also beside another cluster of Ray's on this machine, which the job leaves alone."""
    with cluster_of(1, CPUS):
        call = command(rows, tmp_path / "out")
        done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    check(tmp_path / "out", prompts, ties)
    told = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert told["rows"] == told["new_rows"] == ROWS + len(NO_PROMPTS)
    assert told["errors"] == len(NO_PROMPTS)
    other = [*command(rows, tmp_path / "out"), "--max-tokens", "3"]
    refused = CliRunner().invoke(app, other[3:])
    assert refused.exit_code == 1
    assert "holds another job" in " ".join(refused.output.split())


@pytest.mark.long
def test_a_killed_job_goes_on_and_does_no_row_twice(
    rows: Path, prompts: list[Prompt], tmp_path: Path, ties: Ties
) -> None:
    log = (tmp_path / "log").open("w")
    killed = subprocess.Popen(
        command(rows, tmp_path / "out"), stdout=log, stderr=log, start_new_session=True
    )
    while len(list((tmp_path / "out" / "answered").glob("*.parquet"))) < 2:
        assert killed.poll() is None, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    before = len(list((tmp_path / "out" / "answered").glob("*.parquet")))
    done = subprocess.run(command(rows, tmp_path / "out"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert told["rows"] == ROWS + len(NO_PROMPTS) and told["errors"] == len(NO_PROMPTS)
    assert told["new_rows"] <= told["rows"] - 4 * (before - 1)
    check(tmp_path / "out", prompts, ties)


@pytest.mark.long
def test_two_engines_answer_all_rows_though_a_node_dies(
    rows: Path, prompts: list[Prompt], tmp_path: Path, ties: Ties
) -> None:
    with cluster_of(2, CPUS) as cluster:
        more = ["--engines", "2", "--address", cluster.address]
        with (tmp_path / "log").open("w") as log:
            job = subprocess.Popen(
                command(rows, tmp_path / "out", *more), stdout=log, stderr=log
            )
            while not list((tmp_path / "out" / "answered").glob("*.parquet")):
                assert job.poll() is None, (tmp_path / "log").read_text()[-3000:]
                time.sleep(0.05)
            node = next(iter(cluster.worker_nodes))
            assert has_engine(node)
            cluster.remove_node(node, allow_graceful=False)
            assert job.poll() is None, "the job was over before a node was lost"
            cluster.add_node(num_cpus=CPUS)  # as a cluster's manager would
            assert job.wait(timeout=600) == 0, (tmp_path / "log").read_text()[-3000:]
    check(tmp_path / "out", prompts, ties)
