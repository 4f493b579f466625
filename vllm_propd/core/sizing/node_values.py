"""Trees' nodes, side by side, with what they are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numba import njit

from vllm_propd.core.tree import Float64s, Ints, TokenTree


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
        probability: ``[nodes]`` float64 probability that each node is accepted.
        tree: ``[nodes]`` int64 index of each node's tree.
        share: the mean over trees of how many nodes are expected to be accepted, each
            tree counted up to 1: 0..1.
    """

    probability: Float64s
    tree: Ints
    share: float

    @classmethod
    def of(cls, trees: Sequence[TokenTree]) -> Self:
        """Collects the nodes of one tree or more."""
        score = np.concatenate([tree.score for tree in trees])
        return cls(*_spread(score, np.array([len(tree) for tree in trees])))
