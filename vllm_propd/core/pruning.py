"""Early pruning: which nodes go on after the shallow layers (paper section 3.2).

An early head predicts the next token at each node. The rule ``top_k`` keeps a child that
is among its parent's best K; ``path_probability`` keeps the m nodes whose paths the early
head, and the heads that drafted them, find most probable. Both keep the root, and cut a
node with its whole subtree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit, prange

from vllm_propd.core.tree import Ints

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Reduce = Callable[[torch.Tensor], torch.Tensor]


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
    """The edges of trees whose rows know their parents' rows.

    Args:
        parent_row: ``[rows]`` int64 row of each node's parent; read for drafted nodes.
        depth: ``[rows]`` int64, 0 for roots.
    """
    child = np.flatnonzero(depth)
    parents, place = np.unique(parent_row[child], return_inverse=True)
    return Edges(child, parents, place)


def ranks(
    logits: torch.Tensor, token: torch.Tensor, place: torch.Tensor, start: int, add: Reduce
) -> torch.Tensor:
    """How many tokens the early head prefers to each child's.

    Args:
        logits: ``[parents, tokens]`` of this rank's share of the vocabulary.
        token: ``[edges]`` int64 the children's tokens.
        place: ``[edges]`` int64 the children's parents, rows of ``logits``.
        start: first token of this rank's share.
        add: sums a tensor over the tensor-parallel ranks.

    Returns:
        ``[edges]`` int64, 0 for the best token; the same on every rank.
    """
    own = add(_own_logits(logits, token, place, start))
    # Counted in float32, which every all-reduce knows, and which is exact up to 2^24.
    return add(_count_larger(logits, own, place)).long()


def log_probs(
    logits: torch.Tensor, token: torch.Tensor, place: torch.Tensor, start: int, add: Reduce
) -> torch.Tensor:
    """The early head's log probability of each child's token.

    ``log p = -log sum_j exp(l_j - l)``, so that ranks exchange one number a child, as for
    ``ranks``, whose arguments these are.

    Returns:
        ``[edges]`` float32, never above 0; the same on every rank.
    """
    own = add(_own_logits(logits, token, place, start))
    # A share without any larger logit underflows to 0, one with a huge one to -inf: both
    # are what the sum over all shares would say.
    total = add(_relative_mass(logits, own, place))
    return (-total.log().clamp(min=0.0)).masked_fill(own == -torch.inf, -torch.inf)


def _relative_mass(
    logits: torch.Tensor, own: torch.Tensor, place: torch.Tensor
) -> torch.Tensor:
    """``[edges]`` float32 sum over this rank's tokens of ``exp(logit - own)``."""
    if not logits.shape[1]:
        return torch.zeros(len(own), device=logits.device)
    if logits.device.type != "cpu":
        from vllm_propd.core.pruning_triton import relative_mass

        return relative_mass(logits, own, place)
    lowest = torch.finfo(torch.float32).min  # -inf has no differences
    top = logits.amax(-1).float().clamp(min=lowest)
    total = (logits.float() - top[:, None]).exp().sum(-1)
    return total[place] * (top[place] - own.float()).exp()


def _count_larger(
    logits: torch.Tensor, own: torch.Tensor, place: torch.Tensor
) -> torch.Tensor:
    """``[edges]`` float32 how many of a parent's logits are above its child's."""
    if logits.device.type != "cpu":
        from vllm_propd.core.pruning_triton import count_larger

        return count_larger(logits, own, place)
    bits = torch.int16 if logits.element_size() == 2 else torch.int32
    # Floats of one sign are ordered as their bits are, so one kernel reads all types.
    limits = torch.where(own == 0, torch.zeros_like(own), own)  # no negative zero
    out = np.empty(len(own), np.float32)
    order = np.argsort(place.numpy(), kind="stable")
    _count_above(
        logits.contiguous().view(bits).numpy(), limits.view(bits).numpy(),
        place.numpy()[order], order, out,
    )  # fmt: skip
    return torch.from_numpy(out)


@njit(parallel=True, cache=True, nogil=True)
def _count_above(bits, limits, place, order, out):  # type: ignore[no-untyped-def]
    """Siblings follow each other in ``order``: their row is read from memory once."""
    for at in prange(len(order)):
        row, limit, count = bits[place[at]], limits[order[at]], 0
        if limit >= 0:
            for token in range(len(row)):
                count += row[token] > limit
        else:  # above a negative number are all positive ones, and those of smaller bits
            for token in range(len(row)):
                count += (row[token] >= 0) | (row[token] < limit)
        out[order[at]] = count


def _own_logits(
    logits: torch.Tensor, token: torch.Tensor, place: torch.Tensor, start: int
) -> torch.Tensor:
    """``[edges]`` the children's logits where this rank holds them, else 0."""
    if not logits.shape[1]:  # more ranks than tokens
        return logits.new_zeros(len(token))
    column = token - start
    here = (column >= 0) & (column < logits.shape[1])
    found = logits[place, column.clamp(0, logits.shape[1] - 1)]
    return torch.where(here, found, torch.zeros_like(found))


def own_part(path: Floats, edges: Edges, parent_row: Ints) -> Floats:
    """What each drafted node adds to its path's log probability.

    Args:
        path: ``[edges]`` float32 log probability of each drafted node's whole path.
        edges, parent_row: as for ``edges_of``.

    Returns:
        ``[edges]`` float32, never above 0 where no path is likelier than a part of it.
    """
    above = np.zeros(len(parent_row), np.float32)
    above[edges.child] = path
    return path - above[parent_row[edges.child]]


def _down(values: npt.NDArray[Any], parent_row: Ints, depth: Ints, join: np.ufunc) -> None:
    """Joins each row's value with its ancestors', level by level, in place."""
    for level in range(2, int(depth.max(initial=0)) + 1):
        at = np.flatnonzero(depth == level)
        values[at] = join(values[at], values[parent_row[at]])


def keep_top_k(rank: Ints, edges: Edges, parent_row: Ints, depth: Ints, k: int) -> Bools:
    """Rule ``top_k``: nodes that are, like all their ancestors, in their parent's top K.

    Args:
        rank: ``[edges]`` as ``ranks`` gives them.
        edges: the trees' edges.
        parent_row, depth: ``[rows]``, as for ``edges_of``.
        k: K.

    Returns:
        ``[rows]`` bool, true for roots.
    """
    keep = np.ones(len(depth), np.bool_)
    keep[edges.child] = rank < k
    _down(keep, parent_row, depth, np.logical_and)
    return keep


def keep_best_paths(
    log_prob: Floats,
    edges: Edges,
    parent_row: Ints,
    depth: Ints,
    tree: Ints,
    most: int,
) -> Bools:
    """Rule ``path_probability``: each tree's ``most`` best nodes by their whole paths.

    Trees may share a number: then their nodes compete for what these trees keep together.

    A path is never more probable than a part of it, and among equals parents come first:
    the best m nodes are closed under ancestors.

    Args:
        log_prob: ``[edges]`` float32 what each node adds to its path's; none above 0.
        edges: the trees' edges.
        parent_row, depth: ``[rows]``, as for ``edges_of``.
        tree: ``[rows]`` int64 ascending number of each row's tree, or of its trees.
        most: m.

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
