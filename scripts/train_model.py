"""Makes a small model and its heads: by default the one that ships in ``demo/model``.

Everything is trained from the source of Python's standard library (files whose path
hashes into the held-out share are never read), on two CPU cores in about an hour:

    python scripts/train_model.py --out demo/model

Other families and sizes make models that the repo has never seen:

    python scripts/train_model.py --out build/qwen3 --family qwen3 --hidden-size 192
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from vllm_propd.corpus import library_files, read_text
from vllm_propd.fast_dtype import fast_dtype
from vllm_propd.training.run import train_heads
from vllm_propd.training.settings import TrainSettings
from vllm_propd.training.text import Inputs

END_OF_TEXT = "<|endoftext|>"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""The model writes code and knows no roles: a chat is its messages in a row."""


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of ``vocab_size`` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def target_config(
    family: str, hidden_size: int, layers: int, vocab_size: int
) -> PretrainedConfig:
    """Heads of 64, two query heads to a KV head, tied embeddings."""
    heads = hidden_size // 64
    return AutoConfig.for_model(
        family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )


def train_target(
    model: PreTrainedModel, tokens: np.ndarray, minutes: float, seed: int
) -> None:
    """Plain next-token training: AdamW, cosine schedule over the given wall time."""
    rng = np.random.default_rng(seed)
    decay = [p for p in model.parameters() if p.dim() > 1]
    other = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": decay, "weight_decay": 0.1},
        {"params": other, "weight_decay": 0.0},
    ]
    peak, batch, length, warmup = 3e-3, 16, 512, 50
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95))
    compiled = torch.compile(model, dynamic=False)
    mixed = fast_dtype("cpu") == "bfloat16"
    started, step, smooth = time.monotonic(), 0, 0.0
    with Progress() as bar:
        task = bar.add_task("target", total=1.0)
        while (done := (time.monotonic() - started) / (60 * minutes)) < 1.0:
            rate = 0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * done))
            for group in optimizer.param_groups:
                group["lr"] = peak * rate * min(1.0, (step + 1) / warmup)
            # A quarter of the steps sees long contexts: positions up to 1024.
            rows, cols = (batch // 2, 2 * length) if step % 4 == 3 else (batch, length)
            starts = rng.integers(0, len(tokens) - cols - 1, size=rows)
            ids = torch.from_numpy(
                np.stack([tokens[s : s + cols] for s in starts]).astype(np.int64)
            )
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                loss = compiled(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            value = float(loss.detach())
            smooth = value if step == 1 else 0.95 * smooth + 0.05 * value
            bar.update(
                task, completed=done, description=f"target step {step} loss {smooth:.3f}"
            )


def make_target(
    out: Path,
    files: list[Path],
    config: PretrainedConfig,
    minutes: float,
    seed: int,
) -> None:
    """Trains tokenizer and model from ``files`` and writes them."""
    texts = [read_text(path) for path in files]
    tokenizer = train_tokenizer(texts, config.vocab_size)
    end = [tokenizer.eos_token_id]
    ids = [row + end for row in tokenizer(texts)["input_ids"]]
    tokens = np.concatenate([np.asarray(row, np.int32) for row in ids])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    size = sum(p.numel() for p in model.parameters())
    typer.echo(f"{len(texts)} files, {len(tokens):,} tokens; {size:,} parameters")
    train_target(model, tokens, minutes, seed)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    family: Annotated[str, typer.Option(help="llama, qwen2, qwen3, gemma...")] = "llama",
    hidden_size: Annotated[int, typer.Option(help="A multiple of 64.")] = 256,
    layers: Annotated[int, typer.Option(help="Layers.")] = 6,
    vocab_size: Annotated[int, typer.Option(help="Tokens in the vocabulary.")] = 2048,
    minutes: Annotated[float, typer.Option(help="Training time of the target.")] = 30.0,
    heads_minutes: Annotated[float, typer.Option(help="Of the heads; 0: none.")] = 15.0,
    seed: Annotated[int, typer.Option(help="Seed of initialisation and batches.")] = 0,
    only_heads: Annotated[
        bool, typer.Option(help="Keep the model in the folder, train new heads.")
    ] = False,
) -> None:
    """Train everything and write ``out``."""
    torch.manual_seed(seed)
    files = library_files("train")
    if not only_heads:
        config = target_config(family, hidden_size, layers, vocab_size)
        make_target(out, files, config, minutes, seed)
    if heads_minutes:
        settings = TrainSettings(minutes=heads_minutes, seed=seed)
        inputs = Inputs(str(out), files, library_files("held_out"), self_distill=True)
        train_heads(inputs, out / "propd", settings, for_vllm=False)


if __name__ == "__main__":
    typer.run(main)
