"""The Medusa heads as vLLM's own ``medusa`` method reads them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from vllm_propd.heads.checkpoint import load_heads

SHARED_OUTPUT = "lm_heads.0.weight"
"""The tensor that vLLM takes for all heads' output layer (``original_lm_head``)."""


def export_for_vllm(heads: Path, output: torch.Tensor, folder: Path) -> None:
    """Writes a folder for ``{"method": "medusa", "model": folder}``.

    vLLM's heads do not share the target's output layer in memory, so it is written
    along where ours have none of their own. They know neither the root nor the token
    before: where ours do, they are worse than ours.

    Args:
        heads: folder of ProPD heads.
        output: the target's output layer, ``[vocabulary, hidden]``.
        folder: made if it is not there.

    Raises:
        HeadsError: the heads cannot be read.
    """
    checkpoint = load_heads(heads)
    tensors = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if not name.startswith(("roots.", "transition."))
    }
    if not checkpoint.num_outputs:
        rows = output.detach().to("cpu", checkpoint.block(0, 0, "weight").dtype)
        some = checkpoint.tensors.get("token_map")
        tensors[SHARED_OUTPUT] = rows if some is None else rows[some.long()]
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps(checkpoint.config(len(output)), indent=2) + "\n"
    )
