"""Training, demo and benchmark."""

from __future__ import annotations

from vllm_propd.engine.symbols.symbol import Symbol

SYMBOLS = (
    *(
        Symbol(
            f"vllm.{path}",
            "read",
            "vllm_config",
            f"the benchmark's arm {arm}; never touched",
            "ProPD is measured against what vLLM has",
            "nothing",
        )
        for arm, path in (
            ("medusa", "v1.spec_decode.medusa:MedusaProposer"),
            ("medusa", "model_executor.models.medusa:Medusa"),
            ("ngram", "v1.spec_decode.ngram_proposer:NgramProposer"),
            ("suffix", "v1.spec_decode.suffix_decoding:SuffixDecodingProposer"),
        )
    ),
    Symbol(
        "vllm.triton_utils.dispatcher:_rebind_kernels",
        "called",
        "overrides",
        "finds an empty ``__dict__`` in llvmlite (core/numba_beside_vllm.py)",
        "it takes vars() of any object for a dict; beside numba no engine would start",
        "a check of the type there",
    ),
    Symbol(
        "vllm.model_executor.models.registry:_ModelRegistry.is_pp_supported_model",
        "called",
        "self architectures model_config",
        "refuses to train heads for a model that cannot stop after a layer",
        "early pruning runs a model in two parts, as pipeline parallelism does",
        "nothing",
    ),
    Symbol(
        "vllm:LLM",
        "called",
        "model dtype enforce_eager seed kv_cache_memory_bytes",
        "writes the texts that heads are measured on, and with --self-distill trained on",
        "what heads meet in serving is the target's own text",
        "nothing",
    ),
    Symbol(
        "vllm.v1.engine.llm_engine:LLMEngine.add_request",
        "called",
        "self request_id prompt params",
        "benchmark, demo and the writing of training text run requests step by step",
        "see LLMEngine.step",
        "see LLMEngine.step",
    ),
    Symbol(
        "vllm.sampling_params:RequestOutputKind",
        "read",
        "",
        "training's text comes out as what is new in each step",
        "its bar counts tokens, and LLM.generate's counts requests",
        "a bar of vLLM's that counts tokens",
    ),
    Symbol(
        "vllm.config:ModelConfig",
        "called",
        "model",
        "names the architectures of a model without loading it",
        "see is_pp_supported_model",
        "nothing",
    ),
    Symbol(
        "vllm.v1.engine.llm_engine:LLMEngine.step",
        "called",
        "self",
        "demo, benchmark and training's text run requests step by step, and count",
        "LLM.generate does not say in how many steps a text was made",
        "steps per request in vLLM's RequestOutput.metrics",
    ),
    Symbol(
        "vllm.v1.metrics.loggers:StatLoggerManager.record",
        "replaced",
        "scheduler_stats",
        "the benchmark's own counter takes the place of an engine's stat loggers",
        "all engines of a process share one metrics registry, the last one's",
        "a registry for each engine",
    ),
    Symbol(
        "vllm.v1.spec_decode.metrics:SpecDecodingStats",
        "read",
        "num_drafts num_draft_tokens num_accepted_tokens_per_pos",
        "the benchmark counts drafted and accepted tokens",
        "see StatLoggerManager.record",
        "see StatLoggerManager.record",
    ),
    Symbol(
        "vllm.v1.engine.async_llm:AsyncLLM.from_engine_args",
        "called",
        "engine_args stat_loggers",
        "the benchmark's trace runs an engine for each arm, with a counter of its own",
        "requests arrive over time, as at a server",
        "nothing",
    ),
    Symbol(
        "vllm.v1.engine.async_llm:AsyncLLM.generate",
        "called",
        "self prompt sampling_params request_id",
        "streams a request of the benchmark's trace",
        "see AsyncLLM.from_engine_args",
        "nothing",
    ),
    Symbol(
        "vllm.v1.engine.async_llm:AsyncLLM.collective_rpc",
        "called",
        "self method",
        "puts stopwatches into the workers of the benchmark's trace",
        "see AsyncLLM.from_engine_args",
        "nothing",
    ),
    Symbol(
        "vllm.v1.metrics.stats:IterationStats",
        "read",
        "",
        "the benchmark's trace counts decode steps",
        "outputs of a stream merge where its reader is slow",
        "see LLMEngine.step",
        "inter_token_latencies_iter",
    ),
)
