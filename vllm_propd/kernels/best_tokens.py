"""The best tokens of rows of logits, on both devices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from numba import njit

from vllm_propd.core.tree import Float32s, Ints
from vllm_propd.kernels.transfer import to_device, to_host

BLOCK = 64
"""How many logits are compared at once: few blocks hold one of the best."""


@njit(cache=True, nogil=True)
def best_into(logits, rows, token, value):  # type: ignore[no-untyped-def]
    """Finds each row's best tokens; of equal ones the first, and never one that is NaN.

    Args:
        logits: float32 matrix.
        rows: int64 its rows.
        token, value: ``[rows, count]`` int64 and float32, what they must be better than,
            best first; it is replaced.
    """
    count = token.shape[1]
    for i in range(len(rows)):
        row = logits[rows[i]]
        for start in range(0, len(row), BLOCK):
            block = row[start : start + BLOCK]
            least = value[i, count - 1]
            better = np.int32(0)
            for x in block:
                better |= np.int32(x > least)
            if not better:
                continue
            for ahead, x in enumerate(block):
                if not x > value[i, count - 1]:
                    continue
                place = count - 1
                while place and value[i, place - 1] < x:
                    value[i, place] = value[i, place - 1]
                    token[i, place] = token[i, place - 1]
                    place -= 1
                value[i, place], token[i, place] = x, start + ahead


def best_tokens(
    logits: torch.Tensor, rows: Ints, count: int
) -> Callable[[], tuple[npt.NDArray[np.integer], Float32s]]:
    """Begins to find the best tokens of some rows of logits.

    Args:
        logits: ``[logits rows, vocabulary]``, of any floating type.
        rows: ``[rows]`` int64 the rows.
        count: how many tokens of each row, at most the vocabulary.

    Returns:
        A function that waits for them: tokens ``[rows, count]``, best first, and float32
        log of each one's share of what they have of the row's probability together; -inf
        or nan where a row has fewer tokens that are possible.
    """
    count = min(count, logits.shape[1])
    if logits.device.type == "cpu":
        if logits.dtype != torch.float32 or not logits.is_contiguous():
            logits, rows = logits[torch.from_numpy(rows)].float(), np.arange(len(rows))
        token = np.full((len(rows), count), -1, np.int64)
        value = np.full((len(rows), count), -np.inf, np.float32)
        best_into(logits.numpy(), rows, token, value)
        return lambda: (token, _log_share(value))
    here = to_device({"rows": rows}, logits.device)["rows"]
    best = logits[here].float().topk(count)
    waiting = to_host(best.indices), to_host(best.values)
    return lambda: (waiting[0](), _log_share(waiting[1]()))


def _log_share(value: Float32s) -> Float32s:
    with np.errstate(divide="ignore", invalid="ignore"):
        share = value - value[:, :1]
        log: Float32s = share - np.log(np.exp(share).sum(1, keepdims=True))
    return log
