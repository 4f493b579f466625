"""Text that every machine has: the source of Python's own standard library.

No model hub is needed to train, test or demonstrate this project. Files are split
by a hash of their path inside the library, so the split is the same on every machine
and a held-out file is never seen in training.
"""

from __future__ import annotations

import hashlib
import random
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal

HELD_OUT_SHARE = 16
"""One file in this many is held out."""

MAX_FILE_BYTES = 400_000
"""Larger files are tables (Unicode data, test vectors), not code."""


def is_held_out(relative_path: str) -> bool:
    """Whether the file at ``relative_path`` (inside the library) is kept unseen."""
    digest = hashlib.sha1(relative_path.encode()).digest()
    return digest[0] % HELD_OUT_SHARE == 0


def library_files(split: Literal["train", "held_out"]) -> list[Path]:
    """Returns the library's ``.py`` files of one split, in a fixed order.

    Raises:
        FileNotFoundError: the interpreter has no standard library on disk.
    """
    root = Path(sysconfig.get_path("stdlib"))
    wanted = split == "held_out"
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if "site-packages" not in path.parts
        and is_held_out(path.relative_to(root).as_posix()) == wanted
        and path.stat().st_size <= MAX_FILE_BYTES
    ]
    if not files:
        raise FileNotFoundError(f"no Python source files under {root}")
    return files


def read_text(path: Path) -> str:
    """Reads a file's text; the library's few files in other encodings lose characters."""
    return path.read_text(encoding="utf-8", errors="ignore")


def pieces(
    files: Sequence[Path],
    rng: random.Random,
    min_chars: int,
    read: Callable[[Path], str] = read_text,
) -> Iterator[str]:
    """Yields pieces of text without end, each from a line's start to its file's end.

    Every piece comes from a file of its own while there are enough of them, in their
    order, and is at least ``min_chars`` long.

    Raises:
        ValueError: no file is that long.
    """
    found = True
    while found:
        found = False
        for path in files:
            text = read(path)
            starts = [0] + [i + 1 for i, char in enumerate(text) if char == "\n"]
            starts = [start for start in starts if len(text) - start >= min_chars]
            if starts:
                found = True
                yield text[rng.choice(starts) :]
    raise ValueError(f"none of {len(files)} files has {min_chars} characters")


def held_out_snippets(count: int, seed: int = 0, min_chars: int = 400) -> list[str]:
    """Returns ``count`` pieces of held-out source; see ``pieces``."""
    rng = random.Random(seed)
    files = library_files("held_out")
    rng.shuffle(files)
    return list(islice(pieces(files, rng, min_chars), count))
