"""Work that may be killed and goes on: the same work, by one process, with whole files."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
"""What file systems say that cannot lock."""


def changes(then: dict[str, Any], now: dict[str, Any]) -> str:
    """Names what has changed since the work began, as ``name then -> now``.

    Args:
        then: what decided the work that was begun, as it was written.
        now: the same of the work that is to go on.

    Returns:
        The changes, with commas between; empty: there are none.
    """
    changed = [name for name in now if now[name] != then.get(name)]
    return ", ".join(f"{name} {then.get(name)} -> {now[name]}" for name in changed)


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all, whenever the writer is killed."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


@contextmanager
def alone_in(folder: Path, named: str) -> Iterator[None]:
    """Keeps other processes of this machine out of a folder's work, inside.

    The lock goes with the process, however that ends.

    Args:
        folder: of the work; it is there.
        named: the option that named it, with its value, for errors.

    Raises:
        ValueError: another process is at work there.
    """
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{named}: another process is at work there; wait for its end, or give "
                "another folder"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield
