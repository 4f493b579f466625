"""Lookup: the latest of the longest matches, what follows it, and what that is worth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_propd.core.sources.lookup import (
    ALIKE,
    LONGEST,
    MIXED,
    ODDS,
    ONCE,
    REACH,
    RISE,
    TRUST,
    LookupMatches,
    Lookups,
    Paths,
)

relaxed = settings(deadline=None)


def rows_of(*texts: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Texts as the runner has them: rows of one array, something else behind their ends."""
    lengths = np.array([len(text) for text in texts])
    table = np.full((len(texts), int(lengths.max()) + 3), 7, np.int32)
    for row, text in zip(table, texts, strict=True):
        row[: len(text)] = text
    return table, np.arange(len(texts)), lengths


def find(lookups: Lookups, *texts: list[int]) -> LookupMatches:
    ids = [f"request {i}" for i in range(len(texts))]
    return lookups.find(ids, *rows_of(*texts))


def by_hand(text: list[int]) -> tuple[int, list[int]]:
    """Match and continuation, with slices."""
    best, place = 0, 0
    for end in range(1, len(text)):
        length = 0
        while length < min(end, LONGEST) and text[end - length - 1] == text[-length - 1]:
            length += 1
        if length and length >= best:
            best, place = length, end
    if not best:
        return 0, [-1] * REACH
    longer = list(text)
    for ahead in range(REACH):
        longer.append(longer[place + ahead])
    return best, longer[len(text) :]


@relaxed
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=60), min_size=1))
def test_the_latest_of_the_longest_matches_goes_on(texts: list[list[int]]) -> None:
    found = find(Lookups(), *texts)
    for text, match, token in zip(texts, found.match, found.token, strict=True):
        assert (int(match), token.tolist()) == by_hand(text)


def before_by_hand(text: list[int]) -> int:
    """What followed the text's last token before, as far as it was looked for."""
    followers: list[int] = []
    for end in range(len(text) - 1, 0, -1):
        if text[end - 1] == text[-1]:
            followers.append(text[end])
            if text[max(end - LONGEST, 0) : end] == text[-LONGEST:]:
                break
    return MIXED if len(set(followers)) > 1 else ALIKE if len(followers) > 1 else ONCE


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 66, 128, 129, 200, 700])
@pytest.mark.parametrize("tokens", [1, 2, 9, 60, 500])
def test_long_texts_are_compared_many_tokens_at_a_time(tokens: int, length: int) -> None:
    rng = np.random.default_rng(length)
    texts = rng.integers(0, tokens, (20, length)).tolist()
    if length > 100:  # a long match, anywhere
        for text in texts:
            place, many = rng.integers(0, 60), rng.integers(1, 25)
            text[place : place + many] = text[-many:]
    found = find(Lookups(), *texts)
    for i, text in enumerate(texts):
        assert (int(found.match[i]), found.token[i].tolist()) == by_hand(text)
        assert found.before[i] == before_by_hand(text)


def test_each_request_has_its_own_row() -> None:
    table, _, lengths = rows_of([1, 2, 3], [5, 6, 5], [1, 4, 1])
    found = Lookups().find(["b"], table, np.array([1]), lengths[1:2])
    assert found.match.tolist() == [1]
    assert found.token[0, :3].tolist() == [6, 5, 6]  # what repeats itself goes on so


def test_no_token_is_drafted_that_the_target_does_not_know() -> None:
    """Prompts have placeholders, and tokens that only the tokenizer knows."""
    lookups, known, unknown = Lookups(vocabulary=10), [3, 9, 4, 3], [3, 10, 4, 3]
    found = find(lookups, known, unknown, [10, *known])
    assert found.match.tolist() == [1, 0, 1]
    assert found.token[0, :3].tolist() == [9, 4, 3]
    assert (found.token[1] == -1).all()
    assert np.isneginf(lookups.worth()[1]).all()


@pytest.mark.parametrize(
    ("text", "before"),
    [
        ([1, 2, 1], ONCE),
        ([1, 2, 1, 2, 1], ALIKE),
        ([1, 2, 1, 3, 1], MIXED),
        ([4, 1, 2, 1, 3, 4, 1], MIXED),
        ([4, 1, 2, 5, 1, 2, 4, 1], ALIKE),
        ([*range(300, 400), 1, 9, *range(100, 300), 5, 1, 2, 5, 1], MIXED),
    ],
)
def test_what_followed_before_is_told(text: list[int], before: int) -> None:
    assert find(Lookups(), text).before.tolist() == [before]


def worth_of_one(lookups: Lookups, first: int | None = None) -> float:
    heads = None if first is None else np.array([[first]])
    return float(np.exp(lookups.worth(heads)[0, 0]))


def test_a_match_is_worth_what_it_has_been_worth() -> None:
    """After 1 there always comes something new."""
    lookups, text, worth = Lookups(), [0, 1, 2], []
    for new in range(3, 200, 2):
        text += [new, 1]
        assert find(lookups, text).match.tolist() == [1]
        worth.append(worth_of_one(lookups))
        text.append(new + 1)
    assert worth[0] == pytest.approx(ODDS[ONCE] / (ODDS[ONCE] + 1))
    assert (np.diff(worth[1:]) < 0).all() and worth[-1] < 0.05


