"""What heads know of a text, against counting position by position."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_targets import (
    VOCAB,
    one_thread,  # noqa: F401
    randomise,
    said_by_target,
    token_ids,
    trainee,
)

from vllm_propd.heads.calibration import EARLY_RANKS, TREE_SIZES
from vllm_propd.training.measure import CANDIDATES, calibrate, ranks_of, top_accuracy
from vllm_propd.training.model.trainee import Trainee

HEADS = 3


def guessable(heads: Trainee, prompt: list[int], length: int, seed: int) -> list[int]:
    """A continuation that the first head often has among its best four."""
    rng, ids = np.random.default_rng(seed), list(prompt)
    for _ in range(length):
        logits = heads.predict(torch.tensor([ids])).medusa[0, 0, -2]
        ids.append(int(logits.topk(4).indices[rng.integers(0, 4)]))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def heads() -> Trainee:
    return randomise(trainee(num_heads=HEADS))


@pytest.fixture(scope="module")
def spoken(heads: Trainee) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and continuations of unequal lengths."""
    prompts = [row[: 3 + i].tolist() for i, row in enumerate(token_ids(5))]
    texts = [guessable(heads, p, 20 + 4 * i, i) for i, p in enumerate(prompts)]
    return prompts, texts


def rank(logits: torch.Tensor, token: int) -> int:
    return logits.argsort(descending=True).tolist().index(token)


def counted(
    heads: Trainee, prompts: list[list[int]], texts: list[list[int]]
) -> tuple[list[list[int]], dict[int, list[int]]]:
    """Ranks of the truth, per Medusa head and per early layer."""
    medusa: list[list[int]] = [[] for _ in range(HEADS)]
    early: dict[int, list[int]] = {1: [], 2: []}
    for prompt, text in zip(prompts, texts, strict=True):
        ids = prompt + text
        predicted = heads.predict(torch.tensor([ids]))
        for known in range(len(text)):  # tokens of the text that are there already
            at = len(prompt) + known - 1
            for layer, ranks in early.items():
                ranks.append(rank(predicted.early[layer][0, at], text[known]))
            if known + HEADS >= len(text):
                continue
            for k, ranks in enumerate(medusa):
                ranks.append(rank(predicted.medusa[k, 0, at], text[known + 1 + k]))
    return medusa, early


def test_ranks_are_places_in_the_sorted_vocabulary() -> None:
    torch.manual_seed(0)
    logits, truth = torch.randn(3, 7, 50), torch.randint(0, 50, (3, 7))
    places = logits.argsort(-1, descending=True).argsort(-1)
    expected = places.gather(-1, truth[..., None])[..., 0]
    assert torch.equal(ranks_of(logits, truth), expected)


def test_shares_equal_those_counted_by_hand(
    heads: Trainee, spoken: tuple[list[list[int]], list[list[int]]]
) -> None:
    found = calibrate(heads, *spoken)
    medusa, early = counted(heads, *spoken)
    assert found.positions == len(medusa[0]) == sum(len(t) - HEADS for t in spoken[1])
    expected = [[row.count(r) / len(row) for r in range(CANDIDATES)] for row in medusa]
    np.testing.assert_allclose(found.rank_accuracy, expected, atol=1e-5)
    assert sum(found.rank_accuracy[0][:4]) == pytest.approx(1, abs=0.1)
    assert found.early_recall.keys() == early.keys()
    for layer, row in early.items():
        recall = {k: np.mean([r < k for r in row]) for k in EARLY_RANKS}
        assert found.early_recall[layer] == pytest.approx(recall, abs=1e-5)
    # Grades by what heads said: each head where those before it had the text.
    sureness = found.sureness()
    assert sureness is not None
    reached = np.ones(found.positions, np.bool_)
    for head, row in enumerate(medusa):
        assert sureness[0, head].sum() == CANDIDATES * reached.sum()
        reached &= np.array(row) < CANDIDATES
        assert sureness[2, head].sum() == reached.sum()


