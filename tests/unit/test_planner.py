"""Plans: the best cut of all sequences' nodes, within the budget, and steady."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prices import Line

from vllm_propd.core.sizing.node_values import straight
from vllm_propd.core.sizing.planner import Batch, Plan, Planner, round_totals
from vllm_propd.core.sizing.pruning_recall import PruningRecall
from vllm_propd.core.sizing.step_cost import TREES

relaxed = settings(deadline=None)


ANY = np.arange(1, 1000)


def batch_of(*trees: list[float], **fields: float) -> Batch:
    probability = np.array([p for tree in trees for p in tree], np.float64)
    owner = np.repeat(np.arange(len(trees)), [len(tree) for tree in trees])
    return replace(Batch(probability, owner, len(trees)), **fields)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Up to three sequences; probabilities in eighths, so that ties are common."""
    eighths = st.lists(st.integers(1, 7), max_size=5)
    trees = draw(st.lists(eighths, min_size=1, max_size=3))
    sorted_ones = [[x / 8 for x in sorted(tree, reverse=True)] for tree in trees]
    others, room = draw(st.integers(0, 3)), draw(st.integers(0, 12))
    return batch_of(*sorted_ones, others=others, budget=len(trees) + others + room)


def worth(batch: Batch, sizes: tuple[int, ...], price: Line) -> float:
    """Tokens per second of trees of these sizes: of their mean of order -2, times them."""
    nodes = sum(sizes)
    each = [
        1.0 + batch.probability[batch.tree == tree][:size].sum()
        for tree, size in enumerate(sizes)
    ]
    tokens = batch.sequences * (batch.sequences / sum(x**-2 for x in each)) ** 0.5
    taken = batch.sequences + batch.others
    alone, bare, whole = price.estimate(np.array([batch.sequences, taken, taken + nodes]))
    return float(tokens / (alone + whole - bare + batch.asked_s))


@relaxed
@given(batches(), st.integers(1, 20), st.integers(0, 4), st.integers(0, 8))
def test_no_sizes_within_the_budget_are_worth_more(
    batch: Batch, base: int, slope: int, flat: int
) -> None:
    price, batch = Line(base, slope / 4, flat), replace(batch, asked_s=0.5)
    plan = Planner(price, totals=ANY, hysteresis=0.0, doubt=0.0).plan(batch)
    counts = [int((batch.tree == tree).sum()) for tree in range(batch.sequences)]
    room = batch.budget - batch.sequences - batch.others
    allowed = [
        sizes for sizes in product(*(range(c + 1) for c in counts)) if sum(sizes) <= room
    ]
    best = max(worth(batch, sizes, price) for sizes in allowed)
    assert tuple(plan.sizes.tolist()) in allowed
    assert worth(batch, tuple(plan.sizes.tolist()), price) == pytest.approx(best)
    assert plan.rate == pytest.approx(best)
    assert plan.keep is None


def test_where_tokens_cost_what_they_do_alone_nothing_is_drafted() -> None:
    plan = Planner(Line(0.0, 1.0)).plan(batch_of([0.9, 0.5], [0.8]))
    assert plan == Plan(plan.sizes, None, 2.0, 2.0, 1.0)
    assert plan.sizes.tolist() == [0, 0]


def test_where_they_cost_nothing_everything_is() -> None:
    plan = Planner(Line(1.0, 0.0)).plan(batch_of([0.9, 0.01], [0.8]))
    assert plan.sizes.tolist() == [2, 1]


def test_nothing_is_drafted_because_it_seems_to_save_time() -> None:
    """Estimates of steps with nodes may be of a faster time than those without."""
    plan = Planner(Line(20.0, -2.0)).plan(batch_of([0.03], [0.03]))
    assert not plan.sizes.any()
    assert plan.extra_s == 0.0


def test_sure_sequences_get_the_nodes() -> None:
    plan = Planner(Line(4.0, 1.0, flat=4)).plan(batch_of([0.9, 0.8, 0.7], [0.05, 0.02]))
    assert plan.sizes.tolist() == [2, 0]


@pytest.mark.parametrize("others", [0, 1000])
def test_a_prompt_in_the_step_makes_no_node_cheap(others: int) -> None:
    """A token saves a later step's time, and by then the prompt is over."""
    planner = Planner(Line(2.0, 1.0), totals=ANY)
    batch = batch_of(*[[0.4]] * 4, others=others)
    assert not planner.plan(batch).sizes.any()
    cheap = Planner(Line(100.0, 1.0), totals=ANY)
    assert cheap.plan(batch).sizes.sum() == 4


def test_a_few_do_not_gain_at_the_cost_of_all() -> None:
    """A step of twice the tokens takes 1.75 times as long.

    Half of the sequences repeat themselves: two sure nodes for each of them give twice the
    tokens, but the other half would wait 1.75 times as long for each of theirs.
    """
    price = Line(0.25, 0.75 / 8)
    few = batch_of(*[[0.99, 0.98]] * 4, *[[0.01]] * 4)
    plan = Planner(price, totals=ANY).plan(few)
    assert plan.sizes.sum() == 0
    everyone = batch_of(*[[0.99]] * 8)
    plan = Planner(price, totals=ANY).plan(everyone)
    assert plan.sizes.tolist() == [1] * 8
    assert plan.tokens == pytest.approx(8 * 1.99)
    assert plan.rate == pytest.approx(8 * 1.99 / 1.75)


