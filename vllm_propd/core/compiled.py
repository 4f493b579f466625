"""Kernels that numba keeps on disk, and the code of other files that is in them."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any


def with_parts(*modules: ModuleType) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a decorator, below ``njit``, that puts modules' source into a kernel's name.

    The name of its cache file follows. Numba drops a kernel that it has kept when the
    kernel's own file changes, not when code or constants do that it has from others.

    Args:
        modules: those whose functions or constants are in the kernel.
    """
    source = "".join(map(inspect.getsource, modules)).encode()
    name = hashlib.sha256(source).hexdigest()[:16]

    def named(kernel: Callable[..., Any]) -> Callable[..., Any]:
        kernel.__qualname__ += f"_{name}"
        return kernel

    return named
