"""One arm's turn: a batch of prompts generated to the end, timed and counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from statistics import mean, median
from typing import Any, Generic, TypeVar

from vllm_propd.bench.stopwatch import SPLIT, Work

RARE = 0.1
"""Of a turn's steps; such ones are not what a median is about."""

Taker = TypeVar("Taker")
AnyTurn = TypeVar("AnyTurn", bound="Turn")

Recording = list[list[dict[str, Any]]]
"""Trees of steps (``engine.record.RecordedTree``)."""

FORWARD = ("forward", SPLIT, "lower half", "prune", "upper half")
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
        """Median milliseconds of a step by part; ``rest`` is what no part explains.

        A part of some steps only, as of those that are pruned, counts by their share; one
        of rare steps, as of prefills where all others are pruned, not at all.
        """
        if not self.parts:
            return {}
        found = {}
        for part, laps in self.parts.items():
            share = min(len(laps) / len(self.step_seconds), 1.0)
            if share >= RARE:
                found[part] = 1e3 * share * median(laps)
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


def in_turns(arms: Sequence[Taker], rounds: int) -> Iterator[Taker]:
    """Whose turn it is: A B C A D E, A B C A D E, ... A.

    Args:
        arms: the first is what the others are compared with: no other's turn is far from
            one of its own, before and after.
        rounds: in which each other arm has one turn.
    """
    first, *others = arms
    pairs = [others[i : i + 2] for i in range(0, len(others), 2)] or [[]]
    for _ in range(rounds):
        for pair in pairs:
            yield first
            yield from pair
    yield first


def turns_in(arms: int, rounds: int) -> int:
    """How many ``in_turns`` gives."""
    return rounds * (arms - 1 + max(arms // 2, 1)) + 1


class Turns(Generic[AnyTurn]):
    """All turns that count, in the order in which they were taken."""

    def __init__(self, plain: str = "plain"):
        self._plain = plain
        self._taken: list[tuple[str, AnyTurn]] = []

    def add(self, arm: str, turn: AnyTurn) -> None:
        """The next turn is over."""
        self._taken.append((arm, turn))

    def of(self, arm: str) -> list[AnyTurn]:
        """An arm's."""
        return [turn for name, turn in self._taken if name == arm]

    @property
    def plain(self) -> list[AnyTurn]:
        """Those of what is compared with."""
        return self.of(self._plain)

    def ratio(self, arm: str) -> float:
        """Tokens/s over plain vLLM's, over the mean of its turns before and after.

        Of all turns the mean without the fastest and the slowest quarter: nearly as steady
        as the mean where the machine wavers, and deaf to a minute in which it is slow.
        """
        if arm == self._plain:
            return 1.0
        plain = [i for i, (name, _) in enumerate(self._taken) if name == self._plain]
        found = []
        for place, (name, turn) in enumerate(self._taken):
            if name == arm:
                before = max(i for i in plain if i < place)
                after = min(i for i in plain if i > place)
                near = [self._taken[i][1].tokens_per_s for i in (before, after)]
                found.append(turn.tokens_per_s / mean(near))
        left_out = (len(found) + 1) // 4
        return mean(sorted(found)[left_out : len(found) - left_out])
