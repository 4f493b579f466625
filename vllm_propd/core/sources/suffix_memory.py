"""A memory of what all requests have said: what came next after the same last tokens.

Not in the paper. A request's own text is searched as a whole (``core.sources.lookup``);
what others have said is kept by context, in a table of fixed size: the last 8, 5, 3 or 2
tokens, and how often which token came next (as the suffix trees of SuffixDecoding, arXiv
2411.04975, count it). The longest context that is known speaks. Every node of a tree is
such a context, so that each branch goes on as texts have gone on there before.

Contexts of different salts never meet (``cache_salt``, as in vLLM's prefix cache). All is
integer arithmetic on tokens and salts, alike on every tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from vllm_propd.core.compiled import with_parts
from vllm_propd.core.drafting.candidates import SUREST
from vllm_propd.core.sources import contexts, lookup
from vllm_propd.core.sources.contexts import NONE, ORDERS, WAYS, learn, recall, shift
from vllm_propd.core.sources.lookup import REACH, TokenMatrix
from vllm_propd.core.tree import Float32s, Ints

SLOTS = 1 << 20
"""How many contexts are kept; each new token makes at most ``len(ORDERS)``."""

AFTER_ROOT, GOING_ON, ASTRAY = range(3)
"""Where a token stands: after a root, where drafts have ended, so that it is harder to
guess; after one that was suggested; or after another, and then the text goes another way
than before."""

FIRST = (
    ((0.60, 0.30, 0.77, 0.95), (0.50, 0.23, 0.50, 0.78),
     (0.43, 0.20, 0.50, 0.72), (0.35, 0.16, 0.47, 0.60)),
    ((0.30, 0.15, 0.30, 0.45), (0.20, 0.15, 0.22, 0.30),
     (0.15, 0.11, 0.20, 0.25), (0.11, 0.10, 0.18, 0.16)),
)  # fmt: skip
"""The first belief: how often a context is right, by what the text itself suggests
(nothing; another token), by order and by how often its token has come next. So it was in
40,000 places of a chat model's answers."""

TRUST = 8.0
"""The weight of the first belief, in samples."""

MEMORY = 2000.0
"""The number of samples after which an older one's weight is about a third."""

Table = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.uint8], Float32s]
"""What is asked of the memory: ``[slots]`` the contexts' marks, ``[slots, WAYS]`` their
next tokens, the most frequent first, ``[slots]`` how often that came; and ``[3, 2, orders,
4]`` log probabilities, by where the next token stands (``AFTER_ROOT``, ...), by whether the
text itself suggests another, by order and by how often."""


@njit(cache=True, nogil=True)
@with_parts(contexts)
def _see(  # type: ignore[no-untyped-def]
    texts, rows, begins, ends, starts, tails, salts, teaches, suggested, marks, tokens,
    often, counts, stamps, clock, found,
):  # fmt: skip
    """Grades what was known before each new token, in ``found``, and counts the token."""
    for i in range(len(rows)):
        text, recent = texts[rows[i]], tails[i]
        on_path, where = True, ASTRAY
        for place in range(begins[i], ends[i]):
            token, ahead = text[place], place - starts[i]
            own = NONE
            if on_path and 0 <= ahead < suggested.shape[1]:
                own = suggested[i, ahead]
            on_path = on_path and own == token
            slot, order = recall(recent, salts[i], marks)
            if slot >= 0 and teaches[i] and tokens[slot, 0] != own:
                at = where if ahead else AFTER_ROOT, int(own != NONE), order, often[slot]
                found[(0, *at)] += 1.0
                found[(1, *at)] += tokens[slot, 0] == token
            expected = own if own != NONE or slot < 0 else np.int64(tokens[slot, 0])
            where = GOING_ON if expected == token else ASTRAY
            clock = learn(
                recent, salts[i], token, marks, tokens, often, counts, stamps, clock
            )
            shift(recent, token)
    return clock


