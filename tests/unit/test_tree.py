"""Token trees: prefixes, paths, and ancestor masks against a walk up every branch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_trees import random_parents, random_tree

from vllm_propd.core.tree import Ints, TokenTree, ancestor_masks

seeds = st.integers(0, 2**32 - 1)


def visible(parents: Ints, first: Ints, sizes: Ints) -> np.ndarray:
    """``[rows, nodes]`` bool: the masks, by walking up from every node to its root."""
    seen = np.zeros((len(parents), sizes.max(initial=1)), bool)
    for base, size in zip(first, sizes, strict=True):
        for node in range(size):
            at = node
            while at:
                seen[base + node, at] = True
                at = parents[base + at]
            seen[base + node, 0] = True
    return seen


def check_masks(parents: Ints, first: Ints, sizes: Ints) -> None:
    masks = ancestor_masks(parents, first, sizes)
    nodes = sizes.max(initial=1)
    assert masks.dtype == np.uint64
    assert masks.shape == (len(parents), -(-nodes // 64))
    bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little").astype(bool)
    np.testing.assert_array_equal(bits[:, :nodes], visible(parents, first, sizes))
    assert not bits[:, nodes:].any()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 150), st.integers(0, 3)), max_size=6), seeds)
def test_masks_hold_a_node_and_its_ancestors(
    trees_and_gaps: list[tuple[int, int]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    parents, first = [np.empty(0, np.int64)], []
    for size, gap in trees_and_gaps:
        first.append(sum(map(len, parents)))
        parents += [random_parents(rng, size), np.full(gap, -1, np.int64)]
    sizes = np.array([size for size, _ in trees_and_gaps], np.int64)
    check_masks(np.concatenate(parents), np.array(first, np.int64), sizes)


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 128, 129, 256])
@pytest.mark.parametrize("shape", ["chain", "star"])
def test_masks_at_word_boundaries(size: int, shape: str) -> None:
    parents = np.arange(size) - 1 if shape == "chain" else np.zeros(size, np.int64)
    check_masks(parents, np.zeros(1, np.int64), np.array([size]))


@given(st.integers(0, 40), seeds, st.data())
def test_prefix_keeps_the_first_nodes_without_a_copy(
    nodes: int, seed: int, data: st.DataObject
) -> None:
    tree = random_tree(np.random.default_rng(seed), nodes)
    kept = data.draw(st.integers(0, nodes))
    small = tree.prefix(kept)
    assert len(tree) == nodes and len(small) == kept
    for name in ("token", "parent", "depth", "score"):
        whole, part = getattr(tree, name), getattr(small, name)
        np.testing.assert_array_equal(part, whole[:kept])
        assert not kept or np.shares_memory(part, whole)
    for node in range(kept + 1):
        assert small.path(node) == tree.path(node)


@given(st.integers(0, 40), seeds)
def test_path_leads_from_the_root_to_the_node(nodes: int, seed: int) -> None:
    tree = random_tree(np.random.default_rng(seed), nodes)
    assert tree.path(0) == []
    for node in range(1, nodes + 1):
        path = tree.path(node)
        assert path[-1] == node and len(path) == tree.depth[node - 1]
        assert [0, *path[:-1]] == [tree.parent[at - 1] for at in path]


def test_first_path_ends_where_a_tree_branches() -> None:
    token = np.arange(4)
    score = np.zeros(4, np.float32)
    tree = TokenTree(token, np.array([0, 1, 1, 2]), np.array([1, 2, 2, 3]), score)
    assert tree.first_path().token.tolist() == [0, 1]
    chain = TokenTree(token, np.arange(4), np.arange(1, 5), score)
    assert chain.first_path() is chain
    assert len(tree.prefix(0).first_path()) == 0
