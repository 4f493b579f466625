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


def test_groups_of_prompts_count_alike() -> None:
    """Of the first group there are three turns, of the second one."""
    turns: Turns[Turn] = Turns()
    taken = [("plain", 10, 0), ("plain", 8, 1), ("b", 19, 0), ("b", 30, 0)]
    taken += [("b", 20, 0), ("b", 16, 1)]
    for place, (arm, speed, group) in enumerate(taken):
        turns.add(arm, turn(speed, place, group))
    assert turns.ratio("b") == pytest.approx((30 / 10 + 16 / 8) / 2)
    assert turns.latest("b").texts == [[0], [1]]
    assert turns.latest("b").tokens == round(SECONDS * 36)


def test_what_slows_turns_down_does_not_shape_the_ratio() -> None:
    """Plain vLLM loses half its speed for most of the time, b a tenth."""
    slow = [("plain", 50.0), ("b", 135.0)]
    turns = turns_of(*slow, *slow, ("plain", 100.0), ("b", 150.0), *slow)
    assert turns.ratio("b") == pytest.approx(1.5)
    assert turns.ratio("plain") == 1.0


def test_a_turn_is_placed_by_when_half_of_it_is_over() -> None:
    turns = turns_of(("plain", 10.0), ("b", 10.0))
    assert [turns.when(turns.of(arm)[0]) for arm in ("plain", "b")] == [1.0, 3.0]
