"""Scoring pairs of candidates on the CPU (``transition``): one loop, not thirty steps.

Each of torch's steps takes longer to begin than to compute: together a third of what
asking heads took.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numba import njit

if TYPE_CHECKING:
    from vllm_propd.core.tree import Float32s, Ints

MOST = np.float32(1.0 - 1e-6)
"""The most of a head's probability that its candidates count as having."""


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _product(one, other):  # type: ignore[no-untyped-def]
    found = np.float32(0.0)
    for i in range(len(one)):
        found += one[i] * other[i]
    return found


@njit(cache=True, nogil=True)
def _log_sum(values):  # type: ignore[no-untyped-def]
    """Returns the log of the sum of the exponentials."""
    largest = values.max()
    return largest + np.log(np.exp(values - largest).sum())


@njit(cache=True, nogil=True)
def _best_into(values, known, tokens, said, order):  # type: ignore[no-untyped-def]
    """Writes the best of some candidates, sorted; of equal ones the first stands first."""
    places = np.argsort(-values, kind="mergesort")
    for rank in range(len(tokens)):
        tokens[rank], said[rank] = known[places[rank]], values[places[rank]]
        order[rank] = places[rank] + 1


@njit(cache=True, nogil=True)
def _couple(  # type: ignore[no-untyped-def]
    logits, best, places, total, successors, before, after, tokens, said, next_row
):  # fmt: skip
    heads, sequences, ranks = best.shape
    size = tokens.shape[2] - 1
    known = np.empty((2, size), np.int64)  # of the head before, and of this one
    own, row = np.empty(size, np.float32), np.empty(size, np.float32)
    for sequence in range(sequences):
        for head in range(heads):
            last, here = known[(head + 1) % 2], known[head % 2]
            whole = total[head, sequence]
            for i in range(ranks):
                here[i], own[i] = places[head, sequence, i], best[head, sequence, i]
            for i in range(ranks, size):
                # The first head needs none: it has the best of all tokens already.
                here[i] = here[0]
                if head:
                    parent, which = divmod(i - ranks, successors.shape[1])
                    here[i] = successors[places[head - 1, sequence, parent], which]
                own[i] = logits[head, sequence, here[i]]
                for j in range(i):
                    if here[j] == here[i]:
                        own[i] = -np.inf
            out = tokens[sequence, head], said[sequence, head], next_row[sequence, head]
            # Row 0: after a token that has no row of its own.
            _best_into(own - whole, here, out[0][0], out[1][0], out[2][0])
            if not head:
                for i in range(1, size + 1):
                    out[0][i], out[1][i], out[2][i] = out[0][0], out[1][0], out[2][0]
                continue
            share = min(np.exp(own - whole).sum(), MOST)
            others = whole + np.log1p(-share)
            for i in range(size):
                for j in range(size):
                    row[j] = own[j] + _product(before[last[i]], after[here[j]])
                norm = np.logaddexp(_log_sum(row), others)
                _best_into(row - norm, here, out[0][i + 1], out[1][i + 1], out[2][i + 1])


def couple(
    logits: Float32s,
    best: Float32s,
    places: Ints,
    total: Float32s,
    successors: Ints,
    parents: int,
    before: Float32s,
    after: Float32s,
) -> tuple[Ints, Float32s, Ints]:
    """Returns the candidates of each head after each candidate of the one before.

    Args:
        logits: ``[heads, sequences, tokens]`` float32, the first head's with the root's
            term.
        best, places: ``[heads, sequences, ranks]`` float32 the best of them, sorted, and
            int64 their tokens.
        total: ``[heads, sequences]`` float32 log of the sum of all exponentials.
        successors: ``[tokens, successors]`` int64 each token's best by the term alone.
        parents: how many of a head's best have successors.
        before, after: ``[tokens, rank]`` float32 the term's tables.

    Returns:
        Tokens int64, log probabilities float32 and next rows int64, each ``[sequences,
        heads, rows, ranks]`` (``core.drafting.candidates.Candidates``).
    """
    heads, sequences, ranks = best.shape
    size = ranks + min(parents, ranks) * successors.shape[1]
    shape = (sequences, heads, 1 + size, ranks)
    tokens, next_row = np.empty(shape, np.int64), np.empty(shape, np.int64)
    said = np.empty(shape, np.float32)
    _couple(
        logits, best, places, total, successors, before, after, tokens, said, next_row
    )  # fmt: skip
    return tokens, said, next_row
