"""Heads that are never right: what they cost is what ProPD may cost where it gives nothing.

python scripts/random_heads.py build/smollm2 build/random-heads
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoConfig

from vllm_propd.heads.checkpoint import save_heads

HEADS = 4
SCALE = 3.0
"""Of the weights, in units at which a block's output is as large as its input: the target's
output layer is sure of something, and wrong."""


def main(
    model: Annotated[str, typer.Argument(help="Folder or hub name of the target.")],
    out: Annotated[Path, typer.Argument(help="Folder of the heads; made here.")],
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
) -> None:
    """Write heads of random weights."""
    config = AutoConfig.from_pretrained(model).get_text_config()
    hidden = config.hidden_size
    rng = torch.Generator().manual_seed(seed)
    tensors = {}
    for head in range(HEADS):
        block = f"blocks.{head}.layers.0"
        weight = torch.randn(hidden, hidden, generator=rng)
        tensors[f"{block}.weight"] = SCALE * weight / hidden**0.5
        tensors[f"{block}.bias"] = torch.randn(hidden, generator=rng)
    save_heads(out, tensors, {}, config.vocab_size, torch.float32)
    print(f"{out}: {HEADS} heads of random weights")


if __name__ == "__main__":
    typer.run(main)
