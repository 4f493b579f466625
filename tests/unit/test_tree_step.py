"""One step's trees: what is left after pruning, against a rebuild node by node."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_trees import random_tree

from vllm_propd.core.tree import ancestor_masks
from vllm_propd.engine.step.tree_step import TreeStep, build_step

GROUPS = 2
OF_TREES = ("request", "root_position", "first", "sizes")
OF_ROWS = ("rows", "parent", "depth", "token", "masks")
relaxed = settings(deadline=None, max_examples=60)
seeds = st.integers(0, 2**32 - 1)
shares = st.sampled_from([0.0, 0.3, 0.7, 0.95, 1.0])
requests = st.lists(st.integers(0, 90), min_size=1, max_size=5).filter(any)
"""Drafted nodes of each request; none where it has no tree."""


def random_step(nodes: list[int], seed: int) -> TreeStep:
    """A step of requests in any order, some with a tree and some with a few rows only."""
    rng = np.random.default_rng(seed)
    trees = {f"r{at}": random_tree(rng, count) for at, count in enumerate(nodes) if count}
    counts = [count + 1 if count else int(rng.integers(1, 4)) for count in nodes]
    scheduled = {name: trees[name].token.tolist() for name in rng.permutation([*trees])}
    step = build_step(
        scheduled,
        trees,
        {f"r{at}": at for at in range(len(nodes))},
        np.cumsum(counts),
        rng.integers(0, 500, len(nodes)),
        np.array(counts),
    )
    assert step is not None
    rows = len(step.rows)
    slots = (torch.from_numpy(rng.permutation(9999)[:rows]) for _ in range(GROUPS))
    return step.on_device({}, tuple(slots))


def random_choice(step: TreeStep, share: float, seed: int) -> np.ndarray:
    """Nodes to keep, closed under parents."""
    rng = np.random.default_rng(seed)
    kept = rng.random(len(step.rows)) < share
    for row, parent in enumerate(step.parent_row):
        kept[row] = step.is_root[row] or (kept[row] and kept[parent])
    return kept


def pruned(step: TreeStep, kept: np.ndarray) -> TreeStep:
    left = step.keep(kept, 5 + np.arange(kept.sum()))
    left = left.on_device({}, tuple(slots[left.slot_rows] for slots in step.slots))
    return left


def path(step: TreeStep, row: int) -> list[int]:
    """Rows from the root's child down to ``row``, by the parents' node numbers."""
    first = step.first[np.searchsorted(step.first, row, side="right") - 1]
    rows: list[int] = []
    while row != first:
        rows.append(row)
        row = int(first + step.parent[row])
        assert first <= row < rows[-1]
    return rows[::-1]


def mask_bits(step: TreeStep) -> np.ndarray:
    return np.unpackbits(step.masks.view(np.uint8), axis=1, bitorder="little")


def assert_same(one: TreeStep, other: TreeStep) -> None:
    for name in OF_TREES + OF_ROWS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name)
    for slots, expected in zip(one.slots, other.slots, strict=True):
        assert torch.equal(slots, expected)


@relaxed
@given(requests, seeds)
def test_rows_know_their_tree_node_and_parent(nodes: list[int], seed: int) -> None:
    step = random_step(nodes, seed)
    rows = [(tree, node) for tree, size in enumerate(step.sizes) for node in range(size)]
    assert list(zip(step.tree, step.node, strict=True)) == rows
    starts = {tree: at for at, (tree, node) in enumerate(rows) if not node}
    parents = [starts[t] + step.parent[at] for at, (t, _) in enumerate(rows)]
    assert step.parent_row.tolist() == parents
    assert all(step.parent_row[first] == first for first in step.first)


@relaxed
@given(requests, shares, seeds)
def test_kept_nodes_have_their_paths_and_positions(
    nodes: list[int], share: float, seed: int
) -> None:
    step = random_step(nodes, seed)
    kept = random_choice(step, share, seed)
    left = pruned(step, kept)
    old = np.flatnonzero(kept)
    for row, was in enumerate(old):
        before, after = path(step, int(was)), path(left, row)
        assert old[after].tolist() == before
        np.testing.assert_array_equal(left.token[after], step.token[before])
        assert left.depth[row] == len(after)
    np.testing.assert_array_equal(left.token, step.token[old])
    np.testing.assert_array_equal(left.positions(), step.positions()[old])
    np.testing.assert_array_equal(left.tree, step.tree[old])
    np.testing.assert_array_equal(left.rows, 5 + np.arange(len(old)))


@relaxed
@given(requests, shares, seeds)
def test_kept_nodes_see_their_ancestors(nodes: list[int], share: float, seed: int) -> None:
    step = random_step(nodes, seed)
    kept = random_choice(step, share, seed)
    left = pruned(step, kept)
    rebuilt = ancestor_masks(left.parent, left.first, left.sizes)
    np.testing.assert_array_equal(left.masks, rebuilt)
    before, after = mask_bits(step), mask_bits(left)
    for first, size, now, count in zip(
        step.first, step.sizes, left.first, left.sizes, strict=True
    ):
        nodes_kept = np.flatnonzero(kept[first : first + size])
        expected = before[np.ix_(first + nodes_kept, nodes_kept)]
        found = after[now : now + count]
        np.testing.assert_array_equal(found[:, :count], expected)
        assert not found[:, count:].any()


@relaxed
@given(requests, shares, seeds)
def test_a_kept_path_finds_the_slots_of_its_positions(
    nodes: list[int], share: float, seed: int
) -> None:
    step = random_step(nodes, seed)
    left = pruned(step, random_choice(step, share, seed))
    for before, after in zip(step.slots, left.slots, strict=True):
        assert len(after) == len(left.rows)
        for tree, depth in zip(left.tree, left.depth, strict=True):
            assert after[left.first[tree] + depth] == before[step.first[tree] + depth]


@relaxed
@given(requests, seeds)
def test_keeping_everything_changes_nothing(nodes: list[int], seed: int) -> None:
    step = random_step(nodes, seed)
    left = step.keep(np.ones(len(step.rows), np.bool_), step.rows)
    left = left.on_device({}, tuple(slots[left.slot_rows] for slots in step.slots))
    assert_same(left, step)
    assert left.trees is step.trees


@relaxed
@given(requests, seeds)
def test_roots_may_be_all_that_is_left(nodes: list[int], seed: int) -> None:
    step = random_step(nodes, seed)
    left = pruned(step, step.is_root)
    trees = len(step.trees)
    assert left.first.tolist() == [*range(trees)] and left.sizes.tolist() == [1] * trees
    assert not left.parent.any() and left.is_root.all()
    assert left.masks.tolist() == [[1]] * trees and left.token.tolist() == [-1] * trees
    for before, after in zip(step.slots, left.slots, strict=True):
        assert after.tolist() == before[step.first].tolist()


@relaxed
@given(requests, shares, seeds)
def test_pruning_leaves_the_step_itself_alone(
    nodes: list[int], share: float, seed: int
) -> None:
    step = random_step(nodes, seed)
    pruned(step, random_choice(step, share, seed))
    assert_same(step, random_step(nodes, seed))


@relaxed
@given(requests, shares, shares, seeds)
def test_pruning_twice_is_pruning_once(
    nodes: list[int], share: float, again: float, seed: int
) -> None:
    step = random_step(nodes, seed)
    kept = random_choice(step, share, seed)
    half = pruned(step, kept)
    later = random_choice(half, again, seed + 1)
    kept[np.flatnonzero(kept)[~later]] = False
    assert_same(pruned(half, later), pruned(step, kept))


@relaxed
@given(requests, shares, seeds)
def test_requests_without_a_tree_have_one_logits_row(
    nodes: list[int], share: float, seed: int
) -> None:
    step = random_step(nodes, seed)
    for now in (step, pruned(step, random_choice(step, share, seed))):
        sizes = dict(zip(now.request.tolist(), now.sizes.tolist(), strict=True))
        rows, total = [], 0
        for request in range(len(nodes)):
            rows.append(total)
            total += sizes.get(request, 1)
        assert now.root_rows(len(nodes)).tolist() == rows
