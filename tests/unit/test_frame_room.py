"""Calls under a frame with room map no memory, however deep they are."""

import resource
from collections.abc import Callable

from vllm_propd.engine.frame_room import with_frame_room

CALLS, DEPTHS = 200, 300


def leaf() -> int:
    a = b = c = d = e = f = g = h = i = j = k = m = 1
    return a + b + c + d + e + f + g + h + i + j + k + m


def faults(depth: int) -> int:
    """How many pages the system has to find for calls from some depth."""
    if depth:
        return faults(depth - 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(CALLS):
        leaf()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def worst(measure: Callable[[int], int]) -> int:
    return max(measure(depth) for depth in range(DEPTHS))


def test_no_depth_maps_memory_at_every_call() -> None:
    # Where this fails CPython has mended it, and `frame_room.py` can go.
    assert worst(faults) >= CALLS
    assert worst(with_frame_room(faults)) < CALLS // 2
    assert with_frame_room(faults).__name__ == "faults"
