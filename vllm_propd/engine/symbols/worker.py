"""The worker, and what runs while it starts."""

from __future__ import annotations

from vllm_propd.engine.symbols.symbol import Symbol

SYMBOLS = (
    Symbol(
        "vllm.v1.worker.cpu_worker:CPUWorker.init_device",
        "overridden",
        "self",
        "puts our runner in place while vLLM builds its own",
        "the worker names its runner class in the middle of this method",
        "a runner_cls option, or a method that returns the runner's class",
    ),
    Symbol(
        "vllm.v1.worker.cpu_worker:CPUModelRunner",
        "replaced",
        "vllm_config device",
        "is our subclass while init_device runs",
        "see init_device",
        "see init_device",
    ),
    Symbol(
        "vllm.v1.worker.worker_base:WorkerBase.load_model",
        "overridden",
        "self load_dummy_weights",
        "puts our attention backend in place while the model's layers are built",
        "layers look their backend up when they are built",
        "a backend that the platform takes from the engine's config",
    ),
    Symbol(
        "vllm.v1.worker.worker_base:WorkerBase.compile_or_warm_up_model",
        "overridden",
        "self",
        "compiles our kernels as well",
        "no request should wait for a compiler",
        "nothing: this is the place for it",
    ),
    Symbol(
        "vllm.v1.worker.gpu_model_runner:build_logitsprocs",
        "replaced",
        "vllm_config device is_pin_memory is_pooling_model custom_logitsprocs",
        "builds all logits processors, as without speculation, while the runner starts",
        "with speculation vLLM builds min_tokens only; our walk can apply every one",
        "logits processors with speculative decoding in vLLM",
    ),
)
