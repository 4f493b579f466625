"""Trees' nodes, side by side, with what they are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numba import njit

from vllm_propd.core.tree import Float32s, Float64s, Ints, TokenTree


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


@dataclass(frozen=True)
class NodeValues:
    """The nodes of some trees, with what they are worth.

    Attributes:
        sizes: ``[trees]`` int64 how many nodes each has.
        probability: ``[nodes]`` float64 probability that each node is accepted.
        tree: ``[nodes]`` int64 index of each node's tree.
        share: the mean over trees of how many nodes are expected to be accepted, each
            tree counted up to 1: 0..1.
    """

    sizes: Ints
    probability: Float64s
    tree: Ints
    share: float

    @classmethod
    def of_scores(cls, score: Float32s, sizes: Ints) -> Self:
        """Collects nodes that stand side by side, tree after tree.

        Args:
            score: ``[nodes]`` float32 log probability of each (``TokenTree.score``).
            sizes: ``[trees]`` int64 how many of them each tree has.
        """
        return cls(sizes, *_spread(score, sizes))

    @classmethod
    def of(cls, trees: Sequence[TokenTree], most: int | None = None) -> Self:
        """Collects the best ``most`` nodes of each of one tree or more; None: all."""
        scores = [tree.score[:most] for tree in trees]
        return cls.of_scores(np.concatenate(scores), np.array(list(map(len, scores))))
