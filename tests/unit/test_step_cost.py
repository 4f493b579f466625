"""Step costs: the table at first, the machine as it is soon after."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_propd.core.sizing.step_cost import BARE, CHAINS, TREES, StepCost

TOKENS = np.array([1, 8, 16, 32, 48, 64, 128, 256])
STAIRCASE = np.array([50.0, 50, 51, 55, 90, 120, 230, 450]) / 1e3
"""Flat to 32 tokens, then rising: two cores and 0.7 billion parameters."""


def cost(**options: float) -> StepCost:
    return StepCost(TOKENS, STAIRCASE, **options)


def truth(tokens: np.ndarray, context: float, slower: float = 1.0) -> np.ndarray:
    table = np.interp(tokens, TOKENS, STAIRCASE)
    return slower * (table + 2e-7 * context) + 3e-3


def errors(found: StepCost, context: float = 0.0, slower: float = 1.0) -> np.ndarray:
    tokens = np.arange(1, 257)
    real = truth(tokens, context, slower)
    return np.abs(found.estimate(tokens, context) / real - 1)


def serve(found: StepCost, steps: int, slower: float = 1.0, most: int = 256) -> None:
    """Steps of every size and context, with a noise of 5% and some long pauses."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        tokens = int(np.exp(rng.uniform(0, np.log(most))))
        context = float(rng.integers(0, 30_000))
        seconds = float(truth(np.array([tokens]), context, slower)[0])
        seconds *= np.exp(rng.normal(0, 0.05)) * (20 if rng.random() < 0.02 else 1)
        found.observe(tokens, context, seconds)


def test_the_table_is_what_is_known_at_first() -> None:
    found = cost()
    np.testing.assert_allclose(found.estimate(TOKENS), STAIRCASE)
    np.testing.assert_allclose(found.estimate(np.array([24, 512])), [0.053, 0.89])


def test_more_tokens_never_cost_less() -> None:
    noisy = StepCost(np.array([1, 8, 16]), np.array([1.0, 0.9, 1.2]))
    assert noisy.estimate(np.array([1, 4, 8, 16])).tolist() == [0.95, 0.95, 0.95, 1.2]


def test_host_time_and_context_are_found() -> None:
    found = cost()
    serve(found, 200)
    for context in (0.0, 20_000.0):
        assert np.median(errors(found, context)) < 0.05
        assert errors(found, context).max() < 0.15


@pytest.mark.parametrize("slower", [2.5, 0.5])
def test_a_machine_that_changes_is_followed_within_100_steps(slower: float) -> None:
    found = cost()
    serve(found, 200)
    serve(found, 100, slower)
    assert np.median(errors(found, 10_000.0, slower)) < 0.12


@pytest.mark.parametrize("slower", [4.0, 0.4])
def test_a_jump_makes_the_past_count_less(slower: float) -> None:
    """Steps before it, many and short, would outweigh the long ones after it."""
    found = cost()
    serve(found, 200, most=16)
    serve(found, 40, slower, most=16)
    near = np.arange(8, 17)
    ratio = found.estimate(near, 10_000.0) / truth(near, 10_000.0, slower)
    np.testing.assert_allclose(ratio, 1.0, atol=0.12)


@pytest.mark.parametrize("slower", [3.0, 0.6])
def test_one_kind_of_step_speaks_for_the_others(slower: float) -> None:
    """A server at batch 1 sees one size only, and must still price the others."""
    found = cost()
    for _ in range(100):
        found.observe(33, 0.0, slower * float(np.interp(33, TOKENS, STAIRCASE)))
    ratio = found.estimate(TOKENS) / STAIRCASE
    np.testing.assert_allclose(ratio, slower, rtol=0.15)


LOWER, UPPER = STAIRCASE / 10 + 1e-3, STAIRCASE * 0.9


def split_cost() -> StepCost:
    return StepCost(TOKENS, STAIRCASE, (LOWER, UPPER))


def test_a_split_step_costs_both_halves() -> None:
    tokens, left = np.array([64, 256]), np.array([8, 32])
    found = split_cost().estimate(tokens, 0.0, left)
    lower, upper = np.array([[0.013], [0.046]]), np.array([[0.045, 0.0495]])
    np.testing.assert_allclose(found, lower + upper)


def test_a_step_of_one_kind_speaks_for_the_other() -> None:
    found = split_cost()
    for _ in range(100):
        found.observe(33, 0.0, 2.0 * float(np.interp(33, TOKENS, STAIRCASE)))
    ratio = found.estimate(TOKENS, 0.0, np.array([8]))[:, 0] / (LOWER + UPPER[1])
    np.testing.assert_allclose(ratio, 2.0, rtol=0.15)


def test_what_splitting_costs_is_mended_in_split_steps_only() -> None:
    found = split_cost()
    for step in range(400):
        split = step % 2 == 0
        seconds = 1.3 * float(LOWER[5] + UPPER[2]) if split else float(STAIRCASE[3])
        found.observe(64 if split else 32, 0.0, seconds, 16 if split else None)
    mended = found.seconds_of(64, 0.0, 16)
    assert mended == pytest.approx(1.3 * (LOWER[5] + UPPER[2]), rel=0.05)
    assert found.estimate(np.array([32]))[0] == pytest.approx(STAIRCASE[3], rel=0.05)


