"""Numba and vLLM in one process: what to see to before numba compiles anything.

Importing anything of ``core`` imports this first. An engine's process needs it, too, since
vLLM imports numba itself; so does a script that starts plain vLLM beside our modules, for
its engine's worker imports the script again.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Numba counts cores when it is imported, after vLLM has bound this thread to one of them:
# it would launch one thread, and OpenMP, which it shares with torch, would keep to that.
if threads := os.environ.get("OMP_NUM_THREADS"):
    os.environ.setdefault("NUMBA_NUM_THREADS", threads)

import numba
from llvmlite.binding import ffi

# For each engine that starts in this process, vLLM's CPU platform looks at the ``__dict__``
# of every object of every module. This one, which has none, makes up an attribute for any
# name it is asked for, and vLLM fails on what it gets.
ffi.lib._fntab.setdefault("__dict__", {})

UNKEPT = (
    "Numba finds no folder that it can keep compiled kernels in: each start compiles them "
    "anew. Set NUMBA_CACHE_DIR to a folder that can be written"
)


def _has_folder() -> bool:
    """Whether numba finds a folder for this file's kernels, as it looks for any other."""
    try:
        numba.njit(cache=True)(_has_folder)
    except RuntimeError:
        return False
    return True


def _other_folders() -> Iterator[Path]:
    if root := os.environ.get("VLLM_CACHE_ROOT"):
        yield Path(root) / "propd" / "kernels"
    logging.getLogger("vllm.propd.kernels").warning(UNKEPT)
    yield Path(tempfile.mkdtemp(prefix="vllm-propd-"))


# Otherwise kernels that are to be kept could not be imported: a container may have neither
# a package nor a home that can be written.
if not _has_folder():
    for folder in _other_folders():
        numba.config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"] = str(folder)
        if _has_folder():
            break
