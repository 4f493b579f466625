"""What the target writes itself, by plain vLLM, batched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import psutil
from vllm import LLM, ModelRegistry, SamplingParams
from vllm.config import ModelConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

from vllm_propd.fast_dtype import fast_dtype
from vllm_propd.progress import token_bar

logger = init_logger("vllm.propd.target_text")

MOST_SEQUENCES = 128
"""The most texts written together; more take longer for each step, and gain little."""

AHEAD = 2 * MOST_SEQUENCES
"""Requests that the engine has at a time, those that wait included."""

CACHE_SHARE = 0.4
"""The share of free memory for the KV cache on a CPU; the target comes beside it."""

BLOCK = 128
"""Tokens of a block of the KV cache on a CPU."""


def check_trainable(model: str, early_layers: Sequence[int]) -> None:
    """Refuses early heads for a model that early pruning could not split.

    Args:
        model: Hugging Face folder or name of the target.
        early_layers: layers with an early head after them; none: any model will do.

    Raises:
        ValueError: vLLM runs it in one piece only (no pipeline parallelism).
    """
    if not early_layers:
        return
    config = ModelConfig(model)
    architectures = config.architectures
    if not ModelRegistry.is_pp_supported_model(architectures, config):
        raise ValueError(
            f"{model} ({', '.join(architectures)}): vLLM has no pipeline-parallel support "
            "for this model, which early pruning needs to stop after a layer; train its "
            "heads without early ones: --early-layers ''"
        )


@dataclass(frozen=True)
class Written:
    """What the target wrote after one prompt.

    Attributes:
        place: the prompt's place among those that were given.
        ids: token ids, the end-of-text token included.
        ended: whether the target ended it, and not the limit.
    """

    place: int
    ids: list[int]
    ended: bool


class TargetWriter:
    """Plain vLLM with the target; a context, at whose end the engine's process ends.

    Args:
        model: the target.
        longest: the most tokens of a prompt with what follows it.
        seed: of sampled texts.
    """

    def __init__(self, model: str, longest: int, seed: int = 0):
        self.longest = longest
        self._llm = LLM(
            model,
            enforce_eager=True,
            max_model_len=longest,
            seed=seed,
            disable_log_stats=True,
            **_options(model, longest),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._llm.llm_engine.engine_core.shutdown()

    def write(
        self,
        prompts: Sequence[list[int]],
        description: str,
        most_each: int | None = None,
        most_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        on_text: Callable[[Written], None] = lambda text: None,
    ) -> list[Written]:
        """Writes on from prompts, in their order, until there is enough.

        Args:
            prompts: token ids.
            description: title of the progress bar.
            most_each: new tokens of each; by default as many as ``longest`` allows.
            most_tokens: new tokens after which no other text is begun.
            temperature: 0: greedy.
            top_p: sampled texts are of the likeliest tokens, this much of all.
            on_text: called with each text when it has ended.

        Returns:
            What was written, in the order of the prompts.
        """
        engine = self._llm.llm_engine
        texts: dict[str, list[int]] = {}
        found: list[Written] = []
        waiting, tokens = 0, 0
        with token_bar() as bar:
            total = most_tokens or sum(self._room(one, most_each) for one in prompts)
            task = bar.add_task(description, total=total)
            while True:
                enough = most_tokens is not None and tokens >= most_tokens
                while waiting < len(prompts) and len(texts) < AHEAD and not enough:
                    params = SamplingParams(
                        temperature=temperature,
                        top_p=top_p if temperature else 1.0,
                        max_tokens=self._room(prompts[waiting], most_each),
                        detokenize=False,
                        output_kind=RequestOutputKind.DELTA,
                    )
                    prompt = {"prompt_token_ids": prompts[waiting]}
                    engine.add_request(str(waiting), prompt, params)
                    texts[str(waiting)], waiting = [], waiting + 1
                if not texts:
                    break
                for output in engine.step():
                    text, new = texts[output.request_id], output.outputs[0]
                    text += new.token_ids
                    tokens += len(new.token_ids)
                    if output.finished:
                        place = int(output.request_id)
                        ended = new.finish_reason == "stop"
                        found.append(Written(place, texts.pop(output.request_id), ended))
                        on_text(found[-1])
                        if most_tokens is None:
                            total -= self._room(prompts[place], most_each) - len(text)
                bar.update(task, completed=min(tokens, total), total=total)
            bar.update(task, completed=total)
        return sorted(found, key=lambda one: one.place)

    def _room(self, prompt: list[int], most: int | None) -> int:
        left = self.longest - len(prompt)
        return left if most is None else min(most, left)


def _options(model: str, longest: int) -> dict[str, Any]:
    """Returns arguments of ``vllm.LLM`` for sequences of at most ``longest`` tokens.

    On a CPU the type that is fast there (vLLM would take bfloat16 for float32), and a KV
    cache in which as many sequences fit as are written together: else they evict each
    other, and are computed again and again.
    """
    if not current_platform.is_cpu():
        return {"max_num_seqs": MOST_SEQUENCES}
    dtype = fast_dtype("cpu")
    block_bytes = BLOCK * _bytes_per_token(ModelConfig(model, dtype=dtype))
    blocks = -(-longest // BLOCK)
    room = int(CACHE_SHARE * psutil.virtual_memory().available) // block_bytes
    together = min(MOST_SEQUENCES, max(1, room // blocks))
    logger.info(
        "Writing in %s, %d sequences at a time, %.1f GiB of KV cache",
        dtype,
        together,
        together * blocks * block_bytes / (1 << 30),
    )
    return {
        "dtype": dtype,
        "max_num_seqs": together,
        # Block 0 is vLLM's own.
        "kv_cache_memory_bytes": (together * blocks + 1) * block_bytes,
        "enable_prefix_caching": False,
    }


def _bytes_per_token(config: ModelConfig) -> int:
    """Returns the bytes of KV cache that one token takes, over all layers."""
    text = config.hf_text_config
    each = 2 * config.get_total_num_kv_heads() * config.get_head_size()
    return int(text.num_hidden_layers * each * config.dtype.itemsize)
