"""Numba is loaded so that vLLM can start beside it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


RUNS_A_KERNEL = """
import numpy as np
from vllm_propd.core.sizing.step_cost import StepCost
print(StepCost(np.array([1, 3]), np.array([1.0, 2.0])).seconds_of(2))
"""


@pytest.mark.parametrize("root", ["writable", "no folder", None])
def test_kernels_are_kept_elsewhere_where_nothing_else_can_be_written(
    root: str | None, tmp_path: Path
) -> None:
    """As in a container with a user who owns neither packages nor a home."""
    written = tmp_path / "writable" / "propd" / "kernels"
    (tmp_path / "no folder").touch()
    # Numba looks nowhere but where it is told to.
    known = {"NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"}
    known |= {"TMPDIR": str(tmp_path)}
    known |= {"VLLM_CACHE_ROOT": str(tmp_path / root)} if root else {}
    done = subprocess.run(
        [sys.executable, "-c", RUNS_A_KERNEL],
        capture_output=True, text=True, env=known, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1.5"
    (place,) = [written] if root == "writable" else tmp_path.glob("vllm-propd-*")
    assert list(place.glob("*/*.nbc"))
    assert ("Set NUMBA_CACHE_DIR" in done.stderr) == (root != "writable")
