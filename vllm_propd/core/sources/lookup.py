"""Candidates looked up in the text: what came next when it last ended as it does now.

Not in the paper. vLLM's ``ngram`` method drafts these alone ("prompt lookup"); here they
are one more source of nodes beside the heads, and worth what they have been worth so far. A
match of m tokens whose first continuation comes true is a match of m + 1, so one curve by
length tells what a continuation is worth at every depth. There are curves for texts that
have always gone on alike after their last token, and for others; and for tokens that are a
head's first choice, that are not, and of which no head speaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt
from numba import njit

from vllm_propd.core.compiled import with_parts
from vllm_propd.core.drafting import candidates
from vllm_propd.core.drafting.candidates import SUREST
from vllm_propd.core.tree import Float32s, Ints, TokenTree

TokenMatrix = npt.NDArray[np.int32]

REACH = 16
"""Tokens of a continuation: the deepest that a looked-up node can be."""

LONGEST = 16
"""The longest match, in tokens: longer ones count as if they were of this length."""

SCANNED = 64
"""How many tokens of a text are compared at once."""

UNSAID, SAME, OTHER, SEEN_SAME, SEEN_OTHER = range(5)
"""What is said of a looked-up token: nothing; it is the first choice of the heads; another
is; deeper than the heads, it is the best successor of the token before (``successors``);
another is."""

ONCE, ALIKE, MIXED = 0, 1, 2
"""What has followed earlier uses of the text's last token: one token, once or always
(``ONCE``, ``ALIKE``); or different ones (``MIXED``)."""

ODDS, RISE = (0.5, 1.6, 0.235), 1.4
"""The first belief: the odds that a match of m goes on alike are ``ODDS * m ** RISE``, by
``ONCE``, ``ALIKE`` and ``MIXED``. So it was in 14,147 places of a chat model's answers to
questions of six tasks, and in 5,980 of source code, with hardly a difference."""

TRUST = 8.0
"""The weight of the first belief, in samples."""

MEMORY = 2000.0
"""The number of samples after which an older one's weight is about a third."""


@dataclass(frozen=True)
class LookupMatches:
    """The continuations that were found in the texts of some sequences.

    Attributes:
        token: ``[sequences, REACH]`` int64 the continuation; -1 where none was found.
        match: ``[sequences]`` int64 how many tokens at the text's end stood there before.
        before: ``[sequences]`` int64 ``ONCE``, ``ALIKE`` or ``MIXED``: what has followed
            the text's last token.
    """

    token: Ints
    match: Ints
    before: Ints


@njit(cache=True, nogil=True)
def _may_match(text, start, last, back):  # type: ignore[no-untyped-def]
    """Whether one of ``SCANNED`` tokens may end a match of more than ``back`` tokens.

    That is, whether it is the text's last token, and the token ``back`` places before it is
    the one ``back`` places before the text's last. Compares many at a time.
    """
    here, before = (
        text[start : start + SCANNED],
        text[start - back : start - back + SCANNED],
    )
    found = np.int32(0)
    for i in range(SCANNED):
        found |= np.int32((here[i] == text[last]) & (before[i] == text[last - back]))
    return found != 0


@njit(cache=True, nogil=True)
def _match(text, end, last):  # type: ignore[no-untyped-def]
    """Returns how many tokens up to ``end`` are the same as the text's last ones."""
    length = 0
    while length < LONGEST and length <= end:
        if text[end - length] != text[last - length]:
            break
        length += 1
    return length


@njit(cache=True, nogil=True)
def _look_up(texts, rows, lengths, vocabulary):  # type: ignore[no-untyped-def]
    """Finds each text's latest longest match, and what follows it.

    Where that reaches the text's end, the continuation repeats itself. Where a prompt has
    tokens that the target does not know (placeholders, say), nothing is found.
    """
    token = np.full((len(rows), REACH), -1, np.int64)
    match, before = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    for i in range(len(rows)):
        text, last = texts[rows[i]], lengths[i] - 1
        longest, place, end = 0, 0, lengths[i] - 2
        while end >= 0 and longest < LONGEST:
            # Any match tells of what came before, until that is mixed; then longer ones.
            back = longest if before[i] == MIXED else 0
            start = end - SCANNED + 1
            if start >= back and not _may_match(text, start, last, back):
                end = start - 1
                continue
            while end >= max(start, 0) and longest < LONGEST:
                length = _match(text, end, last)
                if length and longest and before[i] != MIXED:
                    before[i] = ALIKE if text[end + 1] == text[place] else MIXED
                if length > longest:
                    longest, place = length, end + 1
                end -= 1
        match[i] = longest
        if longest:
            for ahead in range(REACH):
                at = place + ahead
                token[i, ahead] = text[at] if at <= last else token[i, at - last - 1]
            if token[i].max() >= vocabulary:
                token[i], match[i] = -1, 0
    return token, match, before


