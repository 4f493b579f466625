"""Items that need no engine: what is installed, what imports, and the kernels' tests."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from gpu_first_run.setting import ROOT, Notes, Setting

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

ON_GPU = (
    QUICK, "tests/kernels/test_tree_attention_triton.py",
    "tests/kernels/test_cuda_attention.py",
)  # fmt: skip
"""The others skip there, compile without a GPU, or are an item of their own."""

HANGING_S = 60
"""After which a test's stack is shown."""


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
    lacks = None
    if setting.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        notes["device"] = properties.name
        notes["capability"] = f"{properties.major}.{properties.minor}"
        notes["memory, GiB"] = round(properties.total_memory / 2**30, 1)
        notes["shared memory of a block"] = properties.shared_memory_per_block_optin
        lacks = lacking_attention(properties.major)
        notes["FlashAttention"] = lacks or "loads"
    else:
        notes["device"] = f"CPU, {torch.get_num_threads()} threads"
        notes["FlashAttention"] = "not on this device"
    changed = replaced_parts()
    notes["parts of torch that importing ours has replaced"] = ", ".join(changed) or "none"
    if changed:
        raise SystemExit(f"replaced: {changed}")
    if lacks:  # vLLM goes on without a word until the first engine needs it
        raise SystemExit(f"FlashAttention {lacks}")


def lacking_attention(major: int) -> str | None:
    """Why no engine of this device would start, or none.

    Args:
        major: of the compute capability; 9 needs FlashAttention 3.
    """
    utils = importlib.import_module("vllm.v1.attention.backends.fa_utils")
    version = utils.get_flash_attn_version()
    wanted = 3 if major == 9 else version
    if version is not None and version == wanted:
        return None
    module = importlib.import_module("vllm.vllm_flash_attn.flash_attn_interface")
    asked = wanted or (4 if major == 10 else 2)
    reason = module.fa_version_unsupported_reason(asked)
    return f"{asked} does not load, vLLM has {version}: {reason}"


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
    """The tests of our kernels, on a GPU without the interpreter."""
    tests = ON_GPU if setting.on_gpu else (QUICK,)
    environment = {**os.environ, "TRITON_INTERPRET": str(int(not setting.on_gpu))}
    run_tests(tests, environment, notes)


def run_tests(tests: Sequence[str], environment: dict[str, str], notes: Notes) -> None:
    """Runs tests in a process of its own; what it prints is in the log as it comes."""
    command = [
        sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider",
        # What one file cannot import says nothing of the others.
        "--continue-on-collection-errors", "-o", f"faulthandler_timeout={HANGING_S}",
    ]  # fmt: skip
    environment = {**environment, "PYTHONUNBUFFERED": "1"}
    failed, last = [], "no output"
    with subprocess.Popen(
        [*command, *tests], cwd=ROOT, env=environment, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        for line in map(str.rstrip, child.stdout):
            print(line, flush=True)
            last = line or last
            if line.startswith(("FAILED", "ERROR")):
                failed.append(line)
                notes["failed"] = failed
    notes["tests"] = last
    if child.returncode:
        raise SystemExit(child.returncode)