def test_pruning_is_used_where_it_pays() -> None:
    trees = [[0.9 * 0.95**i for i in range(40)]] * 4
    for slope, pruned in ((0.0, False), (0.05, True)):
        price = Line(1.0, slope)
        plan = Planner(price, PruningRecall(start=0.9)).plan(batch_of(*trees))
        assert (plan.keep is not None) == pruned
        if plan.keep is not None:
            unpruned = Planner(price).plan(batch_of(*trees))
            assert plan.rate > unpruned.rate
            assert plan.sizes.sum() > unpruned.sizes.sum()
            assert plan.keep < plan.sizes.sum()
            by_worth = -np.sort(-np.concatenate(trees))
            bounds = [by_worth[:count].sum() for count in (plan.keep, plan.sizes.sum())]
            assert bounds[0] < plan.tokens - 4 < bounds[1]


def test_pruning_that_leaves_nothing_is_not_used() -> None:
    trees = [[0.9 * 0.95**i for i in range(40)]] * 4
    plan = Planner(Line(1.0, 0.05), PruningRecall(start=0.0)).plan(batch_of(*trees))
    assert plan.keep is None


class CheapHalves(Line):
    """Two halves whose prices, extrapolated to a long prompt, are a tenth too low."""

    def estimate(self, *step: Any, **kinds: Any) -> np.ndarray:
        seconds = super().estimate(*step, **kinds)
        return seconds * (0.9 if len(step) > 2 else 1.0)


@pytest.mark.parametrize("others", [100, 1000, 1150, 4000])
def test_pruning_beside_a_prompt_costs_more_than_no_tree(others: int) -> None:
    price, trees = CheapHalves(1.0, 0.01), [[0.9 * 0.95**i for i in range(40)]] * 4
    batch = batch_of(*trees, others=others, budget=10_000)
    plan = Planner(price, PruningRecall(start=0.9)).plan(batch)
    alone = float(price.estimate(np.array([4]))[0])
    assert 4.0 / alone <= plan.rate <= plan.tokens / alone * (1.0 + 1e-9)
    assert plan.extra_s >= 0.0


def fair_gains(batch: Batch) -> list[float]:
    """What the best 1, 2, ... nodes add to the mean of order -2 of tokens, times them."""
    reached, gains = [1.0] * batch.sequences, []
    waiting = [list(batch.probability[batch.tree == t]) for t in range(batch.sequences)]
    while any(waiting):
        _, best = max(
            (reached[t] ** -2 - (reached[t] + tree[0]) ** -2, -t)
            for t, tree in enumerate(waiting)
            if tree
        )
        reached[-best] += waiting[-best].pop(0)
        mean = (batch.sequences / sum(x**-2 for x in reached)) ** 0.5
        gains.append(batch.sequences * (mean - 1.0))
    return gains


@relaxed
@given(batches(), st.integers(1, 20), st.integers(0, 4), st.floats(0, 1))
def test_no_pair_of_drafted_and_kept_is_worth_more(
    batch: Batch, base: int, slope: int, share: float
) -> None:
    price = Line(base, slope / 4)
    recall = PruningRecall(start=share)
    plan = Planner(price, recall, totals=ANY, hysteresis=0.0, doubt=0.0).plan(batch)
    taken, sequences = batch.sequences + batch.others, batch.sequences
    gained = np.array([0.0, *fair_gains(batch)])
    most = min(len(batch.probability), batch.budget - taken)
    rates = []
    for drafted in range(most + 1):
        rates.append(
            (sequences + gained[drafted]) / (base + slope / 4 * (sequences + drafted))
        )
        for kept in range(1, drafted):
            accepted = gained[kept] + share * (gained[drafted] - gained[kept])
            seconds = base + slope / 4 * (sequences + 0.1 * drafted + 0.9 * kept)
            rates.append((sequences + accepted) / seconds)
    assert plan.rate == pytest.approx(max(rates))


def test_totals_are_round() -> None:
    totals = round_totals(100)
    assert totals.tolist() == [
        *range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96,
    ]  # fmt: skip
    trees = [[0.9 * 0.95**i for i in range(40)]] * 3
    for budget in (11, 43, 1000):
        batch = batch_of(*trees, others=2, budget=budget)
        allowed = {5, min(budget, 125), *round_totals(125).tolist()}
        met = set()
        for slope in (0.0, 0.005, 0.01, 0.02, 0.03):
            plan = Planner(Line(1.0, slope), PruningRecall()).plan(batch)
            met |= {5 + int(plan.sizes.sum()), 5 + (plan.keep or 0)}
        assert met <= allowed
        assert min(budget, 125) in met


