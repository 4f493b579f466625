"""An inflated model's heads say what the small one's do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from inflate_model import Inflation, inflate_heads
from tiny_targets import (
    LAYERS,
    SIZES,
    one_thread,  # noqa: F401
    randomise,
    token_ids,
    trainee,
)

from vllm_propd.heads.checkpoint import EARLY_FILE, load_heads, save_heads
from vllm_propd.heads.medusa import MedusaHeads, root_input

FACTOR = 4


def inflation() -> Inflation:
    config = {**SIZES, "model_type": "llama", "rms_norm_eps": 1e-6}
    return Inflation(config, FACTOR, LAYERS + 1, seed=0)


def said(folder: Path, states: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
    """What a folder's heads make of states, and of embeddings of the roots."""
    heads = MedusaHeads.from_checkpoint(load_heads(folder))
    return heads(states, root_input(embedded)).detach()


@pytest.mark.parametrize(
    "options",
    [
        {"knows_root": True},
        {"transition_rank": 4, "knows_root": True},
        {"transition_rank": 4, "output_layer": "own"},
        {"early_layers": ()},
    ],
    ids=["root", "root and token before", "own outputs", "no early heads"],
)
def test_heads_of_every_kind_are_inflated(tmp_path: Path, options: dict[str, Any]) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    heads = randomise(trainee(tokens=[1, 5, 9, 30], **options))
    tensors, vocabulary = heads.medusa_tensors(), len(heads.output.weight)
    save_heads(small, tensors, heads.early_tensors(), vocabulary, torch.float32)
    inflate_heads(small, large, inflation(), torch.float32)
    before, after = load_heads(small), load_heads(large)
    after.check_fits(FACTOR * before.hidden_size, vocabulary)
    for name, tensor in before.tensors.items():
        if name.startswith("transition.") or name == "token_map":
            assert torch.equal(after.tensors[name], tensor)
    assert (large / EARLY_FILE).exists() == bool(options.get("early_layers", True))
    layers = json.loads((large / "config.json").read_text())["early_layers"]
    assert layers == [inflation().after(n) for n in options.get("early_layers", (1, 2))]
    ids = token_ids(1, 6)[0]
    states = torch.randn(len(ids), before.hidden_size)
    embedded = heads.target.get_input_embeddings()(ids).detach()

    def wide(rows: torch.Tensor) -> torch.Tensor:
        return inflation().embedding(rows)

    expected = wide(said(small, states, embedded).flatten(0, 1))
    found = said(large, wide(states), wide(embedded)).flatten(0, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
