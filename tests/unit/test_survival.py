"""What pruning leaves: a prior at first, then what pruned steps have put out."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_propd.core.survival import START, Survival


def serve(found: Survival, share: float, steps: int, sequences: int = 8) -> None:
    """Steps whose trees accept what the bounds say, with the noise of single tokens."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        narrow = float(rng.uniform(0.3, 0.9)) * sequences
        wide = narrow + float(rng.uniform(0.0, 0.5)) * sequences
        mean = narrow + share * (wide - narrow)
        found.observe(narrow, wide, int(rng.poisson(mean)), sequences)


def test_the_prior_is_what_is_known_at_first() -> None:
    assert Survival().share == START


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_the_share_is_learned(share: float) -> None:
    found = Survival()
    serve(found, share, 2000)
    assert found.share == pytest.approx(share, abs=0.1)


def test_a_few_steps_say_little() -> None:
    found = Survival()
    serve(found, 0.0, 5)
    assert START - 0.2 < found.share < START


def test_it_is_a_share() -> None:
    low, high = Survival(), Survival()
    for _ in range(1000):
        low.observe(1.0, 2.0, 0, 1)
        high.observe(1.0, 2.0, 5, 1)
    assert (low.share, high.share) == (0.0, 1.0)


def test_equal_bounds_say_nothing() -> None:
    found = Survival()
    found.observe(1.0, 1.0, 3, 2)
    assert found.share == START
