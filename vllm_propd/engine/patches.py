"""How parts of vLLM's are changed: for good, once and recognisably; or for a while."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def patch_once(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    """Replaces ``owner.name`` by ``wrap(original)``, unless that has been done."""
    original = getattr(owner, name)
    if getattr(original, "_propd", False):
        return
    wrapped: Any = functools.wraps(original)(wrap(original))
    wrapped._propd = True
    static = isinstance(owner.__dict__.get(name), staticmethod)
    setattr(owner, name, staticmethod(wrapped) if static else wrapped)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is ``value`` inside, and afterwards what it was."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
