"""Heads for vLLM's own ``medusa``: the same heads, with an output layer beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from heads_on_disk import HEADS, HIDDEN, LAYERS, VOCAB, Tensors, blocks, outputs, write
from safetensors.torch import load_file

from vllm_propd.heads.checkpoint import EARLY_FILE, HeadsError, load_heads, save_heads
from vllm_propd.heads.export import SHARED_OUTPUT, export_for_vllm, output_layer

EARLY = {"early.1.linear.weight": torch.ones(HIDDEN, HIDDEN)}


def exported(tmp_path: Path, tensors: Tensors, output: torch.Tensor) -> Path:
    heads, folder = tmp_path / "propd", tmp_path / "new" / "vllm-medusa"
    save_heads(heads, tensors, EARLY, VOCAB, torch.bfloat16)
    export_for_vllm(heads, output, folder)
    return folder


def assert_bfloat16(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor.bfloat16(), rtol=0, atol=0)


def test_the_targets_output_layer_is_written_along(tmp_path: Path) -> None:
    # As a parameter of a float32 target, not contiguous.
    output = torch.nn.Parameter(torch.randn(HIDDEN, VOCAB).T)
    folder = exported(tmp_path, blocks(), output)
    stored = load_file(folder / "model.safetensors")
    assert SHARED_OUTPUT == "lm_heads.0.weight"
    assert_bfloat16(stored, blocks() | {"lm_heads.0.weight": output.detach()})


def test_exported_heads_load_as_heads_with_a_shared_output(tmp_path: Path) -> None:
    output = torch.randn(VOCAB, HIDDEN)
    checkpoint = load_heads(exported(tmp_path, blocks(), output))
    assert checkpoint.shared_output and checkpoint.num_outputs == 1
    assert (checkpoint.num_heads, checkpoint.num_layers) == (HEADS, LAYERS)
    assert_bfloat16(checkpoint.tensors, blocks() | {SHARED_OUTPUT: output})
    checkpoint.check_fits(HIDDEN, VOCAB)


def test_own_output_layers_are_kept(tmp_path: Path) -> None:
    folder = exported(tmp_path, blocks() | outputs(), torch.zeros(VOCAB, HIDDEN))
    checkpoint = load_heads(folder)
    assert not checkpoint.shared_output and checkpoint.num_outputs == HEADS
    assert_bfloat16(checkpoint.tensors, blocks() | outputs())


@pytest.mark.parametrize("own", [False, True], ids=["target's output", "own outputs"])
def test_a_draft_vocabulary_is_written_as_rows_for_all_tokens(
    tmp_path: Path, own: bool
) -> None:
    """VLLM has no way to load a ``token_map`` (0.32); no other token is ever chosen.

    Not even those before the first of the map, which win where they tie.
    """
    some, output = torch.tensor([1, 4, 5, 19]), torch.randn(VOCAB, HIDDEN).bfloat16()
    tensors = blocks() | {"token_map": some}
    tensors |= outputs(vocab=len(some)) if own else {}
    folder = exported(tmp_path, tensors, output)
    stored = load_file(folder / "model.safetensors")
    assert "token_map" not in stored
    names = [name for name in stored if name.startswith("lm_heads.")]
    assert len(names) == (HEADS if own else 1)
    for name in names:
        rows = tensors[name].bfloat16() if own else output[some]
        torch.testing.assert_close(stored[name][some], rows, rtol=0, atol=0)
        others = torch.ones(VOCAB, dtype=torch.bool).index_fill(0, some, False)
        # Whatever the signs of the logits are.
        logits = torch.randn(200, HIDDEN) @ stored[name].float().T
        drafted, best = logits[:, some].max(-1)
        assert (logits[:, others].max(-1).values <= drafted + 1e-5).all()
        assert (logits.argmax(-1) == some[best]).all()
    config = json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] == config["truncated_vocab_size"] == VOCAB
    load_heads(folder).check_fits(HIDDEN, VOCAB)


@pytest.mark.parametrize("own", [False, True], ids=["target's output", "own outputs"])
def test_early_heads_stay_behind(tmp_path: Path, own: bool) -> None:
    tensors = blocks() | (outputs() if own else {})
    folder = exported(tmp_path, tensors, torch.zeros(VOCAB, HIDDEN))
    before, after = (
        json.loads((place / "config.json").read_text())
        for place in (tmp_path / "propd", folder)
    )
    assert before.pop("early_layers") == [1]
    assert after == before
    assert after["original_lm_head"] is not own
    assert (tmp_path / "propd" / EARLY_FILE).is_file()
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors"}


EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("first", [EMBEDDING, OUTPUT])
def test_a_targets_output_layer_is_found_in_all_its_files(
    tmp_path: Path, first: str
) -> None:
    """Untied: the embedding may lie in a file before it, or behind it."""
    tensors = {EMBEDDING: torch.zeros(VOCAB, HIDDEN), OUTPUT: torch.ones(VOCAB, HIDDEN)}
    for name, tensor in tensors.items():
        number = 1 if name == first else 2
        write(tmp_path, {name: tensor}, f"model-0000{number}-of-00002.safetensors")
    assert torch.equal(output_layer(tmp_path), tensors[OUTPUT])


def test_a_tied_targets_output_layer_is_its_embedding(tmp_path: Path) -> None:
    rows = torch.randn(VOCAB, HIDDEN)
    write(tmp_path, {EMBEDDING: rows, "model.norm.weight": torch.ones(HIDDEN)})
    assert torch.equal(output_layer(tmp_path), rows)


def test_an_output_layer_of_another_name_is_not_guessed(tmp_path: Path) -> None:
    write(tmp_path, {"embed_out.weight": torch.ones(VOCAB, HIDDEN)})
    with pytest.raises(ValueError, match=r"no safetensors with lm_head\.weight or mod"):
        output_layer(tmp_path)


def test_what_cannot_be_read_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(HeadsError, match="it has none of"):
        export_for_vllm(tmp_path, torch.zeros(VOCAB, HIDDEN), tmp_path / "new")
    assert not (tmp_path / "new").exists()
