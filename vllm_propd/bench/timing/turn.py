"""One arm's turn: a batch of prompts generated to the end, timed and counted."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import zip_longest
from math import inf
from statistics import mean
from typing import Any, Self

from vllm_propd.bench.timing.step_profiler import SPLIT, Laps, Work

Kind = tuple[int, int]
"""What a step's time depends on: its sequences, and draft tokens over all of them."""

Recording = list[list[dict[str, Any]]]
"""The trees of each recorded step (``engine.step.record.RecordedTree`` as dicts)."""

FORWARD = ("forward", SPLIT, "lower half", "prune", "upper half")
"""The parts of a step in which the model runs, early head included."""


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
        """Counts a step's drafts; the engine calls it after each step."""
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
        """Logs nothing: the benchmark prints its own table."""


@dataclass
class Turn:
    """What happened in one arm's turn.

    Attributes:
        began: when the counted time began, by ``time.perf_counter``.
        seconds: wall time to the last token; from when every sequence had its first, of a
            trace from its start.
        whole_s: wall time from the first request to the last token.
        group: which of the point's prompts it was about (``Point.groups``).
        full: whether the batch was kept full: texts then end where the turn does.
        tokens: put out in this time, over all sequences.
        prefilled: of these, first tokens of sequences.
        steps: decode steps in this time, summed over sequences.
        texts: token ids per prompt.
        drafted, drafts: draft tokens, and steps of sequences with drafts.
        accepted_at: how many steps with drafts accepted one of depth 1, 2, ...
        step_seconds: wall time of each engine step that put tokens out.
        step_kinds: of each such step, sequences that it gave tokens, and draft tokens that
            it verified, over all of them.
        parts: seconds of each such step inside the worker, by ``step_profiler.PARTS``;
            empty where the engine has no stopwatches.
        work: how much work trees made; zero where the engine has no stopwatches.
        records: what sizing saw at each step (``protocol.StepRecord``); of ProPD's arms.
    """

    began: float = inf
    seconds: float = 0.0
    whole_s: float = 0.0
    group: int = 0
    full: bool = False
    tokens: int = 0
    prefilled: int = 0
    steps: int = 0
    texts: list[list[int]] = field(default_factory=list)
    drafted: int = 0
    drafts: int = 0
    accepted_at: list[int] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    step_kinds: list[Kind] = field(default_factory=list)
    parts: list[Laps] = field(default_factory=list)
    work: Work = field(default_factory=Work)
    records: list[dict[str, Any]] = field(default_factory=list)

    def __iadd__(self, other: Turn) -> Self:
        """Adds a turn that ran after this one."""
        self.began = min(self.began, other.began)
        for name in (
            "seconds", "whole_s", "tokens", "prefilled", "steps", "drafted", "drafts"
        ):  # fmt: skip
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.texts = self.texts + other.texts
        self.step_seconds = self.step_seconds + other.step_seconds
        self.step_kinds = self.step_kinds + other.step_kinds
        self.parts = self.parts + other.parts
        self.work += other.work
        self.records = self.records + other.records
        pairs = zip_longest(self.accepted_at, other.accepted_at, fillvalue=0)
        self.accepted_at = [a + b for a, b in pairs]
        return self

    @property
    def middle(self) -> float:
        """The time when half of the turn was over, by ``time.perf_counter``."""
        return self.began + self.seconds / 2

    @property
    def decodes(self) -> bool:
        """Whether a time counts: none does where all texts end with their first tokens."""
        return self.seconds > 0

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second, over all sequences; 0 where no time counts."""
        return self.tokens / self.seconds if self.decodes else 0.0

    def laps(self) -> list[tuple[Kind, float]]:
        """Returns each step's kind and seconds; one step, where none was timed.

        None, where no time counts.
        """
        if not self.step_seconds:
            return [((0, 0), self.seconds)] if self.decodes else []
        return list(zip(self.step_kinds, self.step_seconds, strict=True))

    def step_ms(self) -> dict[str, float]:
        """Returns the milliseconds of a step by part; ``rest`` is what no part explains.

        Means over all steps: these are of several kinds, and only means add up.
        """
        if not self.parts:
            return {}
        found: dict[str, float] = {}
        for laps in self.parts:
            for part, seconds in laps.items():
                found[part] = found.get(part, 0.0) + 1e3 * seconds / len(self.parts)
        step = 1e3 * mean(self.step_seconds)
        return {**found, "rest": step - sum(found.values()), "step": step}

    def host_ms(self) -> float:
        """Returns the milliseconds of a step without its forward passes."""
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
        """New tokens of a sequence per step, its first one, from the prefill, left out."""
        return (self.tokens - self.prefilled) / max(self.steps, 1)
