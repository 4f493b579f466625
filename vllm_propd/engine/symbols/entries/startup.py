"""What is asked of an engine before it starts, and the worker while it does."""

from __future__ import annotations

from vllm_propd.engine.symbols.symbol import Symbol

_CONFIGS = {
    "ParallelConfig": "pipeline_parallel_size data_parallel_size "
    "decode_context_parallel_size enable_expert_parallel distributed_executor_backend",
    "CacheConfig": "cache_dtype",
    "StructuredOutputsConfig": "backend",
    "ModelConfig": "dtype served_model_name enable_sleep_mode",
    "CompilationConfig": "mode cudagraph_mode splitting_ops use_inductor_graph_partition",
    "AttentionConfig": "backend",
    "VllmConfig": "model_config parallel_config cache_config scheduler_config "
    "device_config compilation_config structured_outputs_config lora_config "
    "kv_transfer_config speculative_config additional_config",
}
_DERIVED = {
    "ParallelConfig": "data_parallel_index world_size",
    "ModelConfig": "hf_text_config runner_type",
}
_ASKED = {
    "config:ParallelConfig": "use_ubatching",
    "config:ModelConfig": "get_head_size get_hidden_size get_vocab_size "
    "get_num_attention_heads get_num_kv_heads get_total_num_kv_heads architectures is_moe "
    "use_mla uses_mrope rswa_window is_attention_free is_hybrid is_encoder_decoder",
    "config:CompilationConfig": "splitting_ops_contain_kv_cache_update",
    "config:CUDAGraphMode": "NONE PIECEWISE has_full_cudagraphs has_piecewise_cudagraphs",
    "config:CompilationMode": "NONE VLLM_COMPILE",
    "config:VllmConfig": "use_v2_model_runner num_speculative_tokens",
    "platforms.interface:Platform": "is_cpu is_cuda get_device_capability",
}

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
    *(
        Symbol(
            f"vllm.config:{name}",
            "read",
            fields,
            "tells whether this engine can run ProPD, and with what",
            "what cannot work is refused at start-up",
            "nothing",
            _DERIVED.get(name, ""),
        )
        for name, fields in _CONFIGS.items()
    ),
    *(
        Symbol(
            f"vllm.{owner}.{name}",
            "read",
            "",
            "likewise; derived from these fields",
            "what cannot work is refused at start-up",
            "nothing",
        )
        for owner, names in _ASKED.items()
        for name in names.split()
    ),
    *(
        Symbol(
            f"vllm.envs:{name}",
            "read",
            "",
            what,
            "users know where vLLM writes",
            "nothing",
        )
        for name, what in (
            ("VLLM_RPC_BASE_PATH", "where workers count for the front end"),
            ("VLLM_CACHE_ROOT", "where tables of step costs are kept"),
        )
    ),
    Symbol(
        "vllm.platforms.interface:Platform.get_device_name",
        "called",
        "device_id",
        "a table of step costs is of one kind of device",
        "hosts of several kinds may share the folder of tables",
        "the device in vLLM's VllmConfig.compute_hash",
    ),
)
