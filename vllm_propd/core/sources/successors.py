"""Recycled successors: what the target thought likely after a token when it last read it.

Not in the paper. Every verified row of logits names successors of its token, and all but
one are thrown away. Kept by token, they draft where no head speaks: without heads, and
below the deepest of them (Token Recycling, arXiv 2408.08696, with a fixed tree). Here they
grow trees best-first like all candidates. A successor is worth what such ones have been
worth so far, by its share of the probability among the successors of its token; and each
token that the text takes grades those that were known of the token before it, for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from vllm_propd.core.drafting.candidates import SUREST
from vllm_propd.core.monotone import rising
from vllm_propd.core.sources.suffix_memory import NOTHING, NOTHING_RECALLED, Recalled
from vllm_propd.core.tree import Bools, Float32s, Ints

RANKS = 8
"""How many successors of a token are kept."""

STEEPEST, BINS = 8.0, 32
"""Bins of a successor's log odds, from ``-STEEPEST`` to ``STEEPEST``."""

FIRST = (
    (-1.2, 0.45, 0.15), (-0.5, 0.6, 0.3), (-1.1, 0.45, 0.1),
    (-1.9, 0.45, 0.0), (-2.2, 0.55, 0.0), (-2.8, 0.45, 0.0),
)  # fmt: skip
"""The first belief, by where a token stands: the log odds of a successor that has half of
the share, and how these rise with its log odds, below that and above. So it was in 17,000
places of a chat model's answers to questions of six tasks."""

TRUST = 8.0
"""The weight of the first belief, in samples of each bin."""

MEMORY = 5000.0
"""The number of samples after which an older one's weight is about a third."""

REFRESH = 32
"""The number of samples after which the curves, which move slowly, are made anew."""

AT_ROOT, EXPECTED, SURPRISING = range(3)
"""Where a token stands whose successors are graded: it is the root of a step, where drafts
have ended, so that what follows is harder to guess; or a node that is the best successor of
its parent's token; or another node, and then the text goes another way than before."""

BESIDE = 3
"""Is added where something else is looked up for the same place (``lookup``)."""

UNKNOWN = -1
"""Stands where a token has no successor (yet)."""


@dataclass(frozen=True)
class Successors:
    """Successors of all tokens, and what they are worth to some sequences.

    Attributes:
        token: ``[vocabulary, RANKS]`` int32, the best first; ``UNKNOWN`` at the end.
        bin: ``[vocabulary, RANKS]`` uint8, the bin of each one's log odds.
        worth: ``[sequences, places, BINS]`` float32 log probability of a successor in each
            bin, rising; by where its token stands: ``AT_ROOT``, ...
        roots: ``[sequences]`` int64, the token that each sequence's tree begins with.
        others: what others have said after longer contexts.
    """

    token: npt.NDArray[np.int32]
    bin: npt.NDArray[np.uint8]
    worth: Float32s
    roots: Ints
    others: Recalled = NOTHING_RECALLED


@dataclass(frozen=True)
class ReadTokens:
    """What the target has read in a step, and what it put out; path after path.

    Attributes:
        before: ``[tokens]`` int64 the tokens that it read.
        truth: ``[tokens]`` int64 what it put out after each.
        sequence: ``[tokens]`` int64 whose text it is.
        depth: ``[tokens]`` int64 how deep each was in its tree: 0 for a root.
    """

    before: Ints
    truth: Ints
    sequence: Ints
    depth: Ints


@njit(cache=True, nogil=True)
def _see(  # type: ignore[no-untyped-def]
    token, place, before, truth, sequence, depth, suggested, seen, log_share, kind, found
):  # fmt: skip
    """Grades what was known of each token before, in ``found``, and replaces it."""
    expected, on_path = False, True
    for i in range(len(before)):
        if before[i] >= len(token):  # a prompt's, which the target does not know
            expected = on_path = False
            continue
        known, bins, right = token[before[i]], place[before[i]], truth[i]
        on_path |= depth[i] == 0
        looked_up = -1
        if on_path and depth[i] < suggested.shape[1]:
            looked_up = suggested[sequence[i], depth[i]]
        where = (EXPECTED if expected else SURPRISING) if depth[i] else AT_ROOT
        if looked_up >= 0:
            where += BESIDE
        for rank in range(RANKS):
            if known[rank] == UNKNOWN:
                break
            if kind[sequence[i]] >= 0 and known[rank] != looked_up:
                at = kind[sequence[i]], where, bins[rank]
                found[(0, *at)] += 1.0
                found[(1, *at)] += known[rank] == right
        expected, on_path = known[0] == right, on_path and looked_up == right
        for rank in range(RANKS):
            known[rank] = UNKNOWN
            if rank < seen.shape[1] and np.isfinite(log_share[i, rank]):
                share = min(np.exp(np.float64(log_share[i, rank])), 1.0 - 1e-12)
                odds = np.log(share / (1.0 - share)) if share > 0.0 else -STEEPEST
                bin_ = int((odds + STEEPEST) * (BINS / (2.0 * STEEPEST)))
                known[rank] = seen[i, rank]
                bins[rank] = min(max(bin_, 0), BINS - 1)


