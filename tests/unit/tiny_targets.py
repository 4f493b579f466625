"""Targets of random weights, small enough to train heads on within a test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from vllm_propd.training.model.trainee import Trainee
from vllm_propd.training.settings import TrainSettings

VOCAB, HIDDEN, LAYERS = 64, 32, 3
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.5,  # so that the target is sure of something
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small lose more to waking threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def target(kind: type[PretrainedConfig] = LlamaConfig, **options: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kind(**SIZES | options)).float()


def settings(**options: Any) -> TrainSettings:
    small = {
        "num_heads": 3,
        "num_layers": 1,
        "transition_rank": 0,
        "knows_root": False,
        "early_layers": (1, 2),
        "steps": 8,
        "batch_size": 4,
        "length": 16,
        "precision": "float32",
    }
    return TrainSettings(**small | options)


def trainee(tokens: list[int] | None = None, **options: Any) -> Trainee:
    """Untrained heads on a Llama; the options are those of the training."""
    drafted = None if tokens is None else torch.tensor(tokens)
    return Trainee(target(), settings(**options), drafted)


def token_ids(rows: int = 4, length: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (rows, length), generator=generator)


@torch.no_grad()
def randomise(heads: Trainee) -> Trainee:
    """Gives all heads weights of their own."""
    torch.manual_seed(1)
    for parameter in heads.trained():
        parameter.add_(torch.randn_like(parameter) * 0.3)
    return heads


@torch.no_grad()
def said_by_target(heads: Trainee, ids: torch.Tensor) -> torch.Tensor:
    """The target's own logits after each token, ``[rows, length, vocabulary]``."""
    logits: torch.Tensor = heads.target(input_ids=ids).logits
    return logits


def loss(heads: Trainee, ids: torch.Tensor, learn: torch.Tensor | None = None) -> Any:
    """The training loss of token ids, by default of all of them."""
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    return heads(ids, everywhere if learn is None else learn, heads.states(ids), 0)
