"""Token trees of any shape."""

from __future__ import annotations

import numpy as np

from vllm_propd.core.tree import Ints, TokenTree


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
