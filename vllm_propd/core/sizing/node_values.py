"""Trees' nodes, side by side, with what they are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numba import njit

from vllm_propd.core.tree import Bools, Float32s, Float64s, Ints, TokenTree


@njit(cache=True, nogil=True)
def _spread(score, sizes):  # type: ignore[no-untyped-def]
    probability, owner = np.empty(len(score)), np.empty(len(score), np.int64)
    node, share = 0, 0.0
    for tree, size in enumerate(sizes):
        expected = 0.0
        for _ in range(size):
            probability[node], owner[node] = np.exp(np.float64(score[node])), tree
            expected += probability[node]
            node += 1
        share += min(expected, 1.0) / len(sizes)
    return probability, owner, share


@njit(cache=True, nogil=True)
def straight(depth, sizes):  # type: ignore[no-untyped-def]
    """Says of each node whether its tree is a path up to it.

    Args:
        depth: ``[nodes]`` int64, tree after tree.
        sizes: ``[trees]`` int64 nodes of each.

    Returns:
        ``[nodes]`` bool.
    """
    found, node = np.empty(len(depth), np.bool_), 0
    for size in sizes:
        path = True
        for place in range(size):
            path &= depth[node] == place + 1
            found[node] = path
            node += 1
    return found


@dataclass(frozen=True)
class NodeValues:
    """The nodes of some trees, with what they are worth.

    Attributes:
        sizes: ``[trees]`` int64 how many nodes each has.
        probability: ``[nodes]`` float64 probability that each node is accepted.
        tree: ``[nodes]`` int64 index of each node's tree.
        share: the mean over trees of how many nodes are expected to be accepted, each
            tree counted up to 1: 0..1.
        straight: ``[nodes]`` bool whether each tree is a path up to this node.
    """

    sizes: Ints
    probability: Float64s
    tree: Ints
    share: float
    straight: Bools

    @classmethod
    def of_scores(cls, score: Float32s, sizes: Ints, straight: Bools | None = None) -> Self:
        """Collects nodes that stand side by side, tree after tree.

        Args:
            score: ``[nodes]`` float32 log probability of each (``TokenTree.score``).
            sizes: ``[trees]`` int64 how many of them each tree has.
            straight: as in the class; None: all trees are paths.
        """
        if straight is None:
            straight = np.ones(len(score), np.bool_)
        probability, tree, share = _spread(score, sizes)
        return cls(sizes, probability, tree, share, straight)

    @classmethod
    def of(cls, trees: Sequence[TokenTree], most: int | None = None) -> Self:
        """Collects the best ``most`` nodes of each of one tree or more; None: all."""
        scores = [tree.score[:most] for tree in trees]
        depth = np.concatenate([tree.depth[:most] for tree in trees])
        sizes = np.array(list(map(len, scores)))
        return cls.of_scores(np.concatenate(scores), sizes, straight(depth, sizes))
