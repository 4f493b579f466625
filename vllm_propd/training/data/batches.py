"""Token ids on disk, and the batches and prompts drawn from them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from rich.progress import Progress, SpinnerColumn, TextColumn
from transformers import PreTrainedTokenizerBase

from vllm_propd.training.data.documents import DataError, Document, read_documents

Tokens = npt.NDArray[np.int32]
Starts = npt.NDArray[np.int64]

HELD_OUT = 16
"""One document in this many is not trained on, but measured with."""

SHORTEST = 16
"""Tokens of the shortest prompt cut from text."""


@dataclass(frozen=True)
class TokenData:
    """Token ids in a row, documents closed by the end-of-text token.

    Attributes:
        tokens: ``[tokens]`` int32, mapped from disk.
        starts: ``[sequences]`` int64, where training sequences may start; empty: anywhere.
        chats: token ids of chats up to the assistant's first answer.
    """

    tokens: Tokens
    starts: Starts
    chats: list[list[int]]

    def batch(self, size: int, length: int, seed: tuple[int, ...]) -> Starts:
        """Returns ``[size, length]`` int64 ids of windows that ``seed`` alone decides."""
        rng = np.random.default_rng(seed)
        if len(self.starts):
            fitting = self.starts[self.starts <= len(self.tokens) - length]
            starts = rng.choice(fitting, size=size)
        else:
            starts = rng.integers(0, len(self.tokens) - length + 1, size=size)
        return self.tokens[starts[:, None] + np.arange(length)].astype(np.int64)

    def prompts(self, count: int, longest: int, seed: int) -> list[list[int]]:
        """Draws ``count`` prompts of at most ``longest`` tokens.

        They are chats up to the answer; or windows of text, their lengths drawn evenly,
        since what a model writes after little context (it repeats itself) is easier to
        draft.

        Raises:
            DataError: no chat is as short as that.
        """
        rng = np.random.default_rng(seed)
        if not self.chats:
            lengths = rng.integers(min(SHORTEST, longest), longest + 1, size=count)
            rows = self.batch(count, longest, (seed, 0)).tolist()
            return [row[:length] for row, length in zip(rows, lengths, strict=True)]
        fitting = [chat for chat in self.chats if len(chat) <= longest]
        if not fitting:
            raise DataError(
                f"--data: of {len(self.chats)} chats none asks its first question in "
                f"{longest} tokens; give a larger --length"
            )
        return [fitting[i] for i in rng.integers(0, len(fitting), size=count)]


def split_documents(
    documents: Iterable[Document],
) -> Iterator[tuple[Literal["train", "held_out"], Document]]:
    """Holds out each ``HELD_OUT``-th document; of a few documents, each one's end."""
    first: list[Document] = []
    index = 0
    for index, document in enumerate(documents, 1):
        if index <= HELD_OUT:
            first.append(document)
        else:
            yield ("train" if index % HELD_OUT else "held_out"), document
    many = index >= 2 * HELD_OUT
    for document in first:
        cut = len(document.ids) - (0 if many else len(document.ids) // HELD_OUT)
        yield "train", Document(document.ids[:cut], document.chat)
        if not many:
            yield "held_out", Document(document.ids[cut:], document.chat)


def prepare(
    paths: list[Path],
    held_out: list[Path],
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    folder: Path,
    most_tokens: int,
) -> tuple[TokenData, TokenData]:
    """Returns token ids to train on, and held-out ones; both are files in ``folder``.

    Args:
        paths: files and folders to train on.
        held_out: files and folders to measure with; none: a share of ``paths``.
        tokenizer: the target's tokenizer.
        vocab_size: rows of the target's output layer.
        folder: made if it is not there; what it holds of an earlier run is replaced.
        most_tokens: tokens after which no more is read.

    Raises:
        DataError: no text, or token ids that the target does not have.
    """
    documents = read_documents(paths, tokenizer, most_tokens)
    if held_out:
        kept = read_documents(held_out, tokenizer, most_tokens)
        split = chain((("train", d) for d in documents), (("held_out", d) for d in kept))
    else:
        split = chain(split_documents(documents))
    writers = {name: _Writer(folder, name) for name in ("train", "held_out")}
    columns = (SpinnerColumn(), TextColumn("{task.description} {task.completed:,} tokens"))
    with Progress(*columns) as bar:
        task = bar.add_task("reading", total=None)
        for name, document in split:
            if not document.ids:
                continue
            if (largest := max(document.ids)) >= vocab_size:
                raise DataError(
                    f"the tokenizer gives token {largest}, and the model knows "
                    f"{vocab_size} only: they do not belong together"
                )
            writers[name].add(document)
            bar.advance(task, len(document.ids))
    train, kept_out = (writer.close() for writer in writers.values())
    if not len(train.tokens):
        raise DataError(f"--data {', '.join(map(str, paths))}: there is no text in it")
    return train, kept_out


class _Writer:
    """Appends documents to one split's files."""

    def __init__(self, folder: Path, name: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.name = folder, name
        self.chats: list[list[int]] = []
        self.file = (folder / f"{name}.tokens").open("wb")

    def add(self, document: Document) -> None:
        np.asarray(document.ids, np.int32).tofile(self.file)
        if document.chat:
            self.chats.append(document.chat)

    def close(self, starts: list[int] | None = None) -> TokenData:
        self.file.close()
        index = {"starts": starts or [], "chats": self.chats}
        (self.folder / f"{self.name}.json").write_text(json.dumps(index))
        return load_data(self.folder, self.name)


def check_enough(data: TokenData, held_out: TokenData, length: int) -> None:
    """Refuses data that is shorter than training and measuring need.

    Raises:
        DataError: there are too few tokens; the message has the counts.
    """
    if min(len(data.tokens), len(held_out.tokens)) <= length:
        raise DataError(
            f"--data holds {len(data.tokens):,} tokens to train on and "
            f"{len(held_out.tokens):,} held out; --length {length} needs more of both"
        )


def save_sequences(folder: Path, name: str, sequences: list[list[int]]) -> TokenData:
    """Writes sequences below ``folder``; windows of that data start where one starts."""
    writer = _Writer(folder, name)
    for ids in sequences:
        writer.add(Document(ids, []))
    lengths = np.array([len(ids) for ids in sequences], np.int64)
    return writer.close((np.cumsum(lengths) - lengths).tolist())


def load_data(folder: Path, name: str) -> TokenData:
    """Loads data that ``prepare`` or ``save_sequences`` has written."""
    path = folder / f"{name}.tokens"
    tokens: Tokens = np.empty(0, np.int32)  # an empty file cannot be mapped
    if path.stat().st_size:
        tokens = np.memmap(path, np.int32, "r")
    index = json.loads((folder / f"{name}.json").read_text())
    return TokenData(tokens, np.array(index["starts"], np.int64), index["chats"])
