"""Candidates are graded once, against the text that followed them."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_propd.core.drafting.candidates import Candidates
from vllm_propd.core.drafting.pending_candidates import PendingCandidates

HEADS, RANKS = 3, 2


def candidates(seed: int) -> Candidates:
    rng = np.random.default_rng(seed)
    said = -np.sort(rng.random((1, HEADS, RANKS)).astype(np.float32), -1)
    return Candidates.independent(rng.integers(0, 5, (1, HEADS, RANKS)), said)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), max_size=12))
def test_every_candidate_is_graded_once_with_its_text(steps: list[tuple[int, int]]) -> None:
    """Two sequences that put out some tokens at each step, and draft after each."""
    ungraded, texts = PendingCandidates(), {"a": [0], "b": [1000]}
    drafted: list[tuple[str, int]] = []
    truths: list[list[int]] = []
    for lengths in steps:
        for text, length in zip(texts.values(), lengths, strict=True):
            text += range(text[0] + len(text), text[0] + len(text) + length)
        if (graded := ungraded.take(texts.items())) is not None:
            truths += graded.truth.tolist()
            # The candidates' first token says where they were drafted.
            assert graded.tokens[:, 0, 0].tolist() == graded.truth[:, 0].tolist()
            assert graded.log_probs.shape == graded.tokens.shape
        for name, text in texts.items():
            tokens = np.full((1, HEADS, RANKS), text[0] + len(text))
            said = np.zeros(tokens.shape, np.float32)
            ungraded.add(name, len(text), Candidates.independent(tokens, said))
            drafted.append((name, len(text)))
    last = {name: len(text) for name, text in texts.items()}
    due = [(n, at) for n, at in drafted if at + HEADS <= last[n]]
    assert sorted(truths) == sorted(texts[n][at : at + HEADS] for n, at in due)


def test_what_was_said_meets_what_came() -> None:
    ungraded = PendingCandidates()
    some = candidates(1)
    ungraded.add("a", 2, some)
    assert ungraded.take([("a", [7, 7, 1, 2])]) is None  # one token is missing
    graded = ungraded.take([("a", [7, 7, 1, 2, 3, 4])])
    assert graded is not None
    assert graded.truth.tolist() == [[1, 2, 3]]
    assert np.array_equal(graded.tokens, some.tokens[:, :, 0])
    assert np.array_equal(graded.log_probs, some.log_probs[:, :, 0])
    assert ungraded.take([("a", [7, 7, 1, 2, 3, 4])]) is None


def test_an_ended_sequence_is_forgotten() -> None:
    ungraded = PendingCandidates()
    ungraded.add("a", 0, candidates(2))
    ungraded.forget("a")
    ungraded.forget("never seen")
    assert ungraded.take([("a", [1, 2, 3])]) is None


def test_a_sessions_next_turn_is_no_text_of_the_turn_before() -> None:
    """It keeps its request id, and counts what it puts out from nothing again."""
    ungraded, some = PendingCandidates(), candidates(3)
    ungraded.add("a", 8, candidates(2))  # the turn ends with them in wait
    ungraded.forget("a")
    assert ungraded.take([("a", [5])]) is None
    ungraded.add("a", 1, candidates(2))  # nor where heads are asked late in the next
    ungraded.forget("a")
    assert ungraded.take([("a", [*range(9)])]) is None
    ungraded.add("a", 1, some)
    graded = ungraded.take([("a", [5, 1, 2, 3])])
    assert graded is not None
    assert graded.truth.tolist() == [[1, 2, 3]]
    assert np.array_equal(graded.tokens, some.tokens[:, :, 0])
    ungraded.add("a", 4, candidates(4))
    assert ungraded.take([("a", [*range(20)])]).truth.tolist() == [[4, 5, 6]]  # type: ignore[union-attr]
