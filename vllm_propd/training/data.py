"""Text into one stream of token ids."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from vllm_propd.training.corpus import read_text


def token_stream(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]
) -> npt.NDArray[np.int32]:
    """``[tokens]`` int32: the texts in a row, each closed by the end-of-text token.

    Raises:
        ValueError: there is no text.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces = [
        np.asarray(ids + end, np.int32)
        for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        if ids
    ]
    if not pieces:
        raise ValueError("there is no text to train on: the files are empty")
    return np.concatenate(pieces)


def read_files(paths: Iterable[Path]) -> list[str]:
    """The texts of files, and of all files inside folders.

    Raises:
        FileNotFoundError: a path that does not exist, named.
    """
    texts = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"--data {path}: there is no such file or folder")
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        texts += [read_text(file) for file in files if file.is_file()]
    return texts
