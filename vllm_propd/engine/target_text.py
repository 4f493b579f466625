"""What the target writes itself: greedy continuations, by plain vLLM, batched."""

from __future__ import annotations

from typing import Any

import psutil
from vllm import LLM, ModelRegistry, SamplingParams
from vllm.config import ModelConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_propd.fast_dtype import fast_dtype

logger = init_logger("vllm.propd.continuations")

MOST_SEQUENCES = 128
"""The most texts written together; more take longer for each step, and gain little."""

CACHE_SHARE = 0.4
"""The share of free memory for the KV cache on a CPU; the target comes beside it."""

BLOCK = 128
"""Tokens of a block of the KV cache on a CPU."""


def check_trainable(model: str) -> None:
    """Refuses a model that early pruning could not split, before any training.

    Raises:
        ValueError: vLLM runs it in one piece only (no pipeline parallelism).
    """
    config = ModelConfig(model)
    architectures = config.architectures
    if not ModelRegistry.is_pp_supported_model(architectures, config):
        raise ValueError(
            f"{model} ({', '.join(architectures)}): vLLM has no pipeline-parallel support "
            "for this model, which early pruning needs to stop after a layer; heads for "
            "it cannot be trained"
        )


def greedy_continuations(
    model: str,
    prompts: list[list[int]],
    max_tokens: list[int],
    description: str,
) -> list[list[int]]:
    """Returns each prompt's greedy continuation, as token ids.

    Args:
        model: the target.
        prompts: token ids.
        max_tokens: the most tokens of each continuation; fewer where the text ends.
        description: title of the progress bar.
    """
    lengths = [len(p) + new for p, new in zip(prompts, max_tokens, strict=True)]
    llm = LLM(
        model, enforce_eager=True, max_model_len=max(lengths), **_options(model, lengths)
    )
    try:
        params = [
            SamplingParams(temperature=0.0, max_tokens=new, detokenize=False)
            for new in max_tokens
        ]
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            params,
            use_tqdm=_bar(description),
        )
        return [list(output.outputs[0].token_ids) for output in outputs]
    finally:
        llm.llm_engine.engine_core.shutdown()


def _options(model: str, lengths: list[int]) -> dict[str, Any]:
    """Returns arguments of ``vllm.LLM`` for sequences of these lengths.

    On a CPU the type that is fast there (vLLM would take bfloat16 for float32), and a KV
    cache in which as many sequences fit as are written together: else they evict each
    other, and are computed again and again.
    """
    if not current_platform.is_cpu():
        return {"max_num_seqs": MOST_SEQUENCES}
    dtype = fast_dtype("cpu")
    blocks = sorted((-(-length // BLOCK) for length in lengths), reverse=True)
    block_bytes = BLOCK * _bytes_per_token(ModelConfig(model, dtype=dtype))
    room = int(CACHE_SHARE * psutil.virtual_memory().available) // block_bytes
    together, taken = 0, 0
    for blocks_of_one in blocks[:MOST_SEQUENCES]:
        if together and taken + blocks_of_one > room:
            break
        together, taken = together + 1, taken + blocks_of_one
    logger.info(
        "Writing in %s, %d sequences at a time, %.1f GiB of KV cache",
        dtype,
        together,
        taken * block_bytes / (1 << 30),
    )
    return {
        "dtype": dtype,
        "max_num_seqs": together,
        "kv_cache_memory_bytes": (taken + 1) * block_bytes,  # block 0 is vLLM's own
        "enable_prefix_caching": False,
    }


def _bytes_per_token(config: ModelConfig) -> int:
    """Returns the bytes of KV cache that one token takes, over all layers."""
    text = config.hf_text_config
    each = 2 * config.get_total_num_kv_heads() * config.get_head_size()
    return int(text.num_hidden_layers * each * config.dtype.itemsize)


def _bar(description: str) -> Any:
    """Returns a class for vLLM's progress bar that shows ``description``."""
    from tqdm import tqdm

    def bar(*args: Any, **kwargs: Any) -> Any:
        return tqdm(*args, **{**kwargs, "desc": description})

    return bar
