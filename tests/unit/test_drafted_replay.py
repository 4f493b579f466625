"""Engines without a model: what they put out, draft and take is what it must be."""

from __future__ import annotations

import numpy as np
import pytest
from prices import Line

from vllm_propd.core.drafting.candidates import Candidates
from vllm_propd.core.drafting.drafter import Drafter
from vllm_propd.core.drafting.prices import Prices
from vllm_propd.core.drafting.reliability import Reliability
from vllm_propd.core.sizing.controller import DynamicSizing
from vllm_propd.core.sizing.step_cost import StepCost
from vllm_propd.core.sources.combined import Sources
from vllm_propd.simulation.answers import Answer, Reading
from vllm_propd.simulation.drafted_replay import Clock, replay_drafted
from vllm_propd.simulation.planned_replay import PlannedReplay

VOCABULARY, HEADS, RANKS = 60, 3, 4
SIZES = np.array([1, 4, 16, 64, 256])


def answer(text: list[int], right: float, seed: int = 0) -> Answer:
    """Its heads' first choice is the text's token so often, and they say so."""
    rng, length = np.random.default_rng(seed), len(text)
    places = np.arange(length)[:, None] + 1 + np.arange(HEADS)
    truth = np.array(text)[np.minimum(places, length - 1)]
    tokens = np.tile(np.arange(50, 50 + RANKS), (length, HEADS, 1))
    hit = rng.random((length, HEADS)) < right
    tokens[..., 0] = np.where(hit, truth, 59)
    said = [right, *[(1 - right) / RANKS] * (RANKS - 1)]
    log_probs = np.broadcast_to(np.log(said), tokens.shape).astype(np.float32)
    best = np.stack([np.array(text), np.full(length, 58)], 1)
    share = np.tile(np.log([0.9, 0.1]), (length, 1)).astype(np.float32)
    heads = Candidates.independent(tokens, log_probs.copy())
    return Answer("any", np.array([40, 41]), np.array(text), best, share, heads)


def run(
    answers: list[Answer],
    sources: tuple[bool, bool, bool] = (False, False, False),
    heads: bool = True,
    token_s: float = 0.0,
    draft_s: float = 1e-3,
    batch_size: int = 1,
) -> PlannedReplay:
    def cost(line: Line) -> StepCost:
        return StepCost(SIZES, line.estimate(SIZES))

    step, draft = Line(1.0, token_s, flat=1), Line(draft_s)
    prices = Prices(Reliability(HEADS), Reliability(HEADS)) if heads else None
    drafter = Drafter(Sources(VOCABULARY, *sources), prices, learns=heads)

    def sizing(clock: Clock) -> DynamicSizing:
        asked = cost(Line(draft_s)) if heads else None
        return DynamicSizing(cost(step), asked, 16, 1 << 20, clock=clock)

    return replay_drafted(answers, drafter, sizing, step, draft, batch_size)


def words(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 40, count).tolist()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_right_heads_give_a_token_for_each_of_them(batch_size: int) -> None:
    answers = [answer(words(200, seed), 0.999, seed) for seed in range(6)]
    found = run(answers, batch_size=batch_size)
    assert found.tokens_per_step == pytest.approx(1 + HEADS, rel=0.1)
    assert found.tokens >= (7 - batch_size) * 199


def test_wrong_heads_cost_hardly_anything() -> None:
    answers = [answer(words(300, seed), 1e-6, seed) for seed in range(3)]
    found = run(answers, token_s=0.2, draft_s=0.1)
    assert found.tokens_per_step == 1.0
    assert found.step_s < 1.02
    assert found.drafted < 0.1


def test_time_is_what_steps_take() -> None:
    answers = [answer(words(200, 5), 0.9)]
    found = run(answers, token_s=0.05)
    assert 0.2 < found.drafted < 4.0
    assert found.step_s == pytest.approx(1.0 + 0.05 * found.drafted, rel=0.02)


@pytest.mark.parametrize(
    "sources", [(True, False, False), (True, True, False), (False, False, True)]
)
def test_sources_need_no_heads(sources: tuple[bool, bool, bool]) -> None:
    again = words(40, 7)
    answers = [answer(again * 3, 1e-6, seed) for seed in range(3)]
    found = run(answers, sources, heads=False)
    assert found.tokens_per_step > 1.5
    nothing = run(answers, (False, False, False), heads=True)
    assert nothing.tokens_per_step == 1.0


def test_answers_are_read_as_they_are_put_out() -> None:
    first, second = (answer(words(20, seed), 0.5, seed) for seed in (1, 2))
    reading = Reading([first, second])
    reading.read(np.array([2, 0]))
    assert reading.outputs == [first.text[:3].tolist(), second.text[:1].tolist()]
    read, best, _ = reading.said()
    assert read.truth.tolist() == first.text[1:3].tolist()
    assert read.before.tolist() == first.text[:2].tolist()
    np.testing.assert_array_equal(best[:, 0], read.truth)
    np.testing.assert_array_equal(reading.rest(0), first.text[3:])
    assert first.candidates is not None and second.candidates is not None
    found = reading.candidates()
    np.testing.assert_array_equal(found.tokens[0], first.candidates.tokens[2])
    np.testing.assert_array_equal(found.tokens[1], second.candidates.tokens[0])
    longer = answer(words(90, 3), 0.5)
    reading.begin(1, longer)
    assert reading.ids == ["answer 0", "answer 2"]
    assert reading.roots.tolist() == [first.text[2], longer.text[0]]


def test_answers_without_heads_are_refused_where_heads_are_asked() -> None:
    one = answer(words(20, 1), 0.9)
    without = Answer(one.task, one.prompt, one.text, one.best, one.log_probs)
    with pytest.raises(ValueError, match="no heads were asked"):
        run([without])
    with pytest.raises(ValueError, match=r"1 recorded answers .* are too few to replay 2"):
        run([answer([1], 0.9), answer(words(9, 2), 0.9)], batch_size=2)


def test_nothing_is_known_before_it_has_come() -> None:
    """Of texts that repeat neither themselves nor each other no source knows anything."""
    texts = np.random.default_rng(0).permutation(10_000)[:400].reshape(8, 50)
    answers = [answer(text.tolist(), 1e-6) for text in texts]
    for batch_size in (1, 4, 8):
        drafter = Drafter(Sources(10_000, True, True, True))
        table = StepCost(SIZES, np.ones(len(SIZES)))
        found = replay_drafted(
            answers,
            drafter,
            lambda clock: DynamicSizing(
                StepCost(SIZES, np.ones(len(SIZES))), None, 16, 1 << 20, clock=clock
            ),
            table,
            table,
            batch_size,
        )
        assert found.tokens_per_step == 1.0


def test_fewer_candidates_of_each_head() -> None:
    one = answer(words(20, 1), 0.9)
    assert one.of_ranks(2).candidates is not None
    assert one.of_ranks(2).candidates.tokens.shape == (20, HEADS, 1, 2)
