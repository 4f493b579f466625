"""Token ids on disk, and the batches and prompts drawn from them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from rich.progress import Progress, SpinnerColumn, TextColumn
from transformers import PreTrainedTokenizerBase

from vllm_propd.training.data.documents import DataError, Document, asking, read_documents
from vllm_propd.training.data.packing import packed

Tokens = npt.NDArray[np.int32]
Starts = npt.NDArray[np.int64]
Written = npt.NDArray[np.uint8]

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
        chats: token ids of chats up to the answer that they wait for.
        written: ``[tokens]`` uint8, 1 where the target wrote the token; empty: learn from
            all of them.
    """

    tokens: Tokens
    starts: Starts
    chats: list[list[int]]
    written: Written = field(default_factory=lambda: np.empty(0, np.uint8))

    def windows(self, length: int) -> Starts:
        """Returns where windows of ``length`` tokens begin that cover the data, int64.

        A window begins where a sequence does, so that the target has read what the text
        answers to; it goes on into the next ones, and the next window begins with the first
        sequence that is not whole in it. Of a sequence longer than a window the last one
        ends with it, as the last of all ends with the data. Without ``starts`` one window
        follows the other, and what is left at the end is dropped.
        """
        last = len(self.tokens) - length
        if not len(self.starts) or last < 0:
            return np.arange(0, last + 1, length, dtype=np.int64)
        ends = np.append(self.starts[1:], len(self.tokens))
        found = [0]
        while (end := found[-1] + length) < len(self.tokens):
            at = np.searchsorted(ends, end, "right")
            begin = int(self.starts[at])
            if begin <= found[-1]:  # longer than a window
                begin = min(end, int(ends[at]) - length)
            found.append(min(begin, last))
        return np.array(found, np.int64)

    def rows(self, starts: Starts, length: int) -> tuple[Starts, npt.NDArray[np.bool_]]:
        """Returns windows' ids and where to learn, ``[windows, length]`` int64 and bool.

        A position is learnt from where the target wrote the token after it.
        """
        places = starts[:, None] + np.arange(length)
        ids = self.tokens[places].astype(np.int64)
        if not len(self.written):
            return ids, np.ones(ids.shape, np.bool_)
        after = np.minimum(places + 1, len(self.tokens) - 1)
        return ids, self.written[after] == 1

    def frequent(self, count: int, vocabulary: int) -> Starts:
        """Returns the ``count`` most frequent tokens, ascending, int64.

        What the target wrote counts, where that is known. Of equally frequent ones the
        first are taken, which tokenizers have merged first.
        """
        tokens = self.tokens[self.written == 1] if len(self.written) else self.tokens
        counts = np.bincount(tokens, minlength=vocabulary)
        return np.sort(np.argsort(-counts, kind="stable")[:count])

    def prompts(
        self,
        count: int,
        longest: int,
        seed: int,
        option: str = "--data",
        begin: Sequence[int] = (),
    ) -> list[list[int]]:
        """Draws at most ``count`` prompts of at most ``longest`` tokens.

        They are different chats up to the answer, those that are short enough, and a line
        says how many are not; or windows of text, their lengths drawn evenly, since what a
        model writes after little context (it repeats itself) is easier to draft.

        Args:
            count: how many are wanted.
            longest: the most tokens of one.
            seed: of the draw.
            option: what named the files of this data, for errors.
            begin: token ids that a prompt cut from text begins with.

        Raises:
            DataError: no chat is as short as that, or there is less text.
        """
        rng = np.random.default_rng(seed)
        if not self.chats and len(self.tokens) < longest:
            raise DataError(
                f"there are {len(self.tokens):,} tokens to measure with, or to ask with; "
                f"prompts of up to {longest} need more: give more {option}, or a smaller "
                "--length"
            )
        if not self.chats:
            starts = rng.integers(0, len(self.tokens) - longest + 1, size=count)
            lengths = rng.integers(min(SHORTEST, longest), longest + 1, size=count)
            first, rows = list(begin), self.rows(starts, longest)[0].tolist()
            rows = [row if row[: len(first)] == first else first + row for row in rows]
            return [row[:length] for row, length in zip(rows, lengths, strict=True)]
        different = {tuple(chat): chat for chat in self.chats}.values()
        fitting = [chat for chat in different if len(chat) <= longest]
        if not fitting:
            raise DataError(
                f"{option}: of {len(self.chats)} chats none asks its first question in "
                f"{longest} tokens; give a larger --length"
            )
        if left_out := len(different) - len(fitting):
            print(
                f"{option}: {left_out:,} of {len(different):,} chats are left out, whose "
                f"first question has more than {longest} tokens; a larger --length takes "
                "them",
                flush=True,
            )
        return [fitting[i] for i in rng.permutation(len(fitting))[:count]]