def test_while_all_steps_are_split_whole_ones_are_not_thought_dear() -> None:
    """Else a step that splitting makes slower would never be compared with a whole one."""
    found = split_cost()
    for _ in range(100):
        found.observe(16, 0.0, 1.2 * float(LOWER[2] + UPPER[1]), 8)
    assert found.seconds_of(16, left=8) == pytest.approx(
        1.2 * (LOWER[2] + UPPER[1]), rel=0.03
    )
    assert found.seconds_of(8) == pytest.approx(STAIRCASE[1], rel=0.06)
    found.observe(8, 0.0, 1.5 * float(STAIRCASE[1]))  # it was the machine, after all
    for _ in range(20):
        found.observe(8, 0.0, 1.5 * float(STAIRCASE[1]))
    assert found.seconds_of(8) == pytest.approx(1.5 * STAIRCASE[1], rel=0.05)


def test_what_drafts_cost_beside_their_tokens_is_found_by_kind() -> None:
    found = cost()
    rng = np.random.default_rng(2)
    more = {BARE: 0.0, CHAINS: 0.004, TREES: 0.012}
    for step in range(300):
        kind, tokens = step % 3, int(rng.choice([1, 8, 16, 32, 48]))
        seconds = float(np.interp(tokens, TOKENS, STAIRCASE)) + more[kind]
        found.observe(tokens, 0.0, seconds * np.exp(rng.normal(0, 0.02)), kind=kind)
    sizes = np.array([8, 16, 32])
    for kind, seconds in more.items():
        real = np.interp(sizes, TOKENS, STAIRCASE) + seconds
        estimated = found.estimate(sizes, kinds=np.full(3, kind))
        np.testing.assert_allclose(estimated, real, rtol=0.03)


def test_while_all_steps_hold_trees_those_without_are_not_thought_dear() -> None:
    found = cost()
    for _ in range(100):
        found.observe(24, 0.0, 1.2 * float(np.interp(24, TOKENS, STAIRCASE)), kind=TREES)
    trees = found.estimate(np.array([24]), kinds=np.array([TREES]))[0]
    assert trees == pytest.approx(0.0636, rel=0.03)
    assert found.seconds_of(16) == pytest.approx(STAIRCASE[2], rel=0.06)


@pytest.mark.parametrize("kind", [CHAINS, TREES])
def test_a_machine_that_was_slow_for_a_while_is_not_thought_so_by_steps_with_drafts(
    kind: int,
) -> None:
    """Drafts do not make steps cheaper: it is the machine that is fast again."""
    found = cost()
    plain, drafts = truth(np.array([16.0, 48.0]), 2000.0).tolist()
    for _ in range(30):
        found.observe(16, 2000.0, plain)
    for _ in range(20):
        found.observe(16, 2000.0, 2.0 * plain)
    assert found.seconds_of(16, 2000.0) > 1.5 * plain
    for _ in range(30):
        found.observe(48, 2000.0, drafts, kind=kind)
    assert found.seconds_of(48, 2000.0, kind=kind) == pytest.approx(drafts, rel=0.03)
    assert found.seconds_of(16, 2000.0) < 1.3 * plain < 0.8 * drafts


def test_a_tables_error_at_one_place_is_mended_there() -> None:
    """Steps of 48 tokens cost what 64 do: the machine's tiles are wider than the table."""
    found = cost()
    rng = np.random.default_rng(1)
    for _ in range(300):
        tokens = int(rng.choice([1, 8, 32, 48, 64, 128]))
        seconds = 0.120 if tokens == 48 else float(np.interp(tokens, TOKENS, STAIRCASE))
        found.observe(tokens, 0.0, seconds)
    assert found.estimate(np.array([48]))[0] == pytest.approx(0.120, rel=0.12)
    assert found.estimate(np.array([8]))[0] == pytest.approx(0.050, rel=0.1)


@pytest.mark.parametrize(
    ("tokens", "seconds"),
    [([1], [1.0]), ([1, 1], [1.0, 1.0]), ([1, 2], [1.0]), ([1, 2], [0.0, 1.0])],
)
def test_a_table_that_is_none_is_refused(tokens: list[int], seconds: list[float]) -> None:
    with pytest.raises(ValueError, match="a cost table needs"):
        StepCost(np.array(tokens), np.array(seconds))


def test_a_clock_may_stand_still() -> None:
    cost = StepCost(np.array([1, 64]), np.array([1e-4, 3e-4]))
    for _ in range(2000):
        cost.observe(1, 0.0, 0.0)
    assert 0.0 < cost.seconds_of(1) < 1e-7
    for _ in range(200):
        cost.observe(1, 0.0, 1e-4)
    assert cost.seconds_of(1) == pytest.approx(1e-4, rel=0.1)
