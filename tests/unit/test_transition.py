"""Heads that know the token before: the pairs that they score, and the trees from them."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from tiny_targets import (
    VOCAB,
    loss,
    one_thread,  # noqa: F401
    randomise,
    said_by_target,
    token_ids,
    trainee,
)

from vllm_propd.core.drafting.candidates import Candidates
from vllm_propd.core.drafting.growth import grow, grow_from
from vllm_propd.core.drafting.pending_candidates import PendingCandidates
from vllm_propd.heads.checkpoint import AFTER, BEFORE, HeadsCheckpoint
from vllm_propd.heads.transition import SUCCESSORS, Transition
from vllm_propd.training.candidates import candidates_of
from vllm_propd.training.measure import calibrate

HEADS, SEQUENCES, TOKENS = 3, 2, 12


@pytest.fixture
def transition() -> Transition:
    torch.manual_seed(0)
    found = Transition(TOKENS, 4).requires_grad_(False)
    found.after.copy_(torch.randn(TOKENS, 4))
    return found


def own_logits(seed: int = 1) -> torch.Tensor:
    torch.manual_seed(seed)
    return 2 * torch.randn(HEADS, SEQUENCES, TOKENS)


ROOTS = torch.tensor([5, TOKENS])  # the second is no token that heads may draft


def test_the_term_is_a_product_of_two_rows(transition: Transition) -> None:
    parents = torch.tensor([[1, 7], [TOKENS, 3]])
    found = transition(parents)
    assert found.shape == (2, 2, TOKENS)
    expected = transition.before[7] @ transition.after.T
    torch.testing.assert_close(found[0, 1], expected)
    assert not found[1, 0].any()
    columns = torch.tensor([4, 0])
    torch.testing.assert_close(transition(parents, columns), found[..., columns])
    for token, best in enumerate(transition.successors()):
        term = transition.before[token] @ transition.after.T
        assert best.tolist() == term.topk(SUCCESSORS).indices.tolist()


def test_with_all_tokens_as_candidates_it_is_the_conditional(
    transition: Transition,
) -> None:
    logits = own_logits()
    found = transition.couple(logits, ROOTS, TOKENS)
    assert found.tokens.shape == (SEQUENCES, HEADS, 1 + TOKENS + 4 * SUCCESSORS, TOKENS)
    for sequence, head in product(range(SEQUENCES), range(1, HEADS)):
        for rank in range(TOKENS):
            before = found.tokens[sequence, head - 1, 0, rank]
            row = found.next_row[sequence, head - 1, 0, rank]
            exact = (logits[head, sequence] + transition(before)).log_softmax(-1)
            tokens = found.tokens[sequence, head, row]
            assert sorted(tokens.tolist()) == list(range(TOKENS))
            said = found.log_probs[sequence, head, row]
            torch.testing.assert_close(said, exact[tokens], rtol=1e-3, atol=1e-3)


def test_the_first_head_knows_the_root_exactly(transition: Transition) -> None:
    logits = own_logits()
    found = transition.couple(logits, ROOTS, 3)
    for sequence, root in enumerate(ROOTS):
        exact = (logits[0, sequence] + transition(root)).log_softmax(-1).topk(3)
        assert found.tokens[sequence, 0, 0].tolist() == exact.indices.tolist()
        torch.testing.assert_close(found.log_probs[sequence, 0, 0], exact.values)
    assert not transition(ROOTS[1]).any()


def test_rows_hold_the_best_of_own_candidates_and_successors(
    transition: Transition,
) -> None:
    logits, ranks = own_logits(), 4
    found = transition.couple(logits, ROOTS, ranks)
    for sequence, head in product(range(SEQUENCES), range(1, HEADS)):
        own = logits[head, sequence].topk(ranks).indices.tolist()
        before = found.tokens[sequence, head - 1, 0]
        own_before = logits[head - 1, sequence].topk(ranks).indices
        offered = before if head == 1 else own_before
        extra = transition.successors()[offered[:4]].flatten().tolist()
        known = torch.tensor(sorted({*own, *extra}))
        total = logits[head, sequence].exp().sum()
        rest = total - logits[head, sequence, known].exp().sum()
        for rank in range(ranks):
            token, row = before[rank], found.next_row[sequence, head - 1, 0, rank]
            scores = (logits[head, sequence] + transition(token))[known]
            best = (scores - (scores.exp().sum() + rest).log()).topk(ranks)
            assert (
                found.tokens[sequence, head, row].tolist() == known[best.indices].tolist()
            )
            said = found.log_probs[sequence, head, row]
            torch.testing.assert_close(said, best.values, rtol=1e-3, atol=1e-4)


def random_candidates(seed: int, rows: int = 4, ranks: int = 3) -> Candidates:
    rng = np.random.default_rng(seed)
    shape = (SEQUENCES, HEADS, rows, ranks)
    tokens = np.argsort(rng.random((*shape[:3], 9)))[..., :ranks]
    said = -np.sort(rng.exponential(size=shape)).astype(np.float32)
    return Candidates(tokens, said, rng.integers(0, rows, shape))


def every_path(one: Candidates, sequence: int) -> dict[tuple[int, ...], float]:
    """All paths of a sequence's candidates, and their log probabilities."""
    found: dict[tuple[int, ...], float] = {}
    open_ends = [((), 0.0, 0)]
    for head in range(one.heads):
        longer = []
        for path, value, row in open_ends:
            for rank in range(one.tokens.shape[3]):
                at = sequence, head, row, rank
                new = (*path, int(one.tokens[at])), value + float(one.log_probs[at])
                found[new[0]] = new[1]
                longer.append((*new, int(one.next_row[at])))
        open_ends = longer
    return found