def test_totals_are_those_of_captured_graphs() -> None:
    captured = [1, 2, 4, 8, 16, 24]
    assert round_totals(100, captured).tolist() == [
        *captured,
        28,
        32,
        40,
        48,
        56,
        64,
        80,
        96,
    ]
    assert round_totals(20, captured).tolist() == captured[:-1]
    planner = Planner(Line(1.0, 0.04), totals=round_totals(64, captured))
    plan = planner.plan(batch_of([0.9 * 0.95**i for i in range(40)]))
    assert 1 + int(plan.sizes.sum()) in captured


def test_small_advantages_do_not_move_it() -> None:
    price = Line(1.0, 0.05, flat=8)
    planner = Planner(price, totals=ANY, hysteresis=0.03)
    rng = np.random.default_rng(0)

    def noisy() -> Batch:
        base = 0.8 * 0.9 ** np.arange(40) * np.exp(rng.normal(0, 0.02, 40))
        return batch_of(-np.sort(-base))

    def moves(sizes: list[int]) -> int:
        return int(np.count_nonzero(np.diff(sizes)))

    steady = [int(planner.plan(noisy()).sizes.sum()) for _ in range(50)]
    restless = [
        int(Planner(price, totals=ANY).plan(noisy()).sizes.sum()) for _ in range(50)
    ]
    assert moves(steady) < 0.2 * moves(restless)


def test_a_small_advantage_that_stays_is_taken() -> None:
    """One node of a sure tree gives 2 tokens in 1.02 seconds; all five 6 in 3.02."""
    planner = Planner(Line(0.02, 0.5), totals=ANY, hysteresis=0.03, doubt=0.0)
    assert planner.plan(batch_of([1.0])).sizes.tolist() == [1]
    sizes = [int(planner.plan(batch_of([1.0] * 5)).sizes[0]) for _ in range(8)]
    assert sizes[:2] == [1, 1]
    assert sizes[-1] == 5


def test_nodes_have_to_pay_clearly_but_then_stay() -> None:
    """Two tokens in a step take 1.5 times as long as one."""
    planner = Planner(Line(1.0, 0.5, flat=1), doubt=0.03)
    gains = [(0.52, 0), (0.54, 0), (0.56, 1), (0.52, 1), (0.49, 0), (0.52, 0)]
    for probability, nodes in gains:
        assert planner.plan(batch_of([probability])).sizes.tolist() == [nodes]


def test_a_jump_of_the_load_moves_it_at_once() -> None:
    price = Line(1.0, 0.02, flat=32)
    tree = [0.8 * 0.9**i for i in range(48)]
    planner = Planner(price)
    alone = planner.plan(batch_of(tree)).sizes
    crowd = planner.plan(batch_of(*[tree] * 32)).sizes
    fresh = Planner(price).plan(batch_of(*[tree] * 32)).sizes
    assert alone[0] > 20 > 3 > crowd.mean()
    assert abs(crowd.sum() - fresh.sum()) <= 0.15 * fresh.sum() + 1
    assert planner.plan(batch_of(tree)).sizes[0] == pytest.approx(alone[0], rel=0.15)


def test_no_sequence_no_plan() -> None:
    plan = Planner(Line(1.0, 1.0)).plan(Batch(np.empty(0), np.empty(0, int), 0))
    assert len(plan.sizes) == 0


class Branching:
    """A price of one second, and of two where a tree branches."""

    def estimate(
        self, tokens: np.ndarray, *context: Any, kinds: np.ndarray | int = 0
    ) -> np.ndarray:
        return np.where(np.broadcast_to(kinds, tokens.shape) == TREES, 2.0, 1.0)


def test_a_step_pays_for_branches_only_if_it_has_some() -> None:
    """The first two nodes of each tree are a path; the third, nearly as good, is not."""
    paths = np.array([True, True, False] * 2)
    batch = replace(batch_of([0.9, 0.8, 0.7], [0.9, 0.8, 0.7]), straight=paths)
    plan = Planner(Branching(), totals=ANY).plan(batch)
    assert plan.sizes.tolist() == [2, 2] and plan.seconds == 1.0
    every = replace(batch, straight=np.ones(6, bool))
    assert Planner(Branching(), totals=ANY).plan(every).sizes.tolist() == [3, 3]


def test_a_node_is_straight_while_its_tree_is_a_path() -> None:
    depth = np.array([1, 2, 2, 3, 1, 2, 3, 1, 1])
    assert straight(depth, np.array([4, 3, 0, 2])).tolist() == [
        True, True, False, False, True, True, True, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize("others", [40, 1000, 5000, 70_000])
def test_sizes_are_as_fine_beside_a_long_prompt(others: int) -> None:
    trees = [[0.9**i for i in range(1, 49)]] * 3
    price = Line(50.0, 1.0)
    alone = Planner(price).plan(batch_of(*trees)).sizes
    assert 0 < alone.sum() < 3 * 48
    beside = Planner(price).plan(batch_of(*trees, others=others))
    assert beside.sizes.tolist() == alone.tolist()
