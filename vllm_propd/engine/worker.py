"""The worker that vLLM starts (``worker_cls``): its own, with our runner inside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any
from unittest.mock import patch

from vllm_propd.engine import numba_beside_vllm  # noqa: F401 - vLLM imports numba

# isort: split

from vllm.logger import init_logger
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_propd.config import ProPDConfig
from vllm_propd.engine.costs import measure
from vllm_propd.engine.record import Recorder
from vllm_propd.engine.runner import ProPDCPUModelRunner
from vllm_propd.engine.warmup import warm_up_kernels

logger = init_logger("vllm.propd.worker")

BACKEND = "vllm_propd.engine.attention.TreeAttentionBackend"


@contextmanager
def _tree_attention() -> Iterator[None]:
    """The layers built inside get our attention backend.

    The registry is one for the process, which may hold plain engines too
    (``VLLM_ENABLE_V1_MULTIPROCESSING=0``): afterwards it is as before.
    """
    ours = AttentionBackendEnum.CPU_ATTN
    before = ours.get_path() if ours.is_overridden() else None
    register_backend(ours, BACKEND)
    selector._cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        ours.clear_override()
        if before is not None:
            register_backend(ours, before)
        selector._cached_get_attn_backend.cache_clear()


class ProPDCPUWorker(CPUWorker):
    """vLLM's CPU worker, with trees."""

    def init_device(self) -> None:
        """Puts our runner in place of vLLM's."""
        with patch.object(cpu_worker, "CPUModelRunner", ProPDCPUModelRunner):
            super().init_device()

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Puts our attention backend in place of vLLM's, in this model."""
        with _tree_attention():
            super().load_model(load_dummy_weights=load_dummy_weights)

    def compile_or_warm_up_model(self) -> Any:
        """Compiles our kernels too, so that no request waits for them."""
        times = super().compile_or_warm_up_model()
        warm_up_kernels(self.model_config.dtype)
        self.model_runner.warm_up_halves()
        self.model_runner.start_sizing()
        return times

    def use_settings(self, config: str) -> None:
        """Goes on with other settings (``LLM.collective_rpc``).

        Args:
            config: ``ProPDConfig`` as JSON, with the same heads.
        """
        self.model_runner.use_settings(ProPDConfig.model_validate_json(config))

    def start_sizing_records(self) -> None:
        """Records plans, estimates and times of steps (``LLM.collective_rpc``)."""
        self.model_runner.step_records = []

    def take_sizing_records(self) -> list[dict[str, Any]]:
        """Ends that; see ``StepRecord`` for what each entry holds."""
        records, self.model_runner.step_records = self.model_runner.step_records, None
        return [asdict(record) for record in records or []]

    def start_recording(self, steps: int = 100, accept: bool = True) -> None:
        """Records trees (``LLM.collective_rpc``); see ``Recorder``."""
        self.model_runner.start_recording(Recorder(steps, accept))

    def take_recording(self) -> list[list[dict[str, Any]]]:
        """Ends the recording; see ``RecordedTree`` for what each entry holds."""
        recorder = self.model_runner.recorder
        self.model_runner.start_recording(None)
        return recorder.take() if recorder is not None else []

    def step_costs(self) -> dict[str, list[float]]:
        """Times steps and drafts now; see ``CostTable`` (``LLM.collective_rpc``)."""
        return measure(self.model_runner).model_dump()
