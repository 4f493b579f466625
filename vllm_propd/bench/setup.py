"""What commands that measure begin with: tokenizer, text for prompts, engines' options."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vllm_propd.bench.engines import FASTEST
from vllm_propd.bench.settings import BenchSettings
from vllm_propd.bench.workloads.points import Tokenize
from vllm_propd.training.data.documents import DataError, files_of, render_row, rows_of

PROMPTS = "--prompts"


@cache
def load_tokenizer(model: Path) -> PreTrainedTokenizerBase:
    """Loads the target's tokenizer, once."""
    return AutoTokenizer.from_pretrained(model)


def tokenizer_of(model: Path) -> Tokenize:
    """Returns the target's tokenizer, as a function from text to token ids."""
    tokenizer = load_tokenizer(model)
    return lambda text: list(tokenizer(text)["input_ids"])


def prompt_texts(model: Path, files: list[Path]) -> list[str]:
    """Reads the texts that prompts are cut from, in all kinds of files that training reads.

    Args:
        model: folder of the target, whose chat template renders chats.
        files: text, rows of JSON or Parquet with ``text`` or a chat, or folders of them.

    Returns:
        A text for each plain file and each row; [] where there are no files.

    Raises:
        DataError: a file cannot be read, or there is no text in any.
    """
    if not files:
        return []
    tokenizer = load_tokenizer(model)
    rendered = (
        render_row(file, row, tokenizer, PROMPTS)
        for file, row in rows_of(files_of(files, PROMPTS), PROMPTS)
    )
    # What a chat asks is its whole text where nobody has answered yet.
    if not (texts := [text for whole, asked in rendered if (text := whole or asked)]):
        named = ", ".join(map(str, files))
        raise DataError(f"{PROMPTS} {named}: there is no text in it; give other files")
    return texts


def longest_fitting(model: Path, settings: BenchSettings) -> int | None:
    """Returns how many tokens a prompt may have for its answer to find positions, too.

    Args:
        model: folder of the target.
        settings: how many new tokens there are.

    Returns:
        At most so many; 0 or less: not even the answer does. None: the model has no limit.
    """
    config = json.loads((model / "config.json").read_text())
    positions = config.get("max_position_embeddings")
    return None if positions is None else positions - settings.max_tokens


def engine_options(model: Path, settings: BenchSettings, nodes: int) -> dict[str, Any]:
    """Returns the arguments of ``vllm.LLM`` that all arms share.

    Args:
        model: folder of the target.
        settings: what to measure.
        nodes: how many nodes the largest tree has.

    Raises:
        ValueError: the model has too few positions for the prompts and their answers.
    """
    most, fitting = max(settings.batch_sizes), longest_fitting(model, settings)
    longest = settings.longest_prompt + FASTEST * settings.max_tokens + 64
    if fitting is not None:
        if settings.longest_prompt > fitting:
            raise ValueError(
                f"prompts of {settings.longest_prompt} tokens and --max-tokens "
                f"{settings.max_tokens}: the model has {fitting + settings.max_tokens} "
                "positions; give shorter prompts (--prompt-tokens, --lengths) or fewer "
                "tokens"
            )
        longest = min(longest, fitting + settings.max_tokens)
    return {
        "model": str(model),
        "dtype": settings.dtype,
        "max_model_len": longest,
        "max_num_seqs": most,
        # Trees take at most half of it: room for all of them whole.
        "max_num_batched_tokens": max(2048, 2 * most * (nodes + 1)),
        "enforce_eager": settings.enforce_eager,
        # The same prompts come round after round: a cache would skip their prefill.
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 1 << 30,
        "use_tqdm_on_load": False,
        "disable_log_stats": False,
    }