@pytest.mark.parametrize("seed", range(20))
def test_trees_are_the_best_of_all_paths(seed: int) -> None:
    some, nodes = random_candidates(seed), 7 + seed
    trees = grow_from(some, np.full(SEQUENCES, nodes))
    for sequence, tree in enumerate(trees):
        known = every_path(some, sequence)
        paths = [
            tuple(int(tree.token[n - 1]) for n in tree.path(node))
            for node in range(1, len(tree) + 1)
        ]
        assert len(set(paths)) == len(paths) == min(nodes, len(known))
        values = [known[path] for path in paths]
        np.testing.assert_allclose(tree.score, values, rtol=1e-5)
        best = sorted(known.values(), reverse=True)[: len(paths)]
        np.testing.assert_allclose(values, best, rtol=1e-5)


def test_a_looked_up_token_leads_to_its_own_row() -> None:
    some = random_candidates(3)
    path = np.full((SEQUENCES, 2), -1)
    path[0] = some.tokens[0, 0, 0, 2], 99
    worth = np.full(path.shape, np.log(0.98), np.float32)
    tree = grow_from(some, np.array([40, 40]), (path, worth))[0]
    first = next(
        n for n in range(1, 41) if tree.looked_up[n - 1] and tree.depth[n - 1] == 1
    )
    row = some.next_row[0, 0, 0, 2]
    children = {int(tree.token[n]) for n in range(40) if tree.parent[n] == first}
    assert children <= {99, *some.tokens[0, 1, row].tolist()} and 99 in children
    assert len(children) > 1


def test_independent_candidates_grow_as_before() -> None:
    one = random_candidates(5, rows=1)
    sizes = np.array([11, 4])
    same = grow(one.tokens[:, :, 0], one.log_probs[:, :, 0], sizes)
    assert all((one.next_row[...] == 0).ravel())
    for a, b in zip(grow_from(one, sizes), same, strict=True):
        np.testing.assert_array_equal(a.token, b.token)
        np.testing.assert_array_equal(a.parent, b.parent)


def test_candidates_are_graded_after_the_texts_own_tokens() -> None:
    some = random_candidates(6)
    text = [int(some.tokens[0, 0, 0, 1]), 50, 51]
    row = int(some.next_row[0, 0, 0, 1])
    tokens, said = some.along(np.array([text, text]))
    assert tokens[0, 0].tolist() == some.tokens[0, 0, 0].tolist()
    assert tokens[0, 1].tolist() == some.tokens[0, 1, row].tolist()
    assert tokens[0, 2].tolist() == some.tokens[0, 2, 0].tolist()  # 50 is no candidate
    assert said[0, 1].tolist() == some.log_probs[0, 1, row].tolist()
    pending = PendingCandidates()
    pending.add("a", 1, some.one(0))
    graded = pending.take([("a", [7, *text])])
    assert graded is not None and graded.tokens.tolist() == tokens[:1].tolist()


def test_the_best_path_follows_first_choices() -> None:
    some = random_candidates(7)
    for sequence, path in enumerate(some.best_path()):
        row = 0
        for head, token in enumerate(path):
            assert token == some.tokens[sequence, head, row, 0]
            row = int(some.next_row[sequence, head, row, 0])


DRAFTED = list(range(0, VOCAB, 2))


