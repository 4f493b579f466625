"""Heads on disk: every published format reads back, every defect is named."""

from __future__ import annotations

import json
import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vllm_propd.heads.checkpoint import EARLY_FILE, HeadsError, load_heads, save_heads
from vllm_propd.heads.medusa import MedusaHeads

HEADS, LAYERS, HIDDEN, VOCAB = 3, 2, 8, 20
Tensors = dict[str, torch.Tensor]

biases = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])


def random_heads(bias: bool = True) -> MedusaHeads:
    torch.manual_seed(0)
    heads = MedusaHeads(HEADS, LAYERS, HIDDEN, bias)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter)
    return heads


def blocks(bias: bool = True) -> Tensors:
    return random_heads(bias).tensors()


def outputs(count: int = HEADS, vocab: int = VOCAB) -> Tensors:
    torch.manual_seed(1)
    names = [f"lm_heads.{head}.weight" for head in range(count)]
    return {name: torch.randn(vocab, HIDDEN) for name in names}


def faster_decoding(bias: bool = True) -> Tensors:
    """``blocks`` and ``outputs`` under the names of the Medusa authors."""
    named = {}
    for name, tensor in (blocks(bias) | outputs()).items():
        part, head, *rest = name.split(".")
        block = part == "blocks"
        tail = f"{rest[1]}.linear.{rest[2]}" if block else f"{LAYERS}.weight"
        named[f"{head}.{tail}"] = tensor
    return named


def write(folder: Path, tensors: dict[str, Any], file: str = "model.safetensors") -> Path:
    """Stores copies under ``file``; a tensor that views another has no place there."""
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    store = torch.save if file.endswith(".pt") else save_file
    store(copies, folder / file)
    return folder


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
    (shared,) = outputs(1).values()
    checkpoint = load_heads(write(tmp_path, blocks() | {name: shared}))
    assert checkpoint.num_outputs == 1
    assert_equal(checkpoint.tensors, blocks() | {"lm_heads.0.weight": shared})


@pytest.mark.parametrize("count", [1, HEADS])
@pytest.mark.parametrize("trimmed", [True, False], ids=["trimmed", "full"])
def test_a_token_map_selects_output_rows(tmp_path: Path, trimmed: bool, count: int) -> None:
    kept = torch.tensor([7, 0, 19, 3])
    small = {name: weight[kept] for name, weight in outputs(count).items()}
    stored = small if trimmed else outputs(count)
    write(tmp_path, blocks() | stored | {"token_map": kept})
    checkpoint = load_heads(tmp_path)
    assert_equal(checkpoint.tensors, blocks() | small | {"token_map": kept})
    assert checkpoint.output_size == len(kept)
    checkpoint.check_fits(HIDDEN, VOCAB)


def test_config_json_gives_the_logit_scale_and_no_sizes(tmp_path: Path) -> None:
    config = {"num_heads": 5, "num_hidden_layers": 9, "logit_scale": 0.5}
    (write(tmp_path, blocks()) / "config.json").write_text(json.dumps(config))
    checkpoint = load_heads(tmp_path)
    assert (checkpoint.num_heads, checkpoint.num_layers) == (HEADS, LAYERS)
    assert checkpoint.logit_scale == 0.5


@pytest.mark.parametrize("file", ["medusa_lm_head.pt", "model.safetensors"])
@pytest.mark.parametrize(
    "tensors",
    [blocks(), blocks(False) | outputs(1), faster_decoding()]
    + [blocks() | outputs(1, v) | {"token_map": torch.arange(4)} for v in (4, VOCAB)],
    ids=["blocks", "shared output", "faster", "trimmed", "mapped"],
)
def test_shapes_alone_tell_the_same(tmp_path: Path, tensors: Tensors, file: str) -> None:
    write(tmp_path, tensors, file)
    full, shapes = load_heads(tmp_path), load_heads(tmp_path, shapes_only=True)
    for name in {field.name for field in fields(full)} - {"tensors"} | {"output_size"}:
        assert getattr(full, name) == getattr(shapes, name)
    assert all(tensor.is_meta for tensor in shapes.tensors.values())
    full_shapes, only_shapes = (
        {name: tensor.shape for name, tensor in read.tensors.items()}
        for read in (full, shapes)
    )
    assert full_shapes == only_shapes


def without(tensors: Tensors, *names: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


WEIGHT, BIAS = "blocks.1.layers.0.weight", "blocks.2.layers.1.bias"
DEFECTS = {
    "missing weight": (without(blocks(), WEIGHT), WEIGHT),
    "missing head": (without(blocks(False), WEIGHT, WEIGHT.replace("0", "1")), WEIGHT),
    "bias on some heads": (without(blocks(), BIAS), BIAS),
    "missing in faster": (without(faster_decoding(), "1.0.linear.weight"), WEIGHT),
    "outputs of some heads": (blocks() | outputs(2), "2 of its 3 heads"),
    "shared output misnamed": (
        blocks() | {"lm_heads.1.weight": torch.randn(VOCAB, HIDDEN)},
        "lm_heads.0.weight",
    ),
    "unused": (blocks() | {"blocks.0.extra": torch.ones(1)}, "blocks.0.extra"),
    "misshapen weight": (blocks() | {WEIGHT: torch.ones(HIDDEN, 3)}, WEIGHT),
    "misshapen bias": (blocks() | {BIAS: torch.ones(HIDDEN, 1)}, BIAS),
    "misshapen output": (
        blocks() | outputs() | {"lm_heads.2.weight": torch.ones(VOCAB, 3)},
        "lm_heads.2.weight",
    ),
    "misshapen map": (blocks() | outputs() | {"token_map": torch.arange(99)}, "map"),
    "no heads": (outputs(), "blocks.0.layers.0.weight"),
    "Medusa-2": (
        blocks() | {"model.layers.0.mlp.up_proj.weight": torch.ones(1)},
        "Medusa-2",
    ),
}


@pytest.mark.parametrize("shapes_only", [True, False], ids=["shapes", "full"])
@pytest.mark.parametrize(("tensors", "named"), DEFECTS.values(), ids=DEFECTS)
def test_defects_are_named(
    tmp_path: Path, tensors: Tensors, named: str, shapes_only: bool
) -> None:
    write(tmp_path, tensors)
    with pytest.raises(HeadsError) as error:
        load_heads(tmp_path, shapes_only)
    assert named in str(error.value) and str(tmp_path) in str(error.value)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HeadsError, match=r"medusa_lm_head\.pt"):
        load_heads(tmp_path)


@pytest.mark.parametrize(
    ("hidden", "vocab", "named"),
    [(99, VOCAB, "hidden size is 8"), (HIDDEN, 20, "is 5000")],
)
def test_heads_of_another_target_are_refused(
    tmp_path: Path, hidden: int, vocab: int, named: str
) -> None:
    checkpoint = load_heads(write(tmp_path, blocks() | outputs(vocab=5000)))
    checkpoint.check_fits(HIDDEN, 4990)  # a few padded rows are no other target
    with pytest.raises(HeadsError, match=named):
        checkpoint.check_fits(hidden, vocab)


class Trap:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_runs_no_code(tmp_path: Path, zipped: bool) -> None:
    file, sprung = tmp_path / "medusa_lm_head.pt", tmp_path / "sprung"
    contents = blocks() | {"trap": Trap(sprung)}
    torch.save(contents, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises((HeadsError, pickle.UnpicklingError)):
        load_heads(tmp_path)
    assert not sprung.exists()
    torch.load(file, weights_only=False)
    assert sprung.exists()  # the trap was armed


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
