"""Real-time sizing: what steps took, and what nodes are worth, to the next trees' sizes.

Times differ between tensor-parallel ranks. They shape nothing but the sizes, which travel
in the scheduled lists, and what ranks agree on (``agree``): one rank's plan counts, the
others' are never seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from types import MappingProxyType

import numpy as np

from vllm_propd.core.sizing.engine_overhead import EngineOverhead
from vllm_propd.core.sizing.head_backoff import LOAN, Account, HeadBackoff
from vllm_propd.core.sizing.node_values import NodeValues
from vllm_propd.core.sizing.planner import MOST_TOKENS, Batch, Plan, Planner, round_totals
from vllm_propd.core.sizing.protocol import Choice, Drafts, StepLoad, StepRecord
from vllm_propd.core.sizing.pruning_recall import Grader, PrunedStep, PruningRecall
from vllm_propd.core.sizing.step_cost import CHAINS, TREES, StepCost
from vllm_propd.core.tree import TokenTree

LOOKING_UP_S = (2e-4, 6e-4)
"""Seconds of drafting without the heads, for 1 and for 64 sequences, as a first guess."""

Agreed = tuple[int | None, bool, int]
"""What ranks agree on: ``Choice.keep``, ``Choice.heads``, and how many steps of this load
the heads are to wait."""


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
        self.has_heads = draft is not None
        self.step, self.draft = step, self.looking_up if draft is None else draft
        self.nodes, self.token_budget = nodes, token_budget
        self.recall = PruningRecall() if pruning else None
        self.grader = Grader(self.recall) if self.recall else None
        totals = round_totals(MOST_TOKENS, captured)
        self.planner = Planner(step, self.draft, self.recall, totals=totals)
        self.planner_without = Planner(step, self.looking_up, kind=CHAINS, totals=totals)
        self.promised, self.clock, self.agree = promised, clock, agree
        self.backoff = HeadBackoff()
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
        if before is not None:
            self.overhead.add(before.sequences > 0, began - before.ended)
        return DynamicTimer(self, began, load, before or Drafted(began))

    def leave(self, drafted: Drafted) -> None:
        """Leaves what a step has drafted to the next step."""
        self._before = drafted


@dataclass(frozen=True)
class Drafted:
    """What a step leaves to the next one.

    Attributes:
        ended: when the step ended, by the clock.
        sequences: how many sequences it has drafted for.
        heads_s: seconds that asking the heads took.
        plan: the plan by which the next step's trees have their sizes.
        stake: the account that has paid for the heads, which the next step is to earn back.
    """

    ended: float
    sequences: int = 0
    heads_s: float = 0.0
    plan: Plan | None = None
    stake: Account | None = None


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
        estimated_s = sizing.step.observe(
            load.tokens, load.context, measured_s, left, load.kind
        )
        if pruned is not None and sizing.grader is not None:
            sizing.grader.add(pruned)
        return DynamicDrafting(sizing, load, self.before, left, measured_s, estimated_s)


class DynamicDrafting:
    """A step whose text is known (``protocol.Drafting``).

    Args:
        sizing: plans the next step.
        load: what the step held.
        before: what the step before had left to it.
        left: tokens that went through all layers; None: the step was not split.
        measured_s, estimated_s: seconds of the step without drafting.
    """

    def __init__(
        self,
        sizing: DynamicSizing,
        load: StepLoad,
        before: Drafted,
        left: int | None,
        measured_s: float,
        estimated_s: float,
    ):
        self._sizing, self._load, self._before = sizing, load, before
        self._left, self._measured_s, self._estimated_s = left, measured_s, estimated_s
        self._read: tuple[Sequence[TokenTree], NodeValues] | None = None
        self._drafts: Drafts | None = None
        self._plan: Plan | None = None
        self._stake: Account | None = None

    def asks_heads(self, looked_up: Sequence[TokenTree]) -> bool:
        """Whether the heads are to draft now: seldom, where they do not pay.

        All tensor-parallel ranks ask, and find the same.

        Args:
            looked_up: trees without the heads' candidates; empty: nothing was looked up.
        """
        if not self._sizing.has_heads:
            return False
        share = self._nodes(looked_up).share if looked_up else 0.0
        sequences, open_account = self._load.sequences, self._open_account
        asks = self._sizing.backoff.asks(sequences, share, open_account)
        self._sizing.backoff.now.earn(self._plain_s())
        return asks

    def _open_account(self, account: Account) -> int:
        """Opens a new load's account; returns how many steps its first ask has to wait."""
        sizing, plain_s = self._sizing, self._plain_s()
        price = sizing.planner.draft.estimate(np.array([self._load.sequences])).item()
        if self._promised_s(price) < plain_s:
            account.balance = LOAN * plain_s
        else:
            account.ask(price, plain_s)
        return sizing.agree((None, False, account.steps_to_wait(plain_s)))[2]

    def _promised_s(self, price: float) -> float:
        """Returns the seconds of a token at this load, as training promises it.

        Args:
            price: seconds of asking the heads.
        """
        sizing, load = self._sizing, self._load
        most = sizing.most(load.sequences)
        promised = {nodes: n for nodes, n in sizing.promised.items() if nodes <= most}
        if not promised:
            return inf
        rows = load.tokens - load.nodes + load.sequences * np.array([*promised])
        kinds = np.full(len(rows), TREES)
        seconds = sizing.planner.step.estimate(rows, load.context, kinds=kinds) + price
        return float((seconds / np.array([*promised.values()])).min())

    def plan(self, drafts: Drafts) -> Choice:
        """Chooses what to verify in the next step; grades earlier steps by the texts."""
        sizing, self._drafts = self._sizing, drafts
        if sizing.grader is not None:
            sizing.grader.grade(drafts.texts)
        trees, looked_up = drafts.trees, drafts.looked_up
        without = self._planned(sizing.planner_without, looked_up) if looked_up else None
        plan = self._planned(sizing.planner, trees) if trees else None
        better = plan is not None and (
            without is None or plan.rate > without.rate * (1.0 + sizing.planner.doubt)
        )
        self._plan = chosen = plan if better else without
        assert chosen is not None
        pays = better and bool(chosen.sizes.any())
        wait = self._asked_for(chosen if pays else None, len(trees)) if trees else 0
        keep, heads, wait = sizing.agree((chosen.keep, better, wait))
        if trees:
            sizing.backoff.wait(wait)
        return Choice(chosen.sizes, keep, heads)

    def end(self, kept: int, emitted: int) -> StepRecord:
        """Ends the step, its drafting included, and returns what it was.

        Args:
            kept: nodes that went through all layers.
            emitted: tokens put out.
        """
        load, before = self._load, self._before
        if before.stake is not None and load.nodes:
            before.stake.balance += self._saved_s(emitted)
        self._sizing.leave(self._drafted())
        expected = 0.0
        if before.plan is not None:  # who has joined since gives one token
            joined = max(0, load.sequences - len(before.plan.sizes))
            expected = before.plan.tokens + joined
        in_vain_s = before.heads_s if emitted <= load.sequences else 0.0
        return StepRecord(
            load.sequences, load.tokens, load.nodes, kept, emitted, expected,
            self._estimated_s, self._measured_s, before.heads_s, in_vain_s,
        )  # fmt: skip

    def _drafted(self) -> Drafted:
        """Takes note of what drafting took; returns what is left to the next step."""
        sizing, drafts = self._sizing, self._drafts
        ended = sizing.clock()
        if drafts is None:
            return Drafted(ended)
        # With all that comes of it: the plan, and the engine's part.
        seconds = ended - drafts.began + sizing.overhead.extra
        sequences = len(drafts.trees or drafts.looked_up)
        price = sizing.draft if drafts.trees else sizing.looking_up
        price.observe(sequences, 0.0, seconds)
        heads_s = seconds if drafts.trees else 0.0
        return Drafted(ended, sequences, heads_s, self._plan, self._stake)

    def _plain_s(self) -> float:
        """Returns the seconds that this step would take without its nodes."""
        load = self._load
        tokens = np.array([load.tokens - load.nodes])
        return self._sizing.planner.step.estimate(tokens, load.context).item()

    def _saved_s(self, emitted: int) -> float:
        """Returns how much longer plain steps would take for this step's tokens, seconds.

        All times are estimates: the noise of single steps would outweigh the difference.
        """
        load, price = self._load, self._sizing.planner.step
        lefts = None if self._left is None else np.array([self._left])
        tokens, kinds = np.array([load.tokens]), np.array([load.kind])
        taken = price.estimate(tokens, load.context, lefts, kinds).item()
        return emitted / max(load.sequences, 1) * self._plain_s() - taken

    def _asked_for(self, plan: Plan | None, sequences: int) -> int:
        """Takes the price of asking the heads from this load's account.

        Args:
            plan: a plan with nodes of the heads; None: they were asked in vain.
            sequences: how many sequences they were asked for.

        Returns:
            How many steps to wait, if what the plan expects comes true.
        """
        account, plain_s = self._sizing.backoff.now, self._plain_s()
        price = self._sizing.planner.draft.estimate(np.array([sequences])).item()
        account.ask(price, plain_s)
        expected = 0.0
        if plan is not None:
            self._stake = account
            expected = plan.tokens / sequences * plain_s - (plan.seconds - price)
        return replace(account, balance=account.balance + expected).steps_to_wait(plain_s)

    def _planned(self, planner: Planner, trees: Sequence[TokenTree]) -> Plan:
        load, half = self._load, self._sizing.token_budget // 2
        others = min(load.waiting, half)
        nodes = self._nodes(trees)
        return planner.plan(
            Batch(
                nodes.probability,
                nodes.tree,
                len(trees),
                others=others,
                context=load.context,
                budget=half + others,
            )
        )

    def _nodes(self, trees: Sequence[TokenTree]) -> NodeValues:
        """Returns the trees' nodes and values; keeps them while the trees are the same."""
        if self._read is None or self._read[0] is not trees:
            self._read = trees, NodeValues.of(trees)
        return self._read[1]
