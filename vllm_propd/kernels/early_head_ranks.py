"""What an early head says of drafted tokens: their ranks, their log probabilities.

The same on every device and every tensor-parallel rank: no rank gathers logits, each
counts, or sums, over its share of the vocabulary, and they exchange a number for each node.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numba import njit, prange

Reduce = Callable[[torch.Tensor], torch.Tensor]


def ranks(
    logits: torch.Tensor, token: torch.Tensor, place: torch.Tensor, start: int, add: Reduce
) -> torch.Tensor:
    """Counts how many tokens the early head prefers to each child's.

    Args:
        logits: ``[parents, tokens]`` logits of this rank's share of the vocabulary.
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
    """Returns the early head's log probability of each child's token.

    It is ``log p = -log sum_j exp(l_j - l)``, so that ranks exchange one number a child.
    Arguments are those of ``ranks``.

    Returns:
        ``[edges]`` float32, never above 0; -inf where logits are no numbers, or none is
        finite; the same on every rank.
    """
    own = add(_own_logits(logits, token, place, start))
    # A share without any larger logit underflows to 0, one with a huge one to -inf: both
    # are what the sum over all shares would say.
    total = add(_relative_mass(logits, own, place))
    said = -total.log().clamp(min=0.0)
    # Torch sorts NaN before any number: such a node would be kept instead of a root.
    return said.masked_fill(said.isnan() | (own == -torch.inf), -torch.inf)


def _relative_mass(
    logits: torch.Tensor, own: torch.Tensor, place: torch.Tensor
) -> torch.Tensor:
    """Sums ``exp(logit - own)`` over this rank's tokens: ``[edges]`` float32."""
    if not logits.shape[1]:
        return torch.zeros(len(own), device=logits.device)
    if logits.device.type != "cpu":
        from vllm_propd.kernels.pruning_triton import relative_mass

        return relative_mass(logits, own, place)
    lowest = torch.finfo(torch.float32).min  # -inf has no differences
    top = logits.amax(-1).float().clamp(min=lowest)
    total = (logits.float() - top[:, None]).exp().sum(-1)
    return total[place] * (top[place] - own.float()).exp()


def _count_larger(
    logits: torch.Tensor, own: torch.Tensor, place: torch.Tensor
) -> torch.Tensor:
    """Counts how many of a parent's logits are above its child's: ``[edges]`` float32."""
    if logits.device.type != "cpu":
        from vllm_propd.kernels.pruning_triton import count_larger

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
    """Counts, for each edge, the parent's logits above ``limits``, by their bits.

    Siblings follow each other in ``order``: their row is read from memory once.
    """
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
    """Returns ``[edges]`` the children's logits where this rank holds them, else 0."""
    if not logits.shape[1]:  # more ranks than tokens
        return logits.new_zeros(len(token))
    column = token - start
    here = (column >= 0) & (column < logits.shape[1])
    found = logits[place, column.clamp(0, logits.shape[1] - 1)]
    return torch.where(here, found, torch.zeros_like(found))