class SuccessorTable:
    """Keeps successors of all tokens, and learns what they are worth.

    Args:
        vocabulary: how many tokens the target knows.
    """

    def __init__(self, vocabulary: int):
        self._token = np.full((vocabulary, RANKS), UNKNOWN, np.int32)
        self._bin = np.zeros((vocabulary, RANKS), np.uint8)
        said = (np.arange(BINS) + 0.5) * (2.0 * STEEPEST / BINS) - STEEPEST
        odds = np.stack(
            [at + np.where(said < 0, low, high) * said for at, low, high in FIRST]
        )
        # By kind of request, greedy and sampled; by where the token stands; by bin.
        self._total = np.full((2, *odds.shape), TRUST)
        self._right = TRUST * np.tile(1.0 / (1.0 + np.exp(-odds)), (2, 1, 1))
        self._worth, self._news = self._curves(), 0

    def see(
        self,
        read: ReadTokens,
        seen: npt.NDArray[np.integer],
        log_share: Float32s,
        kind: Ints,
        suggested: Ints = NOTHING,
    ) -> None:
        """Takes note of what the target has said of the tokens that it has read.

        Args:
            read: the tokens.
            seen: ``[tokens, ranks]`` integer successors, best first.
            log_share: ``[tokens, ranks]`` float32 log of their shares of what these have of
                the probability; what is not finite is not a successor.
            kind: ``[sequences]`` int64 the kind of request: 0 greedy, 1 sampled; -1: one
                that teaches nothing.
            suggested: ``[sequences, reach]`` int64 what was looked up before the step; -1:
                nothing.
        """
        found = np.zeros((2, *self._total.shape))
        _see(
            self._token, self._bin, read.before, read.truth, read.sequence, read.depth,
            suggested, seen, log_share, kind, found,
        )  # fmt: skip
        fades = np.exp(-found[0] / MEMORY)
        self._total = fades * self._total + found[0]
        self._right = fades * self._right + found[1]
        self._news += len(read.before)
        if self._news >= REFRESH:
            self._worth, self._news = self._curves(), 0

    def _curves(self) -> Float32s:
        right, total = self._right.reshape(-1, BINS), self._total.reshape(-1, BINS)
        shares = [rising(r / t, t) for r, t in zip(right, total, strict=True)]
        logs = np.log(np.clip(np.stack(shares), 1e-6, SUREST)).astype(np.float32)
        return logs.reshape(self._total.shape)

    def best_along(self, roots: Ints, path: Ints) -> Ints:
        """Returns ``[sequences, reach]`` int64 the best successor before each token.

        Args:
            roots: ``[sequences]`` int64 tokens.
            path: ``[sequences, reach]`` int64 tokens after each; -1 where there is none.

        Returns:
            At each place the best successor of the token before it; -1: none is known.
        """
        before = np.concatenate([roots[:, None], path[:, :-1]], 1)
        found: Ints = np.where(before < 0, UNKNOWN, self._token[before, 0]).astype(np.int64)
        return found

    def after(
        self, roots: Ints, sampled: Bools, others: Recalled = NOTHING_RECALLED
    ) -> Successors:
        """Returns the successors for sequences that end with ``roots``.

        Args:
            roots: ``[sequences]`` int64 tokens.
            sampled: ``[sequences]`` bool whether a request samples; else it is greedy.
            others: what others have said, for the same sequences.
        """
        worth = self._worth[sampled.astype(np.int64)]
        return Successors(self._token, self._bin, worth, roots, others)