@njit(cache=True, nogil=True)
@with_parts(contexts)
def _along(tails, salts, marks, tokens, path):  # type: ignore[no-untyped-def]
    """Computes what ``Recalled.best_along`` returns."""
    found = np.full(path.shape, NONE, np.int64)
    for i in range(len(tails)):
        recent = tails[i].copy()
        for ahead in range(path.shape[1]):
            slot, _ = recall(recent, salts[i], marks)
            if slot >= 0:
                found[i, ahead] = tokens[slot, 0]
            if path[i, ahead] == NONE:
                break
            shift(recent, path[i, ahead])
    return found


@njit(cache=True, nogil=True)
@with_parts(contexts, lookup)
def _suggest(  # type: ignore[no-untyped-def]
    tails, salts, own, own_worth, marks, tokens, often, curves, vocabulary, path, worth
):
    """Computes what ``SuffixMemory.suggest`` returns, in ``path`` and ``worth``."""
    for i in range(len(tails)):
        recent, on_own = tails[i].copy(), True
        for ahead in range(REACH):
            mine, value = own[i, ahead] if on_own else NONE, -np.inf
            if mine != NONE:
                value = own_worth[i, ahead]
            slot, order = recall(recent, salts[i], marks)
            chosen, where = mine, GOING_ON if ahead else AFTER_ROOT
            # Where they say the same, its own worth knows (``Recalled.best_along``).
            if slot >= 0 and tokens[slot, 0] != mine and tokens[slot, 0] < vocabulary:
                theirs = curves[where, int(mine != NONE), order, often[slot]]
                if theirs > value:
                    chosen, value = np.int64(tokens[slot, 0]), theirs
            if chosen == NONE:
                break
            on_own = chosen == mine
            path[i, ahead], worth[i, ahead] = chosen, value
            shift(recent, chosen)


@dataclass(frozen=True)
class Recalled:
    """The memory, as some sequences may ask it.

    Attributes:
        tails: ``[sequences, ORDERS[0]]`` int64 the last tokens of each, the root first;
            ``NONE`` before its beginning.
        salts: ``[sequences]`` int64.
        table: what is asked.
    """

    tails: Ints
    salts: Ints
    table: Table

    def best_along(self, path: Ints) -> Ints:
        """Returns ``[sequences, reach]`` int64 what others said most often at each place.

        Args:
            path: ``[sequences, reach]`` int64 tokens after each root; -1 from where there
                is none.

        Returns:
            At each place the best token after those before it; -1: none is known.
        """
        marks, tokens, *_ = self.table
        found: Ints = _along(self.tails, self.salts, marks, tokens, path)
        return found


NOTHING = np.empty((0, 0), np.int64)
"""What is looked up where nothing is."""

NOTHING_RECALLED = Recalled(
    np.empty((0, ORDERS[0]), np.int64),
    np.empty(0, np.int64),
    (
        np.empty(0, np.int32),
        np.empty((0, WAYS), np.int32),
        np.empty(0, np.uint8),
        np.empty((3, 2, len(ORDERS), 4), np.float32),
    ),
)
"""Stands where there is no memory."""


def _tails(texts: TokenMatrix, rows: Ints, lengths: Ints) -> Ints:
    """Returns ``[sequences, ORDERS[0]]`` int64 the last tokens of texts, the last first."""
    places = lengths[:, None] - 1 - np.arange(ORDERS[0])
    tails: Ints = texts[rows[:, None], np.maximum(places, 0)].astype(np.int64)
    tails[places < 0] = NONE
    return tails


UNSEEN = (0, 0, 0)
"""Stands for a request of which nothing has been seen: tokens of its text, where its answer
begins, its salt."""


