"""What pruning leaves: a prior at first, then what the text took of pruned trees."""

from __future__ import annotations

import numpy as np
import pytest
from prices import Line

from vllm_propd.core.sizing.planner import Batch, Planner
from vllm_propd.core.sizing.pruning_recall import (
    START,
    TRUST,
    Grader,
    PrunedStep,
    PruningRecall,
    best_by_draft,
)


def serve(found: PruningRecall, share: float, steps: int) -> None:
    """The best of two nodes is right half the time, then kept; the other, often not."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        first, second = rng.random(2) < (0.5, 0.3)
        kept = rng.random() < share
        found.observe(
            np.array([first, second]), np.array([True, False]), np.array([True, kept])
        )


def test_the_prior_is_what_is_known_at_first() -> None:
    assert PruningRecall().share == START


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_the_share_is_learned_in_a_few_hundred_steps(share: float) -> None:
    found = PruningRecall()
    serve(found, share, 400)
    assert found.share == pytest.approx(share, abs=0.1)


def test_a_few_steps_say_little() -> None:
    found = PruningRecall()
    serve(found, 0.0, 5)
    assert START - 0.1 < found.share < START


def test_pruning_that_was_bad_long_ago_is_tried_again() -> None:
    """What is not planned is not graded: what is known fades with any step."""
    found = PruningRecall()
    serve(found, 0.0, 150)
    planner = Planner(Line(1.0, 0.05), found)
    batch = Batch(np.array([0.5]), np.zeros(1, np.int64), 1)
    assert found.share < START / 2
    for _ in range(5000):
        planner.plan(batch)
    assert START - 0.1 < found.share < START


def test_what_pruning_loses_counts_against_it() -> None:
    found, yes, no = PruningRecall(), np.array([True]), np.array([False])
    found.observe(right=yes, narrow=yes, kept=no)
    assert found.share == pytest.approx((TRUST * START - 1) / TRUST)
    for _ in range(100):
        found.observe(right=yes, narrow=yes, kept=no)
    assert found.share == 0.0


def test_the_drafts_best_are_closed_under_parents() -> None:
    scores = np.log(np.array([0.9, 0.8, 0.8, 0.7, 0.8], np.float32))
    assert best_by_draft(scores, 3).tolist() == [True, True, True, False, False]
    assert best_by_draft(scores, 0).sum() == 0


def pruned() -> PrunedStep:
    """Two trees of tokens 1..4 and 5, 6; after each, that of its parent.

    The first: 1 and 2 below the root, 3 below 1, 4 below 3. The second: 5, 6 below 5.
    """
    return PrunedStep(
        requests=["a", "b"],
        places=[2, 0],
        sizes=np.array([5, 3]),
        token=np.array([-1, 1, 2, 3, 4, -1, 5, 6]),
        depth=np.array([0, 1, 1, 2, 3, 0, 1, 2]),
        parent_row=np.array([0, 0, 0, 1, 3, 5, 5, 6]),
        score=np.log(np.array([0.6, 0.5, 0.4, 0.3, 0.9, 0.8], np.float32)),
        kept=np.array([True, True, False, True, False, True, False, False]),
    )


def test_what_is_right_is_the_path_that_the_text_took() -> None:
    step = pruned()
    right, known = step.right({"a": [8, 8, 1, 3, 9], "b": [5, 7, 6]})
    assert np.flatnonzero(right).tolist() == [0, 1, 3, 5, 6]
    assert known.all() and step.dropped == 4
    # A token in the right place below another parent is not on the path.
    right, _ = step.right({"a": [8, 8, 2, 3, 4], "b": [9, 6, 6]})
    assert np.flatnonzero(right).tolist() == [0, 2, 5]


def test_who_is_gone_or_has_too_little_text_is_not_graded() -> None:
    _, known = pruned().right({"b": [5]})
    assert np.flatnonzero(known).tolist() == [5, 6]
    right, known = pruned().right({"b": [7]})  # what hangs on a wrong node is wrong
    assert np.flatnonzero(known).tolist() == [5, 6, 7]
    assert np.flatnonzero(right & known).tolist() == [5]


def test_a_step_is_graded_when_its_text_is_there() -> None:
    recall = PruningRecall()
    grader = Grader(recall)
    grader.add(pruned())
    text: dict[str, list[int]] = {"a": [8, 8], "b": []}
    for token_of_a, token_of_b in ((1, 5), (3, 6), (4, 7)):
        text["a"].append(token_of_a)
        text["b"].append(token_of_b)
        grader.grade(text)
        assert recall.share == START  # not yet
    text["a"].append(0)
    grader.grade(text)
    # Right are 1, 3, 4 and 5, 6. The draft's best two are 5 and 6; kept were 1 and 3.
    assert recall.share == pytest.approx(TRUST * START / (TRUST + 3))
    grader.grade(text)
    assert recall.share == pytest.approx(TRUST * START / (TRUST + 3))


def test_an_unlucky_step_is_not_the_end() -> None:
    """Three tokens lost at once: what is never tried again cannot be found to pay."""
    found = PruningRecall()
    narrow = np.array([True, True, True, False])
    found.observe(np.ones(4, np.bool_), narrow, np.zeros(4, np.bool_))
    assert found.share > 0.1
