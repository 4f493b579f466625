"""vLLM's CUDA worker, with trees."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from vllm.config import CUDAGraphMode
from vllm.logger import init_logger
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu_worker import Worker

from vllm_propd.engine.attention.cuda import (
    TreeFlashAttentionImpl,
    attention_arrays,
    warm_up,
)
from vllm_propd.engine.pruning.cuda_graphs import in_the_models_place
from vllm_propd.engine.runner import ProPDRunner
from vllm_propd.engine.startup.largest_step import run_largest_step
from vllm_propd.engine.step.tree_step import TreeStep
from vllm_propd.engine.worker import ProPDWorker
from vllm_propd.kernels.transfer import Arrays

logger = init_logger("vllm.propd.cuda_worker")


class ProPDCUDARunner(ProPDRunner):
    """ProPD's hooks on vLLM's CUDA runner; CUDA graphs and memory account for trees."""

    _has_graphs = False

    def profile_run(self, *args: Any, **kwargs: Any) -> None:
        """Also runs what the largest step with trees needs: vLLM measures the memory."""
        super().profile_run(*args, **kwargs)
        run_largest_step(self)

    def capture_model(self) -> int:
        """Captures the CUDA graphs of the model and of its halves; returns their bytes."""
        self._has_graphs = True
        size: int = super().capture_model()
        return size

    def warm_up_halves(self) -> None:
        """Warms up new halves; those that come later, by ``use_settings``, get graphs."""
        super().warm_up_halves()
        if self._has_graphs:
            self.capture_model()

    def _warmup_and_capture(
        self, desc: Any, cudagraph_runtime_mode: CUDAGraphMode, *args: Any, **kwargs: Any
    ) -> None:
        """Captures one size of the model, then of its halves."""
        super()._warmup_and_capture(desc, cudagraph_runtime_mode, *args, **kwargs)
        if self._pruned_forward and cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE:
            with in_the_models_place(self, self._pruned_forward.unpruned):
                super()._warmup_and_capture(desc, cudagraph_runtime_mode, *args, **kwargs)

    def _arrays(self, step: TreeStep) -> Arrays:
        return {**super()._arrays(step), **attention_arrays(step, self._groups)}

    @cached_property
    def _groups(self) -> set[int]:
        """How many query heads share a KV head, for each kind of layer."""
        return {
            builder.group
            for group in self._attn_group_iterator()
            for builder in group.metadata_builders
        }


class ProPDCUDAWorker(ProPDWorker, Worker):
    """ProPD's hooks on vLLM's CUDA worker, which no GPU has run yet."""

    attention = (
        AttentionBackendEnum.FLASH_ATTN,
        "vllm_propd.engine.attention.cuda.TreeFlashAttentionBackend",
    )

    def _make_model_runner(self) -> ProPDCUDARunner:
        """Makes our model runner, which extends vLLM's V1 runner."""
        logger.warning_once(
            "ProPD on CUDA has been tested in Triton's interpreter only: compare its text "
            "with plain vLLM's before you rely on it"
        )
        return ProPDCUDARunner(self.vllm_config, self.device)

    def warm_up_attention(self) -> None:
        """Compiles the Triton kernels for each kind of this model's layers."""
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        impls = [getattr(layer, "impl", None) for layer in layers]
        warm_up(
            [impl for impl in impls if isinstance(impl, TreeFlashAttentionImpl)],
            self.model_config.dtype,
            self.device,
        )
