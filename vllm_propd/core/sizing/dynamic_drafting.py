"""A step whose text is known: what comes next is planned, and what it took is told."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

import numpy as np

from vllm_propd.core.sizing.backoff import Account, on_loan
from vllm_propd.core.sizing.node_values import NodeValues
from vllm_propd.core.sizing.planner import Batch, Plan, Planner, Price
from vllm_propd.core.sizing.protocol import Choice, Drafts, StepLoad, StepRecord
from vllm_propd.core.sizing.step_cost import TREES

if TYPE_CHECKING:  # it makes what stands here
    from vllm_propd.core.sizing.controller import DynamicSizing


@dataclass(frozen=True)
class Stake:
    """A source's part in a plan.

    Attributes:
        account: has paid for the plan's nodes.
        promised: seconds that the plan is to save.
        pace: seconds that a token of each sequence takes without the source; None: as
            many as a step without nodes.
    """

    account: Account
    promised: float
    pace: float | None


@dataclass(frozen=True)
class Drafted:
    """What a step leaves to the next one.

    Attributes:
        ended: when the step ended, by the clock.
        sequences: how many sequences it has drafted for.
        heads_s: seconds that asking the heads took.
        plan: the plan by which the next step's trees have their sizes.
        stakes: what the sources that have been asked for its nodes are to earn back.
    """

    ended: float
    sequences: int = 0
    heads_s: float = 0.0
    plan: Plan | None = None
    stakes: tuple[Stake, ...] = ()


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
        self._drafts: Drafts | None = None
        self._plan: Plan | None = None
        self._stakes: tuple[Stake, ...] = ()

    def looks_up(self) -> bool:
        """Whether texts are to be searched now: seldom, where that does not pay.

        All tensor-parallel ranks ask, and find the same.
        """
        backoff = self._sizing.lookup_backoff
        looks = backoff.asks(self._load.sequences, first=on_loan(self._decode_s))
        backoff.now.earn(self._plain_s())
        return looks

    def found_nothing(self, began: float) -> None:
        """Takes what a search took that found nothing out of its account.

        All tensor-parallel ranks find nothing, in the same steps.

        Args:
            began: when the search began, by the clock.
        """
        sizing, decode_s = self._sizing, self._decode_s()
        account = sizing.lookup_backoff.now
        account.ask(self._searched_s(self._load.sequences, began, sizing.clock()), decode_s)
        later = account.steps_to_wait(decode_s, self._pending_s(account))
        sizing.lookup_backoff.wait(sizing.agree((None, False, 0, later))[3])

    def asks_heads(self, looked_up: NodeValues | None) -> bool:
        """Whether the heads are to draft now: seldom, where they do not pay.

        All tensor-parallel ranks ask, and find the same.

        Args:
            looked_up: trees without the heads' candidates; None: nothing was looked up.
        """
        if not self._sizing.has_heads:
            return False
        share = 0.0 if looked_up is None else looked_up.share
        sequences, open_account = self._load.sequences, self._open_account
        asks = self._sizing.backoff.asks(sequences, share, open_account)
        self._sizing.backoff.now.earn(self._plain_s())
        return asks

    def _open_account(self, account: Account) -> int:
        """Opens a new load's account; returns how many steps its first ask has to wait."""
        sizing, decode_s = self._sizing, self._decode_s()
        price = sizing.draft.estimate(np.array([self._load.sequences])).item()
        if self._promised_s(price) < decode_s:
            account.lend(decode_s)
        else:
            account.ask(price, decode_s)
        return sizing.agree((None, False, account.steps_to_wait(decode_s), 0))[2]

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
        rows = load.sequences * (1 + np.array([*promised]))
        kinds = np.full(len(rows), TREES)
        seconds = sizing.planner.step.estimate(rows, load.context, kinds=kinds) + price
        return float((seconds / np.array([*promised.values()])).min())

    def plan(self, drafts: Drafts) -> Choice:
        """Chooses what to verify in the next step; grades earlier steps by the texts."""
        sizing, self._drafts = self._sizing, drafts
        if sizing.grader is not None:
            sizing.grader.grade(drafts.texts())
        asked, looked = drafts.trees, drafts.looked_up
        heads_s = 0.0 if asked is None else self._price(sizing.draft, asked)
        looking_s = 0.0 if looked is None else self._price(sizing.looking_up, looked)
        if asked is not None and looked is not None and drafts.asked is not None:
            # Beside the heads it is the search alone; the plan, and the engine's part, are
            # in their price.
            looking_s = self._searched_s(len(looked.sizes), drafts.began, drafts.asked)
        asked_s = heads_s + looking_s
        without = self._planned(sizing.planner_without, looked, asked_s)
        plan = self._planned(sizing.planner, asked, asked_s)
        better = plan is not None and (
            without is None or plan.rate > without.rate * (1.0 + sizing.planner.doubt)
        )
        self._plan = chosen = plan if better else without
        assert chosen is not None
        rest = later = 0
        # What is saved without the heads is none of their doing, and what they add to it is
        # none of the texts'.
        if asked is not None:
            account, pace = sizing.backoff.now, self._pace_s(without)
            rest = self._pay(account, heads_s, plan if better else None, pace)
        if looked is not None:
            account = sizing.lookup_backoff.now
            later = self._pay(account, looking_s, without, None, chosen=not better)
        keep, heads, rest, later = sizing.agree((chosen.keep, better, rest, later))
        if asked is not None:
            sizing.backoff.wait(rest)
        if looked is not None:
            sizing.lookup_backoff.wait(later)
        return Choice(chosen.sizes, keep, heads)

    def end(self, kept: int, emitted: int) -> StepRecord:
        """Ends the step, its drafting included, and returns what it was.

        Args:
            kept: nodes that went through all layers.
            emitted: tokens put out.
        """
        load, before = self._load, self._before
        if before.stakes and load.nodes:
            for stake in before.stakes:
                stake.account.repay(self._saved_s(emitted, stake.pace), stake.promised)
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
        asked = drafts.trees is not None
        began = drafts.began if drafts.asked is None or not asked else drafts.asked
        seconds = ended - began + sizing.overhead.extra
        nodes = drafts.trees or drafts.looked_up
        assert nodes is not None
        sequences = len(nodes.sizes)
        price = sizing.draft if asked else sizing.looking_up
        price.observe(sequences, 0.0, seconds)
        heads_s = seconds if asked else 0.0
        return Drafted(ended, sequences, heads_s, self._plan, self._stakes)

    def _plain_s(self) -> float:
        """Returns the seconds that this step would take without its nodes."""
        return self._bare_s(self._load.tokens - self._load.nodes)

    def _decode_s(self) -> float:
        """Returns the seconds that it would take without nodes and prompts.

        So long are the steps that further tokens save: the prompts will be over.
        """
        return self._bare_s(self._load.sequences)

    def _bare_s(self, tokens: int) -> float:
        """Returns the seconds of a step without nodes; known already, if it is this one."""
        load = self._load
        if tokens == load.tokens:
            return self._estimated_s
        step = self._sizing.planner.step
        return step.estimate(np.array([tokens]), load.context).item()

    def _saved_s(self, emitted: int, pace: float | None) -> float:
        """Returns how much longer this step's tokens would take at a pace, seconds.

        All times are estimates: the noise of single steps would outweigh the difference.
        """
        load, price = self._load, self._sizing.planner.step
        lefts = None if self._left is None else np.array([self._left])
        tokens, kinds = np.array([load.tokens]), np.array([load.kind])
        taken = price.estimate(tokens, load.context, lefts, kinds).item()
        decode_s = self._decode_s()
        tokens_s = (pace or decode_s) * emitted / max(load.sequences, 1)
        return tokens_s - decode_s + self._plain_s() - taken

    def _pace_s(self, without: Plan | None) -> float | None:
        """Returns the pace of a plan without the heads (``Stake``)."""
        if without is None or not without.sizes.any():
            return None
        tokens = without.tokens / len(without.sizes)
        return (self._decode_s() + without.extra_s) / tokens

    def _searched_s(self, sequences: int, began: float, ended: float) -> float:
        """Returns the seconds of searching texts; learns from a search that has ended.

        An estimate, as all prices are: a machine that stops for a second in the middle of a
        search would silence texts for thousands of steps.
        """
        return self._sizing.searching.observe(sequences, 0.0, ended - began)

    def _price(self, price: Price, nodes: NodeValues) -> float:
        """Returns the seconds of asking a source for some sequences' nodes."""
        return price.estimate(np.array([len(nodes.sizes)])).item()

    def _pay(
        self,
        account: Account,
        price: float,
        plan: Plan | None,
        pace: float | None,
        chosen: bool = True,
    ) -> int:
        """Takes the price of asking a source from its account of this load.

        Args:
            account: the account.
            price: seconds of asking the source.
            plan: the source's plan; None, or without nodes: it was asked in vain.
            pace: see ``Stake``.
            chosen: whether that plan is the step's, so that its savings will be seen.

        Returns:
            How many steps to wait, if what plans expect comes true as it used to.
        """
        decode_s = self._decode_s()
        account.ask(price, decode_s)
        pending = self._pending_s(account)
        if plan is not None and plan.sizes.any():
            tokens = plan.tokens / len(plan.sizes)
            promised = (pace or decode_s) * tokens - decode_s - plan.extra_s
            if chosen:
                self._stakes += (Stake(account, promised, pace),)
                pending += promised
            else:
                account.credit(promised)
        return account.steps_to_wait(decode_s, pending)

    def _pending_s(self, account: Account) -> float:
        """Returns the seconds that this step was to save for an account: ``end`` pays."""
        stakes = self._before.stakes if self._load.nodes else ()
        return sum(stake.promised for stake in stakes if stake.account is account)

    def _planned(
        self, planner: Planner, nodes: NodeValues | None, asked_s: float
    ) -> Plan | None:
        if nodes is None:
            return None
        load, half = self._load, self._sizing.token_budget // 2
        others = min(load.waiting, half)
        return planner.plan(
            Batch(
                nodes.probability,
                nodes.tree,
                len(nodes.sizes),
                others=others,
                context=load.context,
                budget=half + others,
                straight=nodes.straight,
                asked_s=asked_s,
            )
        )
