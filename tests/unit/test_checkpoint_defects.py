"""Heads on disk: every defect is refused with its name, and no pickle runs code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from heads_on_disk import (
    HIDDEN,
    VOCAB,
    Tensors,
    blocks,
    faster_decoding,
    outputs,
    shared,
    without,
    write,
)

from vllm_propd.heads.checkpoint import HeadsError, load_heads, save_heads


def mapped(*tokens: float, vocab: int = VOCAB) -> Tensors:
    return blocks() | outputs(vocab=vocab) | {"token_map": torch.tensor(tokens)}


WEIGHT, BIAS = "blocks.1.layers.0.weight", "blocks.2.layers.1.bias"
DEFECTS = {
    "missing weight": (without(blocks(), WEIGHT), WEIGHT),
    "missing head": (without(blocks(False), WEIGHT, WEIGHT.replace("0", "1")), WEIGHT),
    "bias on some heads": (without(blocks(), BIAS), BIAS),
    "missing in faster": (without(faster_decoding(), "1.0.linear.weight"), WEIGHT),
    "uneven layers in faster": (
        without(faster_decoding(False), "1.1.linear.weight", "1.2.weight")
        | {"1.1.weight": torch.ones(VOCAB, HIDDEN)},
        "blocks.1.layers.1.weight, lm_heads.1.weight",
    ),
    "outputs of some heads": (blocks() | outputs(2), "missing tensors: lm_heads.2.weight"),
    "one output of several": (
        blocks() | {"lm_heads.1.weight": torch.ones(VOCAB, HIDDEN)},
        "missing tensors: lm_heads.0.weight, lm_heads.2.weight",
    ),
    "one output of several in faster": (
        without(faster_decoding(), "0.2.weight", "2.2.weight"),
        "missing tensors: lm_heads.0.weight, lm_heads.2.weight",
    ),
    "shared output and others": (
        blocks()
        | shared(torch.ones(VOCAB, HIDDEN))
        | without(outputs(), "lm_heads.0.weight"),
        "no head uses: lm_heads.1.weight, lm_heads.2.weight",
    ),
    "two shared outputs": (
        blocks() | shared(torch.ones(VOCAB, HIDDEN)) | outputs(1),
        "two of its tensors mean lm_heads.0.weight",
    ),
    "both formats": (
        blocks() | {"medusa_heads.1.0.linear.weight": torch.ones(HIDDEN, HIDDEN)},
        f"two of its tensors mean {WEIGHT}",
    ),
    "scalar weight": (blocks() | {WEIGHT: torch.tensor(1.0)}, f"{WEIGHT} has shape ()"),
    "empty output": (blocks() | outputs(vocab=0), "has shape (0, 8)"),
    "unused": (blocks() | {"blocks.0.extra": torch.ones(1)}, "blocks.0.extra"),
    "misshapen weight": (blocks() | {WEIGHT: torch.ones(HIDDEN, 3)}, WEIGHT),
    "misshapen bias": (blocks() | {BIAS: torch.ones(HIDDEN, 1)}, BIAS),
    "misshapen output": (
        blocks() | outputs() | {"lm_heads.2.weight": torch.ones(VOCAB, 3)},
        "lm_heads.2.weight",
    ),
    "map of outputs too small": (mapped(*range(VOCAB + 1)), "token_map has shape (21,)"),
    "map out of range": (mapped(3, VOCAB), "token_map names token 20"),
    "map negative": (mapped(3, -1), "token_map"),
    "map negative, trimmed": (mapped(3, -1, vocab=2), "token_map"),
    "map repeats": (mapped(3, 3), "token_map"),
    "map of floats": (mapped(0.0, 1.0), "token_map"),
    "map of two dimensions": (
        blocks() | outputs() | {"token_map": torch.arange(4).view(2, 2)},
        "token_map",
    ),
    "transition of other tokens than the map's": (
        blocks()
        | {"token_map": torch.arange(4)}
        | {f"transition.{name}": torch.ones(5, 2) for name in ("before", "after")},
        "transition.before has shape (5, 2), expected (4, 2)",
    ),
    "half a transition": (
        blocks() | {"transition.before": torch.ones(VOCAB, 2)},
        "missing tensors: transition.after",
    ),
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
    ("file", "contents", "problem"),
    [
        ("model.safetensors", b"{}", "header"),
        ("medusa_lm_head.pt", b"not a pickle", "damaged"),
        ("medusa_lm_head.pt", b"", "EOF|Ran out of input"),
        ("medusa_lm_head.pt", b"PK\x03\x04" + bytes(99), "."),
        ("medusa_lm_head.pt", [torch.ones(2)], "not a table of named tensors"),
        ("medusa_lm_head.pt", {0: torch.ones(2)}, "not a table of named tensors"),
        ("medusa_lm_head.pt", {"state": blocks()}, "not a table of named tensors"),
        ("config.json", b"{", "Expecting property name"),
        ("config.json", b"\xff", "can't decode"),
        ("config.json", b"[]", "not a table of keys"),
        ("config.json", b'{"logit_scale": "1"}', "logit_scale is '1', not a positive"),
        ("config.json", b'{"logit_scale": null}', "logit_scale is None"),
        ("config.json", b'{"logit_scale": true}', "logit_scale is True"),
        ("config.json", b'{"logit_scale": NaN}', "logit_scale is nan"),
        ("config.json", b'{"logit_scale": 0}', "logit_scale is 0"),
    ],
)
@pytest.mark.parametrize("shapes_only", [True, False], ids=["shapes", "full"])
def test_defective_files_are_named(
    tmp_path: Path, file: str, contents: Any, problem: str, shapes_only: bool
) -> None:
    if file == "config.json":
        write(tmp_path, blocks())
    if isinstance(contents, bytes):
        (tmp_path / file).write_bytes(contents)
    else:
        torch.save(contents, tmp_path / file)
    with pytest.raises(HeadsError, match=f"heads in {tmp_path / file}: .*({problem})"):
        load_heads(tmp_path, shapes_only)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, blocks()) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(HeadsError, match=str(file)):
        load_heads(tmp_path)


def test_heads_of_another_target_are_refused(tmp_path: Path) -> None:
    checkpoint = load_heads(write(tmp_path, blocks() | outputs(vocab=5000)))
    for vocab in (4993, 5000, 5100):  # a few rows of padding are no other target
        checkpoint.check_fits(HIDDEN, vocab)
    for vocab in (20, 4992, 6100):
        with pytest.raises(HeadsError, match=f"is 5000, the target's {vocab}: they belong"):
            checkpoint.check_fits(HIDDEN, vocab)
    with pytest.raises(HeadsError, match="hidden size is 8, the target's 99"):
        checkpoint.check_fits(99, 5000)


@pytest.mark.parametrize(
    "tensors",
    [without(blocks(), WEIGHT), blocks() | {"stray": torch.ones(2)}],
    ids=["missing", "unused"],
)
def test_nothing_is_written_of_heads_that_would_not_load(
    tmp_path: Path, tensors: Tensors
) -> None:
    folder = tmp_path / "new"
    with pytest.raises(HeadsError):
        save_heads(folder, tensors, {}, VOCAB, torch.float32)
    assert not folder.exists()


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
    with pytest.raises(HeadsError, match=f"{file}: it is damaged, or holds more than"):
        load_heads(tmp_path)
    assert not sprung.exists()
    torch.load(file, weights_only=False)
    assert sprung.exists()  # the trap was armed
