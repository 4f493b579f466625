"""The one way a function of vLLM's is patched: once, and recognisably."""

from __future__ import annotations

import functools
from collections.abc import Callable
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
