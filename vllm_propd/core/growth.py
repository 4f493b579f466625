"""Growing token trees: best-first over the heads' candidates (paper section 3.3).

A node's value is the product of its path's probabilities, each head's taken on its own.
Popping the most valuable candidate n times gives the best tree of n nodes, because a
child is never worth more than its parent, nor a lower rank more than a higher one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from vllm_propd.core.tree import Ints, TokenTree


@njit(cache=True, nogil=True)
def _sift_down(keys, entries, count):  # type: ignore[no-untyped-def]
    """Restores the heap (largest key first; of equal keys the older entry)."""
    at = 0
    while True:
        child = 2 * at + 1
        if child >= count:
            return
        right = child + 1
        if right < count and (
            keys[right] > keys[child]
            or (keys[right] == keys[child] and entries[right] < entries[child])
        ):
            child = right
        if keys[at] > keys[child] or (
            keys[at] == keys[child] and entries[at] < entries[child]
        ):
            return
        keys[at], keys[child] = keys[child], keys[at]
        entries[at], entries[child] = entries[child], entries[at]
        at = child


@njit(cache=True, nogil=True)
def _push(keys, entries, count, key, entry):  # type: ignore[no-untyped-def]
    at = count
    keys[at], entries[at] = key, entry
    while at:
        parent = (at - 1) // 2
        if keys[parent] > keys[at] or (
            keys[parent] == keys[at] and entries[parent] < entries[at]
        ):
            return
        keys[at], keys[parent] = keys[parent], keys[at]
        entries[at], entries[parent] = entries[parent], entries[at]
        at = parent


@njit(cache=True, nogil=True)
def _grow(tokens, values, sizes, token, parent, depth, score):  # type: ignore[no-untyped-def]
    trees, heads, ranks = tokens.shape
    most = token.shape[1]
    keys = np.empty(2 * most + 2, np.float32)
    entries = np.empty(2 * most + 2, np.int64)
    # What each heap entry would add: (parent node, depth, rank).
    parents = np.empty(2 * most + 2, np.int64)
    depths = np.empty(2 * most + 2, np.int64)
    rank = np.empty(2 * most + 2, np.int64)
    grown = np.zeros(trees, np.int64)
    for tree in range(trees):
        parents[0], depths[0], rank[0] = 0, 1, 0
        keys[0], entries[0] = values[tree, 0, 0], 0
        count, made, node = 1, 1, 0
        while node < sizes[tree] and count:
            key, entry = keys[0], entries[0]
            count -= 1
            keys[0], entries[0] = keys[count], entries[count]
            _sift_down(keys, entries, count)
            above, level, place = parents[entry], depths[entry], rank[entry]
            token[tree, node] = tokens[tree, level - 1, place]
            parent[tree, node] = above
            depth[tree, node] = level
            score[tree, node] = key
            node += 1
            if place + 1 < ranks:
                base = score[tree, above - 1] if above else np.float32(0.0)
                parents[made], depths[made], rank[made] = above, level, place + 1
                _push(
                    keys,
                    entries,
                    count,
                    base + values[tree, level - 1, place + 1],
                    made,
                )
                count, made = count + 1, made + 1
            if level < heads:
                parents[made], depths[made], rank[made] = node, level + 1, 0
                _push(keys, entries, count, key + values[tree, level, 0], made)
                count, made = count + 1, made + 1
        grown[tree] = node
    return grown


def grow(tokens: Ints, log_probs: npt.NDArray[np.float32], sizes: Ints) -> list[TokenTree]:
    """The best tree of the wanted size for each sequence.

    Args:
        tokens: ``[sequences, heads, ranks]`` int64 candidates of each head, sorted best
            first.
        log_probs: ``[sequences, heads, ranks]`` float32, their log probabilities: none
            above 0, none above the one before it. Otherwise the trees are not the best.
        sizes: ``[sequences]`` int64 wanted nodes; a tree is smaller where the heads
            offer fewer paths. One rank gives a chain.

    Returns:
        One tree per sequence. The same candidates give the same trees on every rank.

    Raises:
        ValueError: no heads, no ranks, or arguments whose shapes disagree.
    """
    agree = tokens.shape == log_probs.shape and sizes.shape == tokens.shape[:1]
    if not agree or 0 in tokens.shape[1:]:
        raise ValueError(
            "growth needs at least one head and one rank for each size, not tokens of "
            f"shape {tokens.shape}, log_probs {log_probs.shape}, sizes {sizes.shape}"
        )
    shape = (len(tokens), int(sizes.max(initial=0)))
    token, parent, depth = (np.empty(shape, np.int64) for _ in range(3))
    score = np.empty(shape, np.float32)
    grown = _grow(tokens, log_probs, sizes, token, parent, depth, score)
    return [
        TokenTree(token[i, :n], parent[i, :n], depth[i, :n], score[i, :n])
        for i, n in enumerate(grown.tolist())
    ]


def nodes_per_sequence(wanted: int, token_budget: int, sequences: int) -> int:
    """The tree size that each of the running sequences may have.

    Roots and drafts together take at most half of a step's token budget: vLLM schedules
    running sequences first, and prompts must not starve behind their trees.

    Args:
        wanted: nodes, as configured.
        token_budget: tokens that a step may hold (``max_num_batched_tokens``).
        sequences: how many are running.
    """
    return max(0, min(wanted, token_budget // 2 // sequences - 1))
