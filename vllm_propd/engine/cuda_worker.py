"""vLLM's CUDA worker, with trees."""

from __future__ import annotations

from typing import Any

from vllm.config import CUDAGraphMode
from vllm.logger import init_logger
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu_worker import Worker

from vllm_propd.engine.cuda_attention import warm_up
from vllm_propd.engine.graphs import in_the_models_place
from vllm_propd.engine.runner import ProPDRunner
from vllm_propd.engine.worker import ProPDWorker

logger = init_logger("vllm.propd.cuda_worker")


class ProPDCUDARunner(ProPDRunner):
    """The hooks, and CUDA graphs of both halves."""

    def profile_run(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the halves before anything is captured."""
        super().profile_run(*args, **kwargs)
        self.warm_up_halves()

    def _warmup_and_capture(
        self, desc: Any, cudagraph_runtime_mode: CUDAGraphMode, *args: Any, **kwargs: Any
    ) -> None:
        """One size of the model, then of its halves."""
        super()._warmup_and_capture(desc, cudagraph_runtime_mode, *args, **kwargs)
        if self._pruned_forward and cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE:
            with in_the_models_place(self, self._pruned_forward.unpruned):
                super()._warmup_and_capture(desc, cudagraph_runtime_mode, *args, **kwargs)


class ProPDCUDAWorker(ProPDWorker, Worker):
    """The hooks on vLLM's CUDA worker, which no GPU has run yet."""

    attention = (
        AttentionBackendEnum.FLASH_ATTN,
        "vllm_propd.engine.cuda_attention.TreeFlashAttentionBackend",
    )

    def _make_model_runner(self) -> ProPDCUDARunner:
        """Ours, on vLLM's V1 runner."""
        logger.warning_once(
            "ProPD on CUDA has been tested in Triton's interpreter only: compare its text "
            "with plain vLLM's before you rely on it"
        )
        return ProPDCUDARunner(self.vllm_config, self.device)

    def warm_up_attention(self) -> None:
        """Compiles the Triton kernel for this model's heads."""
        model, parallel = self.model_config, self.parallel_config
        warm_up(
            model.get_num_attention_heads(parallel),
            model.get_num_kv_heads(parallel),
            model.get_head_size(),
            model.dtype,
            self.device,
        )
