"""How parts of vLLM's are changed: for good, once and recognisably; or for a while."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

Patch = tuple[Any, str, Callable[[Any], Any]]
"""An owner, the name of its attribute, and the function that makes ours of the original."""


class PatchedByOthersError(RuntimeError):
    """A part of vLLM that ours would stand on has been replaced by someone else."""


def apply(patches: Iterable[Patch]) -> None:
    """Replaces each ``owner.name`` by ``wrap(original)``, unless that has been done.

    It replaces all or none: half of them would draft what nobody verifies.

    Raises:
        PatchedByOthersError: one is not vLLM's any more; the message says whose it is.
    """
    wanted = [patch for patch in patches if not _is_ours(getattr(*patch[:2]))]
    for owner, name, _ in wanted:
        _check(owner, name)
    for owner, name, wrap in wanted:
        original = getattr(owner, name)
        wrapped: Any = functools.wraps(original)(wrap(original))
        wrapped._propd = True
        static = isinstance(owner.__dict__.get(name), staticmethod)
        setattr(owner, name, staticmethod(wrapped) if static else wrapped)


def _is_ours(function: Any) -> bool:
    return bool(getattr(function, "_propd", False))


def _check(owner: type, name: str) -> None:
    """Refuses a function that is not its owner's: its globals say whose it really is.

    What ``functools.wraps`` copies would say whose the original was.
    """
    function = getattr(owner, name)
    module = getattr(function, "__globals__", {}).get("__name__", type(function).__module__)
    own = {cls.__module__.partition(".")[0] for cls in owner.__mro__}
    if module.partition(".")[0] not in own:
        raise PatchedByOthersError(
            f"{owner.__name__}.{name} has been replaced by {module}: what ProPD builds on "
            "is not vLLM's any more. Uninstall one of the two, or leave this plugin out of "
            "VLLM_PLUGINS"
        )


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets ``owner.name`` to ``value`` inside, and back to what it was afterwards."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
