"""Training Medusa heads and early heads together on a frozen target."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)

from vllm_propd.heads.checkpoint import save_heads
from vllm_propd.heads.early import EarlyHead
from vllm_propd.heads.medusa import MedusaHeads
from vllm_propd.training.data import read_files, token_stream
from vllm_propd.training.losses import distillation, medusa_loss

HELD_OUT_SHARE = 16
"""One token in this many, at the end of the data, is not trained on."""


@dataclass(frozen=True)
class TrainSettings:
    """How to train heads.

    Attributes:
        num_heads: Medusa heads K.
        num_layers: residual blocks of each head.
        early_layers: layers after which an early head reads, counted from 1.
        minutes: wall time.
        batch_size, length: sequences a step, and their tokens.
        peak_lr: of AdamW; warmed up, then a cosine to 2% of it.
        seed: of the batches.
    """

    num_heads: int = 4
    num_layers: int = 2
    early_layers: tuple[int, ...] = (1, 2, 3)
    minutes: float = 10.0
    batch_size: int = 8
    length: int = 256
    peak_lr: float = 3e-3
    seed: int = 0


@dataclass
class HeadsReport:
    """What the heads know, on held-out text.

    Attributes:
        medusa: per head, top-1, 5 and 10 accuracy against the target's next tokens.
        early: per early layer, the same against the target's prediction there.
    """

    medusa: list[dict[int, float]] = field(default_factory=list)
    early: dict[int, dict[int, float]] = field(default_factory=dict)

    def show(self) -> None:
        """Prints the report as a table."""
        table = Table("head", "top-1", "top-5", "top-10", title="on held-out text")
        rows = {f"medusa {k}": accuracy for k, accuracy in enumerate(self.medusa, 1)}
        rows |= {f"early, layer {k}": accuracy for k, accuracy in self.early.items()}
        for name, accuracy in rows.items():
            table.add_row(name, *(f"{value:.1%}" for value in accuracy.values()))
        Console().print(table)


class HeadsTrainer:
    """Holds a target and its heads.

    Args:
        target: a Hugging Face causal LM; stays frozen.
        settings: what to train, and how.
    """

    def __init__(self, target: PreTrainedModel, settings: TrainSettings):
        self.target = target.eval().requires_grad_(False)
        self.settings = settings
        config = target.config
        if max(settings.early_layers, default=0) >= config.num_hidden_layers:
            raise ValueError(
                f"early layers {settings.early_layers}: the target has "
                f"{config.num_hidden_layers} layers, an early head must leave some after it"
            )
        self.medusa = MedusaHeads(
            settings.num_heads, settings.num_layers, config.hidden_size, bias=True
        )
        self.early = nn.ModuleDict(
            {
                str(layer): EarlyHead(config.hidden_size, config.rms_norm_eps)
                for layer in settings.early_layers
            }
        )
        self.output = target.get_output_embeddings()

    def _forward(
        self, ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[int, torch.Tensor]]:
        """The target's logits, the Medusa heads' and the early heads'."""
        with torch.no_grad():
            out = self.target(input_ids=ids, output_hidden_states=True)
        states = out.hidden_states
        hidden = states[-1]
        medusa = self.medusa(hidden.flatten(0, 1)).unflatten(1, hidden.shape[:2])
        early = {
            int(layer): self.output(head(states[int(layer)]))
            for layer, head in self.early.items()
        }
        return out.logits, self.output(medusa), early

    def _batch(self, tokens: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        size, length = self.settings.batch_size, self.settings.length
        starts = rng.integers(0, len(tokens) - length - 1, size=size)
        rows = np.stack([tokens[start : start + length] for start in starts])
        return torch.from_numpy(rows.astype(np.int64))

    def train(self, tokens: np.ndarray) -> None:
        """Trains for the settings' minutes on a stream of token ids."""
        settings = self.settings
        rng = np.random.default_rng(settings.seed)
        parameters = [*self.medusa.parameters(), *self.early.parameters()]
        optimizer = torch.optim.AdamW(
            parameters, lr=settings.peak_lr, betas=(0.9, 0.95), weight_decay=0.0
        )
        started, step, smooth = time.monotonic(), 0, math.nan
        columns = [*Progress.get_default_columns(), TextColumn("{task.fields[loss]}")]
        with Progress(*columns) as bar:
            task = bar.add_task("heads", total=1.0, loss="")
            while (done := (time.monotonic() - started) / (60 * settings.minutes)) < 1:
                cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))
                for group in optimizer.param_groups:
                    group["lr"] = settings.peak_lr * cosine * min(1.0, (step + 1) / 30)
                with torch.autocast("cpu", torch.bfloat16):
                    target, medusa, early = self._forward(self._batch(tokens, rng))
                    probs = target.float().softmax(-1)
                    loss = medusa_loss(medusa, probs)
                    for logits in early.values():
                        loss = loss + distillation(logits, probs)
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                step += 1
                value = float(loss.detach())
                smooth = value if step == 1 else 0.95 * smooth + 0.05 * value
                bar.update(task, completed=done, loss=f"step {step} loss {smooth:.3f}")

    @torch.no_grad()
    def evaluate(self, tokens: np.ndarray, batches: int = 4) -> HeadsReport:
        """Accuracy on text that was not trained on."""
        rng = np.random.default_rng(1)
        tops = (1, 5, 10)
        medusa = torch.zeros(self.settings.num_heads, len(tops))
        early = {layer: torch.zeros(len(tops)) for layer in self.settings.early_layers}
        for _ in range(batches):
            target, heads, shallow = self._forward(self._batch(tokens, rng))
            best = target.argmax(-1)
            for k in range(1, len(heads) + 1):
                medusa[k - 1] += _recall(heads[k - 1][:, :-k], best[:, k:], tops)
            for layer, logits in shallow.items():
                early[layer] += _recall(logits, best, tops)

        def table(values: torch.Tensor) -> dict[int, float]:
            return dict(zip(tops, (values / batches).tolist(), strict=True))

        return HeadsReport(
            [table(row) for row in medusa], {k: table(v) for k, v in early.items()}
        )

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """Writes the heads as a checkpoint that ProPD serves."""
        early = {f"early.{k}": v for k, v in self.early.state_dict().items()}
        save_heads(
            folder, self.medusa.tensors(), early, self.target.config.vocab_size, dtype
        )


