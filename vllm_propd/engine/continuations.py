"""What the target writes itself: greedy continuations, by plain vLLM, batched."""

from __future__ import annotations

from typing import Any

from vllm import LLM, ModelRegistry, SamplingParams
from vllm.config import ModelConfig
from vllm.platforms import current_platform

CPU_CACHE_BYTES = 1 << 30
"""KV cache of the engine on the CPU; prompts that do not fit wait."""


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
    """Each prompt's greedy continuation, token ids.

    Args:
        model: the target.
        prompts: token ids.
        max_tokens: of each prompt's continuation; fewer where the text ends.
        description: of the progress bar.
    """
    longest = max(len(p) + new for p, new in zip(prompts, max_tokens, strict=True))
    options: dict[str, Any] = {"max_model_len": longest, "max_num_seqs": 128}
    if current_platform.is_cpu():  # by default it would claim nearly all memory
        options["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
    llm = LLM(model, enforce_eager=True, **options)
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


def _bar(description: str) -> Any:
    """VLLM's progress bar under another name."""
    from tqdm import tqdm

    def bar(*args: Any, **kwargs: Any) -> Any:
        return tqdm(*args, **{**kwargs, "desc": description})

    return bar
