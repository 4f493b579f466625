"""Curves that cannot fall, from measurements that do (pool-adjacent-violators)."""

from __future__ import annotations

import numpy as np

from vllm_propd.core.tree import Float64s


def rising(values: Float64s, weights: Float64s) -> Float64s:
    """Returns the nearest non-falling sequence in weighted least squares, ``[n]`` float64.

    Args:
        values, weights: ``[n]`` float64.
    """
    blocks: list[list[float]] = []
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        blocks.append([value, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            value, weight, count = blocks.pop()
            before = blocks[-1]
            total = before[1] + weight
            blocks[-1] = [
                (before[0] * before[1] + value * weight) / total, total, before[2] + count,
            ]  # fmt: skip
    return np.repeat([b[0] for b in blocks], [int(b[2]) for b in blocks])
