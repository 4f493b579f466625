"""Whose turn it is, and what it is compared with."""

from __future__ import annotations

import pytest

from vllm_propd.bench.turn import Turn, Turns, in_turns, turns_in


def turns_of(*taken: tuple[str, float]) -> Turns[Turn]:
    turns: Turns[Turn] = Turns()
    for arm, tokens_per_s in taken:
        turns.add(arm, Turn(seconds=2.0, tokens=round(2.0 * tokens_per_s)))
    return turns


@pytest.mark.parametrize(
    ("arms", "order"),
    [("A", "AAA"), ("AB", "ABABA"), ("ABC", "ABCABCA"), ("ABCD", "ABCADABCADA")],
)
def test_the_first_arm_goes_right_before_or_after_every_other(
    arms: str, order: str
) -> None:
    assert "".join(in_turns(arms, rounds=2)) == order
    assert turns_in(len(arms), 2) == len(order)


def test_a_machine_that_slows_down_does_not_shape_the_ratio() -> None:
    speeds = [100, 90, 80, 70, 60, 50, 40]
    arms = ["plain", "b", "plain", "b", "plain", "b", "plain"]
    factor = {"plain": 1.0, "b": 1.5}
    turns = turns_of(*((arm, factor[arm] * s) for arm, s in zip(arms, speeds, strict=True)))
    assert turns.ratio("b") == pytest.approx(1.5)
    assert turns.ratio("plain") == 1.0


def test_a_turn_is_compared_with_the_nearest_of_plain_on_both_sides() -> None:
    turns = turns_of(("plain", 10), ("b", 30), ("c", 60), ("plain", 20), ("plain", 99))
    assert turns.ratio("b") == pytest.approx(2.0)
    assert turns.ratio("c") == pytest.approx(4.0)


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


def test_a_part_of_some_steps_counts_by_their_share() -> None:
    """Of four steps three are whole, of 10 ms, and one is in halves, of 1 + 2 + 5 ms."""
    turn = Turn(
        step_seconds=5 * [0.012, 0.012, 0.012, 0.010],
        parts={
            "prepare": [0.001] * 20,
            "forward": [0.010] * 15,
            "split": [0.001] * 5,
            "lower half": [0.002] * 5,
            "upper half": [0.005] * 5,
            "draft": [9.0],
        },
    )
    assert turn.step_ms() == pytest.approx(
        {
            "prepare": 1.0, "forward": 7.5, "split": 0.25, "lower half": 0.5,
            "upper half": 1.25, "rest": 1.5, "step": 12.0,
        }
    )  # fmt: skip
    assert turn.host_ms() == pytest.approx(2.5)
