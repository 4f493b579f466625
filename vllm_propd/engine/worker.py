"""The worker that vLLM starts (``worker_cls``): its own, with our runner inside."""

from __future__ import annotations

import os
from typing import Any
from unittest.mock import patch

# Numba counts cores when it is imported, after vLLM has bound this thread to one of them:
# it would launch one thread, and OpenMP, which it shares with torch, would keep to that.
if threads := os.environ.get("OMP_NUM_THREADS"):
    os.environ.setdefault("NUMBA_NUM_THREADS", threads)

from vllm.logger import init_logger
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_propd.engine.record import Recorder
from vllm_propd.engine.runner import ProPDCPUModelRunner
from vllm_propd.engine.warmup import warm_up_kernels

logger = init_logger("vllm.propd.worker")


class ProPDCPUWorker(CPUWorker):
    """vLLM's CPU worker, with trees."""

    def init_device(self) -> None:
        """Puts our attention backend and our runner in place of vLLM's."""
        register_backend(
            AttentionBackendEnum.CPU_ATTN,
            "vllm_propd.engine.attention.TreeAttentionBackend",
        )
        with patch.object(cpu_worker, "CPUModelRunner", ProPDCPUModelRunner):
            super().init_device()

    def compile_or_warm_up_model(self) -> Any:
        """Compiles our kernels too, so that no request waits for them."""
        times = super().compile_or_warm_up_model()
        warm_up_kernels(self.model_config.dtype)
        self.model_runner.warm_up_halves()
        return times

    def use_pruning(self, keys: dict[str, Any]) -> None:
        """Changes the engine's keys of early pruning (``LLM.collective_rpc``)."""
        config = self.model_runner.propd.model_copy(update=keys)
        self.model_runner.use_pruning(config)

    def start_recording(self, steps: int = 100) -> None:
        """Records the trees of the next steps (``LLM.collective_rpc``)."""
        self.model_runner.recorder = Recorder(steps)

    def take_recording(self) -> list[list[dict[str, Any]]]:
        """Ends the recording; see ``RecordedTree`` for what each entry holds."""
        recorder, self.model_runner.recorder = self.model_runner.recorder, None
        return recorder.take() if recorder is not None else []
