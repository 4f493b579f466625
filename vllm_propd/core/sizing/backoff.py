"""When a source of drafts is asked: while that pays, else so seldom that it costs nothing.

There are two sources, the heads and the texts themselves. Each has an account for each
load, in seconds. A share of the time of its steps is paid in; what asking the source takes
is taken out; what verifying its nodes has saved, against as many tokens from plain steps,
is paid back. Where the account is empty, the source waits until it is not. So asking in
vain takes at most that share of the time, whatever a source costs.

Single steps say little: trees that save a third of a step on the mean lose one in every
second step, and a row of such would empty an account that has every reason to be full. So
what is paid back for a step is as much of its plan's promise as the last fifty plans have
kept of theirs, or fewer ones where they are long ago: texts change, and where plans are
seldom made, fifty would tell of texts that have long ended. Texts, and heads whose
measurement in training promises that they pay at a load, begin with a loan there, once, and
as if a few promises had been kept. Other heads earn all of it. A loan is as large a share
of the usual one as plans have kept at the load before: else a batch whose heads are wrong
would pay for that again at each number of sequences that it shrinks to.

Times are one worker's. The other tensor-parallel ranks hear how many steps to wait, and all
ask in the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, log2

IN_VAIN = 0.003
"""The share of the time that asking a source may take where it does not pay."""

LOAN, CREDIT = 4.0, 8.0
"""What an account begins with where a source is promised to pay, and the most that it
holds, in steps without nodes: what has paid for long may lose so much."""

FADES, KEPT = 0.98, 4.0
"""By how much plans fade with each further one; and how many count as having saved what
they promised where a source begins with a loan."""

TRIED = 0.5
"""The least share of them where plans have kept less at the load before: a source that does
not pay there may pay here."""

AGES = 0.995
"""By how much plans fade with each step."""

LEAST = 0.04
"""What a plan counts as promising at least, in steps without nodes, so that what plans keep
of their promises is a share of something: a planner that weighs sequences otherwise than
their sum (``planner``) makes plans that promise nothing in seconds, or less."""

LONGEST = 4096
"""The most steps of a wait: prices of sources and steps change with the machine."""

LOADS_PER_OCTAVE, SHARES = 2, 3
"""How many loads there are: so many batch sizes in each doubling (their logarithms are
rounded), times so many shares of sequences that do not need the source."""


@dataclass
class Account:
    """A source's account of one load, in seconds.

    Attributes:
        balance: seconds; below 0, what is still to be earned.
        wait: steps until the source is asked again.
        plans: how many late plans there were, faded.
        saved: seconds that they have saved, faded.
        promised: seconds that they were to save, faded; above 0.
        least: seconds that a plan counts as promising at least.
        believed: share of the usual loan that it may be lent, 0..1.
        trust: how many plans beside these count as having kept their promises, faded.
    """

    balance: float = 0.0
    wait: int = 0
    plans: float = 0.0
    saved: float = 0.0
    promised: float = 0.0
    least: float = 0.0
    believed: float = 1.0
    trust: float = 0.0

    def lend(self, step: float) -> None:
        """Gives it its loan; ``step`` is the seconds of a step without nodes."""
        self.balance = self.believed * LOAN * step
        self.trust = max(self.believed, TRIED) * KEPT

    def earn(self, seconds: float) -> None:
        """Pays in the share of a step of so many seconds, in which plans age."""
        self.balance += IN_VAIN * seconds
        self.plans *= AGES
        self.saved *= AGES
        self.promised *= AGES
        self.trust *= AGES

    def ask(self, price: float, step: float) -> None:
        """Takes out what asking the source takes.

        Args:
            price: seconds of that.
            step: seconds of a step without nodes.
        """
        self.balance = min(self.balance, CREDIT * step) - price
        self.least = LEAST * step

    def repay(self, saved: float, promised: float) -> None:
        """Pays back what a plan has saved, which was to be ``promised`` seconds.

        A single plan's saving is mostly luck: what counts is its promise, and which share
        of their promises plans keep.
        """
        promised = max(promised, self.least)
        self.plans = FADES * self.plans + 1.0
        self.saved = FADES * self.saved + saved
        self.promised = FADES * self.promised + promised
        self.balance += self._kept(self.trust) * promised
        self.trust *= FADES

    def credit(self, promised: float) -> None:
        """Pays back what a plan would have saved that was not chosen, by its promise."""
        self.balance += max(0.0, promised * self._kept(self.trust))

    @property
    def reliability(self) -> float:
        """The share of their promises that plans keep, 0..1; without any, as believed."""
        weight = self.trust + self.plans
        if not weight:
            return self.believed
        kept = self.plans * self._kept(0.0) + self.trust * self.believed
        return min(max(kept / weight, 0.0), 1.0)

    def _kept(self, trust: float) -> float:
        """Returns the share of their promises that plans keep; below 0: they lose time.

        A share, not seconds: plans that promise ten times as much miss it by as much more,
        and small ones, which are right, are not to pay for that.
        """
        if self.promised <= 0.0:
            return 1.0
        kept = self.plans * self.saved / self.promised
        return (trust + kept) / (trust + self.plans)

    def steps_to_wait(self, seconds: float, promised: float = 0.0) -> int:
        """Returns after how many steps of so many seconds the account is filled again.

        Args:
            seconds: of a step without nodes.
            promised: seconds that plans are to save whose steps are not over; of these
                counts the share that plans keep: what each plan loses is known a step
                later, and the next ones would be made on its promise.
        """
        believed = max(0.0, promised * self._kept(self.trust + 1.0))
        balance = self.balance + believed
        return 0 if balance >= 0.0 else min(ceil(-balance / (IN_VAIN * seconds)), LONGEST)


def _on_trust(account: Account) -> int:
    return 0


def on_loan(step: Callable[[], float]) -> Callable[[Account], int]:
    """Returns what opens an account with its loan, to be asked at once (``Backoff.asks``).

    Args:
        step: returns the seconds of a step without nodes.
    """

    def opened(account: Account) -> int:
        account.lend(step())
        return 0

    return opened


class Backoff:
    """Decides when a source is asked, by its accounts of all loads.

    Each load has its own: one sequence may pay where sixteen do not; and so has each share
    of sequences whose texts suggest something without the heads.
    """

    def __init__(self) -> None:
        self._of_load: dict[tuple[int, int], Account] = {}
        self._late: dict[int, Account] = {}
        self.now = Account()

    def asks(
        self,
        sequences: int,
        share: float = 0.0,
        first: Callable[[Account], int] = _on_trust,
    ) -> bool:
        """Whether the source is to draft now; to be called once in each step.

        Args:
            sequences: how many sequences the step has.
            share: how much of a token each of them is expected to be given without it, on
                the mean, 0..1.
            first: opens the account of a load that is new, and returns how many steps its
                first ask has to wait.
        """
        load = round(LOADS_PER_OCTAVE * log2(max(sequences, 1)))
        level = min(int(SHARES * share), SHARES - 1)
        account = self._of_load.get((load, level))
        if account is None:
            account = self._of_load[load, level] = Account()
            if (before := self._late.get(level)) is not None:
                account.believed = before.reliability
            account.wait = first(account)
        self.now = self._late[level] = account
        if account.wait:
            account.wait -= 1
            return False
        return True

    def wait(self, steps: int) -> None:
        """Lets the source wait for so many steps of this load, after it was asked."""
        self.now.wait = steps
