"""A GPU's engine compiles no kernel that only CPUs run: each costs its start seconds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_propd.core.sources import successors
from vllm_propd.engine.startup import warmup


@pytest.mark.parametrize("on_cpu", [True, False], ids=["cpu", "gpu"])
def test_only_what_the_device_runs(on_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def watched(name: str) -> Any:
        function = getattr(warmup, name)

        def call(*args: Any) -> Any:
            called.append(name)
            return function(*args)

        return call

    for name in ("best_tokens", "ranks"):
        monkeypatch.setattr(warmup, name, watched(name))
    platform = SimpleNamespace(is_cpu=lambda: on_cpu)
    monkeypatch.setattr(warmup, "current_platform", platform)
    warmup.warm_up_kernels(torch.float32)
    assert called == (["best_tokens", "ranks"] if on_cpu else [])
    # What a GPU sends is of the types that a CPU finds: one kernel for both.
    before = list(successors._see.signatures)
    platform.is_cpu = lambda: not on_cpu
    warmup.warm_up_kernels(torch.float32)
    assert list(successors._see.signatures) == before
