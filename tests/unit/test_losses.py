"""The loss among fewer tokens against the loss over the whole vocabulary."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_targets import (
    HIDDEN,
    VOCAB,
    loss,
    one_thread,  # noqa: F401
    randomise,
    token_ids,
    trainee,
)

from vllm_propd.training.model.losses import distillation, exact_labels, labels_of
from vllm_propd.training.model.states import BEST, RESERVE, ROOM, KeptStates, States

MANY = 4000


def drawn(
    kind: str, sampled: int, seed: int, tokens: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sampled loss and the exact one, of one head at 2 x 6 positions."""
    torch.manual_seed(0)
    target, draft = 2.5 * torch.randn(2, 6, MANY), torch.randn(2, 6, MANY)
    if tokens is None:
        tokens = torch.arange(MANY)
    learn = torch.ones(2, 6, dtype=torch.bool)
    learn[1, 3:] = False
    best = target.log_softmax(-1).topk(BEST)
    generator = torch.Generator().manual_seed(seed)
    labels = labels_of(best.indices, best.values, learn, tokens, sampled, kind, generator)
    whole = exact_labels(target, tokens, kind)
    return (
        distillation(draft[..., labels.columns], labels, learn),
        distillation(draft[..., tokens], whole, learn),
    )


def test_all_tokens_give_the_exact_loss_of_hard_labels() -> None:
    some, whole = drawn("hard", MANY, seed=0)
    torch.testing.assert_close(some, whole)


def test_random_tokens_stand_for_those_left_out() -> None:
    found = torch.stack([drawn("hard", 300, seed)[0] for seed in range(200)])
    exact = drawn("hard", 300, 0)[1]
    error = found.std() / len(found) ** 0.5
    # The logarithm of an unbiased sum is a little low.
    assert abs(found.mean() - exact) < 4 * error + 0.01
    assert found.std() > 0


def test_tokens_that_heads_may_not_draft_are_no_columns() -> None:
    few = torch.arange(0, MANY, 7)
    some, whole = drawn("hard", MANY, seed=0, tokens=few)
    torch.testing.assert_close(some, whole)
    assert some < drawn("hard", MANY, seed=0)[0]  # most positions cannot be learnt


def test_the_best_tokens_hold_nearly_all_of_a_sure_target() -> None:
    torch.manual_seed(0)
    target, draft = 8 * torch.randn(2, 6, 300), torch.randn(2, 6, 300)
    learn, tokens = torch.ones(2, 6, dtype=torch.bool), torch.arange(300)
    best = target.log_softmax(-1).topk(BEST)
    labels = labels_of(
        best.indices, best.values, learn, tokens, 300, "kl", torch.Generator()
    )
    some = distillation(draft, labels, learn)
    whole = distillation(draft, exact_labels(target, tokens, "kl"), learn)
    torch.testing.assert_close(some, whole, rtol=0.02, atol=0)


def test_a_head_is_not_to_guess_the_next_text() -> None:
    heads = randomise(trainee(num_heads=2, early_layers=()))
    ids, learn = token_ids(1), torch.zeros(1, 16, dtype=torch.bool)
    learn[0, :6] = learn[0, 10:] = True
    changed = ids.clone()
    # What is said at 6 to 9 is no label: nor at 4 + 2, the second head's of 4.
    states = heads.states(ids)
    states.best[0, 6:10] = (states.best[0, 6:10] + 1) % VOCAB
    found = heads(changed, learn, states, 0)
    torch.testing.assert_close(found, loss(heads, ids, learn))
    states.best[0, 5] = (states.best[0, 5] + 1) % VOCAB
    assert (heads(changed, learn, states, 0) - found).abs() > 1e-4


def states_of(seed: int, windows: int, length: int, layers: int) -> States:
    torch.manual_seed(seed)
    return States(
        torch.randn(windows, length, HIDDEN),
        torch.randn(layers, windows, length, HIDDEN),
        torch.randint(0, VOCAB, (windows, length, BEST), dtype=torch.int32),
        -torch.rand(windows, length, BEST),
    )


@pytest.mark.parametrize("layers", [0, 2])
def test_states_are_kept_as_they_are_rounded(tmp_path: Path, layers: int) -> None:
    kept = KeptStates(tmp_path / "states", 7, 5, layers, HIDDEN, 1 << 30)
    first, second = states_of(0, 2, 5, layers), states_of(1, 1, 5, layers)
    assert kept.missing(np.arange(7)).all()
    kept.put(np.array([4, 1]), first)
    kept.put(np.array([6]), second)
    for read in (kept, KeptStates(tmp_path / "states", 7, 5, layers, HIDDEN, 1 << 30)):
        assert np.flatnonzero(~read.missing(np.arange(7))).tolist() == [1, 4, 6]
        for rows, states in (([4, 1], first), ([6], second)):
            found = vars(read.get(np.array(rows)))
            for name, tensor in vars(states.rounded()).items():
                torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("room", [0, 3])
