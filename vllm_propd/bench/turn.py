"""One arm's turn: a batch of prompts generated to the end, timed and counted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from statistics import median
from typing import Any

from rich.progress import Progress
from vllm import LLM, SamplingParams

from vllm_propd.bench import stopwatch
from vllm_propd.bench.arms import Arm
from vllm_propd.bench.stopwatch import Work

FORWARD = ("forward", "lower half", "prune", "upper half")
"""Parts of a step that are the model's, early head included."""


class DraftCounter:
    """Takes the place of an engine's stat loggers, which share one process's registry.

    With an engine for each arm in the process, ``get_metrics`` would show the last one's.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets what was counted."""
        self.drafts = self.drafted = 0
        self.accepted_at: list[int] = []

    def record(self, scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
        """What the engine calls after each step."""
        stats = scheduler_stats.spec_decoding_stats
        if stats is None:
            return
        self.drafts += stats.num_drafts
        self.drafted += stats.num_draft_tokens
        counts = stats.num_accepted_tokens_per_pos
        self.accepted_at += [0] * (len(counts) - len(self.accepted_at))
        for depth, count in enumerate(counts):
            self.accepted_at[depth] += count

    def log(self) -> None:
        """Nothing to log: the benchmark prints its own table."""


@dataclass
class Turn:
    """What happened.

    Attributes:
        seconds: wall time from the first request to the last token.
        tokens: new tokens, over all sequences.
        steps: decode steps summed over sequences, prefills left out.
        texts: token ids per prompt.
        drafted, drafts: draft tokens, and steps of sequences with drafts.
        accepted_at: such steps that accepted a draft of depth 1, 2, ...
        step_seconds: wall time of each engine step that put tokens out.
        parts: seconds of each call inside the worker, by ``stopwatch.PARTS``, where the
            engine has stopwatches.
        work: what early pruning saw, likewise.
        records: what sizing saw at each step (``core.sizing.StepRecord``), likewise.
    """

    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0
    texts: list[list[int]] = field(default_factory=list)
    drafted: int = 0
    drafts: int = 0
    accepted_at: list[int] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)
    work: Work = field(default_factory=Work)
    records: list[dict[str, Any]] = field(default_factory=list)

    def __iadd__(self, other: Turn) -> Turn:
        """Adds a turn that ran after this one."""
        for name in ("seconds", "tokens", "steps", "drafted", "drafts"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.texts = self.texts + other.texts
        self.step_seconds = self.step_seconds + other.step_seconds
        for part, laps in other.parts.items():
            self.parts[part] = self.parts.get(part, []) + laps
        self.work += other.work
        self.records = self.records + other.records
        pairs = zip_longest(self.accepted_at, other.accepted_at, fillvalue=0)
        self.accepted_at = [a + b for a, b in pairs]
        return self

    @property
    def tokens_per_s(self) -> float:
        """Throughput over all sequences."""
        return self.tokens / self.seconds

    def step_ms(self) -> dict[str, float]:
        """Median milliseconds of a step by part; ``rest`` is what no part explains."""
        if not self.parts:
            return {}
        found = {part: 1e3 * median(laps) for part, laps in self.parts.items() if laps}
        step = 1e3 * median(self.step_seconds)
        return {**found, "rest": step - sum(found.values()), "step": step}

    def host_ms(self) -> float:
        """Median milliseconds of a step without the forward passes; 0 if not timed."""
        parts = self.step_ms()
        return parts.get("step", 0.0) - sum(parts.get(part, 0.0) for part in FORWARD)

    @property
    def kept_per_step(self) -> float:
        """Nodes of a tree that early pruning let through; all, where nothing prunes."""
        if not self.work.trees:
            return self.drafted / max(self.drafts, 1)
        return (self.work.kept - self.work.trees) / self.work.trees

    @property
    def tokens_per_step(self) -> float:
        """Of one sequence; its first token, which the prefill gives, left out."""
        return (self.tokens - len(self.texts)) / max(self.steps, 1)


class ArmEngine:
    """A running engine of one arm.

    Args:
        arm: what to compare.
        options: arguments of ``vllm.LLM`` that all arms share.
        timed: with stopwatches in the worker (they need
            ``VLLM_ALLOW_INSECURE_SERIALIZATION=1``).
    """

    def __init__(self, arm: Arm, options: dict[str, Any], timed: bool = False):
        self.arm, self.timed = arm, timed
        self.llm = LLM(**options, speculative_config=arm.speculative_config)
        self._requests, self._drafts = 0, DraftCounter()
        self.llm.llm_engine.logger_manager = self._drafts
        if timed:
            self.watch()

    def watch(self) -> None:
        """Puts stopwatches into the worker, anew where pruning has changed."""
        self.timed = True
        self.llm.collective_rpc(stopwatch.install)

    def run(self, prompts: list[list[int]], params: SamplingParams) -> Turn:
        """Generates all prompts together."""
        engine, turn, drafts = self.llm.llm_engine, Turn(), self._drafts
        drafts.reset()
        recording = self.timed and self.arm.is_ours
        if recording:
            self.llm.collective_rpc("start_sizing_records")
        names = [str(self._requests + i) for i in range(len(prompts))]
        self._requests += len(prompts)
        texts: dict[str, list[int]] = {}
        seen = dict.fromkeys(names, 0)
        started = time.perf_counter()
        for name, prompt in zip(names, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            step_started = time.perf_counter()
            outputs = engine.step()
            if outputs:
                turn.step_seconds.append(time.perf_counter() - step_started)
            for output in outputs:
                ids = output.outputs[0].token_ids
                if len(ids) > seen[output.request_id]:
                    turn.steps += seen[output.request_id] > 0
                    seen[output.request_id] = len(ids)
                if output.finished:
                    texts[output.request_id] = list(ids)
        turn.seconds = time.perf_counter() - started
        if self.timed:
            turn.parts, work = self.llm.collective_rpc(stopwatch.take)[0]
            turn.work = Work(**work)
        if recording:
            turn.records = self.llm.collective_rpc("take_sizing_records")[0]
        turn.texts = [texts[name] for name in names]
        turn.tokens = sum(map(len, turn.texts))
        turn.drafted, turn.drafts = drafts.drafted, drafts.drafts
        turn.accepted_at = drafts.accepted_at
        return turn

    def run_all(
        self, prompts: list[list[int]], batch_size: int, params: SamplingParams
    ) -> Turn:
        """Generates the prompts, ``batch_size`` of them together."""
        turn = Turn()
        for start in range(0, len(prompts), batch_size):
            turn += self.run(prompts[start : start + batch_size], params)
        return turn

    def peak_rss_mib(self) -> float:
        """The most memory that the workers have held, together, MiB."""
        return sum(self.llm.collective_rpc(stopwatch.peak_rss))

    def close(self) -> None:
        """Ends the engine's processes."""
        self.llm.llm_engine.engine_core.shutdown()


def start_engines(
    arms: list[Arm], options: dict[str, Any], bar: Progress, timed: bool = False
) -> list[ArmEngine]:
    """An engine for each arm, one after the other; see ``ArmEngine``."""
    task = bar.add_task("starting engines", total=len(arms))
    engines = []
    for arm in arms:
        bar.update(task, description=f"starting {arm.name}")
        engines.append(ArmEngine(arm, options, timed))
        bar.advance(task)
    return engines


def ratio_to(turns: Sequence[Turn], plain: Sequence[Turn]) -> float:
    """Median over rounds of tokens/s over plain vLLM's in the same round."""
    return median(
        turn.tokens_per_s / base.tokens_per_s
        for turn, base in zip(turns, plain, strict=True)
    )
