"""Files that prompts are cut from: read as training reads them, by every command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from tokenizers_on_disk import MODEL, target_in

from vllm_propd.bench import run, simulate, tune
from vllm_propd.bench.settings import BenchSettings
from vllm_propd.bench.setup import prompt_texts
from vllm_propd.training.data.documents import DataError

ROWS = [{"text": "first text"}, {"text": "second text"}]


class Enough(Exception):
    """Ends a command where a test has seen what it wants."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return target_in(tmp_path / "model")


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_rows_are_read_and_not_the_file_that_holds_them(
    model: Path, tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif name == "a.json":
        path.write_text(json.dumps(ROWS, indent=1))
    else:
        lines(path, ROWS)
    assert prompt_texts(model, [path]) == ["first text", "second text"]


def test_text_chats_and_folders_are_read(model: Path, tmp_path: Path) -> None:
    (folder := tmp_path / "texts").mkdir()
    (folder / "b.txt").write_text("plain text\n")
    (folder / "c.bin").write_bytes(b"\0\1")
    answered = [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]
    lines(folder / "a.jsonl", [{"conversations": answered}, {"question": "2 + 2?"}])
    assert prompt_texts(model, [folder]) == [
        "<user>1 + 1?<assistant>2", "<user>2 + 2?<assistant>", "plain text\n"
    ]  # fmt: skip
    assert prompt_texts(model, []) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"title": "x"}\n', "--prompts .*fields title; needed is `text`"),
        ("a.jsonl", '{"text": ""}\n', "--prompts .*a.jsonl: there is no text in it"),
        ("a.bin", "\0", "--prompts .*a.bin: there is no data file in it"),
        ("a.parquet", "no table", "--prompts .*a.parquet cannot be read"),
    ],
)
def test_files_without_text_are_refused(
    model: Path, tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        prompt_texts(model, [tmp_path / name])


@pytest.mark.parametrize("command", ["bench", "tune", "simulate"])
def test_commands_cut_their_prompts_from_the_texts(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    found: list[list[str]] = []

    def cut(tokenize: Any, texts: list[str], *others: Any) -> None:
        found.append(texts)
        raise Enough

    monkeypatch.setattr(run, "batch_points", cut)
    monkeypatch.setattr(tune, "cut_prompts", cut)
    monkeypatch.setattr(simulate, "cut_prompts", cut)
    files, heads, out = [lines(tmp_path / "a.jsonl", ROWS)], MODEL / "propd", tmp_path / "o"
    settings = BenchSettings(arms="plain" if command == "bench" else "chain")
    search = tune.Search((), (5,), (), 16, 2, 0.9)
    calls: dict[str, Callable[[], object]] = {
        "bench": lambda: run.run_bench(model, heads, files, out, settings),
        "tune": lambda: tune.run_tune(
            model, heads, files, out / "a.yaml", settings, search
        ),
        "simulate": lambda: simulate.run_simulate(
            model, heads, files, None, 64, 16, settings
        ),
    }
    with pytest.raises(Enough):
        calls[command]()
    assert found == [["first text", "second text"]]
