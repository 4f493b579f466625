"""How large the next step's trees are: where expected tokens per second are most.

The nodes of all sequences stand in one best-first order. Each cut of it is a plan; its
worth is the tokens it is expected to give over the seconds it is expected to take (paper
section 3.3, for the whole batch at once). With early pruning a plan is a pair: n nodes
drafted, at most m of each tree kept. No node at all is a plan, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vllm_propd.core.tree import Ints

Floats = npt.NDArray[np.float64]


class Price(Protocol):
    """Seconds of steps, as ``core.cost.StepCost`` estimates them."""

    def estimate(self, tokens: Ints, context: float = 0.0) -> Floats:
        """``[steps]`` seconds for ``[steps]`` tokens."""


class KeptShare(Protocol):
    """What pruning is expected to leave of the acceptance."""

    def share(self, nodes: Floats, kept: int) -> Floats:
        """``[plans]`` in 0..1, for trees of ``nodes`` nodes of which ``kept`` stay."""


@dataclass(frozen=True)
class Halves:
    """What a step in two halves costs, and what it loses.

    Attributes:
        lower, upper: the halves, by tokens that pass them.
        judge: the early head and the rule, by tokens judged.
        kept: what is left of the acceptance.
        amounts: values of m to choose from.
    """

    lower: Price
    upper: Price
    judge: Price
    kept: KeptShare
    amounts: tuple[int, ...] = (4, 8, 12, 16, 24, 32)


@dataclass(frozen=True)
class Batch:
    """The step to plan.

    Attributes:
        probability: ``[nodes]`` float64 that each node is accepted; within a tree never
            above its parent's, nor above that of a node grown before it.
        tree: ``[nodes]`` int64 which sequence's; each tree's nodes in growing order.
        sequences: with a root in the step.
        others: further tokens of the step, as of prompts.
        context: tokens of context of all sequences.
        budget: the most tokens that the step may have, roots and others included.
    """

    probability: Floats
    tree: Ints
    sequences: int
    others: int = 0
    context: float = 0.0
    budget: int = 1 << 30


@dataclass(frozen=True)
class Plan:
    """What to draft and to keep.

    Attributes:
        sizes: ``[sequences]`` int64 nodes of each tree.
        keep: m, where the step is to be pruned.
        tokens: expected of the step, over all sequences.
        seconds: that it is expected to take, drafting included.
    """

    sizes: Ints
    keep: int | None
    tokens: float
    seconds: float

    @property
    def rate(self) -> float:
        """Expected tokens per second."""
        return self.tokens / self.seconds


@dataclass
class Planner:
    """Chooses plans, and stays with the last one while no other is clearly better.

    Attributes:
        whole: price of a step that is not pruned.
        draft: price of drafting, by sequences; a plan without nodes does not pay it.
        halves: prices of a pruned step; None: never prune.
        hysteresis: how much faster another plan must be, relatively.
    """

    whole: Price
    draft: Price
    halves: Halves | None = None
    hysteresis: float = 0.02
    _last: tuple[float, int | None] | None = field(default=None, init=False)

    def plan(self, batch: Batch) -> Plan:
        """The plan for a step.

        Nodes per sequence and m are what stays: the batch may grow and shrink between.
        """
        order = np.argsort(-batch.probability, kind="stable")
        taken = batch.sequences + batch.others
        most = min(len(order), max(0, batch.budget - taken))
        nodes = np.arange(most + 1)
        gained = np.concatenate([[0.0], np.cumsum(batch.probability[order[:most]])])
        drafting = self.draft.estimate(np.array([batch.sequences]))[0] * (nodes > 0)
        rows, keeps = self._priced(batch, nodes, gained, taken)
        seconds = np.stack([s for _, s in rows]) + drafting
        tokens = np.stack([t for t, _ in rows])
        rate = tokens / seconds
        row, cut = map(int, np.unravel_index(rate.argmax(), rate.shape))
        if self._last is not None and self._last[1] in keeps:
            before = keeps.index(self._last[1])
            same = min(most, round(self._last[0] * batch.sequences))
            if rate[before, same] * (1.0 + self.hysteresis) >= rate[row, cut]:
                row, cut = before, same
        if batch.sequences:
            self._last = cut / batch.sequences, keeps[row]
        return Plan(
            np.bincount(batch.tree[order[:cut]], minlength=batch.sequences),
            keeps[row] if cut else None,
            float(tokens[row, cut]),
            float(seconds[row, cut]),
        )

    def _priced(
        self, batch: Batch, nodes: Ints, gained: Floats, taken: int
    ) -> tuple[list[tuple[Floats, Floats]], list[int | None]]:
        """Tokens and seconds by number of nodes: unpruned, then for each m."""
        bonus = float(batch.sequences)
        whole = self.whole.estimate(taken + nodes, batch.context)
        rows: list[tuple[Floats, Floats]] = [(bonus + gained, whole)]
        keeps: list[int | None] = [None]
        if self.halves is None:
            return rows, keeps
        halves, size = self.halves, nodes / max(batch.sequences, 1)
        below = halves.lower.estimate(taken + nodes, batch.context)
        below = below + halves.judge.estimate(taken + nodes) * (nodes > 0)
        for amount in halves.amounts:
            left = taken + np.minimum(nodes, amount * batch.sequences)
            above = halves.upper.estimate(left, batch.context)
            share = halves.kept.share(size, amount)
            rows.append((bonus + share * gained, below + above))
            keeps.append(amount)
        return rows, keeps
