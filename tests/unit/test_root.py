"""Heads that read the root's embedding: what they predict, and their checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from heads_on_disk import without
from safetensors.torch import load_file
from tiny_targets import (
    HIDDEN,
    VOCAB,
    loss,
    one_thread,  # noqa: F401
    randomise,
    said_by_target,
    token_ids,
    trainee,
)

from vllm_propd.heads.checkpoint import HeadsCheckpoint, HeadsError, load_heads, save_heads
from vllm_propd.heads.export import export_for_vllm
from vllm_propd.heads.medusa import MedusaHeads, root_input
from vllm_propd.training.model.trainee import Trainee


@pytest.fixture
def heads() -> Trainee:
    return randomise(trainee(knows_root=True))


def test_embeddings_are_read_at_a_scale_of_their_own() -> None:
    embeddings = torch.randn(5, HIDDEN)
    found = root_input(embeddings)
    torch.testing.assert_close(found.pow(2).mean(-1), torch.ones(5))
    torch.testing.assert_close(root_input(1e-3 * embeddings), found)


def test_a_position_reads_the_embedding_of_the_token_after_it(heads: Trainee) -> None:
    ids, tensors = token_ids(), heads.medusa_tensors()
    predicted = heads.predict(ids).medusa
    last = heads.states(ids).last[:, :-1]
    embedded = heads.target.get_input_embeddings().weight[ids[:, 1:]]
    for k in range(3):
        state = last + root_input(embedded) @ tensors[f"roots.{k}.weight"].T
        update = state @ tensors[f"blocks.{k}.layers.0.weight"].T
        update = update + tensors[f"blocks.{k}.layers.0.bias"]
        expected = heads.output(state + update * update.sigmoid())
        torch.testing.assert_close(predicted[k, :, :-1], expected, rtol=1e-4, atol=1e-4)


def test_untrained_heads_do_not_look_at_it() -> None:
    heads, ids = trainee(knows_root=True), token_ids()
    for logits in heads.predict(ids).medusa:
        torch.testing.assert_close(logits, said_by_target(heads, ids))


def test_it_is_learnt(heads: Trainee) -> None:
    assert heads.medusa.roots is not None
    assert any(p is heads.medusa.roots for p in heads.trained())
    loss(heads, token_ids()).backward()
    assert heads.medusa.roots.grad is not None
    assert (heads.medusa.roots.grad.abs().amax((1, 2)) > 0).all()


def test_the_checkpoint_has_it(heads: Trainee, tmp_path: Path) -> None:
    save_heads(tmp_path, heads.medusa_tensors(), {}, VOCAB, torch.float32)
    checkpoint = load_heads(tmp_path)
    assert checkpoint.knows_root
    again = MedusaHeads.from_checkpoint(checkpoint)
    states, roots = torch.randn(2, 5, HIDDEN)
    torch.testing.assert_close(again(states, roots), heads.medusa(states, roots))
    assert not HeadsCheckpoint("here", trainee().medusa_tensors()).knows_root  # type: ignore[arg-type]
    with pytest.raises(HeadsError, match=r"missing tensors: roots\.1\.weight"):
        HeadsCheckpoint(tmp_path, without(checkpoint.tensors, "roots.1.weight"))


def test_vllms_own_heads_have_no_place_for_it(heads: Trainee, tmp_path: Path) -> None:
    save_heads(tmp_path, heads.medusa_tensors(), {}, VOCAB, torch.float32)
    export_for_vllm(tmp_path, heads.output.weight, tmp_path / "vllm")
    stored = load_file(tmp_path / "vllm" / "model.safetensors")
    assert not [name for name in stored if name.startswith("roots")]
