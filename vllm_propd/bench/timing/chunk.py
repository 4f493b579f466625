"""A chunk of all arms: one after another, or a step of each in turn.

In turn, all engines live in this process. Each step of an arm has steps of the others
within a tenth of a second before and after it, and the order turns round each time: a
machine that others share is as fast for one as for the other. Engines that are alike come
out within a percent of each other, where processes of their own are several percent apart
all their lives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vllm import SamplingParams

from vllm_propd.bench.engines import ArmEngine
from vllm_propd.bench.timing.turn import Turn


def one_by_one(
    engines: Sequence[ArmEngine], prompts: list[list[int]], params: SamplingParams
) -> Iterator[Turn]:
    """Lets each arm generate the prompts, one after another; yields their turns."""
    for engine in engines:
        yield engine.run(prompts, params)


def step_by_step(
    engines: Sequence[ArmEngine], prompts: list[list[int]], params: SamplingParams
) -> Iterator[Turn]:
    """Lets all arms generate the prompts, a step of each in turn; yields their turns.

    Each arm needs an engine of its own.
    """
    running = {i: engine.steps(prompts, params) for i, engine in enumerate(engines)}
    turns: dict[int, Turn] = {}
    forward = True
    while running:
        for i in sorted(running, reverse=not forward):
            engines[i].take_over()
            try:
                next(running[i])
            except StopIteration as over:
                turns[i] = over.value
                del running[i]
        forward = not forward
    yield from (turns[i] for i in range(len(engines)))
