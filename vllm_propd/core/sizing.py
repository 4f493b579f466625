"""Real-time sizing: what steps took, and what nodes are worth, to the next trees' sizes.

Times differ between tensor-parallel ranks. They shape nothing but the sizes, which travel
in the scheduled lists: one rank's plan counts, the others' are never seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
from numba import njit

from vllm_propd.core.cost import BARE, CHAINS, TREES, StepCost
from vllm_propd.core.gaps import Gaps
from vllm_propd.core.growth import nodes_per_sequence
from vllm_propd.core.head_backoff import Account, HeadBackoff
from vllm_propd.core.planner import MOST_TOKENS, Batch, Plan, Planner, round_totals
from vllm_propd.core.survival import Grader, PrunedStep, Survival
from vllm_propd.core.tree import Ints, TokenTree

LOOKING_UP_S = (2e-4, 6e-4)
"""Seconds of drafting without the heads, for 1 and for 64 sequences, before any was met."""


@dataclass(frozen=True)
class Load:
    """What a step holds.

    Attributes:
        sequences: that put out a token.
        tokens: all, drafts and prompts included.
        others: tokens of prompts.
        context: tokens of context, over all sequences.
        waiting: tokens that prompts begun here leave to later steps.
        chained: its trees are paths, attended to as vLLM's own drafts.
    """

    sequences: int
    tokens: int
    others: int
    context: int
    waiting: int = 0
    chained: bool = False

    @property
    def nodes(self) -> int:
        """Of trees."""
        return self.tokens - self.others - self.sequences

    @property
    def kind(self) -> int:
        """What prices tell apart (``core.cost``)."""
        return BARE if not self.nodes else CHAINS if self.chained else TREES


@dataclass
class StepRecord:
    """One step, for metrics and plots.

    Attributes:
        sequences, tokens: as in ``Load``.
        nodes, kept: in trees, over all sequences, before and after early pruning.
        expected_tokens: that the plan expected of the step; 0 where there was no plan.
        emitted: tokens put out.
        estimated_s, measured_s: the step's time; 0 where sizes are fixed.
        heads_s: time of asking the heads after the step before, with growing and planning;
            likewise.
        in_vain_s: of it, if no sequence has put out more than one token.
    """

    sequences: int
    tokens: int
    nodes: int
    kept: int
    emitted: int
    expected_tokens: float = 0.0
    estimated_s: float = 0.0
    measured_s: float = 0.0
    heads_s: float = 0.0
    in_vain_s: float = 0.0


@dataclass(frozen=True)
class Choice:
    """What to verify in a step.

    Attributes:
        sizes: ``[sequences]`` int64 nodes of each tree.
        keep: how many of all these early pruning shall keep; None: what is configured.
        heads: they are of the trees that hold the heads' candidates, too; else of the
            looked-up ones.
        wait: steps of this load in which the heads are not to be asked.
    """

    sizes: Ints
    keep: int | None
    heads: bool
    wait: int = 0


class Sizing(Protocol):
    """What a step asks, in this order; see ``DynamicSizing``."""

    def step_begins(self, began: float, load: Load) -> None:
        """A step has begun."""

    def step_verified(self, pruned: PrunedStep | None) -> None:
        """Its text is known."""

    def learn(self, texts: dict[str, list[int]]) -> None:
        """All texts are known so far."""

    def asks_heads(self, looked_up: Sequence[TokenTree]) -> bool:
        """Whether the heads are to draft after this step, beside what is looked up."""

    def most(self, sequences: int) -> int:
        """Nodes to draft for each sequence; 0: do not draft."""

    def wait(self, steps: int) -> None:
        """The heads have been asked, and are not to be in so many steps of this load."""

    def plan(
        self,
        trees: list[TokenTree],
        began: float,
        looked_up: Sequence[TokenTree] = (),
    ) -> Choice:
        """What to verify in the next step."""

    def step_ends(self, kept: int, emitted: int) -> StepRecord:
        """It is over, has kept so many nodes, and put out so many tokens."""


class FixedSizing:
    """Trees of the configured size.

    Args:
        nodes: of a tree.
        token_budget: tokens that a step may hold (``max_num_batched_tokens``).
    """

    def __init__(self, nodes: int, token_budget: int):
        self.nodes, self.token_budget = nodes, token_budget
        self._load = Load(0, 0, 0, 0)

    def step_begins(self, began: float, load: Load) -> None:
        """See ``DynamicSizing``."""
        self._load = load

    def step_verified(self, pruned: PrunedStep | None) -> None:
        """Nothing to learn."""

    def learn(self, texts: dict[str, list[int]]) -> None:
        """Nothing to learn."""

    def step_ends(self, kept: int, emitted: int) -> StepRecord:
        """What the step was."""
        load = self._load
        return StepRecord(load.sequences, load.tokens, load.nodes, kept, emitted)

    def asks_heads(self, looked_up: Sequence[TokenTree]) -> bool:
        """Always."""
        return True

    def wait(self, steps: int) -> None:
        """Never."""

    def most(self, sequences: int) -> int:
        """Nodes to draft for each sequence; 0: do not draft."""
        return nodes_per_sequence(self.nodes, self.token_budget, sequences)

    def plan(
        self,
        trees: list[TokenTree],
        began: float,
        looked_up: Sequence[TokenTree] = (),
    ) -> Choice:
        """All nodes, to be pruned as is configured; see ``DynamicSizing``."""
        return Choice(np.array([len(tree) for tree in trees], np.int64), None, True)


@njit(cache=True, nogil=True)
def _spread(score, sizes):  # type: ignore[no-untyped-def]
    probability, owner = np.empty(len(score)), np.empty(len(score), np.int64)
    node, share = 0, 0.0
    for tree, size in enumerate(sizes):
        expected = 0.0
        for _ in range(size):
            probability[node], owner[node] = np.exp(np.float64(score[node])), tree
            expected += probability[node]
            node += 1
        share += min(expected, 1.0) / len(sizes)
    return probability, owner, share


@dataclass(frozen=True)
class _Nodes:
    """Some trees' nodes.

    Attributes:
        probability: ``[nodes]`` float64 that each is accepted.
        tree: ``[nodes]`` int64 whose it is.
        share: of trees of which some node is likely to be accepted, 0..1.
    """

    probability: npt.NDArray[np.float64]
    tree: Ints
    share: float


def _nodes_of(trees: Sequence[TokenTree]) -> _Nodes:
    score = np.concatenate([tree.score for tree in trees])
    return _Nodes(*_spread(score, np.array([len(tree) for tree in trees])))


class DynamicSizing:
    """Measures steps, and sizes trees.

    Args:
        step: cost of steps without drafting, by tokens.
        draft: cost of drafting, by sequences.
        nodes: the most of a tree.
        token_budget: tokens that a step may hold (``max_num_batched_tokens``).
        pruning: whether steps may be pruned; ``step`` then has a table of both halves.
        captured: see ``round_totals``.
        clock: seconds.
    """

    def __init__(
        self,
        step: StepCost,
        draft: StepCost,
        nodes: int,
        token_budget: int,
        pruning: bool = False,
        captured: Sequence[int] = (),
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.step, self.draft = step, draft
        self.nodes, self.token_budget = nodes, token_budget
        self.survival = Survival() if pruning else None
        self.grader = Grader(self.survival) if self.survival else None
        totals = round_totals(MOST_TOKENS, captured)
        self.planner = Planner(step, draft, self.survival, totals=totals)
        # Without the heads: drafting is mostly the plan; and no early head knows better
        # than a text that repeats itself.
        self.looking_up = StepCost(np.array([1, 64]), np.array(LOOKING_UP_S))
        self.planner_without = Planner(step, self.looking_up, kind=CHAINS, totals=totals)
        self._clock = clock
        self._backoff = HeadBackoff()
        # Whose price the coming step, and this one, are to earn back.
        self._stakes: Account | None = None
        self._staked: Account | None = None
        self._left: int | None = None
        self._heads_s = 0.0
        self._gaps = Gaps()
        self._drafted, self._draft_began, self._asked = 0, 0.0, False
        self._load = Load(0, 0, 0, 0)
        self._plan: Plan | None = None
        self._expected: Plan | None = None
        self._estimated = self._measured = 0.0
        self._began = 0.0
        self._ended: float | None = None
        self._read: tuple[Sequence[TokenTree], _Nodes] | None = None

    def step_begins(self, began: float, load: Load) -> None:
        """A step has begun.

        Args:
            began: when, by the clock.
            load: what it holds.
        """
        self._began = began
        if self._ended is not None:
            self._gaps.add(self._drafted > 0, began - self._ended)
        self._load, self._drafted = load, 0

    def step_verified(self, pruned: PrunedStep | None) -> None:
        """The step's text is known: all but drafting is over.

        Args:
            pruned: its trees, where a plan had it pruned; None: it was not split, or every
                step is.
        """
        load = self._load
        self._measured = self._clock() - self._began + self._gaps.plain
        self._left = left = None if pruned is None else load.tokens - pruned.dropped
        self._estimated = self.step.observe(
            load.tokens, load.context, self._measured, left, load.kind
        )
        if pruned is not None and self.grader is not None:
            self.grader.add(pruned)
        # What the coming plan is for is another step than what this one was planned as.
        self._expected, self._plan = self._plan, None
        self._staked, self._stakes = self._stakes, None

    def step_ends(self, kept: int, emitted: int) -> StepRecord:
        """The step, its drafting included, is over.

        Args:
            kept: nodes that went through all layers.
            emitted: tokens put out.
        """
        load, plan, expected = self._load, self._expected, 0.0
        heads_s, self._heads_s = self._heads_s, 0.0
        in_vain_s = heads_s if emitted <= load.sequences else 0.0
        if self._staked is not None and load.nodes:
            self._staked.balance += self._saved_s(emitted)
        self._ended = self._clock()
        if self._drafted:  # with all that comes of it: the plan, and the engine's part
            seconds = self._ended - self._draft_began + self._gaps.extra
            price = self.draft if self._asked else self.looking_up
            price.observe(self._drafted, 0.0, seconds)
            self._heads_s = seconds if self._asked else 0.0
        if plan is not None:  # who has joined since gives one token
            expected = plan.tokens + max(0, load.sequences - len(plan.sizes))
        return StepRecord(
            load.sequences, load.tokens, load.nodes, kept, emitted,
            expected, self._estimated, self._measured, heads_s, in_vain_s,
        )  # fmt: skip

    def learn(self, texts: dict[str, list[int]]) -> None:
        """Grades earlier steps, once in each step after which trees are drafted.

        Args:
            texts: by request, the tokens that each has put out.
        """
        if self.grader is not None:
            self.grader.grade(texts)

    def asks_heads(self, looked_up: Sequence[TokenTree]) -> bool:
        """Whether the heads are to draft after this step: seldom, where they do not pay.

        All tensor-parallel ranks ask, and find the same.

        Args:
            looked_up: trees without their candidates; empty where nothing was looked up.
        """
        share = self._nodes(looked_up).share if looked_up else 0.0
        asks = self._backoff.asks(self._load.sequences, share)
        self._backoff.now.earn(self._plain_s())
        return asks

    def wait(self, steps: int) -> None:
        """The heads have been asked, and are not to be in so many steps of this load."""
        self._backoff.wait(steps)

    def _plain_s(self) -> float:
        """Seconds that this step would take without its nodes."""
        load = self._load
        tokens = np.array([load.tokens - load.nodes])
        return self.planner.step.estimate(tokens, load.context).item()

    def _saved_s(self, emitted: int) -> float:
        """Seconds that plain steps would take longer for the tokens of this one.

        As all steps are estimated: the noise of single ones would outweigh it.
        """
        load = self._load
        lefts = None if self._left is None else np.array([self._left])
        tokens, kinds = np.array([load.tokens]), np.array([load.kind])
        taken = self.planner.step.estimate(tokens, load.context, lefts, kinds).item()
        return emitted / max(load.sequences, 1) * self._plain_s() - taken

    def _asked_for(self, plan: Plan | None, sequences: int) -> int:
        """Takes the price of asking the heads from this load's account.

        Args:
            plan: with nodes of theirs; None: it was in vain.
            sequences: drafted for.

        Returns:
            How many steps to wait, if what the plan expects comes true.
        """
        account, plain_s = self._backoff.now, self._plain_s()
        price = self.planner.draft.estimate(np.array([sequences])).item()
        account.ask(price)
        expected = 0.0
        if plan is not None:
            self._stakes = account
            expected = plan.tokens / sequences * plain_s - (plan.seconds - price)
        return replace(account, balance=account.balance + expected).steps_to_wait(plain_s)

    def most(self, sequences: int) -> int:
        """Nodes to draft for each sequence; 0: do not draft."""
        return min(self.nodes, max(0, self.token_budget // 2 - sequences))

    def plan(
        self,
        trees: list[TokenTree],
        began: float,
        looked_up: Sequence[TokenTree] = (),
    ) -> Choice:
        """What to verify in the next step.

        Args:
            trees: drafted, of at most ``most`` nodes each; empty where no head was asked.
            began: when drafting them did, by the clock.
            looked_up: the same without the heads' candidates; empty where nothing was
                looked up.
        """
        self._drafted = len(trees or looked_up)
        self._draft_began, self._asked = began, bool(trees)
        without = self._planned(self.planner_without, looked_up) if looked_up else None
        plan = self._planned(self.planner, trees) if trees else None
        better = plan is not None and (
            without is None or plan.rate > without.rate * (1.0 + self.planner.doubt)
        )
        self._plan = chosen = plan if better else without
        assert chosen is not None
        pays = better and bool(chosen.sizes.any())
        wait = self._asked_for(chosen if pays else None, len(trees)) if trees else 0
        return Choice(chosen.sizes, chosen.keep, better, wait)

    def _planned(self, planner: Planner, trees: Sequence[TokenTree]) -> Plan:
        load = self._load
        others = min(load.waiting, self.token_budget // 2)
        nodes = self._nodes(trees)
        return planner.plan(
            Batch(
                nodes.probability,
                nodes.tree,
                len(trees),
                others=others,
                context=load.context,
                budget=self.token_budget // 2 + others,
            )
        )

    def _nodes(self, trees: Sequence[TokenTree]) -> _Nodes:
        """Theirs; ``asks_heads`` and ``plan`` are given the same looked-up trees."""
        if self._read is None or self._read[0] is not trees:
            self._read = trees, _nodes_of(trees)
        return self._read[1]