@njit(cache=True, nogil=True)
@with_parts(candidates)
def _worth_of(right, total):  # type: ignore[no-untyped-def]
    """Returns the log probability of a continuation that was right so often, float32."""
    return np.float32(np.log(min(right / total, SUREST)))


@njit(cache=True, nogil=True)
@with_parts(candidates)
def _grade(  # type: ignore[no-untyped-def]
    texts, rows, lengths, index, starts, token, match, before, said, total, right, curves
):
    """Grades the last step's continuations by the texts that came, in place.

    ``total`` and ``right`` count continuations and those that came true, by curve and
    length of match; ``curves`` are the log probabilities that follow from them.
    """
    found = np.zeros((2, 3, 5, LONGEST))
    for i in range(len(rows)):
        j = index[i]
        if j < 0 or not match[j]:
            continue
        start = starts[j]
        for ahead in range(min(lengths[i] - start, REACH)):
            true = texts[rows[i], start + ahead] == token[j, ahead]
            place = min(match[j] + ahead, LONGEST) - 1
            found[0, before[j], UNSAID, place] += 1.0
            found[1, before[j], UNSAID, place] += true
            if said[j, ahead] != UNSAID:
                found[0, before[j], said[j, ahead], place] += 1.0
                found[1, before[j], said[j, ahead], place] += true
            if not true:
                break
    for at in np.ndindex(total.shape):
        if not found[0][at]:
            continue
        fades = np.exp(-found[0][at] / MEMORY)
        total[at] = fades * total[at] + found[0][at]
        right[at] = fades * right[at] + found[1][at]
        curves[at] = _worth_of(right[at], total[at])


@njit(cache=True, nogil=True)
def _worth(token, match, before, first, best, said, curves):  # type: ignore[no-untyped-def]
    """Computes what ``Lookups.worth`` returns; writes ``said`` where something is said."""
    worth = np.full(token.shape, np.float32(-np.inf))
    for i in range(len(match)):
        for ahead in range(min(first.shape[1], REACH)):
            said[i, ahead] = SAME if token[i, ahead] == first[i, ahead] else OTHER
        for ahead in range(first.shape[1], best.shape[1]):
            if best[i, ahead] >= 0:
                same = token[i, ahead] == best[i, ahead]
                said[i, ahead] = SEEN_SAME if same else SEEN_OTHER
        if match[i]:
            for ahead in range(REACH):
                place = min(match[i] + ahead, LONGEST) - 1
                worth[i, ahead] = curves[before[i], said[i, ahead], place]
    return worth


UNASKED = np.empty((0, 0), np.int64)
"""First choices, or best successors, where there are none: an empty matrix."""


@dataclass
class _Waiting:
    """Continuations that wait for their text, by which they are graded."""

    index: dict[str, int]
    lengths: Ints
    found: LookupMatches
    said: Ints


