"""Unseeded sampling has the model's exact joint distribution; a wrong rule does not.

A tiny vocabulary makes the whole distribution computable: every continuation's
probability is the model's own, from a float64 forward outside vLLM.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import engine
from scipy.stats import chisquare
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import SamplingParams

from vllm_propd.heads.checkpoint import save_heads
from vllm_propd.heads.early import EarlyHead
from vllm_propd.heads.medusa import MedusaHeads

VOCABULARY, TOKENS, SAMPLES = 12, 3, 20_000
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]

Process = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama whose heads draft what it would say next."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        max_position_embeddings=64, initializer_range=0.25, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(folder)
    heads = MedusaHeads(3, 1, 64, bias=True)
    early = {f"early.1.{n}": t for n, t in EarlyHead(64, 1e-6).state_dict().items()}
    save_heads(folder / "propd", heads.tensors(), early, VOCABULARY, torch.float32)
    return folder


@torch.inference_mode()
def joint(model: Path, process: Process) -> np.ndarray:
    """``[VOCABULARY] * TOKENS``: the probability of every continuation."""
    llama = LlamaForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    probability = torch.ones(1, dtype=torch.float64)
    paths = torch.tensor([PROMPT])
    for _ in range(TOKENS):
        step = process(llama(paths).logits[:, -1]).softmax(-1)
        probability = (probability[:, None] * step).flatten()
        nexts = torch.arange(VOCABULARY).repeat(len(paths))[:, None]
        paths = torch.cat([paths.repeat_interleave(VOCABULARY, 0), nexts], 1)
    return (probability / probability.sum()).numpy().reshape([VOCABULARY] * TOKENS)


def sample(model: Path, params: dict[str, Any], **propd: Any) -> Counter[tuple[int, ...]]:
    """Counts of continuations, drafted with trees of 7 nodes."""
    sampling = SamplingParams(
        **params, max_tokens=TOKENS, ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": PROMPT}] * SAMPLES
    options = {
        "model": str(model),
        "skip_tokenizer_init": True,
        "max_model_len": 64,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 2048,
    }
    with engine(7, propd=propd, **options) as llm:
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
    return Counter(tuple(out.outputs[0].token_ids) for out in outputs)


def p_value(counts: Counter[tuple[int, ...]], joint: np.ndarray, tokens: int) -> float:
    """Chi-square of the first ``tokens`` tokens; rare continuations share one cell."""
    expected = joint.sum(tuple(range(tokens, TOKENS))).ravel() * SAMPLES
    observed = np.zeros([VOCABULARY] * tokens)
    for continuation, count in counts.items():
        observed[continuation[:tokens]] += count
    observed = observed.ravel()
    assert observed[expected == 0].sum() == 0, "a token that cannot be sampled"
    rare = expected < 5
    cells = [np.append(x[~rare], x[rare].sum()) for x in (observed, expected)]
    if cells[1][-1] < 1e-9:
        cells = [x[:-1] for x in cells]
    return float(chisquare(*cells).pvalue)


def top_8(logits: torch.Tensor) -> torch.Tensor:
    kept = logits.topk(8).values[:, -1:]
    return (logits / 0.7).masked_fill(logits < kept, -torch.inf)


RULES: dict[str, tuple[dict[str, Any], Process]] = {
    "temperature 1": ({"temperature": 1.0}, lambda logits: logits),
    "temperature 0.7, top-k 8": ({"temperature": 0.7, "top_k": 8}, top_8),
}


PRUNED = {
    "unpruned": {},
    "top_k": {"pruning": "top_k", "top_k": 3},
    # 256 trees share half the token budget: 3 nodes each, of which one is kept.
    "path_probability": {"pruning": "path_probability", "keep_nodes": 1},
}


LENGTHS = (2, TOKENS)
LEVEL = 0.01 / (len(RULES) * len(PRUNED) * len(LENGTHS))
"""One false alarm in a hundred runs of all of them together (Bonferroni)."""


# Half a minute each: what cuts more stands for both in `make test`.
CASES = [
    pytest.param(rule, pruning, marks=[pytest.mark.long] if rule == "temperature 1" else [])
    for rule in RULES
    for pruning in PRUNED
]


@pytest.mark.parametrize(("rule", "pruning"), CASES)
def test_exact_acceptance_samples_the_models_distribution(
    tiny: Path, rule: str, pruning: str
) -> None:
    params, process = RULES[rule]
    counts = sample(tiny, params, **PRUNED[pruning])
    expected = joint(tiny, process)
    for tokens in LENGTHS:
        found = p_value(counts, expected, tokens)
        print(f"{rule}, {pruning}, {tokens} tokens: p = {found:.3f}")
        assert found > LEVEL


def test_typical_acceptance_does_not(tiny: Path) -> None:
    """The same test must be able to fail: typical acceptance is lossy."""
    params, process = RULES["temperature 1"]
    counts = sample(tiny, params, acceptance="typical")
    found = p_value(counts, joint(tiny, process), 2)
    print(f"typical acceptance, 2 tokens: p = {found:.1e}")
    assert found < 1e-6
