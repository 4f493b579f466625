"""Requests that arrive over time, at engines as a server runs them (``AsyncLLM``)."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.progress import Progress
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

from vllm_propd.bench.arms import Arm
from vllm_propd.bench.engines import seeded
from vllm_propd.bench.timing import step_profiler
from vllm_propd.bench.timing.step_profiler import Work
from vllm_propd.bench.timing.turn import DraftCounter, Turn
from vllm_propd.bench.timing.turns import Turns, in_turns, turns_in
from vllm_propd.bench.workloads.points import Point

POLLS_S = 1.1
"""Seconds before a turn: idle vLLM workers poll for one, on cores that others need."""


@dataclass
class TraceTurn(Turn):
    """A trace served to its end.

    Attributes:
        first_token_seconds: of each request, from its arrival to its first token.
        per_token_seconds: of each request, mean over its tokens after the first.
    """

    first_token_seconds: list[float] = field(default_factory=list)
    per_token_seconds: list[float] = field(default_factory=list)


class StepCounter(DraftCounter):
    """Also counts decode steps, which merge where a stream's reader is slow."""

    def reset(self) -> None:
        """Forgets what was counted."""
        super().reset()
        self.steps = 0

    def record(
        self, scheduler_stats: Any, iteration_stats: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        """Counts a step; the engine calls it with statistics of either kind, or both."""
        if scheduler_stats is not None:
            super().record(scheduler_stats)
        if iteration_stats is not None:
            self.steps += len(iteration_stats.inter_token_latencies_iter)

    def log_engine_initialized(self) -> None:
        """Logs nothing."""


class TraceEngine:
    """A running engine of one arm; to be made inside the event loop that it serves.

    Args:
        arm: what to compare.
        options: arguments of vLLM's engines that all arms share.
    """

    def __init__(self, arm: Arm, options: dict[str, Any]):
        self.arm = arm
        self._requests, self._counter = 0, StepCounter()
        # Without vLLM's own loggers; see DraftCounter.
        options = {**options, "disable_log_stats": True}
        with arm.environment():
            self.llm = AsyncLLM.from_engine_args(
                AsyncEngineArgs(**options, speculative_config=arm.speculative_config),
                stat_loggers=[lambda config, index: self._counter],
            )

    async def run(self, point: Point, params: SamplingParams) -> TraceTurn:
        """Serves a trace, each request from its arrival on."""
        assert point.arrivals is not None
        turn, counter = TraceTurn(), self._counter
        counter.reset()
        if self.arm.is_ours:
            await self.llm.collective_rpc("start_sizing_records")
        of_each = seeded(params, point.prompts)
        started = turn.began = time.perf_counter()
        requests = [
            self._request(prompt, started + arrival, own)
            for prompt, arrival, own in zip(
                point.prompts, point.arrivals, of_each, strict=True
            )
        ]
        served = await asyncio.gather(*requests)
        turn.seconds = time.perf_counter() - started
        _, work = (await self.llm.collective_rpc(step_profiler.take))[0]
        turn.work = Work(**work)
        if self.arm.is_ours:
            turn.records = (await self.llm.collective_rpc("take_sizing_records"))[0]
        for text, first, each in served:
            turn.texts.append(text)
            turn.first_token_seconds.append(first)
            turn.per_token_seconds.append(each)
        turn.tokens, turn.prefilled = sum(map(len, turn.texts)), len(turn.texts)
        turn.steps = counter.steps
        turn.drafted, turn.drafts = counter.drafted, counter.drafts
        turn.accepted_at = counter.accepted_at
        return turn

    async def _request(
        self, prompt: list[int], arrival: float, params: SamplingParams
    ) -> tuple[list[int], float, float]:
        """Returns a request's text, seconds to its first token, and per token after it."""
        self._requests += 1
        name = str(self._requests)
        await asyncio.sleep(max(arrival - time.perf_counter(), 0.0))
        text: list[int] = []
        first = last = 0.0
        async for output in self.llm.generate({"prompt_token_ids": prompt}, params, name):
            ids = output.outputs[0].token_ids
            if len(ids) > len(text):
                last = time.perf_counter()
                first = first or last
                text = list(ids)
        return text, first - arrival, (last - first) / (len(text) - 1)

    async def watch(self) -> None:
        """Puts stopwatches into the worker."""
        await self.llm.collective_rpc(step_profiler.install)

    async def peak_rss_mib(self) -> float:
        """Returns the most memory that each worker has held, summed over them, in MiB."""
        return sum(await self.llm.collective_rpc(step_profiler.peak_rss))

    def close(self) -> None:
        """Ends the engine's processes."""
        self.llm.shutdown()


def latencies(turns: list[TraceTurn]) -> dict[str, float]:
    """Returns a ``Row``'s fields for latencies, in ms, over the requests of all turns."""
    first, each = [], []
    for turn in turns:
        first += turn.first_token_seconds
        each += turn.per_token_seconds
    found = {"first_token_ms": first, "per_token_ms": each}
    medians = {name: 1e3 * float(np.median(of)) for name, of in found.items()}
    high = {f"{name}_p90": 1e3 * float(np.percentile(of, 90)) for name, of in found.items()}
    return medians | high


async def run_trace(
    arms: list[Arm],
    options: dict[str, Any],
    point: Point,
    params: SamplingParams,
    rounds: int,
    bar: Progress,
) -> tuple[Turns[TraceTurn], dict[str, float]]:
    """Serves a trace with every arm in turns, after a warm-up of each.

    Args:
        arms: what to compare.
        options: arguments of vLLM's engines that all arms share.
        point: a trace.
        params: of every request.
        rounds: turns of each arm that count.
        bar: shows how far it is.

    Returns:
        The turns that count; and by arm the most memory that its workers have held, MiB.
    """
    found: Turns[TraceTurn] = Turns()
    task = bar.add_task("trace", total=2 * len(arms) + turns_in(len(arms), rounds))
    engines: list[TraceEngine] = []
    try:
        for arm in arms:
            bar.update(task, description=f"trace: starting {arm.name}")
            engines.append(TraceEngine(arm, options))
            await engines[-1].watch()
            bar.advance(task)

        async def turn_of(engine: TraceEngine) -> TraceTurn:
            bar.update(task, description=f"trace: {engine.arm.name}")
            await asyncio.sleep(POLLS_S)
            turn = await engine.run(point, params)
            bar.advance(task)
            return turn

        for engine in engines:
            await turn_of(engine)  # warms it up
        for engine in in_turns(engines, lambda e: found.share(e.arm.name, rounds) < 1):
            found.add(engine.arm.name, await turn_of(engine))
        peaks = {engine.arm.name: await engine.peak_rss_mib() for engine in engines}
    finally:
        for engine in engines:
            engine.close()
    return found, peaks
