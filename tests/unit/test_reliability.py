"""Estimators of acceptance: what they learn, and that growth can use it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vllm_propd.core.drafting.reliability import RankAccuracy, Reliability, counted, hits

HEADS, RANKS = 3, 5
relaxed = settings(deadline=None)


def samples(
    count: int, sharpness: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Candidates, their log probabilities, and truths that these are right about.

    With ``sharpness`` other than 1 the heads are over- or underconfident: truths come
    from their probabilities to the power of 1 / sharpness, normalised.
    """
    rng = np.random.default_rng(seed)
    logits = rng.gumbel(0, 2.0, (count, HEADS, 50))
    real = np.exp(logits / sharpness)
    real /= real.sum(-1, keepdims=True)
    truth = (real.cumsum(-1) > rng.random((count, HEADS, 1))).argmax(-1)
    said = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    tokens = np.argsort(-said, -1)[..., :RANKS]
    return tokens, np.take_along_axis(said, tokens, -1).astype(np.float32), truth


def test_a_hit_is_the_texts_token() -> None:
    tokens = np.array([[[3, 5], [7, 9]]])
    assert hits(tokens, np.array([[5, 8]])).tolist() == [[[False, True], [False, False]]]


def test_rank_accuracy_follows_a_change_of_task() -> None:
    tokens, said, truth = samples(4000, 1.0)
    known = RankAccuracy(np.full((HEADS, RANKS), 0.1))
    hit = hits(tokens, truth)
    for start in range(0, 4000, 4):
        known.observe(hit[start : start + 4], said[start : start + 4])
    np.testing.assert_allclose(known.accuracy, hit.mean(0), atol=0.04)
    known.observe(np.zeros((4000, HEADS, RANKS), np.bool_))
    assert known.accuracy.max() < 0.001
    assert np.isfinite(known.values(said)).all()


@pytest.mark.parametrize("sharpness", [0.7, 1.0, 2.0])
def test_reliability_learns_what_confidence_is_worth(sharpness: float) -> None:
    known = Reliability(HEADS)
    tokens, said, truth = samples(6000, sharpness)
    known.observe(hits(tokens, truth), said)
    tokens, said, truth = samples(3000, sharpness, seed=1)
    hit, values = hits(tokens, truth), np.exp(known.values(said))
    wrong_before = 0.0
    for low, high in ((0.02, 0.1), (0.1, 0.3), (0.3, 0.6), (0.6, 1.0)):
        for head in range(HEADS):
            some = (values[:, head] >= low) & (values[:, head] < high)
            if some.sum() < 200:
                continue
            error = 3 * np.sqrt(0.25 / some.sum())
            found = hit[:, head][some].mean()
            assert found == pytest.approx(values[:, head][some].mean(), abs=error + 0.03)
            wrong_before += abs(found - np.exp(said[:, head][some]).mean())
    assert (wrong_before > 0.3) == (sharpness != 1.0)


def test_a_head_is_graded_where_those_before_it_were_right() -> None:
    """The second head is right exactly where the first one is."""
    known, rng = Reliability(2), np.random.default_rng(0)
    said = np.full((4000, 2, 1), np.log(0.5), np.float32)
    hit = np.repeat(rng.random((4000, 1, 1)) < 0.5, 2, 1)
    known.observe(hit, said)
    values = np.exp(known.values(said[:1]))[0, :, 0]
    assert values == pytest.approx([0.5, 1.0], abs=0.03)


def test_at_first_the_heads_are_believed() -> None:
    _, said, _ = samples(100, 1.0)
    np.testing.assert_allclose(
        Reliability(HEADS).values(said), np.clip(said, -7.75, -0.25), atol=0.05
    )


def test_what_training_measured_is_known_from_the_start() -> None:
    tokens, said, truth = samples(6000, 2.0)
    measured = counted(hits(tokens, truth), said)
    learned, told = Reliability(HEADS), Reliability(HEADS, measured=measured)
    learned.observe(hits(tokens, truth), said)
    at_first = np.exp(told.values(said[:500]))
    np.testing.assert_allclose(at_first, np.exp(learned.values(said[:500])), atol=0.06)
    # And no more than a start: text of another kind is soon believed.
    told.observe(np.zeros((3000, HEADS, RANKS), np.bool_), said[:3000])
    after = np.exp(told.values(said[:500]))
    assert after[:, 0].mean() < 0.3 * at_first[:, 0].mean()


@relaxed
@given(
    arrays(np.float32, (20, HEADS, RANKS), elements=st.floats(-12, 0, width=32)),
    arrays(np.int64, (20, HEADS), elements=st.integers(0, RANKS + 2)),
)
def test_values_never_rise_by_rank(said: np.ndarray, truth: np.ndarray) -> None:
    said = -np.sort(-said, -1)
    hit = hits(np.tile(np.arange(RANKS), (20, HEADS, 1)), truth)
    for known in (Reliability(HEADS), RankAccuracy(np.full((HEADS, RANKS), 0.2))):
        for start in range(0, 20, 5):
            known.observe(hit[start : start + 5], said[start : start + 5])
        values = known.values(said)
        assert values.dtype == np.float32 and values.shape == said.shape
        assert np.isfinite(values).all() and (values <= 0).all()
        assert (np.diff(values, axis=-1) <= 1e-6).all()
