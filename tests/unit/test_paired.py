"""Chunks of arms: ratios that bear a machine whose speed changes."""

import numpy as np
import pytest

from vllm_propd.bench.timing.paired import FEWEST, Chunks, Timed


def chunks_of(speed: float, count: int, noise: float, seed: int = 0) -> Chunks:
    """Of an arm that is so much faster than plain, on a machine of changing speed."""
    rng, found = np.random.default_rng(seed), Chunks()
    for _ in range(count):
        machine = rng.uniform(0.3, 1.0)
        seconds = 10.0 / machine * np.exp(noise * rng.normal(size=2))
        found.add({"plain": Timed(200, seconds[0]), "ours": Timed(200, seconds[1] / speed)})
    return found


def test_plain_vllm_is_as_fast_as_itself() -> None:
    chunks = chunks_of(1.5, 7, 0.1)
    assert set(chunks.ratios("plain")) == {1.0}
    assert chunks.ratio_of_sums("plain") == chunks.median("plain") == 1.0


@pytest.mark.parametrize("speed", [0.8, 1.0, 2.5])
def test_the_machines_speed_falls_out(speed: float) -> None:
    chunks = chunks_of(speed, 60, 0.03)
    assert chunks.median("ours") == pytest.approx(speed, rel=0.02)
    low, high = chunks.quartiles_of_median("ours")
    assert low < speed * 1.01 and high > speed * 0.99
    wide = chunks.quartiles("ours")
    assert wide[0] < low <= high < wide[1]


def test_the_ratio_of_sums_weighs_long_chunks() -> None:
    chunks = Chunks()
    chunks.add({"plain": Timed(10, 1.0), "ours": Timed(10, 0.5)})
    chunks.add({"plain": Timed(300, 30.0), "ours": Timed(300, 30.0)})
    assert chunks.ratios("ours") == [2.0, 1.0]
    assert chunks.ratio_of_sums("ours") == pytest.approx(31.0 / 30.5)


def test_texts_of_other_lengths_are_compared_by_their_tokens() -> None:
    chunks = Chunks()
    chunks.add({"plain": Timed(100, 10.0), "ours": Timed(50, 5.0)})
    assert chunks.median("ours") == 1.0


def test_plain_vllm_twice_is_what_all_are_compared_with() -> None:
    chunks = Chunks()
    chunks.add(
        {"plain": Timed(100, 1.0), "control": Timed(100, 1.5), "ours": Timed(100, 1.25)}
    )
    assert chunks.ratio_of_sums("ours") == chunks.median("ours") == 1.0
    assert chunks.median("plain") == 1.25
    assert chunks.median("control") == pytest.approx(2.5 / 3)


def test_the_luck_of_engines_is_in_the_quartiles() -> None:
    """Chunks of one start agree with each other, and say nothing of the next start's."""
    chunks = Chunks()
    for start, speed in enumerate((0.96, 1.0, 1.04)):
        for _ in range(FEWEST):
            chunks.add({"plain": Timed(100, 1.0), "ours": Timed(100, 1.0 / speed)}, start)
    assert chunks.median("ours") == pytest.approx(1.0)
    low, high = chunks.quartiles_of_median("ours")
    assert low <= 0.98 and high >= 1.02
    assert not chunks.are_enough(["plain", "ours"], 0.02)


def test_it_goes_on_until_the_median_is_known() -> None:
    arms = ["plain", "ours"]
    assert not chunks_of(1.2, FEWEST - 1, 0.0).are_enough(arms, 0.02)
    assert chunks_of(1.2, FEWEST, 0.0).are_enough(arms, 0.02)
    assert not chunks_of(1.2, FEWEST, 0.3).are_enough(arms, 0.02)
    assert chunks_of(1.2, 400, 0.1).are_enough(arms, 0.02)
