"""Numba and vLLM in one process: two things to see to before numba is imported.

Importing anything of ``core`` imports this first. An engine's process needs it, too, since
vLLM imports numba itself; so does a script that starts plain vLLM beside our modules, for
its engine's worker imports the script again.
"""

from __future__ import annotations

import os

# Numba counts cores when it is imported, after vLLM has bound this thread to one of them:
# it would launch one thread, and OpenMP, which it shares with torch, would keep to that.
if threads := os.environ.get("OMP_NUM_THREADS"):
    os.environ.setdefault("NUMBA_NUM_THREADS", threads)

from llvmlite.binding import ffi

# For each engine that starts in this process, vLLM's CPU platform looks at the ``__dict__``
# of every object of every module. This one, which has none, makes up an attribute for any
# name it is asked for, and vLLM fails on what it gets.
ffi.lib._fntab.setdefault("__dict__", {})
