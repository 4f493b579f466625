"""Real-time sizing: what steps took, and what nodes are worth, to the next trees' sizes.

Times differ between tensor-parallel ranks. They shape nothing but the sizes, which travel
in the scheduled lists, and what ranks agree on (``agree``): one rank's plan counts, the
others' are never seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from vllm_propd.core.sizing.backoff import Backoff
from vllm_propd.core.sizing.dynamic_drafting import Drafted, DynamicDrafting
from vllm_propd.core.sizing.engine_overhead import EngineOverhead
from vllm_propd.core.sizing.planner import MOST_TOKENS, Planner, round_totals
from vllm_propd.core.sizing.protocol import StepLoad
from vllm_propd.core.sizing.pruning_recall import Grader, PrunedStep, PruningRecall
from vllm_propd.core.sizing.step_cost import StepCost

LOOKING_UP_S, SEARCHING_S = (2e-4, 6e-4), (1e-4, 3e-4)
"""Seconds of drafting without the heads, and of searching texts alone, for 1 and for 64
sequences, as a first guess."""

Agreed = tuple[int | None, bool, int, int]
"""What ranks agree on: ``Choice.keep``, ``Choice.heads``, and how many steps of this load
the heads, and looking up, are to wait."""


def _alone(said: Agreed) -> Agreed:
    return said


class DynamicSizing:
    """Measures steps, and sizes trees (``protocol.Sizing``).

    Args:
        step: cost of steps without drafting, by tokens.
        draft: cost of asking the heads, by sequences; None: there are none.
        nodes: the most nodes of a tree.
        token_budget: tokens that a step may hold (``max_num_batched_tokens``).
        pruning: whether steps may be pruned; ``step`` then has a table of both halves.
        promised: tokens per step by nodes of a tree, as training has measured them.
        captured: see ``round_totals``.
        clock: gives the time in seconds.
        agree: returns what the first tensor-parallel rank says, whatever this one says.
    """

    def __init__(
        self,
        step: StepCost,
        draft: StepCost | None,
        nodes: int,
        token_budget: int,
        pruning: bool = False,
        promised: Mapping[int, float] = MappingProxyType({}),
        captured: Sequence[int] = (),
        clock: Callable[[], float] = time.perf_counter,
        agree: Callable[[Agreed], Agreed] = _alone,
    ):
        # Without the heads: drafting is mostly the plan; and no early head knows better
        # than a text that repeats itself.
        self.looking_up = StepCost(np.array([1, 64]), np.array(LOOKING_UP_S))
        self.searching = StepCost(np.array([1, 64]), np.array(SEARCHING_S))
        self.has_heads = draft is not None
        self.step, self.draft = step, self.looking_up if draft is None else draft
        self.nodes, self.token_budget = nodes, token_budget
        self.recall = PruningRecall() if pruning else None
        self.grader = Grader(self.recall) if self.recall else None
        totals = round_totals(MOST_TOKENS, captured)
        self.planner = Planner(step, self.recall, totals=totals)
        self.planner_without = Planner(step, totals=totals)
        self.promised, self.clock, self.agree = promised, clock, agree
        self.backoff, self.lookup_backoff = Backoff(), Backoff()
        self.overhead = EngineOverhead()
        self._before: Drafted | None = None

    def most(self, sequences: int) -> int:
        """Returns how many nodes to draft for each sequence; 0: do not draft."""
        return min(self.nodes, max(0, self.token_budget // 2 - sequences))

    def begin(self, began: float, load: StepLoad) -> DynamicTimer:
        """Begins to time a step.

        Args:
            began: when the step began, by the clock.
            load: what the step holds.
        """
        before, self._before = self._before, None
        if before is not None and not load.fresh:
            self.overhead.add(before.sequences > 0, began - before.ended)
        return DynamicTimer(self, began, load, before or Drafted(began))

    def leave_out(self, seconds: float) -> None:
        """Leaves so many seconds since the last step out of what the engine takes."""
        if (before := self._before) is not None:
            self._before = replace(before, ended=before.ended + seconds)

    def leave(self, drafted: Drafted) -> None:
        """Leaves what a step has drafted to the next step."""
        self._before = drafted


@dataclass(frozen=True)
class DynamicTimer:
    """A step that is running and timed (``protocol.StepTimer``).

    Attributes:
        sizing: learns from the step.
        began: when the step began, by the clock.
        load: what the step holds.
        before: what the step before has left to this one.
    """

    sizing: DynamicSizing
    began: float
    load: StepLoad
    before: Drafted

    def verified(self, pruned: PrunedStep | None) -> DynamicDrafting:
        """Takes the time of a step whose text is known: all but drafting is over.

        Args:
            pruned: the step's trees, where a plan had it pruned; None: the step was not
                split, or every step is.
        """
        sizing, load = self.sizing, self.load
        measured_s = sizing.clock() - self.began + sizing.overhead.plain
        left = None if pruned is None else load.tokens - pruned.dropped
        if load.teaches:
            estimated_s = sizing.step.observe(
                load.tokens, load.context, measured_s, left, load.kind
            )
        else:
            estimated_s = sizing.step.seconds_of(load.tokens, load.context, left, load.kind)
        if pruned is not None and sizing.grader is not None:
            sizing.grader.add(pruned)
        return DynamicDrafting(sizing, load, self.before, left, measured_s, estimated_s)
