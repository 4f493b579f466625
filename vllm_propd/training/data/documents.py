"""Text files, JSON rows and chats into documents of token ids, streamed."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
"""The builder of ``datasets`` that reads a file, by suffix; other files are text."""

TOKENIZED_AT_ONCE = 16
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
"""ShareGPT's names of roles; others are OpenAI's already."""


class DataError(ValueError):
    """Data that cannot be trained on; the message names the file and the remedy."""


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        ids: its token ids, closed by the end-of-text token.
        chat: of a chat, the ids up to the assistant's first answer; else empty.
    """

    ids: list[int]
    chat: list[int]


def files_of(paths: list[Path]) -> list[tuple[str, Path]]:
    """Finds the data files among ``paths`` and inside their folders, with their builders.

    Hidden files, caches, binary and empty files in folders are left out. JSON there is text
    like other sources (``package.json``), JSON lines are rows.

    Raises:
        DataError: a path does not exist, or there is no data file.
    """
    files = []
    for path in paths:
        if not path.exists():
            raise DataError(f"--data {path}: there is no such file or folder")
        if path.is_file():
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
        raise DataError(f"--data {', '.join(map(str, paths))}: there is no data file in it")
    return files


def _is_data(file: Path) -> bool:
    """Whether the file is Parquet, or text that is not empty."""
    with file.open("rb") as opened:
        head = opened.read(1024)
    return bool(head) and (BUILDERS.get(file.suffix) == "parquet" or b"\0" not in head)


def _rows(files: list[tuple[str, Path]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each document's file and row, streamed."""
    from datasets import load_dataset

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
            raise DataError(f"--data {name} cannot be read: {detail}") from error


def messages_of(row: dict[str, Any]) -> list[dict[str, str]] | None:
    """Returns a row's chat in OpenAI's shape; None where it has none.

    Known are ``messages`` of ``role`` and ``content``, and ShareGPT's ``conversations``
    of ``from`` and ``value``.
    """
    for key in ("messages", "conversations"):
        turns = row.get(key)
        if not isinstance(turns, list) or not turns:
            continue
        chat = []
        for turn in turns:
            if not isinstance(turn, dict):
                return None
            # Rows read together have each other's keys, without a value.
            role, content = turn.get("role"), turn.get("content")
            role = turn.get("from") if role is None else role
            content = turn.get("value") if content is None else content
            if isinstance(content, list):  # OpenAI's parts; pictures have no text
                parts = [part.get("text") for part in content if isinstance(part, dict)]
                content = "".join(part for part in parts if isinstance(part, str))
            if not isinstance(role, str):
                return None
            # A turn that only calls tools says nothing.
            chat.append({"role": ROLES.get(role, role), "content": str(content or "")})
        return chat
    return None


def render(
    file: str, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str]:
    """Returns a row's text, and of a chat the part up to the assistant's first answer.

    Raises:
        DataError: the row has neither text nor chat, or the chat template is missing or
            refuses it.
    """
    if isinstance(text := row.get("text"), str):
        return text, ""
    chat = messages_of(row)
    if chat is None:
        raise DataError(
            f"--data {file}: a row has the fields {', '.join(sorted(row)) or '(none)'}; "
            "needed is `text`, or a chat in `messages` or `conversations`"
        )
    if tokenizer.chat_template is None:
        raise DataError(
            f"--data {file} holds chats, and the model's tokenizer has no chat template: "
            "use a model that has one, or rows with `text`"
        )
    roles = [turn["role"] for turn in chat]
    asked = chat[: roles.index("assistant")] if "assistant" in roles else []
    try:
        whole = tokenizer.apply_chat_template(chat, tokenize=False)
        question = asked and tokenizer.apply_chat_template(
            asked, tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise DataError(
            f"--data {file}: the model's chat template refuses a chat: {error}"
        ) from error
    return str(whole), str(question or "")


def read_documents(
    paths: list[Path], tokenizer: PreTrainedTokenizerBase, most_tokens: int
) -> Iterator[Document]:
    """Yields documents of files and folders until they have ``most_tokens`` tokens.

    Raises:
        DataError: files that cannot be read, or rows that hold no text.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(texts: list[tuple[str, str]]) -> Iterator[Document]:
        whole, asked = (list(part) for part in zip(*texts, strict=True))
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        chats = tokenizer(asked, add_special_tokens=False)["input_ids"]
        for document, chat in zip(ids, chats, strict=True):
            if document:
                yield Document(document + end, chat)

    rows = (render(file, row, tokenizer) for file, row in _rows(files_of(paths)))
    tokens = 0
    while tokens < most_tokens and (texts := list(islice(rows, TOKENIZED_AT_ONCE))):
        for document in encode(texts):
            tokens += len(document.ids)
            yield document
