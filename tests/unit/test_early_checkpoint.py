"""Early heads on disk: they read back, every defect is named, shares make the whole."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from heads_on_disk import HIDDEN, VOCAB, Tensors, blocks, without, write

from vllm_propd.heads.checkpoint import EARLY_FILE, HeadsError, save_heads
from vllm_propd.heads.early import EarlyHead, early_layers, load_early_head, norm_eps

RANK = 3
TARGET = SimpleNamespace(hidden_size=HIDDEN, vocab_size=VOCAB, rms_norm_eps=1e-5)
own_outputs = pytest.mark.parametrize("rank", [0, RANK], ids=["target's", "own"])


def random_head(rank: int, seed: int = 0) -> EarlyHead:
    torch.manual_seed(seed)
    head = EarlyHead(HIDDEN, 1e-5, rank, VOCAB)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    return head


def early(rank: int = RANK, *layers: int) -> Tensors:
    """The tensors of early heads after ``layers``, each its own."""
    return {
        f"early.{layer}.{name}": tensor
        for layer in layers or (4,)
        for name, tensor in random_head(rank, layer).state_dict().items()
    }


@own_outputs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_early_heads_load_again(
    tmp_path: Path, dtype: torch.dtype, rank: int
) -> None:
    save_heads(tmp_path, blocks(), early(rank, 12, 4), VOCAB, dtype)
    assert early_layers(tmp_path) == [4, 12]
    hidden, output = torch.randn(5, HIDDEN), torch.nn.Linear(HIDDEN, VOCAB)
    for layer in (4, 12):
        head = load_early_head(tmp_path, layer, TARGET)
        assert head.norm.eps == 1e-5
        assert (head.up is not None) == (rank > 0)
        assert not any(weight.requires_grad for weight in head.parameters())
        expected = random_head(rank, layer).to(dtype).float()
        found = head.state_dict()
        assert found.keys() == expected.state_dict().keys()
        for name, tensor in expected.state_dict().items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
        logits = head.logits(hidden, output)
        torch.testing.assert_close(logits, expected.logits(hidden, output))
        assert logits.shape == (5, VOCAB)


def test_heads_without_early_ones_have_no_layers(tmp_path: Path) -> None:
    save_heads(tmp_path, blocks(), {}, VOCAB, torch.float32)
    assert early_layers(tmp_path) == []
    with pytest.raises(HeadsError, match="no early head after layer 4; they have none"):
        load_early_head(tmp_path, 4, TARGET)


def test_a_missing_layer_is_named_with_those_there_are(tmp_path: Path) -> None:
    write(tmp_path, early(0, 10, 2), EARLY_FILE)
    what = re.escape(str(tmp_path)) + ": no early head after layer 1; they have 2, 10"
    with pytest.raises(HeadsError, match=what):
        load_early_head(tmp_path, 1, TARGET)


def test_another_layers_defects_do_not_matter(tmp_path: Path) -> None:
    write(tmp_path, without(early(0, 1, 10), "early.10.linear.bias"), EARLY_FILE)
    assert load_early_head(tmp_path, 1, TARGET).linear.in_features == HIDDEN


BIAS, DOWN, UP = "early.4.linear.bias", "early.4.down.weight", "early.4.up.weight"
DEFECTS = {
    "no norm": (
        without(early(), "early.4.norm.weight"),
        ["missing tensor early.4.norm.weight"],
    ),
    "no bias": (without(early(0), BIAS), [f"missing tensor {BIAS}"]),
    "no up": (without(early(), UP), [f"missing tensor {UP}"]),
    "no down": (without(early(), DOWN), [UP]),
    "empty down": (early() | {DOWN: torch.ones(0, HIDDEN)}, [DOWN]),
    "scalar down": (early() | {DOWN: torch.tensor(1.0)}, [DOWN]),
    "unused": (
        early(0) | {"early.4.linear.scale": torch.ones(1)},
        ["unused tensor early.4.linear.scale"],
    ),
    "misshapen bias": (
        early() | {BIAS: torch.ones(HIDDEN, 1)},
        [f"{BIAS} has shape (8, 1), expected (8,)"],
    ),
    "another hidden size": (
        early(0) | {"early.4.linear.weight": torch.ones(4, 4)},
        ["early.4.linear.weight has shape (4, 4), expected (8, 8)"],
    ),
    "another vocabulary": (
        early() | {UP: torch.ones(VOCAB + 1, RANK)},
        [f"{UP} has shape (21, 3), expected (20, 3)"],
    ),
    "another rank": (
        early() | {UP: torch.ones(VOCAB, RANK + 1)},
        [f"{UP} has shape (20, 4), expected (20, 3)"],
    ),
    "several": (
        without(early(0), BIAS)
        | {"early.4.x": torch.ones(1), "early.4.norm.weight": torch.ones(1)},
        [
            f"missing tensor {BIAS}",
            "unused tensor early.4.x",
            "early.4.norm.weight has shape (1,), expected (8,)",
        ],
    ),
}


@pytest.mark.parametrize(("tensors", "named"), DEFECTS.values(), ids=DEFECTS)
def test_defects_are_refused_by_name(
    tmp_path: Path, tensors: Tensors, named: list[str]
) -> None:
    write(tmp_path, tensors, EARLY_FILE)
    with pytest.raises(HeadsError) as error:
        load_early_head(tmp_path, 4, TARGET)
    assert all(what in str(error.value) for what in [str(tmp_path / EARLY_FILE), *named])


@pytest.mark.parametrize("size", [0, 7, 100])
def test_a_damaged_file_is_named(tmp_path: Path, size: int) -> None:
    path = write(tmp_path, early(), EARLY_FILE) / EARLY_FILE
    path.write_bytes(path.read_bytes()[:size])
    for read in (early_layers, lambda folder: load_early_head(folder, 4, TARGET)):
        with pytest.raises(HeadsError, match=re.escape(str(path))):
            read(tmp_path)


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"weight": torch.ones(1)}, EARLY_FILE)
    with pytest.raises(HeadsError, match=re.escape(str(tmp_path / EARLY_FILE))):
        early_layers(tmp_path)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_shares_logits_are_the_wholes(world: int) -> None:
    hidden, whole = torch.randn(5, HIDDEN), random_head(RANK)
    parts, starts = [], []
    for rank in range(world):
        head = random_head(RANK)
        starts.append(head.keep_share(rank, world))
        assert head.up is not None and not head.up.weight.requires_grad
        parts.append(head.own_logits(hidden))
    assert starts == [sum(p.shape[1] for p in parts[:rank]) for rank in range(world)]
    together = torch.cat(parts, -1)[:, :VOCAB]
    torch.testing.assert_close(together, whole.own_logits(hidden))


def test_a_share_does_not_hold_on_to_the_whole() -> None:
    head = random_head(RANK)
    head.keep_share(1, 2)
    assert head.up is not None
    assert head.up.weight.untyped_storage().nbytes() == 4 * RANK * VOCAB // 2


@pytest.mark.parametrize("target", [SimpleNamespace(), SimpleNamespace(rms_norm_eps=None)])
def test_targets_without_an_epsilon_have_a_default(target: SimpleNamespace) -> None:
    assert norm_eps(target) == 1e-6
    assert norm_eps(TARGET) == 1e-5
