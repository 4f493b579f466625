"""What ProPD adds to vLLM's workers, whatever their device.

The devices' workers are `cpu_worker.py` and `cuda_worker.py`. Nothing here may import
vLLM's CPU worker: it replaces parts of `torch.cuda` for the whole process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np

from vllm_propd.core import numba_beside_vllm  # noqa: F401 - vLLM imports numba

# isort: split

from vllm.logger import init_logger
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.worker_base import WorkerBase

from vllm_propd.config import ProPDConfig
from vllm_propd.core.drafting.reliability import Reliability
from vllm_propd.engine.attention.tree_split import refuse_other_builders
from vllm_propd.engine.startup.cost_table import measure
from vllm_propd.engine.startup.warmup import warm_up_kernels
from vllm_propd.engine.step.draft_batch import warm_up
from vllm_propd.engine.step.record import Recorder

logger = init_logger("vllm.propd.worker")


@contextmanager
def _replaced(vllms: AttentionBackendEnum, ours: str) -> Iterator[None]:
    """Lets the layers that are built inside get our attention backend.

    The registry is one for the process, which may hold plain engines too
    (``VLLM_ENABLE_V1_MULTIPROCESSING=0``): afterwards it is as before.
    """
    before = vllms.get_path() if vllms.is_overridden() else None
    register_backend(vllms, ours)
    selector._cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        vllms.clear_override()
        if before is not None:
            register_backend(vllms, before)
        selector._cached_get_attn_backend.cache_clear()


class ProPDWorker(WorkerBase):
    """ProPD's hooks on vLLM's workers; a device's worker of vLLM is the next base class.

    Attributes:
        attention: vLLM's attention backend of this device, and the path of ours.
    """

    attention: ClassVar[tuple[AttentionBackendEnum, str]]

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Puts our attention backend in place of vLLM's, in this model."""
        with _replaced(*self.attention):
            super().load_model(load_dummy_weights=load_dummy_weights)

    def compile_or_warm_up_model(self) -> Any:
        """Compiles our kernels too, so that no request waits for them."""
        groups = self.model_runner._attn_group_iterator()
        refuse_other_builders(b for group in groups for b in group.metadata_builders)
        # Before vLLM's own: from its end on it watches for kernels that are compiled.
        self.warm_up_attention()
        times = super().compile_or_warm_up_model()
        warm_up_kernels(self.model_config.dtype)
        warm_up(self.model_runner.ends, self.model_runner.input_batch)
        if self.model_runner.propd.heads:
            self.model_runner.drafter.ask(1)
        self.model_runner.try_halves()
        self.model_runner.start_sizing()
        return times

    def warm_up_attention(self) -> None:
        """Compiles this device's tree attention."""
        raise NotImplementedError

    def use_settings(self, config: str) -> None:
        """Switches to other settings (``LLM.collective_rpc``).

        Args:
            config: ``ProPDConfig`` as JSON, with the same heads.
        """
        self.model_runner.use_settings(ProPDConfig.model_validate_json(config))

    def keep_texts(self) -> None:
        """Keeps what is known of texts by now (``LLM.collective_rpc``)."""
        self.model_runner.drafter.trees.sources.keep()

    def forget_texts(self) -> None:
        """Forgets what was learned of texts since ``keep_texts`` (``LLM.collective_rpc``).

        A benchmark's texts come again, a service's do not.
        """
        self.model_runner.drafter.trees.sources.forget()

    def leave_out(self, seconds: float) -> None:
        """Leaves seconds in which others ran out of step times (``LLM.collective_rpc``)."""
        self.model_runner.sizing.leave_out(seconds)

    def start_sizing_records(self) -> None:
        """Starts to record steps' plans, estimates and times (``LLM.collective_rpc``)."""
        self.model_runner.step_records = []

    def take_sizing_records(self) -> list[dict[str, Any]]:
        """Ends that record and returns it: dicts with the fields of ``StepRecord``."""
        records, self.model_runner.step_records = self.model_runner.step_records, None
        return [asdict(record) for record in records or []]

    def reliability(self) -> list[list[tuple[float, float]]]:
        """Returns (probability said, share found true) by head (``LLM.collective_rpc``).

        Both rise. It is empty where node values are not learned from what heads say.
        """
        prices = self.model_runner.drafter.trees.prices
        if prices is None or not isinstance(estimator := prices.taught, Reliability):
            return []
        curves: list[list[tuple[float, float]]]
        curves = np.exp(np.stack(estimator.curve(), -1)).tolist()
        return curves

    def start_recording(self, steps: int = 100, accept: bool = True) -> None:
        """Starts to record trees (``LLM.collective_rpc``); see ``Recorder``."""
        self.model_runner.start_recording(Recorder(steps, accept))

    def take_recording(self) -> list[list[dict[str, Any]]]:
        """Ends the recording of trees, and returns it; see ``RecordedTree``."""
        recorder = self.model_runner.recorder
        self.model_runner.start_recording(None)
        return recorder.take() if recorder is not None else []

    def recorded_answers(self) -> list[dict[str, Any]]:
        """Returns what a recording without acceptance holds to draft from, so far.

        ``LLM.collective_rpc``; see ``RecordedAnswer``.
        """
        recorder = self.model_runner.recorder
        return recorder.take_answers() if recorder is not None else []

    def step_costs(self) -> dict[str, list[float]]:
        """Times steps and drafts now (``LLM.collective_rpc``); returns a ``CostTable``."""
        return measure(self.model_runner).model_dump()
