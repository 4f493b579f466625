"""Acceptance counted by walking over a known text, without an engine.

The next step starts after the accepted tokens and the bonus, as in serving. An average
over all positions flatters: it counts the easy ones that a step jumps over.
"""

from __future__ import annotations

import numpy as np

from vllm_propd.core.tree import Ints, TokenTree


def accepted_path(tree: TokenTree, truth: Ints) -> list[int]:
    """Returns the nodes (from 1) that lie on the text ``truth``, from the root's child on.

    The indices ascend, so the first n nodes of the tree accept as many tokens as the
    path has indices up to n.
    """
    path: list[int] = []
    node = 0
    for token in truth.tolist():
        child = np.flatnonzero((tree.parent == node) & (tree.token == token))
        if not len(child):
            break
        node = int(child[0]) + 1
        path.append(node)
    return path


def tokens_per_step(paths: list[list[list[int]]], nodes: int) -> float:
    """Returns tokens per step, the bonus included, of trees cut to ``nodes`` nodes.

    Args:
        paths: per sequence and position, ``accepted_path`` of the tree drafted there.
        nodes: how many nodes each tree has.

    Raises:
        ValueError: there is no position.
    """
    steps = tokens = 0
    for sequence in paths:
        at = 0
        while at < len(sequence):
            accepted = sum(node <= nodes for node in sequence[at])
            at += accepted + 1
            steps, tokens = steps + 1, tokens + accepted + 1
    if not steps:
        raise ValueError("there is no position to walk over")
    return tokens / steps
