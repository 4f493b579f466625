"""Replays of lookup and recycling: what they would have gained on answers made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_propd.simulation.source_replay import Answer, replay

VOCABULARY = 40


def answer(text: list[int], prompt: list[int], task: str = "any") -> Answer:
    """An answer that the target was nearly sure of: its runner-up is always token 39."""
    best = np.stack([np.array(text), np.full(len(text), VOCABULARY - 1)], 1)
    log_probs = np.tile(np.log([0.9, 0.1]), (len(text), 1)).astype(np.float32)
    return Answer(task, np.array(prompt), np.array(text), best, log_probs)


NEW = list(range(20))


def test_nothing_is_gained_where_nothing_comes_again() -> None:
    for lookup in (False, True):
        for recycling in (False, True):
            found = replay([answer(NEW, [30, 31])], 4, lookup, recycling, VOCABULARY)
            assert found.tokens_per_step() == 1.0
            assert found.tokens.total() == len(NEW) - 1


@pytest.mark.parametrize("nodes", [1, 3])
def test_lookup_gains_by_the_prompt(nodes: int) -> None:
    found = replay([answer(NEW, NEW)], nodes, True, False, VOCABULARY)
    assert found.tokens_per_step() == pytest.approx(19 / np.ceil(19 / (1 + nodes)))


@pytest.mark.parametrize("nodes", [1, 3])
def test_recycling_gains_by_answers_before(nodes: int) -> None:
    answers = [answer(NEW, [30], "first"), answer(NEW, [31], "second")]
    found = replay(answers, nodes, False, True, VOCABULARY)
    assert found.tokens_per_step("first") == 1.0
    assert found.tokens_per_step("second") > 1.8
    alone = replay(answers, nodes, True, False, VOCABULARY)
    assert alone.tokens_per_step() == 1.0, "a text knows nothing of another"


def test_both_together_are_as_good_as_the_better() -> None:
    nodes, rng = 4, np.random.default_rng(0)
    words = rng.integers(0, 38, (6, 4))
    texts = [words[rng.integers(0, 6, 12)].ravel().tolist() for _ in range(12)]
    answers = [answer(text, text[:8]) for text in texts]
    alone = [
        replay(answers, nodes, lookup, not lookup, VOCABULARY).tokens_per_step()
        for lookup in (False, True)
    ]
    both = replay(answers, nodes, True, True, VOCABULARY)
    assert both.tokens_per_step() >= 0.98 * max(alone)
    accepted = both.tokens.total() - both.steps.total()
    assert both.expected == pytest.approx(accepted, rel=0.4)