def test_windows_beyond_the_room_are_not_kept(tmp_path: Path, room: int) -> None:
    each = 5 * (2 * HIDDEN * 2 + BEST * 6)
    kept = KeptStates(tmp_path / "states", 7, 5, 1, HIDDEN, room * each + each - 1)
    kept.put(np.array([5, 1, 6]), states_of(0, 3, 5, 1))
    known = np.flatnonzero(~kept.missing(np.arange(7))).tolist()
    assert known == ([1] if room else [])


def test_states_of_another_shape_are_forgotten(tmp_path: Path) -> None:
    kept = KeptStates(tmp_path / "states", 4, 5, 1, HIDDEN, 1 << 30)
    kept.put(np.arange(4), states_of(0, 4, 5, 1))
    again = KeptStates(tmp_path / "states", 4, 5, 2, HIDDEN, 1 << 30)
    assert again.missing(np.arange(4)).all()


def test_states_of_other_layers_are_forgotten(tmp_path: Path) -> None:
    """As many others have files of the same size."""
    for kind, known in (("layers 1, 2", 0), ("layers 1, 2", 4), ("layers 2, 3", 0)):
        kept = KeptStates(tmp_path / "states", 4, 5, 2, HIDDEN, 1 << 30, kind)
        assert (~kept.missing(np.arange(4))).sum() == known
        kept.put(np.arange(4), states_of(0, 4, 5, 2))


def test_no_more_is_kept_than_the_disk_has_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A sparse file's write would be a bus error."""
    each = 5 * (2 * HIDDEN * 2 + BEST * 6)
    free = SimpleNamespace(free=int(3.5 * each / ROOM))
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    for _ in range(2):
        kept = KeptStates(tmp_path / "states", 7, 5, 1, HIDDEN, 1 << 30)
        assert kept.windows == 3
        free.free = 0  # what is there has its room
    assert "of 3 of 7 windows" in caplog.text


def test_a_disk_that_fills_up_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    each = 5 * (2 * HIDDEN * 2 + BEST * 6)
    kept = KeptStates(tmp_path / "states", 7, 5, 1, HIDDEN, 1 << 30)
    free = SimpleNamespace(free=RESERVE + 2 * each)
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    kept.put(np.array([1, 2]), states_of(0, 2, 5, 1))
    free.free -= 1
    for window in (4, 6):
        kept.put(np.array([window, 5]), states_of(0, 2, 5, 1))
    assert np.flatnonzero(~kept.missing(np.arange(7))).tolist() == [1, 2]
    assert caplog.text.count("is full") == 1


def test_other_room_keeps_what_is_there(tmp_path: Path) -> None:
    """As ``--kept-gib`` gives it to a resumed training."""
    each, states = 5 * (2 * HIDDEN * 2 + BEST * 6), states_of(0, 7, 5, 1)
    for room, known in ((3, []), (5, [0, 1, 2]), (7, [0, 1, 2, 3, 4]), (2, [0, 1])):
        kept = KeptStates(tmp_path / "states", 7, 5, 1, HIDDEN, room * each)
        assert np.flatnonzero(~kept.missing(np.arange(7))).tolist() == known
        kept.put(np.arange(7), states)
        found = kept.get(np.arange(room)).last
        torch.testing.assert_close(found, states.rounded().last[:room], rtol=0, atol=0)


def test_new_states_stand_beside_kept_ones() -> None:
    whole = states_of(0, 5, 4, 2)
    mine = torch.tensor([True, False, False, True, False])
    parts = [
        States(whole.last[at], whole.early[:, at], whole.best[at], whole.log_probs[at])
        for at in (mine, ~mine)
    ]
    found = parts[0].beside(parts[1], mine)
    for name, tensor in vars(whole).items():
        torch.testing.assert_close(getattr(found, name), tensor, rtol=0, atol=0)


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_batch_have_its_loss(parts: int) -> None:
    """However many of their positions are learnt: one part has them all but few."""
    heads, ids = randomise(trainee(num_heads=2, sampled_tokens=0)), token_ids(4)
    learn = torch.zeros(ids.shape, dtype=torch.bool)
    learn[0], learn[1, :4], learn[2, 3:9] = True, True, True
    whole = heads(ids, learn, heads.states(ids), 0)
    positions = heads.positions(learn)
    found = sum(
        heads(some, where, heads.states(some), 0, positions)
        for some, where in zip(ids.chunk(parts), learn.chunk(parts), strict=True)
    )
    torch.testing.assert_close(found, whole)
