"""Early pruning: both rules against walks over the nodes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_propd.core.pruning import (
    Edges,
    edges_of,
    keep_best_paths,
    keep_top_k,
    node_log_probs,
    own_part,
)
from vllm_propd.core.tree import Bools, Float32s, Ints

relaxed = settings(deadline=None, max_examples=60)


@dataclass
class Forest:
    """Rows of a few trees, one after another, each root first."""

    parent_row: Ints
    depth: Ints
    tree: Ints

    @property
    def edges(self) -> Edges:
        return edges_of(self.parent_row, self.depth)

    @property
    def drafted(self) -> list[int]:
        return [row for row, depth in enumerate(self.depth) if depth]

    def nodes(self) -> list[list[int]]:
        """The drafted rows of each tree."""
        trees = range(max(self.tree, default=-1) + 1)
        return [[row for row in self.drafted if self.tree[row] == at] for at in trees]

    def path_sums(self, log_prob: Float32s) -> Float32s:
        total = np.zeros(len(self.depth), np.float32)
        for row, own in zip(self.drafted, log_prob, strict=True):
            total[row] = total[self.parent_row[row]] + own
        return total

    def closed(self, kept: set[int]) -> bool:
        return all(not self.depth[r] or self.parent_row[r] in kept for r in kept)

    def best_paths(self, log_prob: Float32s, most: int) -> set[int]:
        """Runs ``keep_best_paths``, and checks what holds of any log probabilities."""
        keep = keep_best_paths(
            log_prob, self.edges, self.parent_row, self.depth, self.tree, most
        )
        kept = rows_of(keep)
        assert set(rows_of(self.depth == 0)) <= kept and self.closed(kept)
        for nodes in self.nodes():
            assert len(kept & set(nodes)) == min(most, len(nodes))
        return kept

    def best_paths_together(self, log_prob: Float32s, most: int) -> set[int]:
        """All trees under one number."""
        group = np.zeros_like(self.tree)
        edges, parent_row = self.edges, self.parent_row
        keep = keep_best_paths(log_prob, edges, parent_row, self.depth, group, most)
        kept = rows_of(keep)
        assert set(rows_of(self.depth == 0)) <= kept and self.closed(kept)
        return kept


def rows_of(keep: Bools) -> set[int]:
    assert keep.dtype == np.bool_
    return set(np.flatnonzero(keep).tolist())


@st.composite
def forests(draw: st.DrawFn, rows: int = 12) -> Forest:
    parent_row: list[int] = []
    depth: list[int] = []
    tree: list[int] = []
    sizes = draw(st.lists(st.integers(1, rows), min_size=1, max_size=4))
    for number, size in enumerate(sizes):
        root = len(depth)
        for node in range(size):
            parent = root + (draw(st.integers(0, node - 1)) if node else 0)
            parent_row.append(parent)
            depth.append(depth[parent] + 1 if node else 0)
            tree.append(number)
    return Forest(*(np.array(values, np.int64) for values in (parent_row, depth, tree)))


def eighths(data: st.DataObject, count: int, hopeless: bool = False) -> Float32s:
    """Log probabilities whose sums are exact, and often equal."""
    values: st.SearchStrategy[float] = st.integers(-16, 0).map(lambda value: value / 8)
    if hopeless:
        values |= st.just(-math.inf)
    return np.array(data.draw(st.lists(values, min_size=count, max_size=count)), np.float32)


@relaxed
@given(forests())
def test_edges_lead_from_each_drafted_node_to_its_parent(forest: Forest) -> None:
    edges = forest.edges
    assert edges.child.tolist() == forest.drafted
    parents = [int(forest.parent_row[row]) for row in forest.drafted]
    assert edges.parents.tolist() == sorted(set(parents))
    assert edges.parents[edges.place].tolist() == parents


@relaxed
@given(forests(), st.data())
def test_own_parts_add_up_to_the_paths(forest: Forest, data: st.DataObject) -> None:
    own = eighths(data, len(forest.drafted))
    path = forest.path_sums(own)[forest.drafted]
    assert own_part(path, forest.edges, forest.parent_row).tolist() == own.tolist()


@relaxed
@given(forests(), st.data())
def test_below_hopeless_nodes_parts_are_numbers(
    forest: Forest, data: st.DataObject
) -> None:
    own = eighths(data, len(forest.drafted), hopeless=True)
    path = forest.path_sums(own)[forest.drafted]
    assert (own_part(path, forest.edges, forest.parent_row) <= 0).all()


@relaxed
@given(forests(), st.data(), st.integers(0, 12))
def test_trees_with_one_number_share_what_is_kept(
    forest: Forest, data: st.DataObject, most: int
) -> None:
    log_prob = eighths(data, len(forest.drafted), hopeless=True)
    kept = forest.best_paths_together(log_prob, most) & set(forest.drafted)
    assert len(kept) == min(most, len(forest.drafted))
    path = forest.path_sums(log_prob)
    left = [path[row] for row in forest.drafted if row not in kept]
    assert max(left, default=-math.inf) <= min((path[r] for r in kept), default=math.inf)


def test_roots_alone_have_no_edges_and_are_kept() -> None:
    roots = np.arange(3)
    forest = Forest(roots, np.zeros(3, np.int64), roots)
    none = np.empty(0, np.int64)
    assert [len(forest.edges.child), len(forest.edges.parents)] == [0, 0]
    assert keep_top_k(none, forest.edges, roots, forest.depth, 1).all()
    assert forest.best_paths(none.astype(np.float32), 1) == {0, 1, 2}


@relaxed
@given(forests(), st.integers(1, 9), st.data())
def test_top_k_keeps_what_its_whole_path_allows(
    forest: Forest, k: int, data: st.DataObject
) -> None:
    edges, count = forest.edges, len(forest.drafted)
    rank = data.draw(st.lists(st.integers(0, 8), min_size=count, max_size=count))
    expected = set(rows_of(forest.depth == 0))
    for row, own in zip(forest.drafted, rank, strict=True):
        if own < k and forest.parent_row[row] in expected:
            expected.add(row)
    keep = keep_top_k(np.array(rank, np.int64), edges, forest.parent_row, forest.depth, k)
    assert rows_of(keep) == expected and forest.closed(expected)
    assert k < 9 or keep.all()  # as many as there are tokens


def test_top_k_cuts_deep_subtrees_whole() -> None:
    parents = np.maximum(np.arange(7) - 1, 0)
    rank = np.array([0, 0, 5, 0, 0, 0])
    forest = Forest(parents, np.arange(7), np.zeros(7, np.int64))
    keep = keep_top_k(rank, forest.edges, parents, forest.depth, 5)
    assert rows_of(keep) == {0, 1, 2}


most_nodes = st.integers(1, 13)


@relaxed
@given(forests(), most_nodes, st.data())
def test_best_paths_come_in_order_of_their_sums(
    forest: Forest, most: int, data: st.DataObject
) -> None:
    log_prob = eighths(data, len(forest.drafted), hopeless=True)
    total = forest.path_sums(log_prob)
    expected = set(rows_of(forest.depth == 0))
    for nodes in forest.nodes():
        expected.update(sorted(nodes, key=lambda row: (-total[row], row))[:most])
    assert forest.best_paths(log_prob, most) == expected


@relaxed
@given(forests(), most_nodes, st.data())
def test_best_paths_are_closed_whatever_the_rounding(
    forest: Forest, most: int, data: st.DataObject
) -> None:
    count = len(forest.drafted)
    below = st.floats(max_value=0.0, width=32, allow_nan=False)
    log_prob = data.draw(st.lists(below, min_size=count, max_size=count))
    forest.best_paths(np.array(log_prob, np.float32), most)


@relaxed
@given(forests(), most_nodes)
def test_parents_come_first_among_equals(forest: Forest, most: int) -> None:
    for certain in (0.0, -0.0):
        log_prob = np.full(len(forest.drafted), certain, np.float32)
        kept = forest.best_paths(log_prob, most)
        assert kept & set(forest.drafted) == {
            row for nodes in forest.nodes() for row in nodes[:most]
        }


@relaxed
@given(forests(rows=8), st.integers(1, 7), st.data())
def test_no_other_closed_nodes_are_more_probable(
    forest: Forest, most: int, data: st.DataObject
) -> None:
    log_prob = eighths(data, len(forest.drafted))
    worth = np.exp(forest.path_sums(log_prob).astype(np.float64))
    roots = set(rows_of(forest.depth == 0))
    kept = forest.best_paths(log_prob, most)
    for nodes in forest.nodes():
        best = max(
            math.fsum(worth[row] for row in some)
            for some in combinations(nodes, min(most, len(nodes)))
            if forest.closed(roots | set(some))
        )
        found = math.fsum(worth[row] for row in kept & set(nodes))
        assert found == pytest.approx(best, rel=1e-12)


@relaxed
@given(forests(), most_nodes, st.data())
def test_hopeless_nodes_go_on_last(forest: Forest, most: int, data: st.DataObject) -> None:
    log_prob = eighths(data, len(forest.drafted), hopeless=True)
    hopeless = rows_of(np.isneginf(forest.path_sums(log_prob)))
    kept = forest.best_paths(log_prob, most)
    for nodes in map(set, forest.nodes()):
        assert not kept & nodes & hopeless or nodes - hopeless <= kept


def test_a_draft_without_weight_is_not_heard() -> None:
    early, draft = np.array([-1.0, -2.0], np.float32), np.array([-np.inf, -4.0], np.float32)
    assert node_log_probs(early, draft, 0.0).tolist() == [-1.0, -2.0]
    assert node_log_probs(early, draft, 0.5).tolist() == [-math.inf, -4.0]