def _recall(
    logits: torch.Tensor, truth: torch.Tensor, tops: tuple[int, ...]
) -> torch.Tensor:
    """``[len(tops)]`` share of positions whose truth is among the k best logits."""
    found = logits.topk(max(tops), dim=-1).indices == truth[..., None]
    return torch.stack([found[..., :k].any(-1).float().mean() for k in tops])


def train_heads(
    model: str, data: list[Path], out: Path, settings: TrainSettings
) -> HeadsReport:
    """Trains heads for ``model`` on text files and writes them to ``out``.

    One token in ``HELD_OUT_SHARE`` is kept for the report, which is printed.

    Args:
        model: a Hugging Face causal LM, folder or name. Trained against in float32, as
            its weights are stored.
        data: text files or folders of them.
        out: the heads' folder; ``model``'s own ``propd/`` is where serving looks.
        settings: what to train, and how.
    """
    tokens = token_stream(AutoTokenizer.from_pretrained(model), read_files(data))
    kept = len(tokens) // HELD_OUT_SHARE
    if kept <= settings.length + 1:
        raise ValueError(
            f"--data holds {len(tokens):,} tokens; training with --length "
            f"{settings.length} needs {(settings.length + 2) * HELD_OUT_SHARE:,}"
        )
    stored = AutoConfig.from_pretrained(model).dtype or torch.bfloat16
    target = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    trainer = HeadsTrainer(target, settings)
    trainer.train(tokens[:-kept])
    report = trainer.evaluate(tokens[-kept:])
    report.show()
    trainer.save(out, stored)
    return report
