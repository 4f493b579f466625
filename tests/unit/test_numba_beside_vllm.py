"""Numba is loaded so that vLLM can start beside it."""

from __future__ import annotations

import subprocess
import sys

import pytest

AS_VLLM_DOES = """
import importlib, os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])  # as vLLM binds a worker
importlib.import_module({module!r})
assert "numba" in sys.modules
for module in list(sys.modules.values()):
    for value in list((getattr(module, "__dict__", None) or {{}}).values()):
        if hasattr(value, "__dict__"):
            vars(value).get("kernel")
print(sys.modules["numba"].config.NUMBA_NUM_THREADS)
"""


@pytest.mark.parametrize(
    "module",
    [
        "vllm_propd.core.drafting.growth",
        "vllm_propd.kernels.best_tokens",
        "vllm_propd.kernels.early_head_ranks",
        "vllm_propd.kernels.gemm",
        "vllm_propd.kernels.tree_attention_cpu",
        "vllm_propd.simulation.source_replay",
    ],
)
def test_vllm_may_look_at_every_object(module: str) -> None:
    """It does so for each engine that starts in a process where numba is loaded."""
    done = subprocess.run(
        [sys.executable, "-c", AS_VLLM_DOES.format(module=module)],
        capture_output=True, text=True, env={"OMP_NUM_THREADS": "2"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2"
