"""What training heads takes of memory, counted: does a large target fit 24 GB?

    python scripts/training_memory.py            # writes the table in docs/training.md

Every tensor of one real training step is counted, on a CPU: heads, their gradients, Adam's
moments, the target's states, logits and what autograd keeps, for a target of the vocabulary
and hidden size in question with four layers. Its other layers add their weights and the
states that come out of them, which is arithmetic. On a GPU the allocator adds a little.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

from vllm_propd.training.model.trainee import Trainee
from vllm_propd.training.settings import TrainSettings

PAGE = Path(__file__).parents[1] / "docs" / "training.md"
PLACE = re.compile(r"(<!-- memory: [^\n]*-->\n).*?(<!-- end of memory -->\n)", re.DOTALL)
GB = 1e9


@dataclass(frozen=True)
class Target:
    """A Llama-like target."""

    name: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    kv_heads: int

    def config(self, layers: int) -> LlamaConfig:
        """Its configuration with fewer layers."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=layers,
            num_attention_heads=self.hidden // 128,
            num_key_value_heads=self.kv_heads,
            tie_word_embeddings=False,
        )


TARGETS = (
    Target("1B, vocabulary 128k", 128_256, 2048, 8192, 16, 8),
    Target("8B, vocabulary 128k", 128_256, 4096, 14_336, 32, 8),
)
RUN = 4
"""Layers of the target that is run."""


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that live at once; enter it to count.

    Attributes:
        most: the most bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def add(self, tensor: torch.Tensor) -> None:
        """Counts a tensor that is there already."""
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Runs an operation, and counts what has come of it."""
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor):
                self.add(one)
        alive = {at: s for at, s in self._storages.items() if not s[0].expired()}
        self._storages = alive
        self.most = max(self.most, sum(size for _, size in alive.values()))
        return result


CASES = {"as it is by default": {}, "whole vocabulary": {"sampled_tokens": 0}}


def counted(target: Target, settings: TrainSettings) -> dict[str, float]:
    """Gigabytes of one step."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(target.config(RUN), dtype=torch.bfloat16)
    tokens = torch.arange(min(settings.draft_tokens, target.vocabulary))
    trainee = Trainee(model, settings, tokens)
    optimizer = torch.optim.AdamW(trainee.trained(), lr=1e-4)
    ids = torch.randint(0, target.vocabulary, (settings.batch_size, settings.length))
    learn = torch.ones_like(ids, dtype=torch.bool)
    alive = Alive()
    for one in (*model.parameters(), *trainee.parameters()):
        alive.add(one)
    with alive:
        for part, where in zip(
            ids.chunk(settings.accumulate), learn.chunk(settings.accumulate), strict=True
        ):
            with trainee.autocast():
                states = trainee.states(part).rounded()
                loss = trainee(part, where, states, 0)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    others = target.layers - RUN
    rows = settings.batch_size // settings.accumulate * settings.length
    weights = sum(p.numel() for p in model.parameters()) + others * layer
    heads = sum(p.numel() for p in trainee.trained())
    return {
        "target": 2 * weights / GB,
        "heads": 16 * heads / GB,
        "peak": (alive.most + 2 * others * (layer + rows * target.hidden)) / GB,
    }


def table() -> Iterator[str]:
    """The lines of the table."""
    yield "| target | loss | target's weights | heads with Adam | the most at once |"
    yield "|---|---|---|---|---|"
    for target in TARGETS:
        for name, options in CASES.items():
            settings = TrainSettings(precision="bfloat16", **options)
            if options and target.hidden > 2048:
                continue  # counted for the smaller target only: it takes minutes
            found = counted(target, settings)
            cells = [f"{found[part]:.1f} GB" for part in ("target", "heads", "peak")]
            yield f"| {' | '.join([target.name, name, *cells])} |"


def main(
    write: Annotated[bool, typer.Option(help="Into the documentation.")] = True,
) -> None:
    """Count, print, and write the table."""
    lines = "\n".join(table()) + "\n"
    print(lines)
    if write:
        page = PLACE.sub(lambda m: m[1] + lines + m[2], PAGE.read_text())
        PAGE.write_text(page)


if __name__ == "__main__":
    typer.run(main)
