"""Dynamic sizing against a simulated machine: sizes, steps' times, changes of load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from vllm_propd.core.drafting.growth import grow
from vllm_propd.core.sizing.backoff import IN_VAIN, LOAN
from vllm_propd.core.sizing.controller import DynamicSizing
from vllm_propd.core.sizing.fixed import FixedSizing
from vllm_propd.core.sizing.node_values import NodeValues
from vllm_propd.core.sizing.protocol import Drafting, Drafts, StepLoad, StepRecord
from vllm_propd.core.sizing.step_cost import StepCost
from vllm_propd.core.tree import TokenTree

HEADS, RANKS, NODES, BUDGET = 4, 10, 64, 2048
TOKENS = np.array([1, 8, 16, 32, 64, 128, 256])
HOST_S = 0.004
DRAFT_S = 0.002


def staircase(tokens: np.ndarray) -> np.ndarray:
    """Seconds of a forward: flat up to 32 tokens, then 2 ms a token."""
    return 0.08 + 0.002 * np.maximum(np.ceil(tokens / 8) * 8 - 32, 0)


@dataclass
class Machine:
    """Runs steps of sequences whose candidates are as good as they claim.

    ``speed`` divides the forward's time; what is drafted takes the engine ``extra``
    seconds more; every time has 3% of noise.
    """

    seed: int = 0
    speed: float = 1.0
    extra: float = 0.0
    now: float = 0.0
    tokens_out: int = 0
    rng: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.trees: list[TokenTree] = []
        self.sizes: list[int] = []
        self.records: list[StepRecord] = []

    def sizing(self, promised: float = 3.0) -> DynamicSizing:
        whole = StepCost(TOKENS, staircase(TOKENS))
        draft = StepCost(np.array([1, 64]), np.array([DRAFT_S, DRAFT_S]))
        return DynamicSizing(
            whole, draft, NODES, BUDGET, promised={8: promised}, clock=lambda: self.now
        )

    def spend(self, seconds: float) -> None:
        self.now += seconds * float(self.rng.normal(1.0, 0.03))

    def draft(self, sequences: int, nodes: int) -> list[TokenTree]:
        sharpness = self.rng.uniform(0.3, 3.0, (sequences, HEADS, 1))
        logits = -np.arange(RANKS) * sharpness - 0.3 * np.arange(HEADS)[:, None]
        said = np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True) * 0.9)
        tokens = np.tile(np.arange(RANKS), (sequences, HEADS, 1))
        sizes = np.full(sequences, nodes, np.int64)
        return grow(tokens, said.astype(np.float32), sizes)

    def accepted(self, tree: TokenTree, size: int) -> int:
        """A walk in which each child is right as often as its score says."""
        at, probability, depth = 0, 1.0, 0
        while True:
            children = np.flatnonzero(tree.parent[:size] == at)
            chances = np.exp(tree.score[children]) / probability
            drawn = self.rng.random() - np.cumsum(chances)
            found = np.flatnonzero(drawn < 0)
            if not len(found):
                return depth
            at, depth = int(children[found[0]]) + 1, depth + 1
            probability = float(np.exp(tree.score[at - 1]))

    def step(self, sizing: DynamicSizing | FixedSizing, sequences: int) -> None:
        if len(self.trees) != sequences:  # requests come and go: without trees
            self.trees, self.sizes = [], []
        nodes = sum(self.sizes)
        load = StepLoad(sequences, sequences + nodes, 0, 100 * sequences)
        self.spend(HOST_S)
        timer = sizing.begin(self.now, load)
        self.spend(float(staircase(np.array([load.tokens]))[0]) / self.speed)
        drafting = timer.verified(None)
        emitted = sequences + sum(
            self.accepted(tree, size)
            for tree, size in zip(self.trees, self.sizes, strict=True)
        )
        self.trees, self.sizes = [], []
        if (most := sizing.most(sequences)) and drafting.asks_heads(None):
            before = self.now
            trees = self.draft(sequences, most)
            self.spend(DRAFT_S)
            plan = drafting.plan(Drafts(NodeValues.of(trees), before))
            self.sizes, self.trees = plan.sizes.tolist(), trees
        self.records.append(drafting.end(nodes, emitted))
        self.spend(self.extra * bool(self.trees))
        self.tokens_out += emitted

    def tokens_per_s(
        self, sizing: DynamicSizing | FixedSizing, sequences: int, steps: int
    ) -> float:
        started, before = self.now, self.tokens_out
        for _ in range(steps):
            self.step(sizing, sequences)
        return (self.tokens_out - before) / (self.now - started)


def verified(sizing: DynamicSizing, machine: Machine, load: StepLoad) -> Drafting:
    """A step whose text is known as soon as it has begun."""
    return sizing.begin(machine.now, load).verified(None)


def recorded(machine: Machine, run: Callable[[], object]) -> list[StepRecord]:
    machine.records.clear()
    run()
    return machine.records.copy()


@pytest.mark.parametrize("sequences", [1, 4, 16, 64])
def test_no_fixed_size_is_faster(sequences: int) -> None:
    machine = Machine()
    sizing = machine.sizing()
    machine.tokens_per_s(sizing, sequences, 50)
    dynamic = machine.tokens_per_s(sizing, sequences, 300)
    for nodes in (0, 2, 4, 8, 16, 32, 64):
        other = Machine(seed=1)
        fixed = FixedSizing(nodes, BUDGET)
        assert dynamic > 0.97 * other.tokens_per_s(fixed, sequences, 300), nodes


@pytest.mark.parametrize("promised", [3.0, 1.0])
def test_heads_that_are_not_promised_to_pay_earn_their_first_ask(promised: float) -> None:
    machine = Machine()
    sizing = machine.sizing(promised)
    machine.tokens_per_s(sizing, 1, 50)
    drafted = [record.nodes > 0 for record in machine.records]
    earned = DRAFT_S / (IN_VAIN * float(staircase(np.array([1]))[0]))
    first = drafted.index(True)
    assert first == 1 if promised > 1.0 else first == pytest.approx(1 + earned, abs=2)
    assert all(drafted[first:])


def test_what_drafting_costs_the_engine_is_drafts_not_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine(extra=0.01)
    sizing = machine.sizing()
    for step in range(100):  # some draft, some do not
        with monkeypatch.context() as patch:
            if step % 4 > 1:
                patch.setattr(sizing, "most", lambda sequences: 0)
            machine.step(sizing, 8)
    assert sizing.draft.seconds_of(8) == pytest.approx(DRAFT_S + 0.01, rel=0.1)
    plain = [r.measured_s for r in machine.records[-20:] if not r.nodes]
    assert np.mean(plain) == pytest.approx(HOST_S + staircase(np.array([8]))[0], rel=0.05)


def mean_nodes(records: list[StepRecord]) -> float:
    return float(np.mean([record.nodes / record.sequences for record in records]))


def test_sizes_follow_a_jump_of_the_load() -> None:
    machine = Machine()
    sizing = machine.sizing()
    machine.tokens_per_s(sizing, 1, 100)
    alone = recorded(machine, lambda: machine.tokens_per_s(sizing, 1, 200))
    machine.tokens_per_s(sizing, 8, 30)
    crowd = recorded(machine, lambda: machine.tokens_per_s(sizing, 8, 200))
    machine.tokens_per_s(sizing, 1, 30)
    again = recorded(machine, lambda: machine.tokens_per_s(sizing, 1, 200))
    assert mean_nodes(alone) > 1.5 * mean_nodes(crowd) > 0
    assert mean_nodes(again) == pytest.approx(mean_nodes(alone), rel=0.15)


def error(records: list[StepRecord]) -> float:
    return float(np.median([abs(r.estimated_s / r.measured_s - 1.0) for r in records]))


def test_step_times_are_estimated_and_a_slower_machine_is_noticed() -> None:
    machine = Machine()
    sizing = machine.sizing()
    loads = [1, 3, 9, 30, 64]

    def mixed() -> None:
        for sequences in loads:
            machine.tokens_per_s(sizing, sequences, 12)

    mixed()
    assert error(recorded(machine, mixed)) < 0.06
    machine.speed = 0.5
    mixed()
    assert error(recorded(machine, mixed)) < 0.1


def test_an_expectation_belongs_to_the_step_it_was_made_for() -> None:
    machine = Machine()
    sizing = machine.sizing()
    machine.tokens_per_s(sizing, 4, 100)
    records = recorded(machine, lambda: machine.tokens_per_s(sizing, 4, 400))
    expected = sum(r.expected_tokens for r in records)
    assert expected == pytest.approx(sum(r.emitted for r in records), rel=0.05)
    assert all(r.tokens == r.sequences + r.nodes for r in records)


def test_trees_leave_half_of_the_budget() -> None:
    machine = Machine()
    sizing = machine.sizing()
    sizing.token_budget = 40
    records = recorded(machine, lambda: machine.tokens_per_s(sizing, 6, 30))
    assert max(r.tokens for r in records) == 20
    assert sizing.most(20) == 0


@pytest.mark.parametrize("waiting", [0, 1000])
def test_prompts_make_no_trees_large(waiting: int) -> None:
    """Neither one that is done, nor one that goes on in the next step."""
    machine = Machine()
    sizing = machine.sizing()
    machine.tokens_per_s(sizing, 16, 50)
    steady = mean_nodes(machine.records[-20:])
    drafting = verified(sizing, machine, StepLoad(16, 1016, 1000, 1600, waiting))
    drafts = Drafts(NodeValues.of(machine.draft(16, 48)), machine.now - DRAFT_S)
    nodes = drafting.plan(drafts).sizes.mean()
    assert nodes <= steady + 1.0


def test_prompts_do_not_teach_what_nodes_cost() -> None:
    """Their tokens have no logits, which are most of what a token costs here."""
    machine = Machine()

    def seconds(tokens: int, logits: int) -> float:
        return 0.08 + 0.0004 * tokens + 0.0006 * logits

    table = StepCost(TOKENS, np.array([seconds(n, n) for n in TOKENS]))
    sizing = DynamicSizing(table, None, NODES, BUDGET, clock=lambda: machine.now)
    for step in range(400):
        others = 0 if step % 4 else 512
        timer = sizing.begin(machine.now, StepLoad(4, 4 + others, others, 0))
        machine.now += seconds(4 + others, 4)
        timer.verified(None).end(0, 4)
    for nodes in (4, 12, 28):
        further = table.seconds_of(4 + nodes) - table.seconds_of(4)
        assert further == pytest.approx(0.001 * nodes, rel=0.1)


def test_what_is_lent_is_a_few_steps_without_their_prompts() -> None:
    """A long prompt's step would lend a minute's asks, and promise that all heads pay."""
    machine = Machine()
    sizing = machine.sizing(promised=1.2)
    alone = float(staircase(np.array([16]))[0])
    verified(sizing, machine, StepLoad(16, 2016, 2000, 1600)).asks_heads(None)
    assert sizing.backoff.now.balance < LOAN * (HOST_S + alone)


def path_of(probability: float, nodes: int) -> TokenTree:
    depth = np.arange(1, nodes + 1)
    score = (depth * np.log(probability)).astype(np.float32)
    return TokenTree(np.zeros(nodes, np.int64), depth - 1, depth, score)


@pytest.mark.parametrize(("looked_up", "by_heads"), [(0.2, True), (0.99, False)])
def test_looked_up_nodes_pay_without_the_heads(looked_up: float, by_heads: bool) -> None:
    """Trees are the same: only what drafting costs tells them apart, or what they hold."""
    machine = Machine()
    sizing = machine.sizing()
    machine.tokens_per_s(sizing, 4, 50)
    drafting = verified(sizing, machine, StepLoad(4, 4, 0, 400))
    without = NodeValues.of([path_of(looked_up, 16)] * 4)
    surer = NodeValues.of([path_of(max(looked_up, 0.8), 16)] * 4)
    plan = drafting.plan(Drafts(surer, machine.now - DRAFT_S, without))
    assert plan.heads is by_heads
    assert plan.sizes.min() >= 4
    assert not drafting.plan(Drafts(None, machine.now, without)).heads


def test_what_drafting_costs_without_the_heads_is_learned_apart() -> None:
    machine = Machine()
    sizing = machine.sizing()
    before = sizing.draft.seconds_of(4)
    for _ in range(100):
        drafting = verified(sizing, machine, StepLoad(4, 4, 0, 400))
        began = machine.now
        machine.spend(5e-4)
        drafting.plan(Drafts(None, began, NodeValues.of([path_of(0.9, 8)] * 4)))
        drafting.end(0, 4)
    assert sizing.looking_up.seconds_of(4) == pytest.approx(5e-4, rel=0.1)
    assert sizing.draft.seconds_of(4) == before


@pytest.mark.parametrize("pays", [True, False])
def test_texts_are_searched_while_that_pays_and_else_seldom(pays: bool) -> None:
    machine, took, looked = Machine(), 0.003, 0
    sizing = machine.sizing()
    nodes = NodeValues.of([path_of(0.9 if pays else 0.01, 8)] * 4)
    sizes, steps = np.zeros(4, np.int64), 1000
    for _ in range(steps):
        drafted = int(sizes.sum())
        timer = sizing.begin(machine.now, StepLoad(4, 4 + drafted, 0, 400, 0, True))
        machine.spend(float(staircase(np.array([4 + drafted]))[0]))
        drafting = timer.verified(None)
        emitted = 4 + (drafted // 2 if pays else 0)
        sizes = np.zeros(4, np.int64)
        if drafting.looks_up():
            looked, began = looked + 1, machine.now
            machine.spend(took)
            sizes = drafting.plan(Drafts(None, began, nodes)).sizes
        drafting.end(drafted, emitted)
    if pays:
        assert looked == steps
    else:  # what is lent at first, and the share of the time
        spent = looked * took / float(staircase(np.array([4]))[0])
        assert 0.5 * IN_VAIN * steps < spent < 1.1 * IN_VAIN * steps + LOAN + 1


@pytest.mark.parametrize("better_in", [1, 10])
def test_heads_are_paid_for_what_texts_do_not_give(better_in: int) -> None:
    """Texts alone save two thirds of the steps; in one step of so many, heads a bit more.

    What they add is worth three times what asking takes, when it is there.
    """
    machine, asked, steps = Machine(), 0, 600
    sizing = machine.sizing()
    without, surer = (NodeValues.of([path_of(p, 8)] * 4) for p in (0.8, 0.9))
    sizes, heads = np.zeros(4, np.int64), False
    for step in range(steps):
        drafted, tree = int(sizes.sum()), path_of(0.9 if heads else 0.8, 8)
        timer = sizing.begin(machine.now, StepLoad(4, 4 + drafted, 0, 400, 0, True))
        machine.spend(float(staircase(np.array([4 + drafted]))[0]))
        drafting = timer.verified(None)
        emitted = sum(machine.accepted(tree, int(n)) for n in sizes) + 4
        assert drafting.looks_up()
        began, trees = machine.now, None
        machine.spend(2e-4)
        if drafting.asks_heads(without):
            asked += 1
            machine.spend(0.01)
            trees = surer if step % better_in == 0 else without
        choice = drafting.plan(Drafts(trees, began, without))
        sizes, heads = choice.sizes, choice.heads
        drafting.end(drafted, emitted)
    assert asked > 0.9 * steps if better_in == 1 else asked < 0.3 * steps


def test_time_of_others_is_no_time_of_the_engine() -> None:
    machine = Machine()
    sizing = machine.sizing()
    for _ in range(50):
        machine.step(sizing, 4)
        machine.now += 7.0  # another engine's step
        sizing.leave_out(7.0)
    assert sizing.overhead.plain < 2 * HOST_S


def test_fixed_sizes_are_fixed() -> None:
    sizing = FixedSizing(8, 64)
    assert [sizing.most(n) for n in (1, 3, 4, 8, 32, 100)] == [8, 8, 7, 3, 0, 0]
    trees = Machine().draft(3, 5)
    drafting = sizing.begin(0.0, StepLoad(3, 20, 2, 100)).verified(None)
    plan = drafting.plan(Drafts(NodeValues.of(trees), 0.1))
    assert (plan.sizes.tolist(), plan.keep, plan.heads) == ([5, 5, 5], None, True)
    assert drafting.end(7, 6) == StepRecord(3, 20, 15, 7, 6)
