"""Asking the heads: always where it pays, and for a bounded share of the time elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import numpy as np
import pytest

from vllm_propd.core.sizing.backoff import (
    CREDIT,
    IN_VAIN,
    KEPT,
    LOAN,
    LONGEST,
    Account,
    Backoff,
)


def asked(
    backoff: Backoff,
    steps: int,
    price: float,
    sequences: int = 8,
    share: float = 0.0,
    saved: float = 0.0,
    trusted: bool = True,
) -> list[int]:
    """The steps, of a second each, after which the heads were asked.

    Args:
        price: seconds of asking.
        saved: seconds that each ask saves; 0: in vain.
        trusted: whether the first ask need not be earned.
    """

    def earned_first(account: Account) -> int:
        account.ask(price, 1.0)
        return account.steps_to_wait(1.0)

    first = {} if trusted else {"first": earned_first}
    found = []
    for step in range(steps):
        asks = backoff.asks(sequences, share, **first)
        account = backoff.now
        account.earn(1.0)
        if asks:
            found.append(step)
            account.ask(price, 1.0)
            backoff.wait(0 if saved else account.steps_to_wait(1.0))
            account.balance += saved
    return found


@pytest.mark.parametrize("price", [1e-4, 0.005, 0.2, 3.0, 20.0])
def test_asking_in_vain_takes_a_bounded_share_of_the_time(price: float) -> None:
    steps = 8000
    found = asked(Backoff(), steps, price)
    assert found[0] == 0
    assert (len(found) - 1) * price <= IN_VAIN * steps
    # Nor is it given up: what does not pay may do so later.
    assert len(found) >= min(steps, 0.8 * IN_VAIN * steps / price)


@pytest.mark.parametrize("price", [1e-4, 0.005, 0.2, 3.0])
def test_who_is_not_trusted_has_earned_every_ask(price: float) -> None:
    backoff = Backoff()
    for sequences in (1, 4, 16):  # each is a load of its own
        found = asked(backoff, 2000, price, sequences, trusted=False)
        assert found or price > IN_VAIN * 2000
        for count, step in enumerate(found, 1):
            assert count * price <= IN_VAIN * (step + 1) + 1e-9


def test_nobody_waits_for_ever() -> None:
    assert len(asked(Backoff(), LONGEST + 2, price=1e6)) == 2


def test_there_is_no_wait_while_it_pays() -> None:
    assert len(asked(Backoff(), 50, price=0.3, saved=0.4)) == 50


@pytest.mark.parametrize("good", [1, 400])
def test_what_has_paid_may_fail_a_few_times(good: int) -> None:
    backoff = Backoff()
    asked(backoff, good, price=0.3, saved=0.4)
    failed = asked(backoff, 20, price=2.0)
    in_a_row = next(at for at, step in enumerate([*failed, 99]) if step != at)
    assert 2.0 * in_a_row <= CREDIT + 2.0
    assert in_a_row == 1 if good == 1 else 2.0 * in_a_row > CREDIT / 2


def test_each_load_has_its_own_wait() -> None:
    for load in (1, 32):
        backoff = Backoff()
        asked(backoff, 70, price=1.0)
        assert not backoff.asks(8)
        assert not backoff.asks(9)  # nearly the same load
        assert backoff.asks(load)


def test_heads_may_pay_where_texts_suggest_nothing() -> None:
    backoff = Backoff()
    asked(backoff, 70, price=1.0, share=1.0)
    assert not backoff.asks(8, 0.9)
    assert backoff.asks(8, 0.5)
    assert backoff.asks(8, 0.1)


def test_a_load_that_comes_again_goes_on_with_its_wait() -> None:
    backoff = Backoff()
    asked(backoff, 40, price=1.0)
    asked(backoff, 20, price=1.0, sequences=2)
    waited = ceil(1.0 / IN_VAIN) - 40
    assert asked(backoff, 400, price=1.0) == [waited]
    asked(backoff, 5, price=1.0, sequences=1, saved=2.0)
    assert not backoff.asks(8)  # what pays at another load does not end it


@pytest.mark.parametrize("right", [0.0, 0.5])
def test_promises_that_are_broken_are_soon_not_believed(right: float) -> None:
    """Each plan promises two steps' time; it loses half of one, or saves two and a half."""
    rng, account, made = np.random.default_rng(0), Account(LOAN if right else 0.0), 0
    pending: list[float] = []
    for _ in range(100):
        account.earn(1.0)
        asks, account.wait = not account.wait, max(0, account.wait - 1)
        if asks:
            account.ask(0.1, 1.0)
            account.wait, made = account.steps_to_wait(1.0, promised=2.0), made + 1
        if pending:  # only now is it known what the plan before was worth
            account.repay(pending.pop(), 2.0)
        if asks:
            pending.append(2.5 if rng.random() < right else -0.5)
    assert made == 100 if right else made <= 5


