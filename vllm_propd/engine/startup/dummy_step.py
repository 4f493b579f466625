"""A step of one tree that nobody has drafted: for warming up, and for timing."""

from __future__ import annotations

import numpy as np

from vllm_propd.core.tree import TokenTree
from vllm_propd.engine.step.tree_step import TreeStep

PARENTS = 0.4
"""About the share of a tree's rows that have children: for these the early head runs."""


def one_tree(rows: int) -> TreeStep:
    """Makes a step of one tree of ``rows`` rows, like those that are drafted."""
    parent = np.zeros(rows, np.int64)
    parent[1:] = PARENTS * np.arange(rows - 1)
    depth = np.zeros(rows, np.int64)
    for node in range(1, rows):
        depth[node] = depth[parent[node]] + 1
    token = np.zeros(rows, np.int64)
    tree = TokenTree(token[1:], parent[1:], depth[1:], np.zeros(rows - 1, np.float32))
    root = np.zeros(1, np.int64)
    return TreeStep(
        trees=[tree], request=root, first=root, sizes=root + rows, rows=np.arange(rows),
        parent=parent, depth=depth, token=token, root_position=root,
        starts=np.array([0, rows]),
    )  # fmt: skip
