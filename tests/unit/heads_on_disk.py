"""Heads as they lie on disk, in every published format, for the checkpoint tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vllm_propd.heads.medusa import MedusaHeads

HEADS, LAYERS, HIDDEN, VOCAB = 3, 2, 8, 20
Tensors = dict[str, torch.Tensor]


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


def shared(weight: torch.Tensor) -> Tensors:
    """An output layer for all heads, under a name that says so."""
    return {"lm_head.weight": weight}


def without(tensors: Tensors, *names: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name not in names}
