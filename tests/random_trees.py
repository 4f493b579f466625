"""Token trees of any shape."""

from __future__ import annotations

import numpy as np

from vllm_propd.core.tree import Ints, TokenTree
from vllm_propd.engine.step.tree_step import TreeStep, build_step


def random_parents(rng: np.random.Generator, rows: int) -> Ints:
    """Parents of a tree of ``rows`` rows; the root's own is nonsense, to be ignored."""
    return np.array([-1, *(rng.integers(0, node) for node in range(1, rows))], np.int64)


def random_tree(rng: np.random.Generator, nodes: int) -> TokenTree:
    """Any tokens; best first, as all trees are."""
    parent = random_parents(rng, nodes + 1)
    depth = np.zeros(nodes + 1, np.int64)
    for node in range(1, nodes + 1):
        depth[node] = depth[parent[node]] + 1
    token, score = rng.integers(0, 999, nodes), np.sort(rng.normal(size=nodes))[::-1]
    return TokenTree(token, parent[1:], depth[1:], score.astype(np.float32))


def step_of_trees(
    rng: np.random.Generator, nodes: list[int], contexts: list[int]
) -> TreeStep:
    """A step in which every request has a tree, behind so many cached tokens."""
    trees = {str(at): random_tree(rng, count) for at, count in enumerate(nodes)}
    sizes = np.array(nodes) + 1
    step = build_step(
        {name: tree.token.tolist() for name, tree in trees.items()},
        trees,
        {name: int(name) for name in trees},
        np.cumsum(sizes),
        np.array(contexts),
        sizes,
    )
    assert step is not None
    return step