def test_the_loss_is_of_the_conditional_after_the_texts_own_tokens() -> None:
    heads = trainee(
        DRAFTED, num_heads=2, early_layers=(), transition_rank=4, sampled_tokens=0
    )
    randomise(heads)
    ids = token_ids()
    predicted = heads.predict(ids)
    assert predicted.medusa.shape[-1] == len(DRAFTED)
    assert heads.transition is not None
    truth = said_by_target(heads, ids).softmax(-1)[..., DRAFTED]
    expected = torch.zeros(())
    for k, weight in ((1, 0.8), (2, 0.64)):
        before = heads.place[ids[:, k:]]
        logits = predicted.medusa[k - 1][:, :-k] + heads.transition(before)
        now = logits.log_softmax(-1)
        expected = expected - weight * (truth[:, k:] * now).sum(-1).mean()
    torch.testing.assert_close(loss(heads, ids), expected)


def test_all_that_heads_know_is_in_their_checkpoint() -> None:
    heads = randomise(trainee(DRAFTED, transition_rank=4))
    tensors = heads.medusa_tensors()
    checkpoint = HeadsCheckpoint("here", dict(tensors))  # type: ignore[arg-type]
    assert checkpoint.transition_rank == 4 and checkpoint.output_size == len(DRAFTED)
    assert checkpoint.num_outputs == 0
    assert tensors["token_map"].tolist() == DRAFTED
    assert tensors[BEFORE].shape == tensors[AFTER].shape == (len(DRAFTED), 4)
    assert any(name.startswith("transition.") for name in heads.state())


def test_candidates_in_training_are_token_ids() -> None:
    heads = randomise(trainee(DRAFTED, transition_rank=4))
    ids = token_ids(1)
    logits = heads.predict(ids).medusa[:, 0].float()
    found = candidates_of(heads, logits, ids[0], 5)
    assert set(found.tokens.ravel().tolist()) <= set(DRAFTED)
    assert (np.diff(found.log_probs) <= 0).all()


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "autocast"])
def test_calibration_measures_what_knows_the_token_before(mixed: bool) -> None:
    """A term that is always right: the token after t is t + 2."""
    heads = trainee(DRAFTED, num_heads=2, early_layers=(), transition_rank=len(DRAFTED))
    assert heads.transition is not None
    with torch.no_grad():
        heads.transition.before.copy_(50 * torch.eye(len(DRAFTED)))
        heads.transition.after.copy_(torch.eye(len(DRAFTED)).roll(1, 0))
    text = [(2 * i) % VOCAB for i in range(30)]
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        found = calibrate(heads, [text[:3]], [text[3:]])
    assert found.rank_accuracy[0][0] == found.rank_accuracy[1][0] == 1.0
    assert found.tokens_per_step[4] == 3.0


@pytest.mark.parametrize("ranks", [1, 3, TOKENS])
def test_one_loop_on_the_cpu_gives_what_torchs_steps_give(
    transition: Transition, ranks: int
) -> None:
    """These are what other devices do."""
    logits = own_logits()
    given = torch.cat([(logits[0] + transition(ROOTS))[None], logits[1:]])
    best, places = given.topk(ranks)
    total = given.logsumexp(-1, keepdim=True)
    expected = transition._coupled(given, best, places, total, ranks)
    found = transition.couple(logits, ROOTS, ranks)
    real = torch.isfinite(expected.log_probs)
    torch.testing.assert_close(found.log_probs, expected.log_probs)
    assert torch.equal(found.tokens[real], expected.tokens[real])
    # A token may stand twice among the candidates: what follows either is the same.
    for sequence, head in product(range(SEQUENCES), range(HEADS - 1)):
        kept = real[sequence, head]
        after = (one.tokens[sequence, head + 1] for one in (expected, found))
        rows = (one.next_row[sequence, head][kept] for one in (expected, found))
        assert torch.equal(*(tokens[row] for tokens, row in zip(after, rows, strict=True)))


def test_roots_that_read_eight_bits_say_nearly_the_same(transition: Transition) -> None:
    logits = own_logits()
    exact = transition.couple(logits, ROOTS, TOKENS)
    transition.pack()
    found = transition.couple(logits, ROOTS, TOKENS)
    # The later heads do not see the root.
    assert torch.equal(found.log_probs[:, 1:], exact.log_probs[:, 1:])
    own = slice(0, 1), slice(0, 1)
    for sequence, root in enumerate(ROOTS):
        said = (one.log_probs[sequence, 0, 0] for one in (found, exact))
        torch.testing.assert_close(*said, rtol=0, atol=0.05)
        if root == TOKENS:  # which heads do not draft: the term is nothing
            same = (one.log_probs[sequence][own] for one in (found, exact))
            assert torch.equal(*same)
