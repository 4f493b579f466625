"""Growing token trees: best-first over the heads' candidates (paper section 3.3).

A node's value is the product of its path's probabilities, each head's taken on its own, or
with heads that know the token before, given that. Popping the most valuable candidate n
times gives the best tree of n nodes, because a child is never worth more than its parent,
nor a lower rank more than a higher one.
Beside the heads a path may have been looked up in the text (``core.sources.lookup``); and
deeper than they speak, what the target has named (``successors``) and others have said
(``suffix_memory``) after the same tokens.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from vllm_propd.core.compiled import with_parts
from vllm_propd.core.drafting.candidates import Candidates
from vllm_propd.core.drafting.same_places import priced_together
from vllm_propd.core.sources import contexts, successors, suffix_memory
from vllm_propd.core.sources.contexts import NONE, ORDERS, recall
from vllm_propd.core.sources.successors import (
    AT_ROOT,
    BESIDE,
    BINS,
    EXPECTED,
    RANKS,
    SURPRISING,
    UNKNOWN,
    Successors,
)
from vllm_propd.core.sources.suffix_memory import ASTRAY, GOING_ON
from vllm_propd.core.tree import Float32s, Ints, TokenTree

LookedUp = tuple[Ints, Float32s]
"""Continuations ``[sequences, reach]``: int64 tokens, -1 where there is none; and float32
log probabilities."""

DEEPEST = 16
"""The deepest node that a successor can be."""

LEAST = 0.01
"""The least probability of a path that ends with a successor: others never pay."""


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
def _next_rank(tokens, values, place, seen):  # type: ignore[no-untyped-def]
    """Finds the first rank from ``place`` on whose token is not the looked-up one.

    Returns it and its log probability; -1 where there is none.
    """
    if place < len(tokens) and tokens[place] == seen:
        place += 1
    if place >= len(tokens):
        return -1, np.float32(0.0)
    return place, values[place]


@njit(cache=True, nogil=True)
@with_parts(successors)
def _next_successor(tokens, bins, of_bin, place, seen):  # type: ignore[no-untyped-def]
    """Finds the first successor from ``place`` on, as ``_next_rank`` does."""
    if place < len(tokens) and tokens[place] == seen:
        place += 1
    if place >= len(tokens) or tokens[place] == UNKNOWN:
        return -1, np.float32(0.0)
    return place, of_bin[bins[place]]


@njit(cache=True, nogil=True)
def _row_after(tokens, next_row, token):  # type: ignore[no-untyped-def]
    """Finds the next head's row for what follows a token; 0 if it is no candidate."""
    for rank in range(len(tokens)):
        if tokens[rank] == token:
            return next_row[rank]
    return 0


@njit(cache=True, nogil=True)
@with_parts(contexts)
def _remembered(  # type: ignore[no-untyped-def]
    token, parent, node, where, tail, salt, vocabulary, marks, remembered, often, curves
):
    """Recalls what others have said after a node, and its log probability; -1: nothing."""
    recent, at, depth = np.empty(ORDERS[0], np.int64), node, 0
    for back in range(len(recent)):
        if at:
            recent[back], at, depth = token[at - 1], parent[at - 1], depth + 1
        else:
            recent[back] = tail[back - depth]
    slot, order = recall(recent, salt, marks)
    if slot < 0 or remembered[slot, 0] >= vocabulary:
        return NONE, np.float32(0.0)
    return remembered[slot, 0], curves[where, 0, order, often[slot]]


