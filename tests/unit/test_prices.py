"""What candidates are worth, by kind of request."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_propd.core.drafting.prices import Prices
from vllm_propd.core.drafting.reliability import RankAccuracy, Reliability

SAID = np.log(np.full((400, 1, 1), 0.5, np.float32))


def taught(prices: Prices) -> Prices:
    """Greedy requests take what they are told always, sampled ones half of the time."""
    half = (np.arange(400) % 2 == 0).reshape(400, 1, 1)
    prices.observe(False, np.ones((400, 1, 1), np.bool_), SAID)
    prices.observe(True, half, SAID)
    return prices


def test_each_kind_has_its_own() -> None:
    prices = taught(Prices(Reliability(1), Reliability(1)))
    kinds = np.array([False, True, True, False])
    values = np.exp(prices.values(kinds, SAID[:4]))[:, 0, 0]
    assert values == pytest.approx([1.0, 0.5, 0.5, 1.0], abs=0.05)
    for kind in (False, True):
        same = prices.values(np.full(4, kind), SAID[:4])
        assert np.exp(same)[:, 0, 0] == pytest.approx([0.5 if kind else 1.0] * 4, abs=0.05)


def test_what_is_shown_has_seen_more() -> None:
    prices = Prices(*(RankAccuracy(np.full((1, 1), 0.1)) for _ in range(2)))
    assert prices.taught is prices.estimators[0]
    prices.observe(True, np.ones((1, 1, 1), np.bool_), SAID[:1])
    assert prices.taught is prices.estimators[1]