def test_longer_matches_learn_from_the_rest_of_a_continuation() -> None:
    lookups, text = Lookups(), [1, 2, 3, 4, 5, 6, 9, 1]
    find(lookups, text)
    find(lookups, [*text, 2, 3, 8])
    # 2 and 3 were right, 4 was not; nothing is known of what comes behind.
    odds = ODDS[ONCE] * np.arange(1.0, 5.0) ** RISE
    start = odds / (odds + 1)
    expected = (TRUST * start[:3] + [1, 1, 0]) / (TRUST + 1)
    found = lookups._right[0, 0] / lookups._total[0, 0]
    np.testing.assert_allclose(found[:3], expected, rtol=1e-3)
    assert found[3] == pytest.approx(start[3])


def test_what_the_heads_say_is_told_apart() -> None:
    """The looked-up token is right where the head agrees, and wrong where not."""
    rng = np.random.default_rng(0)
    lookups, text = Lookups(), [0, 1, 2]
    worth: dict[bool, float] = {}
    for new in range(3, 400, 2):
        text += [new, 1]
        looked_up = int(find(lookups, text).token[0, 0])
        agrees = bool(rng.integers(2))
        first = looked_up if agrees else new + 1
        worth[agrees] = worth_of_one(lookups, first)
        text.append(first)
    assert worth[True] > 0.9 and worth[False] < 0.1
    text += [new + 3, 1]
    find(lookups, text)
    assert worth_of_one(lookups) == pytest.approx(0.5, abs=0.1)  # no head has been asked


def test_nothing_found_is_worth_nothing_and_has_no_nodes() -> None:
    lookups = Lookups()
    found = find(lookups, [1, 2, 3], [4, 5, 4])
    worth = lookups.worth()
    assert found.match.tolist() == [0, 1]
    assert np.isneginf(worth[0]).all() and (worth[1] < 0).all()
    both = Paths(found.token, worth, 3)
    nothing, path = both
    assert len(nothing) == 0
    assert path.token.tolist() == [5, 4, 5]
    assert path.parent.tolist() == [0, 1, 2] and path.depth.tolist() == [1, 2, 3]
    np.testing.assert_allclose(path.score, np.cumsum(worth[1, :3]), rtol=1e-6)
    for most in (2, 8):
        score, sizes = both.scores(most)
        assert sizes.tolist() == [0, min(most, 3)]
        np.testing.assert_array_equal(score, path.score[:most])


def test_requests_that_end_or_change_rows_are_no_others_truth() -> None:
    lookups = Lookups()
    find(lookups, [1, 2, 1], [3, 4, 3])
    before = lookups._total.copy()
    lookups.find(["another"], *rows_of([1, 2, 1, 2]))
    np.testing.assert_array_equal(lookups._total, before)
    lookups.find(["request 1"], *rows_of([3, 4, 3]))
    lookups.find(["request 1", "another"], *rows_of([3, 4, 3, 4], [1, 2, 1, 2, 5]))
    assert lookups._total.sum() > before.sum()


def test_a_sessions_next_turn_is_no_truth_of_the_turn_before() -> None:
    """It has the same id, and its text goes on with what the user has said."""
    lookups = Lookups()
    find(lookups, [1, 2, 1], [3, 4, 3])
    before = lookups._total.copy()
    lookups.end("request 0")
    lookups.end("never seen")
    assert (lookups.suggested(["request 0"], np.array([3])) == -1).all()
    find(lookups, [1, 2, 1, 9, 9, 9])
    np.testing.assert_array_equal(lookups._total, before)


def test_what_was_suggested_is_of_texts_as_long_as_then() -> None:
    lookups = Lookups()
    found = find(lookups, [1, 2, 1], [5, 6, 7, 5])
    again = lookups.suggested(["request 1", "another", "request 0"], np.array([4, 4, 2]))
    np.testing.assert_array_equal(again[0], found.token[1])
    assert (again[1:] == -1).all()
    assert (Lookups().suggested(["request 0"], np.array([3])) == -1).all()


def test_a_successor_that_says_the_same_makes_a_continuation_surer() -> None:
    """Of 400 continuations those that the best successor confirms come true."""
    lookups, rng = Lookups(), np.random.default_rng(0)
    text = [1]
    for _ in range(400):
        text += [0, int(rng.integers(1, 3))]
        path = find(lookups, text[:-1]).token
        agrees = bool(path[0, 0] == text[-1])
        best = np.full((1, REACH), -1)
        best[0, 0] = path[0, 0] if agrees else 9
        worth = np.exp(lookups.worth(None, best)[0, 0])
    same, other = (
        np.exp(lookups.worth(None, np.full((1, REACH), token))[0, 0])
        for token in (int(path[0, 0]), 9)
    )
    assert 0 < worth < 1 and other < 0.2 < 0.8 < same
