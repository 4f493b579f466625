"""The tokenizer that rows are read with: the one that the engines have."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from transformers import AutoTokenizer, PreTrainedTokenizerBase


class TokenizerSource(NamedTuple):
    """Where a tokenizer comes from.

    Attributes:
        name: folder or hub name.
        revision: branch, tag or commit on the hub; None: its main branch.
        trust_remote_code: whether code that comes with it may run.
    """

    name: str
    revision: str | None = None
    trust_remote_code: bool = False


@lru_cache(maxsize=1)
def load_tokenizer(source: TokenizerSource) -> PreTrainedTokenizerBase:
    """Loads a tokenizer, once in a process.

    Raises:
        ValueError: it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(
            source.name,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
        )
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"the tokenizer of {source.name} cannot be loaded ({error}); --engine-kwargs "
            "may have another tokenizer, its tokenizer_revision, and trust_remote_code"
        ) from error
