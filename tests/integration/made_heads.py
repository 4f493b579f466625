"""The demo's heads in other shapes: as FasterDecoding stores them, or with more terms."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import MODEL
from safetensors.torch import load_file

from vllm_propd.heads.checkpoint import AFTER, BEFORE, load_heads, save_heads

TOKENS, RANK = torch.arange(0, 2048, 3), 8
"""The draft vocabulary of ``heads_in``, and the rank of its transition term."""

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


def heads_in(folder: Path, *terms: str) -> Path:
    """The demo's heads with a third of the vocabulary, and perhaps random terms."""
    tensors = dict(load_heads(MODEL / "propd").tensors) | {"token_map": TOKENS}
    torch.manual_seed(0)
    if "root" in terms:
        hidden = tensors["blocks.0.layers.0.weight"].shape[-1]
        weights = torch.randn(4, hidden, hidden) / hidden**0.5
        tensors |= {f"roots.{k}.weight": weight for k, weight in enumerate(weights)}
    if "transition" in terms:
        tensors |= {name: torch.randn(len(TOKENS), RANK) for name in (BEFORE, AFTER)}
    save_heads(folder, tensors, {}, 2048, torch.float32)
    return folder