class SuffixMemory:
    """Remembers what all requests have said, and learns what that is worth.

    Args:
        vocabulary: how many tokens the target knows: no others are drafted.
        slots: how many contexts are kept, a power of two; each takes 37 bytes.
    """

    def __init__(self, vocabulary: int, slots: int = SLOTS):
        self._vocabulary = vocabulary
        self._marks = np.zeros(slots, np.int32)
        self._tokens = np.full((slots, WAYS), NONE, np.int32)
        self._counts = np.zeros((slots, WAYS), np.int16)
        self._often = np.zeros(slots, np.uint8)
        self._stamps = np.zeros(slots, np.int64)
        self._clock = 0
        self._seen: dict[str, tuple[int, int, int]] = {}
        self._total = np.full((3, 2, len(ORDERS), 4), TRUST)
        self._right = TRUST * np.tile(FIRST, (3, 1, 1, 1))
        self._curves = self._logs()

    def _logs(self) -> Float32s:
        logs: Float32s = np.log(np.clip(self._right / self._total, 1e-4, SUREST))
        return logs.astype(np.float32)

    def see(
        self,
        ids: list[str],
        texts: TokenMatrix,
        rows: Ints,
        begins: Ints,
        lengths: Ints,
        starts: Ints,
        salts: Ints,
        teaches: npt.NDArray[np.bool_],
        suggested: Ints,
    ) -> None:
        """Takes note of what requests have said since they were last seen.

        Args:
            ids: ``[sequences]`` request ids.
            texts: ``[rows, width]`` int32 tokens, prompts included.
            rows: ``[sequences]`` int64 row of each one's text.
            begins: ``[sequences]`` int64 where its answer begins: a prompt is not kept.
            lengths: ``[sequences]`` int64 tokens of the text.
            starts: ``[sequences]`` int64 tokens before the last step.
            salts: ``[sequences]`` int64 hashes of ``cache_salt``; 0: none.
            teaches: ``[sequences]`` bool whether it says what the target alone would say.
            suggested: ``[sequences, reach]`` int64 what its own text suggested before the
                last step; -1: nothing.
        """
        seen = [self._seen.get(one, UNSEEN)[0] for one in ids]
        new = np.minimum(np.maximum(np.array(seen, np.int64), begins), lengths)
        found = np.zeros((2, *self._total.shape))
        self._clock = _see(
            texts, rows, new, lengths, starts, _tails(texts, rows, new), salts, teaches,
            suggested, self._marks, self._tokens, self._often, self._counts, self._stamps,
            self._clock, found,
        )  # fmt: skip
        places = zip(lengths.tolist(), begins.tolist(), salts.tolist(), strict=True)
        self._seen.update(zip(ids, places, strict=True))
        fades = np.exp(-found[0] / MEMORY)
        self._total = fades * self._total + found[0]
        self._right = fades * self._right + found[1]
        self._curves = self._logs()

    def of(self, texts: TokenMatrix, rows: Ints, lengths: Ints, salts: Ints) -> Recalled:
        """Returns the memory for the next tokens of some texts; see ``see``."""
        table = self._marks, self._tokens, self._often, self._curves
        return Recalled(_tails(texts, rows, lengths), salts, table)

    def suggest(
        self, recalled: Recalled, own: Ints, worth: Float32s
    ) -> tuple[Ints, Float32s]:
        """Returns how texts go on, by their own words or by others', whichever is surer.

        Args:
            recalled: what ``of`` has returned.
            own: ``[sequences, REACH]`` int64 what their own text suggests; -1: nothing.
            worth: ``[sequences, REACH]`` float32 log probability of each such token.

        Returns:
            Both again: -1 and -inf where nothing is known.
        """
        path, value = np.full(own.shape, NONE, np.int64), np.full_like(worth, -np.inf)
        _suggest(
            recalled.tails, recalled.salts, own, worth, *recalled.table, self._vocabulary,
            path, value,
        )  # fmt: skip
        return path, value

    def end(self, request_id: str, answer: Sequence[int]) -> None:
        """Takes note that a text has ended, and of its last words; all are kept.

        Args:
            request_id: the request's id, which a session's turns share.
            answer: all tokens that it has put out.
        """
        length, begins, salt = self._seen.pop(request_id, UNSEEN)
        known = length - begins
        if not length or len(answer) <= known:
            return
        first = max(0, known - ORDERS[0])
        texts, row = np.array([answer[first:]], np.int32), np.zeros(1, np.int64)
        starts, lengths = np.array([known - first]), np.array([texts.shape[1]])
        self._clock = _see(
            texts, row, starts, lengths, starts, _tails(texts, row, starts),
            np.array([salt]), row > 0, NOTHING, self._marks, self._tokens, self._often,
            self._counts, self._stamps, self._clock, np.zeros((2, *self._total.shape)),
        )  # fmt: skip
