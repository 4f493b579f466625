"""What asking a source is charged with, and what it is paid: one loop of steps for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from vllm_propd.core.sizing.backoff import IN_VAIN, LOAN
from vllm_propd.core.sizing.controller import DynamicSizing
from vllm_propd.core.sizing.dynamic_drafting import DynamicDrafting
from vllm_propd.core.sizing.node_values import NodeValues
from vllm_propd.core.sizing.protocol import Choice, Drafts, StepLoad
from vllm_propd.core.sizing.step_cost import StepCost

TOKENS = np.array([1, 2, 4, 8])
SECONDS = np.array([0.066, 0.069, 0.091, 0.112])
NOTHING = Choice(np.zeros(1, np.int64), None, False)


def nodes_of(*probability: float) -> NodeValues:
    """One sequence's nodes, a path."""
    count = len(probability)
    return NodeValues(
        sizes=np.array([count]),
        probability=np.array(probability),
        tree=np.zeros(count, np.int64),
        share=0.0,
        straight=np.ones(count, np.bool_),
    )


@dataclass
class Alone:
    """One sequence; heads of which nothing is known, and texts; exact times."""

    heads_s: float
    looking_s: float = 0.0
    now: float = 0.0

    def sizing(self) -> DynamicSizing:
        draft = StepCost(np.array([1, 64]), np.full(2, self.heads_s))
        return DynamicSizing(
            StepCost(TOKENS, SECONDS), draft, 8, 1 << 20, clock=lambda: self.now
        )

    def run(
        self,
        sizing: DynamicSizing,
        steps: int,
        then: Callable[[Alone, DynamicDrafting], Choice],
        emitted: Callable[[Choice], int],
    ) -> None:
        """Runs steps; ``then`` drafts after each, ``emitted`` says what drafts give."""
        choice = NOTHING
        for _ in range(steps):
            nodes = int(choice.sizes.sum())
            load = StepLoad(1, 1 + nodes, 0, 0, chained=True)
            timer = sizing.begin(self.now, load)
            self.now += float(np.interp(1 + nodes, TOKENS, SECONDS))
            drafting, gave = timer.verified(None), emitted(choice)
            choice = then(self, drafting)
            drafting.end(nodes, gave)


def test_what_asking_has_taken_is_spent_whatever_is_drafted() -> None:
    """A node whose verification pays is drafted, though asking for it did not."""
    alone = Alone(heads_s=0.011)
    sizing = alone.sizing()
    drafting = sizing.begin(0.0, StepLoad(1, 1, 0, 0)).verified(None)
    assert drafting.plan(Drafts(nodes_of(0.2), 0.0)).sizes.tolist() == [1]
    # As where texts are searched, too: both plans have had the same.
    both = Drafts(nodes_of(0.2), 0.0, nodes_of(0.19))
    assert not drafting.plan(both).heads
    assert drafting.plan(Drafts(nodes_of(0.4), 0.0, nodes_of(0.19))).heads


def test_a_source_that_earns_more_than_it_takes_is_asked_in_every_step() -> None:
    """Its last two asks are paid before the first has been paid back."""
    alone, asked = Alone(heads_s=0.011), []
    probability = 0.28  # saves 15 ms beyond its verification, 3 ms
    sizing, step = alone.sizing(), 0

    def then(alone: Alone, drafting: DynamicDrafting) -> Choice:
        nonlocal step
        step += 1
        if not drafting.asks_heads(None):
            return NOTHING
        asked.append(step)
        began, alone.now = alone.now, alone.now + 0.011
        return drafting.plan(Drafts(nodes_of(probability), began))

    luck = np.random.default_rng(0)
    alone.run(sizing, 400, then, lambda c: 1 + int(c.sizes.sum() * (luck.random() < 0.28)))
    assert asked and asked[-1] == 400 and np.diff(asked[-150:]).max() == 1


def test_texts_are_not_paid_for_what_heads_add() -> None:
    alone, looked = Alone(heads_s=0.001, looking_s=0.005), 0
    sizing = alone.sizing()

    def then(alone: Alone, drafting: DynamicDrafting) -> Choice:
        nonlocal looked
        began, without = alone.now, None
        if drafting.looks_up():
            looked, without = looked + 1, nodes_of(0.01)
            alone.now += alone.looking_s
        trees, asks = None, alone.now
        if drafting.asks_heads(without):
            alone.now, trees = alone.now + alone.heads_s, nodes_of(0.9, 0.8, 0.7)
        if trees is None and without is None:
            return NOTHING
        return drafting.plan(Drafts(trees, began, without, asked=asks))

    alone.run(sizing, 600, then, lambda choice: 1 + int(choice.sizes.sum()))
    assert 0 < looked < 0.3 * 600
    # Its seconds are not the heads'.
    assert sizing.draft.seconds_of(1) < 0.002


def test_a_search_in_vain_does_not_forget_what_is_under_way() -> None:
    """An account is empty but for the promise of the step that is ending."""
    alone, looked = Alone(heads_s=0.001), []
    sizing = alone.sizing()

    def then(alone: Alone, drafting: DynamicDrafting) -> Choice:
        looked.append(drafting.looks_up())
        account = sizing.lookup_backoff.now
        if len(looked) == 1:
            choice = drafting.plan(Drafts(None, alone.now, nodes_of(0.3)))
            account.balance = 0.0
            return choice
        began, alone.now = alone.now, alone.now + 0.0075
        drafting.found_nothing(began)
        return NOTHING

    alone.run(sizing, 3, then, lambda choice: 1 + int(choice.sizes.sum()))
    assert looked == [True, True, True]


def test_searches_that_find_nothing_take_no_more_than_their_share() -> None:
    alone, looked, steps = Alone(heads_s=0.001, looking_s=0.003), 0, 1000
    sizing = alone.sizing()

    def then(alone: Alone, drafting: DynamicDrafting) -> Choice:
        nonlocal looked
        if drafting.looks_up():
            looked, began = looked + 1, alone.now
            alone.now += alone.looking_s
            drafting.found_nothing(began)
        return NOTHING

    alone.run(sizing, steps, then, lambda choice: 1)
    spent = looked * alone.looking_s / SECONDS[0]
    assert 0.5 * IN_VAIN * steps < spent < 1.1 * IN_VAIN * steps + LOAN + 1


@pytest.mark.parametrize("finds", [False, True])
def test_a_machine_that_stops_in_a_search_silences_no_texts(finds: bool) -> None:
    alone, looked, steps = Alone(heads_s=0.001, looking_s=1e-4), list[int](), 400
    sizing, step = alone.sizing(), 0

    def then(alone: Alone, drafting: DynamicDrafting) -> Choice:
        nonlocal step
        step += 1
        if not drafting.looks_up():
            return NOTHING
        looked.append(step)
        began = alone.now
        alone.now += 10.0 if step == 50 else alone.looking_s
        if finds:
            trees, asked, alone.now = nodes_of(0.5), alone.now, alone.now + 0.001
            return drafting.plan(Drafts(trees, began, nodes_of(0.3), asked=asked))
        drafting.found_nothing(began)
        return NOTHING

    alone.run(sizing, steps, then, lambda choice: 1 + int(choice.sizes.sum()) % 2)
    assert 50 in looked
    assert len(looked) > 0.7 * steps
