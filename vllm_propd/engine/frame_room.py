"""Room for Python's frames, so that calls deep in a step map no memory.

CPython keeps frames in chunks of 16 KiB. A call whose frame does not fit maps a new chunk
and its return unmaps it (CPython 3.11, ``Python/pystate.c``, ``push_chunk``). Where a
chunk's end happens to lie under a model's layers, every call of every layer does so, and
with threads on other cores each costs about 20 microseconds. Which calls these are depends
on the depth of the stack, so it hits some engines and not their neighbours. A function with
room is for loops that last: opening its chunk for each step would cost 0.1 ms of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

FRAME_ROOM = "VLLM_PROPD_FRAME_ROOM"
"""The environment variable that, set to 1, gives engines of plain vLLM room, too."""

P = ParamSpec("P")
R = TypeVar("R")

SLOTS = 15_500
"""Of a frame that opens a chunk of its own: with the 1,000 that CPython adds, just more
than half of 256 KiB, so that as much again is left for the frames of what it calls."""


def with_frame_room(call: Callable[P, R]) -> Callable[P, R]:
    """Returns a function that calls another one, with 128 KiB of room for frames."""

    @wraps(call)
    def roomy(*args: P.args, **kwargs: P.kwargs) -> R:
        return call(*args, **kwargs)

    function: Any = roomy
    function.__code__ = function.__code__.replace(co_stacksize=SLOTS)
    return roomy
