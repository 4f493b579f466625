"""What a turn says of itself."""

from __future__ import annotations

import pytest

from vllm_propd.bench.stopwatch import Work, after
from vllm_propd.bench.turn import Turn


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


def test_turns_that_pruned_nothing_say_nothing_of_the_work() -> None:
    turn = Turn(work=Work(trees=2, rows=10, kept=4, layers=6, early_layer=1))
    turn += Turn()
    assert turn.work.ratio == pytest.approx((10 + 4 * 5) / 60)


def test_steps_of_prefill_are_not_timed() -> None:
    laps = {"forward": [9.0, 1.0], "draft": [9.0, 1.0, 1.0], "lower half": [2.0, 2.0]}
    found = {"forward": [1.0], "draft": [1.0, 1.0], "lower half": [2.0, 2.0]}
    assert after(1, laps) == found


def test_a_first_token_is_the_prefills() -> None:
    assert Turn(tokens=9, steps=3).tokens_per_step == 3.0
    assert Turn(tokens=9, prefilled=3, steps=3).tokens_per_step == 2.0
