"""Text files, JSON rows and chats into documents of token ids, streamed."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from vllm_propd.chats import (
    SHAPES,
    ChatError,
    chat_of,
    half_character,
    question_of,
    render,
)

BUILDERS = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".parquet": "parquet",
}
"""The builder of ``datasets`` that reads a file, by suffix; other files are text. JSON
lines are read here."""

TOKENIZED_AT_ONCE = 16


class DataError(ValueError):
    """Data that cannot be trained on; the message names the file and the remedy."""


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        ids: its token ids, closed by the end-of-text token; empty where it only asks.
        chat: of a chat, the ids of what waits for an answer; else empty.
    """

    ids: list[int]
    chat: list[int]


def files_of(paths: list[Path], option: str) -> list[tuple[str, Path]]:
    """Finds the data files among ``paths`` and inside their folders, with their builders.

    Hidden files, caches and binary files in folders are left out, and empty ones anywhere.
    JSON in folders is text like other sources (``package.json``), JSON lines are rows.

    Args:
        paths: files and folders.
        option: what named them, for errors.

    Raises:
        DataError: a path does not exist or is a binary file, or there is no data file.
    """
    files: list[tuple[str, Path]] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"{option} {path}: there is no such file or folder")
        if path.is_file():
            if path.stat().st_size and not _is_data(path):
                raise DataError(
                    f"{option} {path}: there is no data file in it: it is binary"
                )
            files.append((BUILDERS.get(path.suffix, "text"), path))
            continue
        for file in sorted(path.rglob("*")):
            inner = file.relative_to(path).parts
            if file.is_file() and not any(
                p.startswith((".", "__pycache__")) for p in inner
            ):
                builder = "text" if file.suffix == ".json" else BUILDERS.get(file.suffix)
                files.append((builder or "text", file))
    files = [(builder, file) for builder, file in files if _is_data(file)]
    if not files:
        named = ", ".join(map(str, paths))
        raise DataError(f"{option} {named}: there is no data file in it")
    return files


def _is_data(file: Path) -> bool:
    """Whether the file is Parquet, or text that is not empty."""
    with file.open("rb") as opened:
        head = opened.read(1024)
    return bool(head) and (BUILDERS.get(file.suffix) == "parquet" or b"\0" not in head)


def _lines_of(file: Path, option: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the rows of JSON lines, each with fields of its own.

    A reader of columns would refuse a field that comes late, or is once of another type.
    """
    with file.open("rb") as opened:
        for at, line in enumerate(opened, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:
                raise DataError(
                    f"{option} {file} cannot be read: line {at} is not JSON: {error}"
                ) from error
            if not isinstance(row, dict):
                raise DataError(f"{option} {file}: line {at} is not a JSON object")
            if half := half_character(row):
                raise DataError(f"{option} {file}: line {at} has {half}")
            yield str(file), row


def rows_of(
    files: list[tuple[str, Path]], option: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each document's file and row, streamed.

    Args:
        files: files with their builders, as ``files_of`` finds them.
        option: what named them, for errors.

    Raises:
        DataError: a file cannot be read.
    """
    from datasets import load_dataset

    lines = [file for builder, file in files if builder == "lines"]
    files = [(builder, file) for builder, file in files if builder != "lines"]
    for file in lines:
        yield from _lines_of(file, option)
    # Rows have each file's own fields; plain files are documents all alike.
    sources = [(builder, [file]) for builder, file in files if builder != "text"]
    if text := [file for builder, file in files if builder == "text"]:
        sources.append(("text", text))
    for builder, group in sources:
        # Source trees hold files in odd encodings; they lose those characters.
        odd = {"sample_by": "document", "encoding_errors": "ignore"}
        name = str(group[0]) + (f" and {len(group) - 1} more" if len(group) > 1 else "")
        try:
            rows = load_dataset(
                builder,
                data_files={"train": [glob.escape(str(file)) for file in group]},
                split="train",
                streaming=True,
                **(odd if builder == "text" else {}),
            )
            for row in rows:
                yield name, row
        except Exception as error:
            detail = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"{option} {name} cannot be read: {detail}") from error


def render_row(
    file: str, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, option: str
) -> tuple[str, str]:
    """Returns a row's text, and of a chat the part that waits for an answer.

    A row that only asks has a prompt and no text.

    Args:
        file: its file, for errors.
        row: its fields.
        tokenizer: the target's.
        option: what named the file, for errors.

    Raises:
        DataError: the row has neither text nor chat, or the chat template is missing or
            refuses it.
    """
    if isinstance(text := row.get("text"), str):
        return text, ""
    chat = chat_of(row)
    if chat is None:
        raise DataError(
            f"{option} {file}: a row has the fields {', '.join(sorted(row)) or '(none)'}; "
            f"needed is `text`, or a chat in {SHAPES}, with something in it"
        )
    question = question_of(chat)
    try:
        asked = render(question, tokenizer, asks=True) if question else ""
        return ("" if question == chat else render(chat, tokenizer)), asked
    except ChatError as error:
        raise DataError(f"{option} {file}: {error}") from error


def special_before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the token ids that a tokenizer puts before a text: BOS, or mostly none.

    Serving gives them to every prompt that is no chat; a chat's template writes its own.
    """
    (alone,) = tokenizer("a", add_special_tokens=False)["input_ids"][:1]
    whole: list[int] = tokenizer("a")["input_ids"]
    return whole[: whole.index(alone)]


def _numbered(
    rows: Iterator[tuple[str, dict[str, Any]]],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Says beside each row's file which one of its rows it is, for errors."""
    for file, group in groupby(rows, key=itemgetter(0)):
        for at, (_, row) in enumerate(group, 1):
            yield f"row {at} of {file}", row


def read_documents(
    paths: list[Path], tokenizer: PreTrainedTokenizerBase, most_tokens: int, option: str
) -> Iterator[Document]:
    """Yields documents of files and folders until they have ``most_tokens`` tokens.

    The last one is cut. Text begins as the tokenizer has it (BOS), chats as their template.

    Args:
        paths: files and folders.
        tokenizer: the target's.
        most_tokens: tokens after which no more is read.
        option: what named the paths, for errors.

    Raises:
        DataError: files that cannot be read, or rows that hold no text.
    """
    begin = special_before(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(some: list[tuple[str, dict[str, Any]]]) -> Iterator[Document]:
        texts = [render_row(file, row, tokenizer, option) for file, row in some]
        whole, asked = (list(part) for part in zip(*texts, strict=True))
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        chats = tokenizer(asked, add_special_tokens=False)["input_ids"]
        for (_, row), document, chat in zip(some, ids, chats, strict=True):
            if document or chat:
                first = begin if isinstance(row.get("text"), str) else []
                yield Document(first + document + end if document else [], chat)

    rows = _numbered(rows_of(files_of(paths, option), option))
    left = most_tokens
    while some := list(islice(rows, TOKENIZED_AT_ONCE)):
        for document in encode(some):
            yield Document(document.ids[:left], document.chat)
            left -= len(document.ids) or len(document.chat)
            if left <= 0:
                return


def asking(documents: Iterator[Document], option: str) -> Iterator[Document]:
    """Passes documents on; says in the end how many ask nothing, where others do.

    Args:
        documents: where some ask, they alone give prompts.
        option: what named their files.
    """
    counts = [0, 0]
    for document in documents:
        counts[bool(document.chat)] += 1
        yield document
    if all(counts):
        print(
            f"{option}: {counts[0]:,} documents ask nothing and are left out: prompts are "
            f"the questions of the other {counts[1]:,}",
            flush=True,
        )
