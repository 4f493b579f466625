"""The demo's heads as FasterDecoding stores them, each with an output layer."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import MODEL
from safetensors.torch import load_file

NUM_LAYERS = 2
"""Residual blocks of the demo's heads."""


def write_own_outputs(folder: Path) -> None:
    """Writes the heads, each with a copy of the target's output layer."""
    heads = load_file(MODEL / "propd" / "model.safetensors")
    output = load_file(MODEL / "model.safetensors")["model.embed_tokens.weight"]
    tensors = {}
    for name, tensor in heads.items():
        _, head, _, layer, kind = name.split(".")
        tensors[f"{head}.{layer}.linear.{kind}"] = tensor
        tensors[f"{head}.{NUM_LAYERS}.weight"] = output.clone()
    torch.save(tensors, folder / "medusa_lm_head.pt")
    (folder / "config.json").write_text('{"medusa_num_heads": 2}')