class Lookups:
    """Looks up continuations, and learns what they are worth.

    Args:
        vocabulary: how many tokens the target knows: no others are drafted.
    """

    def __init__(self, vocabulary: int = np.iinfo(np.int32).max) -> None:
        self._vocabulary = vocabulary
        odds = np.outer(ODDS, np.arange(1.0, LONGEST + 1) ** RISE)
        # By what was before, what is said of it, and length.
        self._total = np.full((3, 5, LONGEST), TRUST)
        self._right = TRUST * np.repeat((odds / (odds + 1.0))[:, None], 5, 1)
        worth = np.log(np.minimum(self._right / self._total, SUREST))
        self._curves = worth.astype(np.float32)
        self._waiting: _Waiting | None = None

    def find(
        self, ids: list[str], texts: TokenMatrix, rows: Ints, lengths: Ints
    ) -> LookupMatches:
        """Finds what may come next, and grades what was found in the last step.

        Args:
            ids: ``[sequences]`` request ids.
            texts: ``[rows, width]`` int32 tokens, prompts included.
            rows: ``[sequences]`` int64 row of each one's text.
            lengths: ``[sequences]`` int64 tokens of it.
        """
        self._grade(ids, texts, rows, lengths)
        found = LookupMatches(*_look_up(texts, rows, lengths, self._vocabulary))
        index = {request: i for i, request in enumerate(ids)}
        said = np.zeros(found.token.shape, np.int64)
        self._waiting = _Waiting(index, lengths, found, said)
        return found

    def _grade(self, ids: list[str], texts: TokenMatrix, rows: Ints, lengths: Ints) -> None:
        if (waiting := self._waiting) is None:
            return
        index = np.array([waiting.index.get(request, -1) for request in ids], np.int64)
        found = waiting.found
        _grade(
            texts, rows, lengths, index, waiting.lengths, found.token, found.match,
            found.before, waiting.said, self._total, self._right, self._curves,
        )  # fmt: skip

    def suggested(self, ids: list[str], starts: Ints) -> Ints:
        """Returns what was found last time, if that was for texts as long as these.

        Args:
            ids: ``[sequences]`` request ids.
            starts: ``[sequences]`` int64 tokens of each text at that time.

        Returns:
            ``[sequences, REACH]`` int64 continuations; -1 where there is none.
        """
        found = np.full((len(ids), REACH), -1, np.int64)
        if (waiting := self._waiting) is not None:
            index = np.array([waiting.index.get(request, -1) for request in ids], np.int64)
            same = (index >= 0) & (waiting.lengths[index] == starts)
            found[same] = waiting.found.token[index[same]]
        return found

    def end(self, request_id: str) -> None:
        """Forgets what was found for a text that has ended; another may have its name."""
        if self._waiting is not None:
            self._waiting.index.pop(request_id, None)

    def worth(self, first: Ints | None = None, best: Ints | None = None) -> Float32s:
        """Returns what the continuations that were found last are worth.

        Args:
            first: ``[sequences, heads]`` int64 the heads' first choices; None: no head has
                been asked.
            best: ``[sequences, REACH]`` int64 the best successor of the token before each
                of the continuation's, -1 where none is known; None: none are kept.

        Returns:
            ``[sequences, REACH]`` float32 log probability of each token, those before it
            being right; -inf where nothing was found.
        """
        assert self._waiting is not None
        found = self._waiting.found
        heads = UNASKED if first is None else np.ascontiguousarray(first)
        seen = UNASKED if best is None else best
        worth: Float32s = _worth(
            found.token, found.match, found.before, heads, seen, self._waiting.said,
            self._curves,
        )  # fmt: skip
        return worth


PARENTS = np.arange(REACH)
DEPTHS = PARENTS + 1
LOOKED_UP = np.ones(REACH, np.bool_)
"""The fields of a tree that is a path; all such trees share them."""


class Paths(Sequence[TokenTree]):
    """Trees of looked-up nodes alone: paths, empty where nothing was found.

    A tree is made when it is asked for: most are never verified.

    Args:
        token: ``[sequences, REACH]`` int64 continuations; -1 from where there is none.
        worth: ``[sequences, REACH]`` float32 log probability of each token, those before
            it being right.
        most: the most nodes of each.
    """

    def __init__(self, token: Ints, worth: Float32s, most: int):
        self._token = token
        self._score = worth.cumsum(1, np.float32)
        self._sizes = np.minimum((token >= 0).sum(1), most)

    def __len__(self) -> int:
        return len(self._sizes)

    @overload
    def __getitem__(self, i: int) -> TokenTree: ...
    @overload
    def __getitem__(self, i: slice) -> list[TokenTree]: ...
    def __getitem__(self, i: int | slice) -> TokenTree | list[TokenTree]:
        """Returns the tree of sequence ``i``, or those of a slice."""
        if isinstance(i, slice):
            return [self[one] for one in range(*i.indices(len(self)))]
        n = int(self._sizes[i])
        return TokenTree(
            self._token[i, :n], PARENTS[:n], DEPTHS[:n], self._score[i, :n], LOOKED_UP[:n]
        )

    def scores(self, most: int) -> tuple[Float32s, Ints]:
        """Returns the best nodes' scores, path after path, and how many each path has.

        Args:
            most: the most nodes of a path that count.
        """
        sizes = np.minimum(self._sizes, most)
        return self._score[sizes[:, None] > PARENTS], sizes
