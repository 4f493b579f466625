"""Token trees as flat arrays, and their ancestor masks as bit matrices.

Node 0 is the root: the last token of the sequence, already known. Drafted nodes are
1..n, parents before children, in best-first order, so that every prefix of a tree is
itself the best smaller tree (paper section 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TokenTree:
    """The drafted nodes of one sequence; element i describes node i + 1.

    Attributes:
        token: ``[n]`` int64 token ids; -1 marks a node that can never be accepted.
        parent: ``[n]`` int64 node index of the parent, 0 for children of the root.
        depth: ``[n]`` int64, 1 for children of the root.
        score: ``[n]`` float32 natural log of the node's estimated path probability.
        looked_up: ``[n]`` bool nodes of the path that the text suggests; None: there are
            none.
    """

    token: Ints
    parent: Ints
    depth: Ints
    score: npt.NDArray[np.float32]
    looked_up: npt.NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.token)

    def prefix(self, nodes: int) -> TokenTree:
        """Returns the best smaller tree of ``nodes`` nodes (views, no copies)."""
        if nodes >= len(self):
            return self
        return TokenTree(
            self.token[:nodes],
            self.parent[:nodes],
            self.depth[:nodes],
            self.score[:nodes],
            None if self.looked_up is None else self.looked_up[:nodes],
        )

    def first_path(self) -> TokenTree:
        """Returns the tree's longest prefix that is a path."""
        branches = np.flatnonzero(self.depth != np.arange(1, len(self) + 1))
        return self.prefix(int(branches[0]) if len(branches) else len(self))

    def path(self, node: int) -> list[int]:
        """Returns node indices from the root's child down to ``node``."""
        nodes: list[int] = []
        while node:
            nodes.append(node)
            node = int(self.parent[node - 1])
        return nodes[::-1]


@njit(cache=True, nogil=True)
def _fill_masks(parents, first, sizes, masks):  # type: ignore[no-untyped-def]
    for tree in range(first.shape[0]):
        base = first[tree]
        masks[base, 0] |= np.uint64(1)
        for node in range(1, sizes[tree]):
            row, parent = base + node, base + parents[base + node]
            for word in range(masks.shape[1]):
                masks[row, word] |= masks[parent, word]
            masks[row, node >> 6] |= np.uint64(1) << np.uint64(node & 63)


def ancestor_masks(parents: Ints, first: Ints, sizes: Ints) -> npt.NDArray[np.uint64]:
    """Returns which nodes each node attends to inside its tree, as bits.

    Args:
        parents: ``[rows]`` node index of each row's parent within its tree; read only
            for drafted nodes.
        first: ``[trees]`` row of each tree's root; its nodes follow it.
        sizes: ``[trees]`` rows of each tree, the root counted.

    Returns:
        ``[rows, words]`` uint64: bit j of a row is set where node j of its tree is an
        ancestor of the row's node or the node itself. Rows of no tree are zero.
    """
    words = (int(sizes.max(initial=1)) + 63) // 64
    masks = np.zeros((len(parents), words), np.uint64)
    _fill_masks(parents, first, sizes, masks)
    return masks
