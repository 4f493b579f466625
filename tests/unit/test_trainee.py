"""A frozen target with its heads: what they predict, what learns, what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_targets import (
    HIDDEN,
    VOCAB,
    loss,
    one_thread,  # noqa: F401
    randomise,
    said_by_target,
    settings,
    target,
    token_ids,
    trainee,
)
from tokenizers_on_disk import MODEL
from transformers import CohereConfig, Gemma2Config, GraniteConfig, PretrainedConfig

from vllm_propd.heads.checkpoint import HeadsCheckpoint
from vllm_propd.heads.early import EarlyHead
from vllm_propd.heads.medusa import MedusaHeads
from vllm_propd.training.model.target import check_output_layer
from vllm_propd.training.model.trainee import Trainee, check_early_layers


@torch.no_grad()
def states(heads: Trainee, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return heads.target(input_ids=ids, output_hidden_states=True).hidden_states


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("output_layer", ["target", "own"])
def test_untrained_medusa_heads_predict_what_the_target_does(output_layer: str) -> None:
    heads = trainee(output_layer=output_layer)
    predicted, said = heads.predict(token_ids()), said_by_target(heads, token_ids())
    assert predicted.medusa.shape == (3, 4, 16, VOCAB)
    assert said.std() > 0.5
    for logits in predicted.medusa:
        torch.testing.assert_close(logits, said)


def test_untrained_early_heads_put_their_state_through_the_output_layer() -> None:
    heads, ids = trainee(), token_ids()
    predicted, found = heads.predict(ids), states(heads, ids)
    assert predicted.early.keys() == {1, 2}
    for layer, logits in predicted.early.items():
        expected = heads.output(rms_norm(found[layer]))
        torch.testing.assert_close(logits, expected)
    # The target's own layers: fed on by hand, the second state follows from the first.
    places = torch.arange(ids.shape[1])[None]
    rotary = heads.target.model.rotary_emb(found[1], places)
    mask = torch.full((16, 16), float("-inf")).triu(1)[None, None]
    layer = heads.target.model.layers[1]
    after = layer(found[1], attention_mask=mask, position_embeddings=rotary)
    torch.testing.assert_close(after, found[2], rtol=1e-4, atol=1e-4)


def test_trained_weights_make_each_head_predict_its_own() -> None:
    heads, ids = randomise(trainee()), token_ids()
    predicted, last = heads.predict(ids), states(heads, ids)[-1]
    tensors = heads.medusa_tensors()
    for k, logits in enumerate(predicted.medusa):
        weight = tensors[f"blocks.{k}.layers.0.weight"]
        update = last @ weight.T + tensors[f"blocks.{k}.layers.0.bias"]
        expected = heads.output(last + update * update.sigmoid())
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_outputs_of_full_rank_start_as_the_targets() -> None:
    heads, ids = trainee(early_rank=HIDDEN), token_ids()
    found = states(heads, ids)
    for layer, logits in heads.predict(ids).early.items():
        expected = heads.output(rms_norm(found[layer]))
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rank", [4, 16])
def test_outputs_of_low_rank_start_close_to_the_best_of_their_rank(rank: int) -> None:
    heads = trainee(early_rank=rank)
    weight, tensors = heads.output.weight, heads.early_tensors()
    up, down = tensors["early.2.up.weight"], tensors["early.2.down.weight"]
    assert (up.shape, down.shape) == ((VOCAB, rank), (rank, HIDDEN))
    lost = torch.linalg.svdvals(weight)[rank:].norm()
    assert lost * 0.999 <= (weight - up @ down).norm() <= lost * 1.05


def test_early_heads_load_from_their_tensors() -> None:
    heads, hidden = randomise(trainee(early_rank=4)), torch.randn(5, HIDDEN)
    tensors = heads.early_tensors()
    again = EarlyHead(HIDDEN, 1e-6, 4, VOCAB)
    prefix = "early.2."
    again.load_state_dict(
        {name.removeprefix(prefix): t for name, t in tensors.items() if prefix in name}
    )
    head = heads.early["2"]
    assert isinstance(head, EarlyHead)
    torch.testing.assert_close(again.own_logits(hidden), head.own_logits(hidden))


def test_own_output_layers_are_parameters_and_tensors_of_each_head() -> None:
    heads, ids = randomise(trainee(output_layer="own")), token_ids()
    assert heads.own_output is not None and heads.own_output.shape == (3, VOCAB, HIDDEN)
    assert any(p is heads.own_output for p in heads.trained())
    tensors = heads.medusa_tensors()
    checkpoint = HeadsCheckpoint("here", dict(tensors))
    assert (checkpoint.num_outputs, checkpoint.output_size) == (3, VOCAB)
    hidden = MedusaHeads.from_checkpoint(checkpoint)(states(heads, ids)[-1].flatten(0, 1))
    for k, logits in enumerate(heads.predict(ids).medusa):
        expected = hidden[k] @ tensors[f"lm_heads.{k}.weight"].T
        torch.testing.assert_close(logits.flatten(0, 1), expected, rtol=1e-4, atol=1e-4)


def test_a_shared_output_layer_is_no_parameter_and_no_tensor() -> None:
    heads = trainee()
    assert all(p is not heads.output.weight for p in heads.trained())
    assert HeadsCheckpoint("here", heads.medusa_tensors()).num_outputs == 0
    assert not any("output" in name for name in heads.state())


@pytest.mark.parametrize(
    "options",
    [{}, {"output_layer": "own"}, {"early_rank": 4}, {"labels": "hard"}],
    ids=["shared", "own output", "low rank", "hard labels"],
)
def test_steps_change_all_heads_and_nothing_of_the_target(options: dict[str, Any]) -> None:
    heads = trainee(**options)
    frozen = {name: p.clone() for name, p in heads.target.named_parameters()}
    before = {name: t.clone() for name, t in heads.state().items()}
    optimizer = torch.optim.AdamW(heads.trained(), lr=1e-2)
    for step in range(3):
        loss(heads, token_ids(seed=step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in heads.target.named_parameters():
        assert parameter.grad is None and not parameter.requires_grad
        assert torch.equal(parameter, frozen[name]), name
    unchanged = [name for name, t in heads.state().items() if torch.equal(t, before[name])]
    assert unchanged == []


@pytest.mark.parametrize("layers", [(3,), (1, 7)])
def test_an_early_head_must_leave_a_layer_after_it(layers: tuple[int, ...]) -> None:
    named = ",".join(map(str, layers))
    with pytest.raises(ValueError, match=f"--early-layers {named}: the model has 3 layers"):
        trainee(early_layers=layers)


def test_a_rank_above_the_hidden_size_is_refused() -> None:
    with pytest.raises(ValueError, match=f"--early-rank {HIDDEN + 1}: at most .* {HIDDEN}"):
        trainee(early_rank=HIDDEN + 1)


def test_early_heads_may_be_left_out() -> None:
    check_early_layers((), 1)
    heads = trainee(early_layers=())
    assert heads.early_tensors() == {} and heads.predict(token_ids()).early == {}


@pytest.mark.parametrize("labels", ["kl", "hard"])
def test_each_head_is_compared_with_the_target_that_much_later(labels: str) -> None:
    """Untrained heads all say what the target says now."""
    heads = trainee(num_heads=2, early_layers=(1,), labels=labels, sampled_tokens=0)
    predicted, said = heads.predict(token_ids()), said_by_target(heads, token_ids())
    truth = said.softmax(-1)
    if labels == "hard":
        truth = torch.nn.functional.one_hot(truth.argmax(-1), VOCAB)
    now = said.log_softmax(-1)
    expected = -(truth * predicted.early[1].log_softmax(-1)).sum(-1).mean()
    for k, weight in ((1, 0.8), (2, 0.64)):
        expected = expected - weight * (truth[:, k:] * now[:, :-k]).sum(-1).mean()
    torch.testing.assert_close(loss(heads, token_ids()), expected)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (GraniteConfig, {"logits_scaling": 8.0}),
        (CohereConfig, {"logit_scale": 0.0625, "use_qk_norm": False}),
    ],
    ids=["granite", "cohere"],
)
def test_targets_that_scale_their_logits_are_refused(
    kind: type[PretrainedConfig], options: dict[str, Any], tmp_path: Path
) -> None:
    model = target(kind, **options)
    heads = Trainee(model, settings())
    message = re.escape(f"'{kind.model_type}' does more to its logits")
    with pytest.raises(ValueError, match=message):
        heads.check_output_layer()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        check_output_layer(str(tmp_path))


@pytest.mark.parametrize("cap", [None, 2.0])
def test_targets_that_cap_their_logits_are_followed(cap: float | None) -> None:
    model = target(Gemma2Config, final_logit_softcapping=cap, head_dim=16)
    heads = Trainee(model, settings())
    heads.check_output_layer()
    predicted, said = heads.predict(token_ids()), said_by_target(heads, token_ids())
    assert (said.abs().max() <= 2.0) == (cap is not None)
    assert (predicted.early[1].abs().max() <= 2.0) == (cap is not None)
    torch.testing.assert_close(predicted.medusa[0], said)


def test_plain_targets_pass_the_check() -> None:
    trainee().check_output_layer()
    check_output_layer(str(MODEL))
