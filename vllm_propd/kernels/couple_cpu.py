"""Heads that know the token before, on the CPU: two loops, not forty of torch's steps.

Each of torch's steps takes longer to begin than to compute: together a third of what
asking heads took. The first loop finds each head's best tokens, the second one scores pairs
of them (``heads.transition``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numba import njit, prange

from vllm_propd.core.compiled import with_parts
from vllm_propd.kernels import best_tokens, exponentials, gemm, row_maximum
from vllm_propd.kernels.best_tokens import best_into
from vllm_propd.kernels.exponentials import exponentiate
from vllm_propd.kernels.row_maximum import largest

if TYPE_CHECKING:
    from vllm_propd.core.tree import Float32s, Ints

MOST = np.float32(1.0 - 1e-6)
"""The most of a head's probability that its candidates count as having."""


@njit(parallel=True, cache=True, nogil=True)
@with_parts(best_tokens, exponentials, gemm, row_maximum)
def _best_of_heads(logits, term, best, places, total):  # type: ignore[no-untyped-def]
    """Finds each head's best tokens, sorted, and the log of the sum of exponentials."""
    heads, sequences, tokens = logits.shape
    ranks, zero = best.shape[2], np.zeros(1, np.int64)
    for item in prange(heads * sequences):
        head, sequence = item // sequences, item % sequences
        row = np.empty((1, tokens), np.float32)
        for token in range(tokens):
            row[0, token] = logits[head, sequence, token]
        if not head:  # there is one token before the first head's: it is known exactly
            for token in range(tokens):
                row[0, token] += term[sequence, token]
        # Of a row without numbers any tokens: they say that they are impossible.
        found, said = np.empty((1, ranks), np.int64), np.empty((1, ranks), np.float32)
        for rank in range(ranks):
            found[0, rank], said[0, rank] = rank, -np.inf
        best_into(row, zero, found, said)
        for rank in range(ranks):
            places[head, sequence, rank], best[head, sequence, rank] = (
                found[0, rank], said[0, rank],
            )  # fmt: skip
        maximum = largest(row, 0, tokens)
        whole = exponentiate(row[0], tokens, maximum)
        total[head, sequence] = maximum + np.log(whole)


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _product(one, other):  # type: ignore[no-untyped-def]
    found = np.float32(0.0)
    for i in range(len(one)):
        found += one[i] * other[i]
    return found


@njit(cache=True, nogil=True)
def _log_sum(values):  # type: ignore[no-untyped-def]
    """Returns the log of the sum of the exponentials."""
    most = values.max()
    return most + np.log(np.exp(values - most).sum())


@njit(cache=True, nogil=True)
def _sorted_into(values, known, tokens, said, order):  # type: ignore[no-untyped-def]
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
            _sorted_into(own - whole, here, out[0][0], out[1][0], out[2][0])
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
                _sorted_into(row - norm, here, out[0][i + 1], out[1][i + 1], out[2][i + 1])


def couple(
    logits: Float32s,
    term: Float32s,
    ranks: int,
    successors: Ints,
    before: Float32s,
    after: Float32s,
    parents: int,
) -> tuple[Ints, Float32s, Ints]:
    """Returns the candidates of each head after each candidate of the one before.

    Args:
        logits: ``[heads, sequences, tokens]`` float32, the heads' own.
        term: ``[sequences, tokens]`` float32 what the roots add to the first head's.
        ranks: the most candidates after one token.
        successors: ``[tokens, successors]`` int64 each token's best by the term alone.
        before, after: ``[tokens, rank]`` float32 the term's tables.
        parents: how many of a head's best have successors.

    Returns:
        Tokens int64, log probabilities float32 and next rows int64, each ``[sequences,
        heads, rows, ranks]`` (``core.drafting.candidates.Candidates``).
    """
    heads, sequences = logits.shape[:2]
    best = np.empty((heads, sequences, ranks), np.float32)
    places = np.empty((heads, sequences, ranks), np.int64)
    total = np.empty((heads, sequences), np.float32)
    _best_of_heads(logits, term, best, places, total)
    size = ranks + min(parents, ranks) * successors.shape[1]
    shape = (sequences, heads, 1 + size, ranks)
    tokens, next_row = np.empty(shape, np.int64), np.empty(shape, np.int64)
    said = np.empty(shape, np.float32)
    _couple(
        logits, best, places, total, successors, before, after, tokens, said, next_row
    )  # fmt: skip
    return tokens, said, next_row
