"""Prompts of three tasks, from text that the machine has: code, prose, tables.

What is found differs between machines, so figures by task compare arms, not machines.
"""

from __future__ import annotations

import gzip
import random
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from itertools import zip_longest
from pathlib import Path

from vllm_propd.corpus import MAX_FILE_BYTES, library_files, pieces

LIBRARIES = sorted({Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")})
"""Folders of Python packages."""

SHARES = [Path(sysconfig.get_path("data")) / "share", Path("/usr/share")]
"""Folders of a system's documentation, where there is one."""

PROSE = ("*.txt", "*.rst", "*.md", "LICENSE*", "METADATA")
TABLES = ("*.json", "*.csv", "*.tsv")

ROFF = re.compile(r"^[.'].*\n?|\\f(?:\[\w*\]|\(..|.)|\\&", re.MULTILINE)
"""Matches what a manual page has beside its text: requests, fonts, empty characters."""


def _packaged(*patterns: str) -> dict[str, list[Path]]:
    """Returns the libraries' files of these names, by package, without data of tests."""
    found: dict[str, list[Path]] = {}
    for folder in LIBRARIES:
        for file in sorted(folder.rglob("*")):
            if any(fnmatch(file.name, pattern) for pattern in patterns):
                inner = file.relative_to(folder).parts
                if not {"test", "tests", "site-packages"}.intersection(inner):
                    # All packages' metadata are one, or they would be most of it.
                    package = inner[0].rpartition(".")[2]
                    found.setdefault(package, []).append(file)
    return found


def _shared(*patterns: str) -> list[Path]:
    """Returns the files of these paths in the system's documentation."""
    return sorted({f for folder in SHARES for p in patterns for f in folder.glob(p)})


TASKS: dict[str, Callable[[], list[list[Path]]]] = {
    "code": lambda: [library_files("held_out")],
    "prose": lambda: [
        [file for files in _packaged(*PROSE).values() for file in files],
        _shared("doc/**/*", "common-licenses/*"),
        _shared("man/man?/*"),
    ],
    "tables": lambda: list(_packaged(*TABLES).values()),
}
"""The files of each task, in families: drawn in turn, no kind of text is most of it."""


def text_of(file: Path) -> str:
    """Returns a file's text, unpacked, without headers and markup of its kind.

    It is cut at ``MAX_FILE_BYTES``, and empty where the file cannot be read or is no text.
    """
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rb") as stream:
            data = stream.read(MAX_FILE_BYTES)
    except (OSError, EOFError, zlib.error):  # a folder, a dead link, a broken archive
        return ""
    if b"\0" in data:
        return ""
    text = data.decode(errors="ignore")
    if file.name == "METADATA":
        return text.partition("\n\n")[2]
    return ROFF.sub("", text).replace(r"\-", "-") if "man" in file.parts else text


def task_texts(task: str, min_chars: int, seed: int = 0) -> Iterator[str]:
    """Yields a task's pieces of text without end, each at least ``min_chars`` long.

    Every piece comes from a file of its own while there are enough of them; the same
    seed on the same machine gives the same pieces.

    Raises:
        ValueError: no text of that length is on the machine (at the first piece).
    """
    rng = random.Random(seed)
    families = TASKS[task]()
    for family in families:
        rng.shuffle(family)
    rng.shuffle(families)
    files = [file for turn in zip_longest(*families) for file in turn if file]
    try:
        yield from pieces(files, rng, min_chars, text_of)
    except ValueError as error:
        raise ValueError(f"task {task}: too little text on this machine: {error}") from None
