"""Prices of steps that a test sets, in place of measured ones; and plans without any."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_propd.core.sizing.backoff import Backoff
from vllm_propd.core.sizing.planner import Batch, Plan
from vllm_propd.core.sizing.protocol import Choice, Drafts


@dataclass
class Line:
    """Seconds that grow by ``slope`` for each token beyond ``flat``.

    Of a pruned step's tokens, all pass ``below`` of the layers, the others what is left.
    """

    base: float
    slope: float = 0.0
    flat: int = 0
    below: float = 0.1

    def estimate(
        self,
        tokens: np.ndarray,
        context: float = 0.0,
        left: np.ndarray | None = None,
        kinds: np.ndarray | None = None,
    ) -> np.ndarray:
        if left is not None:
            tokens = self.below * tokens[:, None] + (1.0 - self.below) * left
        return self.base + self.slope * np.maximum(tokens - self.flat, 0)

    def observe(self, tokens: int, context: float, seconds: float) -> None:
        """Learns nothing: it is set."""


def sizing_of(llm: Any) -> Any:
    """The worker's; tests' engines run in this process."""
    return llm.collective_rpc(lambda worker: worker.model_runner.sizing)[0]


class Always(Backoff):
    """Lets a source be asked in every step, whether it pays or not."""

    def asks(self, *load: Any, **first: Any) -> bool:
        return True


def ask_always(sizing: Any) -> None:
    """Lets an engine ask its sources in every step, whether it pays or not."""
    sizing.backoff, sizing.lookup_backoff = Always(), Always()


def pay_always(llm: Any) -> None:
    """Makes nodes free in an engine, and lets it ask its sources in every step.

    For tests of what follows from drafts: by the prices of a slow machine, a source that
    did not pay for one batch may wait for all of the next.
    """
    sizing = sizing_of(llm)
    for planner in (sizing.planner, sizing.planner_without):
        planner.step = Line(0.01)
    sizing.draft = sizing.looking_up = Line(1e-5)
    ask_always(sizing)


@dataclass
class AnySizes:
    """Plans that no estimate explains: any sizes, and now and then a while of none."""

    prunes: bool
    plans: int = 0

    def take_over(self, sizing: Any) -> None:
        """Plans for an engine, which asks its heads whether it pays or not."""
        sizing.planner.plan = self.plan
        ask_always(sizing)

    def plan(self, batch: Batch) -> Plan:
        self.plans += 1
        rng = np.random.default_rng(self.plans)
        whole = np.bincount(batch.tree, minlength=batch.sequences)
        room = max(0, batch.budget - batch.sequences - batch.others) // batch.sequences
        sizes = rng.integers(0, np.minimum(whole, room) + 1) * (self.plans % 12 < 9)
        keep = int(rng.integers(0, sizes.sum() + 1)) if self.prunes else None
        return Plan(sizes, keep, 1.0, 1.0, 1.0)


@dataclass
class _Watched:
    """A step of an engine's, whose plan is seen."""

    inner: Any
    see: Callable[[Drafts, Choice], None]

    def verified(self, pruned: Any) -> _Watched:
        return _Watched(self.inner.verified(pruned), self.see)

    def looks_up(self) -> bool:
        return bool(self.inner.looks_up())

    def found_nothing(self, began: float) -> None:
        self.inner.found_nothing(began)

    def asks_heads(self, looked_up: Any) -> bool:
        return bool(self.inner.asks_heads(looked_up))

    def plan(self, drafts: Drafts) -> Choice:
        choice: Choice = self.inner.plan(drafts)
        self.see(drafts, choice)
        return choice

    def end(self, kept: int, emitted: int) -> Any:
        return self.inner.end(kept, emitted)


def watch_plans(sizing: Any, see: Callable[[Drafts, Choice], None]) -> None:
    """Shows every plan of an engine from now on."""
    begin = sizing.begin
    sizing.begin = lambda *args: _Watched(begin(*args), see)
