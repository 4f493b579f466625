"""Items that need no engine: what is installed, what imports, and the kernels' tests."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu_first_run.setting import Notes, Setting

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("torch", "triton", "vllm", "transformers", "numpy", "numba")
OURS = (
    "engine.cuda_worker", "engine.attention.cuda", "engine.pruning.cuda_graphs",
    "engine.pruning.pruned_forward", "engine.runner", "kernels.pruning_triton",
    "kernels.tree_attention_triton",
)  # fmt: skip
WATCHED = (
    "Event", "Stream", "stream", "current_stream", "synchronize", "pin_memory",
    "record_stream", "empty_cache", "memory_stats", "device_count",
)  # fmt: skip
QUICK = "tests/kernels/test_pruning_triton.py"
"""What Triton's interpreter has done in a minute."""


def check_imports(setting: Setting, notes: Notes) -> None:
    """Versions, the device, FlashAttention, and our modules, which leave torch alone."""
    import torch

    notes["python"] = platform.python_version()
    for name in VERSIONS:
        try:
            module = importlib.import_module(name)
            notes[name] = getattr(module, "__version__", "?")
        except ImportError as error:
            notes[name] = f"missing: {error}"
    if setting.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        notes["device"] = properties.name
        notes["capability"] = f"{properties.major}.{properties.minor}"
        notes["memory, GiB"] = round(properties.total_memory / 2**30, 1)
        notes["shared memory of a block"] = properties.shared_memory_per_block_optin
        fa_utils = importlib.import_module("vllm.v1.attention.backends.fa_utils")
        notes["FlashAttention"] = fa_utils.get_flash_attn_version()
        importlib.import_module("vllm.vllm_flash_attn")
    else:
        notes["device"] = f"CPU, {torch.get_num_threads()} threads"
        notes["FlashAttention"] = "not on this device"
    changed = replaced_parts()
    notes["parts of torch that importing ours has replaced"] = ", ".join(changed) or "none"
    if changed:
        raise SystemExit(f"replaced: {changed}")


def replaced_parts() -> list[str]:
    """Imports our CUDA modules; the parts of torch that are others afterwards."""
    import torch

    before = _parts(torch)
    for name in OURS:
        importlib.import_module(f"vllm_propd.{name}")
    after = _parts(torch)
    return [place for place, was in before.items() if after[place] is not was]


def _parts(torch: Any) -> dict[str, Any]:
    owners = (torch, torch.cuda, torch.accelerator, torch.Tensor)
    return {
        f"{owner.__name__}.{name}": getattr(owner, name, None)
        for owner in owners
        for name in WATCHED
    }


def run_kernel_tests(setting: Setting, notes: Notes) -> None:
    """The tests of our kernels: on a GPU all, without the interpreter."""
    tests = "tests/kernels" if setting.on_gpu else QUICK
    environment = {**os.environ, "TRITON_INTERPRET": str(int(not setting.on_gpu))}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, tests], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    notes["tests"] = lines[-1] if lines else "no output"
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if failed:
        notes["failed"] = failed
    print(done.stdout[-6000:], done.stderr[-2000:])
    if done.returncode:
        raise SystemExit(done.returncode)