def test_bad_luck_does_not_end_what_pays() -> None:
    """Plans cost 0.3 of a step, and save one if they are right: in half of all cases, in
    some texts of 60 steps more often, in others less."""
    shares = []
    for seed in range(60):
        rng, account, made = np.random.default_rng(seed), Account(), 0
        account.lend(1.0)
        pending: list[tuple[float, float]] = []
        right = 0.0
        for step in range(900):
            if step % 60 == 0:
                right = min(0.5 * rng.gamma(4.0, 0.25), 0.95)
            account.earn(1.0)
            asks, account.wait = not account.wait, max(0, account.wait - 1)
            if pending:
                account.repay(*pending.pop())
            if not asks:
                continue
            account.ask(0.1, 1.0)
            promised = right - 0.3  # what heads say is known to be true
            if promised > 0.1:
                made += 1
                pending.append((float(rng.random() < right) - 0.3, promised))
            account.wait = account.steps_to_wait(1.0, max(promised, 0.0))
        shares.append(made / 900)
    assert np.mean(shares) > 0.5


def test_small_promises_that_are_kept_do_not_pay_for_large_ones_that_are_not() -> None:
    """Of a long match half of what it promises comes true, of a short one all of it."""
    account, waited = Account(), 0
    account.lend(1.0)
    for step in range(2000):
        account.earn(1.0)
        account.ask(0.01, 1.0)
        promised, saved = (0.4, 0.4) if step % 4 else (8.0, 4.0)
        waited += account.steps_to_wait(1.0, promised)
        account.repay(saved, promised)
    assert not waited


def lent(steps: int, price: float, plan: Callable[[], tuple[float, float]]) -> list[float]:
    """The balances of an account that began with a loan, after each plan that was made.

    Args:
        steps: of a second each.
        price: seconds of asking.
        plan: seconds that the next plan saves, and that it promises.
    """
    account, balances = Account(), []
    account.lend(1.0)
    for _ in range(steps):
        account.earn(1.0)
        asks, account.wait = not account.wait, max(0, account.wait - 1)
        if asks:
            account.ask(price, 1.0)
            saved, promised = plan()
            account.wait = account.steps_to_wait(1.0, max(promised, 0.0))
            account.repay(saved, promised)
            balances.append(account.balance)
    return balances


@pytest.mark.parametrize(("mean", "asks"), [(0.0, 1500), (0.02, 2500), (0.05, 3000)])
def test_promises_of_about_nothing_do_not_silence_a_source(mean: float, asks: int) -> None:
    """A planner that looks at more than seconds makes plans that promise none, or less."""
    made, worst = 0, 0.0
    for seed in range(20):
        rng = np.random.default_rng(seed)

        def plan(rng: np.random.Generator = rng) -> tuple[float, float]:
            promised = rng.normal(mean, 0.05)
            return promised + rng.normal(0.0, 0.3), promised

        balances = lent(3000, 0.001, plan)
        made, worst = made + len(balances), min(worst, *balances)
    assert made >= 20 * asks
    assert worst > -1.0


def test_small_losses_beside_promises_that_cancel_out_cost_what_they_are() -> None:
    account = Account()
    account.lend(1.0)
    for step in range(40):
        account.ask(0.0, 1.0)
        promised = 0.43 if step % 2 else -0.43
        account.repay(promised - 0.043, promised)
    assert LOAN - 2.0 * 40 * 0.043 < account.balance < LOAN + KEPT * 0.43


