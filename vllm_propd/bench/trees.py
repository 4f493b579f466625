"""What a recording of trees tells: who was right, by depth and rank; what size gave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from vllm_propd.bench.timing.turn import Recording


def _trees(recording: Recording) -> Iterator[dict[str, Any]]:
    return (tree for step in recording for tree in step)


def accepted_by_rank(recording: Recording) -> list[list[float]]:
    """Counts how often a depth's accepted node was its parent's child of each rank.

    Returns:
        ``[depth][rank]`` shares of all trees; the rest of a depth's row accepted nothing
        there. Ranks among the drafted children, which stand best first.
    """
    found: Counter[tuple[int, int]] = Counter()
    trees = 0
    for tree in _trees(recording):
        trees += 1
        for depth, node in enumerate(tree["accepted"]):
            parents = tree["parent"][:node]  # of this node, and of those before it
            found[depth, parents.count(parents[-1]) - 1] += 1
    if not found:
        return []
    depths, ranks = (1 + max(numbers) for numbers in zip(*found, strict=True))
    return [[found[d, r] / trees for r in range(ranks)] for d in range(depths)]


def tokens_by_size(recording: Recording) -> list[float]:
    """Returns tokens per step, had only the best n nodes of each tree been verified.

    Any prefix of a tree is a tree. The places are those that the whole trees led to.

    Returns:
        For n = 0, 1, ...; nothing, where the trees' sizes differ.
    """
    sizes = Counter(tree["verified"] for tree in _trees(recording))
    if not sizes:
        return []
    size, count = sizes.most_common(1)[0]
    if count < 0.9 * sizes.total():
        return []
    nodes = [node for tree in _trees(recording) for node in tree["accepted"]]
    at = np.bincount(np.array(nodes, np.int64), minlength=size + 1)[: size + 1]
    return (1.0 + np.cumsum(at) / sizes.total()).tolist()
