"""Replays of lookup and recycling: what they would have gained on answers made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_propd.core.sources.combined import Sources
from vllm_propd.simulation.answers import Answer
from vllm_propd.simulation.source_replay import replay

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
            sources = Sources(VOCABULARY, lookup, False, recycling)
            found = replay([answer(NEW, [30, 31])], 4, sources)
            assert found.tokens_per_step() == 1.0
            assert found.tokens.total() == len(NEW) - 1


@pytest.mark.parametrize("nodes", [1, 3])
def test_lookup_gains_by_the_prompt(nodes: int) -> None:
    found = replay([answer(NEW, NEW)], nodes, Sources(VOCABULARY, True, False, False))
    assert found.tokens_per_step() == pytest.approx(19 / np.ceil(19 / (1 + nodes)))


@pytest.mark.parametrize("nodes", [1, 3])
def test_recycling_gains_by_answers_before(nodes: int) -> None:
    answers = [answer(NEW, [30], "first"), answer(NEW, [31], "second")]
    found = replay(answers, nodes, Sources(VOCABULARY, False, False, True))
    assert found.tokens_per_step("first") == 1.0
    assert found.tokens_per_step("second") > 1.8
    alone = replay(answers, nodes, Sources(VOCABULARY, True, False, False))
    assert alone.tokens_per_step() == 1.0, "a text knows nothing of another"


def test_others_texts_help_where_they_are_shared() -> None:
    answers = [answer(NEW, [30, 31], "first"), answer(NEW[2:], [33, 0, 1], "second")]
    found = replay(answers, 8, Sources(VOCABULARY, True, True, False))
    assert found.tokens_per_step("first") == 1.0
    assert found.tokens_per_step("second") > 4.0
    both = replay(answers, 8, Sources(VOCABULARY, True, True, True))
    assert both.tokens_per_step("second") > 4.0


def test_both_together_are_as_good_as_the_better() -> None:
    nodes, rng = 4, np.random.default_rng(0)
    words = rng.integers(0, 38, (6, 4))
    texts = [words[rng.integers(0, 6, 12)].ravel().tolist() for _ in range(12)]
    answers = [answer(text, text[:8]) for text in texts]
    alone = [
        replay(answers, nodes, Sources(VOCABULARY, *kinds)).tokens_per_step()
        for kinds in ((False, False, True), (True, False, False))
    ]
    both = replay(answers, nodes, Sources(VOCABULARY, True, False, True))
    assert both.tokens_per_step() >= 0.98 * max(alone)
    accepted = both.tokens.total() - both.steps.total()
    assert both.expected == pytest.approx(accepted, rel=0.4)


def test_what_was_learned_of_texts_can_be_forgotten() -> None:
    """As a benchmark does, before the same texts come again."""
    rng = np.random.default_rng(3)
    first, second = (rng.permutation(VOCABULARY).tolist() for _ in range(2))
    sources = Sources(VOCABULARY, False, True, True)

    def steps(text: list[int]) -> int:
        found = replay([answer(text, text)], 8, sources)
        return found.steps.total()

    new, again = steps(first), steps(first)
    assert again < 0.7 * new
    sources.forget()
    assert steps(first) == new
    sources.keep()
    other = steps(second)
    assert steps(second) < 0.7 * other
    sources.forget()
    assert steps(second) == other
    assert steps(first) < 0.7 * new, "what was kept is forgotten"