@pytest.mark.parametrize(("promised", "most"), [(1e-6, 50), (0.1, 50), (10.0, 200)])
def test_plans_that_lose_are_not_made_often(promised: float, most: int) -> None:
    """Whatever they promise: what they begin with is used up, and trust fades."""
    made = len(lent(1000, 0.01, lambda: (-0.2, promised)))
    assert made <= most


def test_what_begins_to_pay_is_soon_asked_often() -> None:
    """Plans promise 0.3 of a step: at first a tenth of that comes true, then all of it."""
    asks = []
    for seed in range(20):
        rng, account = np.random.default_rng(seed), Account()
        account.lend(1.0)
        for step in range(2000):
            account.earn(1.0)
            if account.wait:
                account.wait -= 1
                continue
            asks.append(step)
            account.ask(0.08, 1.0)
            account.wait = account.steps_to_wait(1.0, promised=0.3)
            mean = 0.03 if step < 1500 else 0.3
            account.repay(mean + rng.normal(0.0, 0.5), promised=0.3)
    early, late = (np.histogram(asks, [500, 1500, 1700, 2000])[0] / 20)[[0, 2]]
    assert early < 150
    assert late > 200


def shrinking(pays: tuple[bool, ...], seed: int = 0, share: float = 0.0) -> list[float]:
    """What each load's steps save, where a batch shrinks by half every 100 steps.

    Plans promise a quarter of a step, and take a tenth; a token that is right saves a step.

    Args:
        pays: whether plans keep their promises, by load; others save nothing.
        share: see ``Backoff.asks``, at all loads but the first.
    """
    rng, backoff, saved = np.random.default_rng(seed), Backoff(), []

    def lent_first(account: Account) -> int:
        account.lend(1.0)
        return 0

    for place, good in enumerate(pays):
        saved.append(0.0)
        for _ in range(100):
            level = share if place else 0.0
            asks = backoff.asks(2 ** (len(pays) - place), level, lent_first)
            backoff.now.earn(1.0)
            if asks:
                right = good and rng.random() < 0.35
                backoff.now.ask(0.03, 1.0)
                backoff.wait(backoff.now.steps_to_wait(1.0, promised=0.25))
                backoff.now.repay(right - 0.1, promised=0.25)
                saved[-1] += right - 0.13
    return saved


def test_a_batch_that_shrinks_pays_once_for_heads_that_are_wrong() -> None:
    first, *later = shrinking((False,) * 5)
    assert first < -LOAN / 2
    assert min(later) > first / 2


def test_heads_that_are_right_are_lent_as_much_at_the_next_load() -> None:
    saved = np.mean([shrinking((True,) * 4, seed) for seed in range(20)], axis=0)
    assert (saved > 0.8 * 100 * (0.35 - 0.13)).all()


def test_heads_that_were_wrong_at_the_load_before_may_pay_at_the_next() -> None:
    saved = np.mean([shrinking((False, True), seed) for seed in range(40)], axis=0)
    assert saved[1] > 0.7 * 100 * (0.35 - 0.13)


def test_what_heads_add_to_texts_does_not_tell_of_what_they_are_worth_alone() -> None:
    backoff = Backoff()
    for share, loan in ((1.0, LOAN), (0.0, LOAN), (1.0, 0.0)):
        sequences = 1 if loan else 8
        backoff.asks(sequences, share, lambda account: account.lend(1.0) or 0)
        assert backoff.now.balance == loan
        if share:
            for _ in range(50):
                backoff.now.repay(-0.1, promised=0.25)


def test_a_load_without_plans_hands_on_what_it_was_believed() -> None:
    backoff, loans = Backoff(), []
    for sequences in (8, 4, 2, 1):
        backoff.asks(sequences, first=lambda account: account.lend(1.0) or 0)
        loans.append(backoff.now.balance)
        for _ in range(50 if sequences == 8 else 0):
            backoff.now.repay(-0.1, promised=0.25)
    assert loans == [LOAN, 0.0, 0.0, 0.0]
