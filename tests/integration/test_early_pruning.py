"""Trees pruned early: plain vLLM's text on every family, compiled or not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ties, engine, greedy, mixed_prompts, run
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from vllm_propd.heads.checkpoint import save_heads
from vllm_propd.heads.early import EarlyHead
from vllm_propd.heads.medusa import MedusaHeads

LAYERS, VOCABULARY, HIDDEN = 4, 96, 64
EARLY = (1, LAYERS - 1)
FAMILIES: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma2": Gemma2Config,
}
RULES: dict[str, dict[str, Any]] = {
    "top_k": {"pruning": "top_k", "top_k": 4},
    "path_probability": {"pruning": "path_probability", "keep_nodes": 5},
}
PROMPTS = [
    {"prompt_token_ids": [(7 * i + j) % 90 for j in range(3 + i)]} for i in range(16)
]
LOGGED = greedy(48, logprobs=2, ignore_eos=True, detokenize=False)


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model; its untrained heads draft what it would say next."""
    torch.manual_seed(5)
    tied = request.param == "gemma2"  # which has no other output layer
    config = FAMILIES[request.param](
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=96,
        num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        max_position_embeddings=256, initializer_range=0.25, tie_word_embeddings=tied,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp(request.param)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    early = {
        f"early.{layer}.{name}": tensor
        for layer in EARLY
        for name, tensor in EarlyHead(HIDDEN, 1e-6).state_dict().items()
    }
    medusa = MedusaHeads(3, 1, HIDDEN, bias=True).tensors()
    save_heads(folder / "propd", medusa, early, VOCABULARY, torch.float32)
    return folder


def options_of(model: Path, **options: Any) -> dict[str, Any]:
    small = {"max_model_len": 160, "max_num_batched_tokens": 320}
    return {"model": str(model), "skip_tokenizer_init": True, **small, **options}


def kept_and_drafted(llm: Any) -> tuple[list[int], list[int]]:
    """Nodes that went on, and nodes there were, of each recorded tree."""
    trees = [tree for step in llm.collective_rpc("take_recording")[0] for tree in step]
    return [len(tree["kept"]) for tree in trees], [tree["verified"] for tree in trees]


def test_eager(tiny: Path, ties: Ties) -> None:
    with engine(**options_of(tiny)) as llm:
        expected = run(llm, PROMPTS, LOGGED)
    for layer, rule in zip(EARLY, RULES.values(), strict=True):
        propd = {**rule, "early_layer": layer}
        with engine(14, propd=propd, **options_of(tiny)) as llm:
            llm.collective_rpc("start_recording", args=(1000,))
            ties.check(expected, run(llm, PROMPTS, LOGGED))
            kept, drafted = kept_and_drafted(llm)
        assert sum(kept) < sum(drafted)


# A minute each: the first stands for all in `make test`.
COMPILED = [
    pytest.param(
        family,
        rule,
        marks=[pytest.mark.long] if (family, rule) != ("llama", "top_k") else [],
    )
    for family in FAMILIES
    for rule in RULES
]


@pytest.mark.parametrize(("tiny", "rule"), COMPILED, indirect=["tiny"], scope="module")
def test_compiled(tiny: Path, rule: str, ties: Ties) -> None:
    compiled = options_of(tiny, enforce_eager=False)
    with engine(**compiled) as llm:
        expected = run(llm, PROMPTS, LOGGED)
    propd = {**RULES[rule], "early_layer": EARLY[list(RULES).index(rule)]}
    with engine(14, propd=propd, **compiled) as llm:
        ties.check(expected, run(llm, PROMPTS, LOGGED))


@pytest.mark.parametrize("k", [1, 2048])
def test_trees_that_lose_everything_or_nothing(k: int, ties: Ties) -> None:
    """The demo's model; prompts in chunks beside the trees."""
    prompts, params = mixed_prompts(24, seed=41), greedy(64, logprobs=2)
    with engine() as llm:
        expected = run(llm, prompts, params)
    propd = {"pruning": "top_k", "top_k": k, "early_layer": 1}
    with engine(32, propd=propd, max_num_batched_tokens=512) as llm:
        llm.collective_rpc("start_recording", args=(10_000,))
        ties.check(expected, run(llm, prompts, params))
        kept, drafted = kept_and_drafted(llm)
    if k == 1:
        assert 0 in kept and sum(kept) < sum(drafted) / 4
    else:
        assert kept == drafted
