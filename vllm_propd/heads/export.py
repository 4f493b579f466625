"""The Medusa heads as vLLM's own ``medusa`` method reads them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vllm_propd.heads.checkpoint import load_heads

SHARED_OUTPUT = "lm_heads.0.weight"
"""The tensor that vLLM takes for all heads' output layer (``original_lm_head``)."""

OUTPUT_NAMES = ("lm_head.weight", "model.embed_tokens.weight")
"""What targets call their output layer; where it is tied they store the embedding only."""


def output_layer(model: Path) -> torch.Tensor:
    """Reads a target's output layer; its embedding, where they are tied.

    Args:
        model: folder of the target, whose weights may lie in several files.

    Returns:
        ``[vocabulary, hidden]``, of the dtype in which it is stored.

    Raises:
        ValueError: no safetensors in the folder hold it under a name that is known.
    """
    paths = sorted(model.glob("*.safetensors"))
    for name in OUTPUT_NAMES:  # the embedding may lie in a file before the output layer's
        for path in paths:
            with safe_open(path, framework="pt") as file:
                if name in file.keys():  # noqa: SIM118 - it is no dict
                    return file.get_tensor(name)
    raise ValueError(
        f"{model} holds no safetensors with {' or '.join(OUTPUT_NAMES)}: heads for vLLM's "
        "own medusa need a copy of the output layer"
    )


def export_for_vllm(heads: Path, output: torch.Tensor, folder: Path) -> None:
    """Writes a folder for ``{"method": "medusa", "model": folder}``.

    vLLM's heads do not share the target's output layer in memory, so it is written
    along where ours have none of their own. They know neither the root nor the token
    before: where ours do, they are worse than ours. Heads that draft some tokens only are
    written with rows for all, since vLLM 0.32 refuses a ``token_map`` of its own format
    ("weights were not initialized"): the others' are the mean of those drafted, whose logit
    is below the best one's whatever the state, but for rounding where all of them tie.

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
    some = tensors.pop("token_map", None)
    if not checkpoint.num_outputs:
        rows = output.detach().to("cpu", checkpoint.block(0, 0, "weight").dtype)
        tensors[SHARED_OUTPUT] = rows if some is None else rows[some.long()]
    config = checkpoint.config(len(output))
    if some is not None:
        config["truncated_vocab_size"] = len(output)
        for name, rows in tensors.items():
            if name.startswith("lm_heads."):
                mean = rows.float().mean(0).to(rows.dtype)
                tensors[name] = mean.repeat(len(output), 1)
                tensors[name][some.long()] = rows
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
