"""What work that goes on must have in common with what was begun."""

from __future__ import annotations

from pathlib import Path
from typing import Any


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
