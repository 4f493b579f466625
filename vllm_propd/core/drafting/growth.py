"""Growing token trees: best-first over the heads' candidates (paper section 3.3).

A node's value is the product of its path's probabilities, each head's taken on its own, or
with heads that know the token before, given that. Popping the most valuable candidate n
times gives the best tree of n nodes, because a child is never worth more than its parent,
nor a lower rank more than a higher one.
Beside the heads a path may have been looked up in the text (``core.drafting.lookup``).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from vllm_propd.core.drafting.candidates import Candidates
from vllm_propd.core.tree import Float32s, Ints, TokenTree

SUREST = 0.999
"""The highest probability of a token: the heads' other candidates share the rest."""


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
def _next_rank(tokens, values, rest, place, seen):  # type: ignore[no-untyped-def]
    """Finds the first rank from ``place`` on whose token is not the looked-up one.

    Returns it and its log probability. Where there is none, the rank is beyond the last.
    """
    ranks = len(tokens)
    if place < ranks and tokens[place] == seen:
        place += 1
    value = values[min(place, ranks - 1)]
    if seen >= 0:
        value += rest
    return place, value


@njit(cache=True, nogil=True)
def _row_after(tokens, next_row, token):  # type: ignore[no-untyped-def]
    """Finds the next head's row for what follows a token; 0 if it is no candidate."""
    for rank in range(len(tokens)):
        if tokens[rank] == token:
            return next_row[rank]
    return 0


@njit(cache=True, nogil=True)
def _grow(  # type: ignore[no-untyped-def]
    tokens, values, next_row, looked_up, worth, rest, sizes,
    token, parent, depth, score, on_path,
):  # fmt: skip
    trees, heads, _, ranks = tokens.shape
    reach, most = looked_up.shape[1], token.shape[1]
    # A node may offer its next sibling, its looked-up child and its head's first one.
    room = 3 * most + 2
    keys = np.empty(room, np.float32)
    entries = np.empty(room, np.int64)
    # What each heap entry would add: (parent node, depth, rank); rank -1 is looked up.
    parents = np.empty(room, np.int64)
    depths = np.empty(room, np.int64)
    rank = np.empty(room, np.int64)
    # The row of its head that speaks of a node's children, by node; the root's first.
    rows = np.zeros(most + 1, np.int64)
    grown = np.zeros(trees, np.int64)
    for tree in range(trees):
        count = made = node = 0
        level = 1
        while True:
            # The children of the newest node, or of the root.
            base = score[tree, node - 1] if node else np.float32(0.0)
            looked = node == 0 or on_path[tree, node - 1]
            seen = looked_up[tree, level - 1] if looked and level <= reach else -1
            if seen >= 0:
                parents[made], depths[made], rank[made] = node, level, -1
                _push(keys, entries, count, base + worth[tree, level - 1], made)
                count, made = count + 1, made + 1
            if level <= heads:
                head, row = level - 1, rows[node]
                place, value = _next_rank(
                    tokens[tree, head, row], values[tree, head, row], rest[tree, head],
                    0, seen,
                )  # fmt: skip
                if place < ranks:
                    parents[made], depths[made], rank[made] = node, level, place
                    _push(keys, entries, count, base + value, made)
                    count, made = count + 1, made + 1
            if node == sizes[tree] or not count:
                break
            key, entry = keys[0], entries[0]
            count -= 1
            keys[0], entries[0] = keys[count], entries[count]
            _sift_down(keys, entries, count)
            above, level, place = parents[entry], depths[entry], rank[entry]
            looked = above == 0 or on_path[tree, above - 1]
            seen = looked_up[tree, level - 1] if looked and level <= reach else -1
            head, row = level - 1, rows[above]
            if place >= 0:
                token[tree, node] = tokens[tree, head, row, place]
                following = next_row[tree, head, row, place]
            else:
                token[tree, node] = seen
                following = 0
                if level <= heads:
                    following = _row_after(
                        tokens[tree, head, row], next_row[tree, head, row], seen
                    )
            parent[tree, node] = above
            depth[tree, node] = level
            score[tree, node] = key
            on_path[tree, node] = place < 0
            node += 1
            rows[node] = following
            if place >= 0:
                place, value = _next_rank(
                    tokens[tree, head, row], values[tree, head, row], rest[tree, head],
                    place + 1, seen,
                )  # fmt: skip
                if place < ranks:
                    base = score[tree, above - 1] if above else np.float32(0.0)
                    parents[made], depths[made], rank[made] = above, level, place
                    _push(keys, entries, count, base + value, made)
                    count, made = count + 1, made + 1
            level += 1
        grown[tree] = node
    return grown