class Epochs:
    """The windows of each step: all of them in random order, then all again, and so on.

    The seed and the step's number alone decide, so that a resumed training and one with
    more workers see the same batches.

    Args:
        windows: how many there are.
        size: windows of a step.
        seed: of the orders.
    """

    def __init__(self, windows: int, size: int, seed: int):
        self.windows, self.size, self.seed = windows, size, seed
        self._order = (-1, np.empty(0, np.int64))

    def __call__(self, step: int) -> Starts:
        """Returns the numbers of a step's windows, ``[size]`` int64."""
        places = np.arange(step * self.size, (step + 1) * self.size)
        epochs, places = np.divmod(places, self.windows)
        found = np.empty(self.size, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            found[here] = self._order_of(int(epoch))[places[here]]
        return found

    def _order_of(self, epoch: int) -> Starts:
        if self._order[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch))
            self._order = (epoch, rng.permutation(self.windows))
        return self._order[1]


def split_documents(
    documents: Iterable[Document],
) -> Iterator[tuple[Literal["train", "held_out"], Document]]:
    """Holds out each ``HELD_OUT``-th document; of a few documents, each one's end.

    Of a few chats each fourth one is held out whole; the last one where they are fewer.
    """
    first: list[Document] = []
    index = 0
    for index, document in enumerate(documents, 1):
        if index <= HELD_OUT:
            first.append(document)
        else:
            yield ("train" if index % HELD_OUT else "held_out"), document
    many = index >= 2 * HELD_OUT
    chats = [place for place, document in enumerate(first) if document.chat]
    kept = set() if many else {*chats[3::4], *chats[1:4][-1:]}
    for place, document in enumerate(first):
        if place in kept:
            yield "held_out", document
            continue
        cut = len(document.ids) - (0 if many else len(document.ids) // HELD_OUT)
        yield "train", Document(document.ids[:cut], document.chat)
        if not many:
            yield "held_out", Document(document.ids[cut:], [])


def prepare(
    paths: list[Path],
    held_out: list[Path],
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    folder: Path,
    most_tokens: int,
    prompts_do: bool = False,
    option: str = "--data",
) -> tuple[TokenData, TokenData]:
    """Returns token ids to train on, and held-out ones; both are files in ``folder``.

    Args:
        paths: files and folders to train on.
        held_out: files and folders to measure with; none: a share of ``paths``.
        tokenizer: the target's tokenizer.
        vocab_size: rows of the target's output layer.
        folder: made if it is not there; what it holds of an earlier run is replaced.
        most_tokens: tokens after which no more is read.
        prompts_do: whether chats without an answer are enough.
        option: what named ``paths``, for errors.

    Raises:
        DataError: no text, or token ids that the target does not have.
    """
    documents = read_documents(paths, tokenizer, most_tokens, option)
    if prompts_do and paths != held_out:
        documents = asking(documents, option)
    if held_out:
        kept = read_documents(held_out, tokenizer, most_tokens, "--held-out")
        kept = asking(kept, "--held-out")
        split = chain((("train", d) for d in documents), (("held_out", d) for d in kept))
    else:
        split = chain(split_documents(documents))
    writers = {name: _Writer(folder, name) for name in ("train", "held_out")}
    columns = (SpinnerColumn(), TextColumn("{task.description} {task.completed:,} tokens"))
    with Progress(*columns) as bar:
        task = bar.add_task("reading", total=None)
        for name, document in split:
            ids = document.ids or document.chat
            if not ids:
                continue
            if (largest := max(ids)) >= vocab_size:
                raise DataError(
                    f"the tokenizer gives token {largest}, and the model knows "
                    f"{vocab_size} only: they do not belong together"
                )
            writers[name].add(document)
            bar.advance(task, len(ids))
    train, kept_out = (writer.close() for writer in writers.values())
    named = ", ".join(map(str, paths))
    if not len(train.tokens) and not train.chats:
        raise DataError(f"{option} {named}: there is no text in it")
    if not len(train.tokens) and not prompts_do:
        raise DataError(
            f"{option} {named}: it asks and does not answer; with --self-distill the "
            "target writes the answers"
        )
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

    def close(self, starts: list[int] | None = None, written: bool = False) -> TokenData:
        self.file.close()
        index = {"starts": starts or [], "chats": self.chats, "written": written}
        (self.folder / f"{self.name}.json").write_text(json.dumps(index))
        return load_data(self.folder, self.name)


def check_enough(data: TokenData, length: int, what: str, option: str = "--data") -> None:
    """Refuses data that has no window of ``length`` tokens, or nothing to learn in it.

    Args:
        data: token ids.
        length: tokens of a window.
        what: what the tokens are, for errors.
        option: what gives more of them, for errors.

    Raises:
        DataError: there are too few tokens, or the target wrote no two of them in a row;
            the message has the counts, and ``what`` they are.
    """
    if not len(data.windows(length)):
        raise DataError(
            f"there are {len(data.tokens):,} tokens {what}; --length {length} needs more: "
            f"give more {option}, or a smaller --length"
        )
    wrote = data.written == 1
    if len(wrote) and not (wrote[1:] & wrote[:-1]).any():
        raise DataError(
            f"the target ends its answers at once: {len(data.tokens):,} tokens {what} have "
            "nothing to learn. Give --data that it goes on from"
        )


def save_written(
    folder: Path, name: str, prompts: list[list[int]], texts: list[list[int]], length: int
) -> TokenData:
    """Saves what the target wrote after prompts, as data to learn from.

    Windows of ``length`` tokens begin with a prompt, and learn from the text alone.
    """
    writer = _Writer(folder, name)
    both = list(zip(prompts, texts, strict=True))
    tokens = np.array([len(prompt) + len(text) for prompt, text in both], np.int64)
    both = [both[place] for place in packed(tokens, length)]
    for prompt, text in both:
        writer.add(Document(prompt + text, []))
    pairs = [part for pair in both for part in pair]
    lengths = np.array([len(part) for part in pairs], np.int64)
    marks = np.arange(len(pairs), dtype=np.uint8) % 2
    np.repeat(marks, lengths).tofile(folder / f"{name}.written")
    return writer.close((np.cumsum(lengths) - lengths)[::2].tolist(), written=True)


def load_data(folder: Path, name: str) -> TokenData:
    """Loads data that ``prepare`` or ``save_written`` has written."""
    index = json.loads((folder / f"{name}.json").read_text())
    tokens = _numbers_in(folder / f"{name}.tokens", np.int32)
    starts = np.array(index["starts"], np.int64)
    if not index["written"]:
        return TokenData(tokens, starts, index["chats"])
    written = _numbers_in(folder / f"{name}.written", np.uint8)
    return TokenData(tokens, starts, index["chats"], written)


def _numbers_in(path: Path, dtype: Any) -> npt.NDArray[Any]:
    """Maps a file of numbers; an empty one cannot be mapped."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)