def test_one_node_is_worth_the_first_heads_best_token(
    heads: Trainee, spoken: tuple[list[list[int]], list[list[int]]]
) -> None:
    steps = tokens = 0
    for prompt, text in zip(*spoken, strict=True):
        predicted = heads.predict(torch.tensor([prompt + text]))
        known = 0
        while known + HEADS < len(text):
            draft = predicted.medusa[0, 0, len(prompt) + known - 1].argmax()
            made = 1 + int(draft == text[known + 1])
            known, steps, tokens = known + made, steps + 1, tokens + made
    found = calibrate(heads, *spoken).tokens_per_step
    assert found[1] == pytest.approx(tokens / steps, abs=1e-4)
    assert 1 < found[1] < 2


def test_larger_trees_make_more_tokens_per_step(
    heads: Trainee, spoken: tuple[list[list[int]], list[list[int]]]
) -> None:
    found = calibrate(heads, *spoken).tokens_per_step
    assert tuple(found) == TREE_SIZES
    values = list(found.values())
    assert values == sorted(values) and values[0] < values[2] < values[-1]
    assert values[-1] <= 1 + HEADS


def test_continuations_within_the_heads_reach_are_left_out(heads: Trainee) -> None:
    prompt, calls = [1, 2, 3], []
    text = guessable(heads, prompt, HEADS + 2, 0)
    short = text[: HEADS + 1]
    found = calibrate(heads, [prompt] * 2, [short, text], lambda: calls.append(1))
    assert found == calibrate(heads, [prompt], [text]) and found.positions == 2
    assert len(calls) == 2
    with pytest.raises(ValueError, match=r"ends its continuations at once.*--held-out"):
        calibrate(heads, [prompt, prompt], [short, []])


def test_heads_without_early_ones_are_measured(
    heads: Trainee, spoken: tuple[list[list[int]], list[list[int]]]
) -> None:
    alone = randomise(trainee(num_heads=HEADS, early_layers=()))
    found = calibrate(alone, *spoken)
    assert found.early_recall == {} and found.positions > 0


def test_measuring_leaves_no_gradients(
    heads: Trainee, spoken: tuple[list[list[int]], list[list[int]]]
) -> None:
    calibrate(heads, *spoken)
    ids = token_ids()
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    top_accuracy(heads, ids, everywhere, heads.states(ids))
    assert all(p.grad is None and p.requires_grad for p in heads.trained())


def test_top_accuracy_compares_with_the_targets_best_token(heads: Trainee) -> None:
    ids = token_ids(3, 12)
    learn = torch.ones_like(ids, dtype=torch.bool)
    learn[1, 4:7] = False
    predicted, said = heads.predict(ids), said_by_target(heads, ids)
    found = top_accuracy(heads, ids, learn, heads.states(ids))
    for k, (top1, top10) in enumerate(found, 1):
        ranks = [
            rank(
                predicted.medusa[k - 1, row, at],
                int(said[row, at + k].argmax()),
            )
            for row in range(3)
            for at in range(12 - k)
            if learn[row, at] and learn[row, at + k]
        ]
        assert top1 == pytest.approx(np.mean([r < 1 for r in ranks]), abs=1e-6)
        assert top10 == pytest.approx(np.mean([r < 10 for r in ranks]), abs=1e-6)
        assert 0 < top10 < 1


def test_untrained_heads_know_what_the_target_says_next() -> None:
    """Their top token is the target's for the position before: a shift would show."""
    heads = trainee(num_heads=1)
    prompt = [5, 6, 7]
    best = int(said_by_target(heads, torch.tensor([prompt]))[0, -1].argmax())
    other = (best + 1) % VOCAB
    found = calibrate(heads, [prompt], [[other, best, other]])
    assert found.positions == 2 and found.rank_accuracy[0][0] >= 0.5