@njit(cache=True, nogil=True)
@with_parts(contexts, successors, suffix_memory)
def _grow(  # type: ignore[no-untyped-def]
    tokens, values, next_row, looked_up, worth, rest, roots, after, bins, of_bin, sizes,
    tails, salts, marks, remembered, often, curves, token, parent, depth, score, on_path,
):  # fmt: skip
    trees, heads = tokens.shape[:2]
    reach, most = looked_up.shape[1], token.shape[1]
    deepest, least = DEEPEST if len(after) else 0, np.float32(np.log(LEAST))
    # A node may offer its next sibling, its looked-up child and its source's first one.
    room = 3 * most + 2
    keys = np.empty(room, np.float32)
    entries = np.empty(room, np.int64)
    # What each heap entry would add: (parent node, depth, rank); rank -1 is looked up, or
    # what others have said.
    parents = np.empty(room, np.int64)
    depths = np.empty(room, np.int64)
    ranks = np.empty(room, np.int64)
    # Where candidates for a node's children stand, the root's first: in that row of their
    # head's; or, deeper than the heads speak, after that token.
    rows = np.zeros(most + 1, np.int64)
    stands = np.full(most + 1, AT_ROOT)
    # What others have said after a node that is not on the looked-up path.
    said = np.full(most + 1, NONE, np.int64)
    said_worth = np.zeros(most + 1, np.float32)
    grown = np.zeros(trees, np.int64)
    for tree in range(trees):
        rows[0] = 0 if heads else roots[tree]
        count = made = node = 0
        above, level, rank = 0, 0, -1
        while True:
            # The newest node's next sibling, and its first children, or the root's.
            for children in range(rank < 0, 2):
                owner, at, place = above, level, rank + 1
                if children:
                    owner, at, place = node, level + 1, 0
                base = score[tree, owner - 1] if owner else np.float32(0.0)
                looked = owner == 0 or on_path[tree, owner - 1]
                seen, surest = said[owner], said_worth[owner]
                if looked:
                    seen = NONE
                    if at <= reach:
                        seen, surest = looked_up[tree, at - 1], worth[tree, at - 1]
                if seen >= 0 and children:
                    parents[made], depths[made], ranks[made] = owner, at, -1
                    _push(keys, entries, count, base + surest, made)
                    count, made = count + 1, made + 1
                row, found, value = rows[owner], -1, np.float32(0.0)
                if at <= heads:
                    found, value = _next_rank(
                        tokens[tree, at - 1, row], values[tree, at - 1, row], place, seen
                    )
                    if seen >= 0:
                        value += rest[tree, at - 1]
                elif at <= deepest:
                    where = stands[owner] + (BESIDE if seen >= 0 else 0)
                    found, value = _next_successor(
                        after[row], bins[row], of_bin[tree, where], place, seen
                    )
                if found >= 0 and (at <= heads or base + value >= least):
                    parents[made], depths[made], ranks[made] = owner, at, found
                    _push(keys, entries, count, base + value, made)
                    count, made = count + 1, made + 1
            if node == sizes[tree] or not count:
                break
            key, entry = keys[0], entries[0]
            count -= 1
            keys[0], entries[0] = keys[count], entries[count]
            _sift_down(keys, entries, count)
            above, level, rank = parents[entry], depths[entry], ranks[entry]
            row, following = rows[above], 0
            looked = rank < 0 and (above == 0 or on_path[tree, above - 1])
            if rank < 0:
                chosen = looked_up[tree, level - 1] if looked else said[above]
                if level <= heads:
                    following = _row_after(
                        tokens[tree, level - 1, row], next_row[tree, level - 1, row], chosen
                    )
            elif level <= heads:
                chosen = tokens[tree, level - 1, row, rank]
                following = next_row[tree, level - 1, row, rank]
            else:
                chosen = np.int64(after[row, rank])
            token[tree, node], parent[tree, node] = chosen, above
            depth[tree, node], score[tree, node] = level, key
            on_path[tree, node] = looked
            node += 1
            rows[node] = following if level < heads else chosen
            said[node] = NONE
            if len(marks) and heads <= level < deepest and not looked:
                said[node], said_worth[node] = _remembered(
                    token[tree], parent[tree], node, GOING_ON if rank < 0 else ASTRAY,
                    tails[tree], salts[tree], len(after), marks, remembered, often, curves,
                )  # fmt: skip
            if deepest:
                before = token[tree, above - 1] if above else roots[tree]
                stands[node] = EXPECTED if after[before, 0] == chosen else SURPRISING
        grown[tree] = node
    return grown


NO_SUCCESSORS = Successors(
    np.empty((0, RANKS), np.int32), np.empty((0, RANKS), np.uint8),
    np.empty((0, 2 * BESIDE, BINS), np.float32), np.empty(0, np.int64),
)  # fmt: skip
"""Stands where no successors are known of any token."""


def grow(
    tokens: Ints,
    log_probs: Float32s,
    sizes: Ints,
    looked_up: LookedUp | None = None,
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
    looked_up: LookedUp | None = None,
    successors: Successors | None = None,
) -> list[TokenTree]:
    """Grows the best tree of the wanted size for each sequence.

    Args:
        candidates: what the heads offer; no log probability is above 0, none above the one
            before it in its row. Otherwise the trees are not the best.
        sizes: ``[sequences]`` int64 wanted nodes; a tree is smaller where there are fewer
            paths. One rank gives a chain.
        looked_up: a continuation of each sequence (``core.sources.lookup``); None: none.
        successors: what may follow the tokens deeper than the heads speak; None: nothing.

    Returns:
        One tree per sequence. The same candidates give the same trees on every rank.

    Raises:
        ValueError: neither heads nor successors, no ranks, or arguments whose shapes
            disagree.
    """
    tokens, log_probs = candidates.tokens, candidates.log_probs
    agree = tokens.shape == log_probs.shape and sizes.shape == tokens.shape[:1]
    speaks = tokens.shape[1] or successors is not None
    if not agree or not speaks or 0 in tokens.shape[2:]:
        raise _misshapen(tokens, log_probs, sizes)
    nothing = np.empty((len(tokens), 0))
    path, worth = looked_up or (nothing.astype(np.int64), nothing.astype(np.float32))
    worth, rest = priced_together(candidates, path, worth)
    known = successors or NO_SUCCESSORS
    shape = (len(tokens), int(sizes.max(initial=0)))
    token, parent, depth = (np.empty(shape, np.int64) for _ in range(3))
    score = np.empty(shape, np.float32)
    on_path = np.empty(shape, np.bool_)
    others = known.others
    grown = _grow(
        tokens, log_probs, candidates.next_row, path, worth, rest, known.roots, known.token,
        known.bin, known.worth, sizes, others.tails, others.salts, *others.table, token,
        parent, depth, score, on_path,
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
