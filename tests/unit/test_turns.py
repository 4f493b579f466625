"""Whose turn it is, and what it is compared with."""

from __future__ import annotations

import pytest

from vllm_propd.bench.turn import Turn
from vllm_propd.bench.turns import Turns, in_turns, turns_in

SECONDS = 2.0
"""Of every turn; they follow one another without a gap."""


def turn(tokens_per_s: float, place: int = 0, group: int = 0) -> Turn:
    return Turn(
        began=SECONDS * place,
        seconds=SECONDS,
        tokens=round(SECONDS * tokens_per_s),
        texts=[[group]],
        group=group,
    )


def turns_of(*taken: tuple[str, float]) -> Turns[Turn]:
    turns: Turns[Turn] = Turns()
    for place, (arm, tokens_per_s) in enumerate(taken):
        turns.add(arm, turn(tokens_per_s, place))
    return turns


@pytest.mark.parametrize(
    ("arms", "order"),
    [("A", "AAA"), ("AB", "ABABA"), ("ABC", "ABCABCA"), ("ABCD", "ABCADABCADA")],
)
def test_the_first_arm_goes_right_before_or_after_every_other(
    arms: str, order: str
) -> None:
    taken: list[str] = []
    for arm in in_turns(arms, lambda arm: taken.count(arm) < 2 * arms.count(arm)):
        taken.append(arm)
    assert "".join(taken) == order
    assert turns_in(len(arms), 2) == len(order)


def test_who_has_had_enough_takes_no_more_turns() -> None:
    wanted, taken = {"A": 0, "B": 3, "C": 1, "D": 2}, ["start"]
    for arm in in_turns("ABCD", lambda arm: taken.count(arm) < wanted[arm]):
        taken.append(arm)
    assert "".join(taken[1:]) == "ABCAD" + "ABD" + "AB" + "A"


def test_the_share_of_what_an_arm_needs_is_of_rounds_and_of_seconds() -> None:
    turns = turns_of(("plain", 10), ("b", 30), ("b", 30))
    assert turns.share("b", rounds=3) == pytest.approx(2 / 3)
    assert turns.share("b", rounds=2) == 1.0
    assert turns.share("b", rounds=2, seconds=8 * SECONDS) == pytest.approx(0.25)


def test_a_machine_that_slows_down_does_not_shape_the_ratio() -> None:
    speeds = [100, 90, 80, 70, 60, 50, 40]
    arms = ["plain", "b", "plain", "b", "plain", "b", "plain"]
    factor = {"plain": 1.0, "b": 1.5}
    turns = turns_of(*((arm, factor[arm] * s) for arm, s in zip(arms, speeds, strict=True)))
    assert turns.ratio("b") == pytest.approx(1.5)
    assert turns.ratio("plain") == 1.0


def test_a_turn_is_compared_with_plain_at_its_time() -> None:
    turns = turns_of(("plain", 10), ("b", 39), ("c", 64), ("plain", 19), ("plain", 99))
    assert turns.ratio("b") == pytest.approx(3.0)
    assert turns.ratio("c") == pytest.approx(4.0)


def test_groups_of_prompts_count_alike() -> None:
    """Of the first group there are three turns, of the second one."""
    turns = turns_of(("plain", 10))
    for place, (speed, group) in enumerate([(20, 0), (30, 1), (20, 0), (20, 0)], start=1):
        turns.add("b", turn(speed, place, group))
    turns.add("plain", turn(10, 5))
    assert turns.ratio("b") == pytest.approx(2.5)
    assert turns.latest("b").texts == [[0], [1]]
    assert turns.latest("b").tokens == round(SECONDS * 50)


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [((1.0, 1.2, 9.0), 1.2), ((0.1, 1.0, 1.1, 1.2, 9.0), 1.1)],
)
def test_rounds_that_stand_out_do_not_count(
    ratios: tuple[float, ...], expected: float
) -> None:
    taken = [("plain", 100.0)]
    for ratio in ratios:
        taken += [("b", 100.0 * ratio), ("plain", 100.0)]
    assert turns_of(*taken).ratio("b") == pytest.approx(expected)
