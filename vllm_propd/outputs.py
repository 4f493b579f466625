"""Folders that work writes to at its end: whether they can be written is known before."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile


def check_writable(folder: Path, named: str) -> None:
    """Makes a folder, and tries to write a file there.

    Args:
        folder: made if it is not there.
        named: the option that named it, with its value, for errors.

    Raises:
        OSError: the folder cannot be made, or no file can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            f"{named} cannot be written ({reason}): give a folder that can be"
        ) from error
