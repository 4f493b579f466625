"""vLLM's CPU worker and model runner, with trees."""

from __future__ import annotations

from vllm_propd.core import numba_beside_vllm  # noqa: F401 - vLLM imports numba

# isort: split

from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_propd.engine.integration.patches import replaced
from vllm_propd.engine.runner import ProPDRunner
from vllm_propd.engine.startup.warmup import warm_up_cpu_attention
from vllm_propd.engine.worker import ProPDWorker


class ProPDCPUModelRunner(ProPDRunner, CPUModelRunner):
    """ProPD's hooks on vLLM's CPU model runner."""


class ProPDCPUWorker(ProPDWorker, CPUWorker):
    """vLLM's CPU worker, with trees."""

    attention = (
        AttentionBackendEnum.CPU_ATTN,
        "vllm_propd.engine.attention.cpu.TreeAttentionBackend",
    )

    def init_device(self) -> None:
        """Puts our runner in place of vLLM's."""
        with replaced(cpu_worker, "CPUModelRunner", ProPDCPUModelRunner):
            super().init_device()

    def warm_up_attention(self) -> None:
        """Compiles the numba kernel."""
        warm_up_cpu_attention(self.model_config.dtype)