def _shared(
    candidates: Candidates, looked_up: Ints, worth: Float32s
) -> tuple[Float32s, Float32s]:
    """Prices looked-up tokens beside the heads' candidates, and the candidates beside them.

    A token that both offer is worth what the surer of them says. The heads' other tokens
    share what is left, in the proportions that they had.

    Returns:
        Log probabilities like ``worth``; and ``[sequences, heads]`` float32 to add to the
        log probabilities of a head's candidates that have a looked-up sibling.
    """
    rest = np.zeros(candidates.tokens.shape[:2], np.float32)
    both = min(candidates.heads, looked_up.shape[1])
    if not both:
        return worth, rest
    tokens, log_probs = candidates.along(looked_up)
    same = tokens == looked_up[:, :both, None]
    said = np.where(same, np.exp(log_probs), 0.0).sum(-1).clip(max=SUREST)
    surer = np.maximum(np.exp(worth[:, :both]), said).clip(max=SUREST)
    rest[:, :both] = np.log1p(-surer) - np.log1p(-said)
    with np.errstate(divide="ignore"):
        log_surer = np.log(surer).astype(np.float32)
    return np.concatenate([log_surer, worth[:, both:]], 1), rest


def grow(
    tokens: Ints,
    log_probs: Float32s,
    sizes: Ints,
    looked_up: tuple[Ints, Float32s] | None = None,
) -> list[TokenTree]:
    """Grows the best trees from candidates that do not depend on the token before them.

    Args:
        tokens: ``[sequences, heads, ranks]`` int64 candidates of each head, sorted best
            first.
        log_probs: ``[sequences, heads, ranks]`` float32, their log probabilities.
        sizes, looked_up: see ``grow_from``, for what is returned and raised, too.
    """
    if tokens.ndim != 3 or tokens.shape != log_probs.shape:
        raise _misshapen(tokens, log_probs, sizes)
    return grow_from(Candidates.independent(tokens, log_probs), sizes, looked_up)


def grow_from(
    candidates: Candidates,
    sizes: Ints,
    looked_up: tuple[Ints, Float32s] | None = None,
) -> list[TokenTree]:
    """Grows the best tree of the wanted size for each sequence.

    Args:
        candidates: what the heads offer; no log probability is above 0, none above the one
            before it in its row. Otherwise the trees are not the best.
        sizes: ``[sequences]`` int64 wanted nodes; a tree is smaller where there are fewer
            paths. One rank gives a chain.
        looked_up: two arrays ``[sequences, reach]``: a continuation of each sequence,
            int64 tokens, -1 where there is none; and their log probabilities, float32
            (``core.drafting.lookup``).

    Returns:
        One tree per sequence. The same candidates give the same trees on every rank.

    Raises:
        ValueError: no heads, no ranks, or arguments whose shapes disagree.
    """
    tokens, log_probs = candidates.tokens, candidates.log_probs
    agree = tokens.shape == log_probs.shape and sizes.shape == tokens.shape[:1]
    if not agree or 0 in tokens.shape[1:]:
        raise _misshapen(tokens, log_probs, sizes)
    nothing = np.empty((len(tokens), 0))
    path, worth = looked_up or (nothing.astype(np.int64), nothing.astype(np.float32))
    worth, rest = _shared(candidates, path, worth)
    shape = (len(tokens), int(sizes.max(initial=0)))
    token, parent, depth = (np.empty(shape, np.int64) for _ in range(3))
    score = np.empty(shape, np.float32)
    on_path = np.empty(shape, np.bool_)
    grown = _grow(
        tokens, log_probs, candidates.next_row, path, worth, rest, sizes,
        token, parent, depth, score, on_path,
    )  # fmt: skip
    return [
        TokenTree(token[i, :n], parent[i, :n], depth[i, :n], score[i, :n], on_path[i, :n])
        for i, n in enumerate(grown.tolist())
    ]


def _misshapen(tokens: Ints, log_probs: Float32s, sizes: Ints) -> ValueError:
    return ValueError(
        "growth needs at least one head and one rank for each size, not tokens of "
        f"shape {tokens.shape}, log_probs {log_probs.shape}, sizes {sizes.shape}"
    )


def nodes_per_sequence(wanted: int, token_budget: int, sequences: int) -> int:
    """Returns how many nodes the tree of each running sequence may have.

    Roots and drafts together take at most half of a step's token budget: vLLM schedules
    running sequences first, and prompts must not starve behind their trees.

    Args:
        wanted: nodes of a tree, as configured.
        token_budget: tokens that a step may hold (``max_num_batched_tokens``).
        sequences: how many sequences are running.
    """
    return max(0, min(wanted, token_budget // 2 // sequences - 1))
