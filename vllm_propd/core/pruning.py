"""Early pruning: which nodes go on after the shallow layers (paper section 3.2).

An early head predicts the next token at each node. The rule ``top_k`` keeps a child that
is among its parent's best K; ``path_probability`` keeps the m nodes whose paths the early
head, and the heads that drafted them, find most probable. Both keep the root, and cut a
node with its whole subtree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_propd.core.tree import Bools, Float32s, Ints


@dataclass(frozen=True)
class Edges:
    """The edges of a step's trees, one for each drafted node.

    Attributes:
        child: ``[edges]`` int64 rows of the drafted nodes.
        parents: ``[parents]`` int64 rows that have children, ascending.
        place: ``[edges]`` int64 each child's parent, as an index into ``parents``.
    """

    child: Ints
    parents: Ints
    place: Ints


def edges_of(parent_row: Ints, depth: Ints) -> Edges:
    """Returns the edges of trees whose rows know their parents' rows.

    Args:
        parent_row: ``[rows]`` int64 row of each node's parent; read for drafted nodes.
        depth: ``[rows]`` int64, 0 for roots.
    """
    child = np.flatnonzero(depth)
    parents, place = np.unique(parent_row[child], return_inverse=True)
    return Edges(child, parents, place)


def own_part(path: Float32s, edges: Edges, parent_row: Ints) -> Float32s:
    """Returns what each drafted node adds to its path's log probability.

    Args:
        path: ``[edges]`` float32 log probability of each drafted node's whole path; -inf
            counts as the least number.
        edges, parent_row: as for ``edges_of``.

    Returns:
        ``[edges]`` float32, never above 0 where no path is likelier than a part of it.
    """
    path = np.maximum(path, np.finfo(np.float32).min)  # -inf has no differences
    above = np.zeros(len(parent_row), np.float32)
    above[edges.child] = path
    return path - above[parent_row[edges.child]]


def node_log_probs(early: Any, draft: Any, draft_weight: float) -> Any:
    """Returns what a node adds to its path's log probability in ``path_probability``.

    That is ``early + draft_weight * draft``: both the early head and the draft are heard.

    Args:
        early: ``[nodes]`` float32 array or tensor: the early head's log probabilities.
        draft: ``[nodes]`` float32 of the same kind: what each node adds to the draft's log
            probability, see ``own_part``.
        draft_weight: weight of the draft; 0: it does not count, not even where it is -inf.

    Returns:
        ``[nodes]`` float32.
    """
    return early + draft_weight * draft if draft_weight else early


def _down(values: npt.NDArray[Any], parent_row: Ints, depth: Ints, join: np.ufunc) -> None:
    """Joins each row's value with its ancestors', level by level, in place."""
    for level in range(2, int(depth.max(initial=0)) + 1):
        at = np.flatnonzero(depth == level)
        values[at] = join(values[at], values[parent_row[at]])


def keep_top_k(rank: Ints, edges: Edges, parent_row: Ints, depth: Ints, k: int) -> Bools:
    """Rule ``top_k`` keeps nodes that, like their ancestors, are in their parent's top K.

    Args:
        rank: ``[edges]`` int64, as ``kernels.early_head_ranks.ranks`` gives them.
        edges: the trees' edges.
        parent_row, depth: ``[rows]``, as for ``edges_of``.
        k: the rule's K.

    Returns:
        ``[rows]`` bool, true for roots.
    """
    keep = np.ones(len(depth), np.bool_)
    keep[edges.child] = rank < k
    _down(keep, parent_row, depth, np.logical_and)
    return keep


def keep_best_paths(
    log_prob: Float32s,
    edges: Edges,
    parent_row: Ints,
    depth: Ints,
    tree: Ints,
    most: int,
) -> Bools:
    """Rule ``path_probability`` keeps each tree's ``most`` best nodes by whole paths.

    Trees may share a number: then their nodes compete for what these trees keep together.

    A path is never more probable than a part of it, and among equals parents come first:
    the best m nodes are closed under ancestors.

    Args:
        log_prob: ``[edges]`` float32 what each node adds to its path's; none above 0.
        edges: the trees' edges.
        parent_row, depth: ``[rows]``, as for ``edges_of``.
        tree: ``[rows]`` int64 ascending number of each row's tree, or of its trees.
        most: the rule's m, the nodes that are kept of each number.

    Returns:
        ``[rows]`` bool, true for roots.
    """
    path = np.zeros(len(depth), np.float32)
    path[edges.child] = log_prob
    _down(path, parent_row, depth, np.add)
    path[depth == 0] = np.inf
    order = np.lexsort((-path, tree))  # stable
    # A number's rows in this order: its roots, then its nodes.
    roots = np.bincount(tree, depth == 0).astype(np.int64)
    within = np.arange(len(tree)) - np.searchsorted(tree, tree) - roots[tree]
    keep = np.empty(len(depth), np.bool_)
    keep[order] = within < most
    return keep
