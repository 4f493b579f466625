"""Chats on real engines: the benchmark's prompts by task, and the demo's race."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import MODEL
from typer.testing import CliRunner

from vllm_propd.bench.results import Results
from vllm_propd.cli import app

pytestmark = [pytest.mark.alone, pytest.mark.long]

TEMPLATE = "{% for m in messages %}# {{ m.role }}\n{{ m.content }}\n{% endfor %}"
QUESTIONS = {
    "code": ["def read(self, size):", "class Stack:", "import os\n\ndef walk("],
    "tables": ["COLORS = {", "SIZES = ["],
}


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model with a chat template, and its heads."""
    folder = tmp_path_factory.mktemp("model") / "chatty"
    shutil.copytree(MODEL, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def call(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_bench_compares_arms_without_heads(chatty: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(chatty, bare, ignore=shutil.ignore_patterns("propd"))
    options = ("--batch-sizes", "1", "--max-tokens", "8", "--dtype", "float32", "--in-turn")
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"question": "import os"}) + "\n")
    where = ("--prompts", str(asked), "--out", str(tmp_path))
    call("bench", str(bare), "--arms", "plain propd-no-heads", *options, *where)
    found = Results.model_validate_json((tmp_path / "results.json").read_text())
    same = [row.identical_to_plain for row in found.rows if row.workload == "batch"]
    assert same == [1, 1]
    asks = ["bench", str(bare), "--arms", "plain propd", *options, *where]
    refused = CliRunner().invoke(app, asks)
    assert refused.exit_code == 1
    assert str(bare / "propd") in refused.output.replace("\n", "")


def test_bench_answers_chats_by_task(chatty: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "asked.jsonl"
    rows = [
        {"category": task, "question": text}
        for task, texts in QUESTIONS.items()
        for text in texts
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    call(
        *("bench", str(chatty), "--prompts", str(prompts), "--batch-sizes", "1,2"),
        *("--arms", "plain propd-no-heads propd", "--max-tokens", "12"),
        *("--dtype", "float32", "--prompts-each", "2", "--out", str(tmp_path)),
    )
    found = Results.model_validate_json((tmp_path / "results.json").read_text())
    assert found.chats == ["asked.jsonl"]
    assert found.workloads == ["task code", "task tables"]
    assert len(found.rows) == 3 * 2 * 3  # arms, batch sizes, all and two tasks
    for row in found.rows:
        assert row.wall_ratio is not None and row.tokens_per_step >= 1
        assert row.identical_to_plain == row.prompts > 0
    one = found.row("propd", 1)
    assert one is not None and len(one.chunks) == one.prompts == 4
    assert "asked.jsonl" in found.caption()


def test_demo_shows_the_same_answers_side_by_side(chatty: Path, tmp_path: Path) -> None:
    said = call(
        *("demo", "--model", str(chatty), "--heads", str(chatty / "propd")),
        *("--out", str(tmp_path), "--max-tokens", "24"),
    )
    result = json.loads((tmp_path / "result.json").read_text())
    plain, ours = result["arms"]
    assert result["identical"] and ours["tokens"] == plain["tokens"] > 0
    assert plain["tokens_per_step"] == 1 < ours["tokens_per_step"]
    assert (tmp_path / "tree.png").stat().st_size > 10_000
    assert "plain vLLM: " in said and "tokens per step" in said
