"""Heads on disk: every published format reads back."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from heads_on_disk import (
    HEADS,
    HIDDEN,
    LAYERS,
    VOCAB,
    Tensors,
    blocks,
    faster_decoding,
    outputs,
    random_heads,
    shared,
    write,
)

from vllm_propd.heads.checkpoint import (
    AFTER,
    BEFORE,
    EARLY_FILE,
    HeadsError,
    load_heads,
    save_heads,
)
from vllm_propd.heads.medusa import MedusaHeads

biases = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


@biases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_heads_load_again(tmp_path: Path, bias: bool, dtype: torch.dtype) -> None:
    heads = random_heads(bias)
    early = {"early.4.linear.weight": torch.randn(HIDDEN, HIDDEN)}
    folder = tmp_path / "new" / "propd"
    save_heads(folder, heads.tensors(), early, VOCAB, dtype)
    checkpoint = load_heads(folder)
    assert_equal(checkpoint.tensors, {k: t.to(dtype) for k, t in blocks(bias).items()})
    again = MedusaHeads.from_checkpoint(checkpoint)
    assert_equal(again.state_dict(), heads.to(dtype).state_dict())
    checkpoint.check_fits(HIDDEN, VOCAB)
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_heads"], config["num_hidden_layers"]) == (HEADS, LAYERS)
    assert (config["vocab_size"], config["early_layers"]) == (VOCAB, [4])
    assert (folder / EARLY_FILE).is_file()


@biases
@pytest.mark.parametrize("prefix", ["", "medusa_heads.", "medusa_head."])
@pytest.mark.parametrize("names", ["faster", "vllm"])
@pytest.mark.parametrize(
    "file", ["medusa_lm_head.pt", "medusa_lm_head.safetensors", "model.safetensors"]
)
def test_published_formats_load(
    tmp_path: Path, file: str, names: str, prefix: str, bias: bool
) -> None:
    expected = blocks(bias) | outputs()
    stored = faster_decoding(bias) if names == "faster" else expected
    write(tmp_path, {prefix + name: t for name, t in stored.items()}, file)
    checkpoint = load_heads(tmp_path)
    assert_equal(checkpoint.tensors, expected)
    assert checkpoint.num_outputs == HEADS and checkpoint.output_size == VOCAB


@pytest.mark.parametrize("name", ["lm_heads.0.weight", "lm_head.weight"])
def test_one_output_layer_may_serve_all_heads(tmp_path: Path, name: str) -> None:
    (weight,) = outputs(1).values()
    write(tmp_path, blocks() | {name: weight})
    if name == "lm_heads.0.weight":  # which may also be the first of several
        with pytest.raises(HeadsError, match=r"missing tensors: lm_heads\.1\.weight"):
            load_heads(tmp_path)
        (tmp_path / "config.json").write_text('{"original_lm_head": true}')
    checkpoint = load_heads(tmp_path)
    assert checkpoint.num_outputs == 1
    assert_equal(checkpoint.tensors, blocks() | {"lm_heads.0.weight": weight})


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("count", [1, HEADS])
@pytest.mark.parametrize("trimmed", [True, False], ids=["trimmed", "full"])
def test_a_token_map_selects_output_rows(
    tmp_path: Path, trimmed: bool, count: int, dtype: torch.dtype
) -> None:
    kept = torch.tensor([7, 0, 19, 3], dtype=dtype)
    small = {name: weight[kept] for name, weight in outputs(count).items()}
    stored = small if trimmed else outputs(count)
    write(tmp_path, blocks() | stored | {"token_map": kept})
    (tmp_path / "config.json").write_text(json.dumps({"original_lm_head": count == 1}))
    checkpoint = load_heads(tmp_path)
    assert_equal(checkpoint.tensors, blocks() | small | {"token_map": kept})
    assert checkpoint.output_size == len(kept)
    for shapes_only in (True, False):
        checkpoint = load_heads(tmp_path, shapes_only)
        checkpoint.check_fits(HIDDEN, VOCAB)  # the target knows token 19
        with pytest.raises(HeadsError, match="vocabulary is 20, the target's 19"):
            checkpoint.check_fits(HIDDEN, 19)


@pytest.mark.parametrize("size", [VOCAB - 3, VOCAB + 3])
def test_a_transition_knows_every_token_that_the_target_does(
    tmp_path: Path, size: int
) -> None:
    """Own output layers may lack some, or be padded; places in its tables are tokens."""
    own = {name: torch.randn(size, HIDDEN) for name in outputs(HEADS)}
    write(tmp_path, blocks() | own)
    load_heads(tmp_path).check_fits(HIDDEN, VOCAB)
    write(tmp_path, blocks() | own | {one: torch.randn(size, 2) for one in (BEFORE, AFTER)})
    with pytest.raises(HeadsError, match=f"transition knows {size} tokens, the target 20"):
        load_heads(tmp_path).check_fits(HIDDEN, VOCAB)


def test_config_json_gives_the_logit_scale_and_no_sizes(tmp_path: Path) -> None:
    config = {"num_heads": 5, "num_hidden_layers": 9, "logit_scale": 0.5}
    (write(tmp_path, blocks()) / "config.json").write_text(json.dumps(config))
    checkpoint = load_heads(tmp_path)
    assert (checkpoint.num_heads, checkpoint.num_layers) == (HEADS, LAYERS)
    assert checkpoint.logit_scale == 0.5


@pytest.mark.parametrize("file", ["medusa_lm_head.pt", "model.safetensors"])
@pytest.mark.parametrize(
    "tensors",
    [blocks(), blocks(False) | shared(torch.ones(VOCAB, HIDDEN)), faster_decoding()]
    + [blocks() | outputs(vocab=v) | {"token_map": torch.arange(4)} for v in (4, VOCAB)],
    ids=["blocks", "shared output", "faster", "trimmed", "mapped"],
)
def test_shapes_alone_tell_the_same(tmp_path: Path, tensors: Tensors, file: str) -> None:
    write(tmp_path, tensors, file)
    full, shapes = load_heads(tmp_path), load_heads(tmp_path, shapes_only=True)
    for name in {field.name for field in fields(full)} - {"tensors"} | {"output_size"}:
        assert getattr(full, name) == getattr(shapes, name)
    assert {n for n, t in shapes.tensors.items() if not t.is_meta} <= {"token_map"}
    full_shapes, only_shapes = (
        {name: (tensor.shape, tensor.dtype) for name, tensor in read.tensors.items()}
        for read in (full, shapes)
    )
    assert full_shapes == only_shapes


def test_heads_without_output_layers_fit_any_vocabulary(tmp_path: Path) -> None:
    load_heads(write(tmp_path, blocks())).check_fits(HIDDEN, 10**6)


def test_saving_replaces_the_early_heads(tmp_path: Path) -> None:
    early = {"early.4.linear.weight": torch.randn(HIDDEN, HIDDEN)}
    save_heads(tmp_path, blocks(), early, VOCAB, torch.float32)
    save_heads(tmp_path, blocks(), {}, VOCAB, torch.float32)
    assert not (tmp_path / EARLY_FILE).exists()
    assert json.loads((tmp_path / "config.json").read_text())["early_layers"] == []


@biases
def test_heads_computed_together_equal_heads_one_by_one(bias: bool) -> None:
    heads, tensors, hidden = random_heads(bias), blocks(bias), torch.randn(5, HIDDEN)
    together = heads(hidden)
    for head in range(HEADS):
        state = hidden
        for layer in range(LAYERS):
            weight = tensors[f"blocks.{head}.layers.{layer}.weight"]
            update = state @ weight.T
            if bias:
                update = update + tensors[f"blocks.{head}.layers.{layer}.bias"]
            state = state + update * update.sigmoid()
        torch.testing.assert_close(together[head], state)
