"""Tree attention on the CPU, and the commit of accepted nodes."""

from __future__ import annotations

from vllm_propd.engine.symbols.behaviour import OWN, Behaviour
from vllm_propd.engine.symbols.symbol import Symbol

_CPU_ATTENTION = "vllm.v1.attention.backends.cpu_attn"
_BACKENDS = "vllm.v1.attention.backends.registry:AttentionBackendEnum"

SYMBOLS = (
    Symbol(
        "vllm.model_executor.layers.attention:Attention",
        "read",
        "",
        "a layer's name and implementation, for staging and commit",
        "the cache update belongs to the implementation",
        "nothing",
        "layer_name impl",
    ),
    Symbol(
        "vllm.v1.attention.backends.registry:register_backend",
        "called",
        "backend class_path is_mamba",
        "puts our CPU attention backend in place of vLLM's while our model is built",
        "the supported way to override a backend",
        "nothing: this is the supported way",
    ),
    Symbol(
        f"{_BACKENDS}.clear_override",
        "called",
        "self",
        "takes the override back",
        "other engines of the process keep vLLM's backend",
        "see WorkerBase.load_model",
    ),
    *(
        Symbol(
            f"{_BACKENDS}.{name}",
            "read",
            "",
            "the backend in whose place ours stands",
            "trees need one that knows them",
            "see get_impl_cls",
        )
        for name in ("CPU_ATTN", "FLASH_ATTN")
    ),
    *(
        Symbol(
            f"{_BACKENDS}.{name}",
            "called",
            "self",
            "an override that others had put there comes back",
            "other engines of the process keep what they had",
            "see WorkerBase.load_model",
        )
        for name in ("get_path", "is_overridden")
    ),
    Symbol(
        "vllm.v1.attention.selector:_cached_get_attn_backend",
        "read",
        "",
        "forgets what was looked up, before and after the override",
        "vLLM looks a backend up once in a process",
        "see WorkerBase.load_model",
    ),
    Symbol(
        f"{_CPU_ATTENTION}:CPUAttentionBackend.get_impl_cls",
        "overridden",
        "",
        "returns our layer implementation",
        "trees need a mask that vLLM's kernel does not take",
        "a mask, or log-sum-exp output, in vLLM's CPU attention",
    ),
    Symbol(
        f"{_CPU_ATTENTION}:CPUAttentionBackend.get_builder_cls",
        "overridden",
        "",
        "returns our metadata builder",
        "see get_impl_cls",
        "see get_impl_cls",
    ),
    Symbol(
        f"{_CPU_ATTENTION}:CPUAttentionMetadataBuilder.build",
        "overridden",
        "self common_prefix_len common_attn_metadata fast_build",
        "splits a step into requests with and without drafts",
        "each part has its kernel",
        "see get_impl_cls",
    ),
    Symbol(
        f"{_CPU_ATTENTION}:CPUAttentionMetadataBuilder._set_isa_to_layers",
        "called",
        "self layer_names",
        "chooses the cache layout 'vec' where vLLM would choose AMX tiles",
        "our kernel reads the cache by address",
        "an option for the layout, or see get_impl_cls",
    ),
    Symbol(
        f"{_CPU_ATTENTION}:CPUAttentionMetadata",
        "read",
        "num_actual_tokens query_start_loc seq_lens block_table scheduler_metadata",
        "is extended by the step's trees",
        "the builder's product is what layers see",
        "see get_impl_cls",
    ),
    Symbol(
        f"{_CPU_ATTENTION}:CPUAttentionBackendImpl.forward",
        "overridden",
        "self layer query key value kv_cache attn_metadata output output_scale "
        "output_block_scale",
        "attends trees by our kernel, stages their keys and values",
        "see get_impl_cls",
        "see get_impl_cls",
    ),
    Symbol(
        f"{_CPU_ATTENTION}:CPUAttentionBackendImpl",
        "read",
        "alibi_slopes sliding_window kv_cache_dtype logits_soft_cap attn_type "
        "kv_sharing_target_layer_name sinks",
        "what a layer's attention is: some of it is refused",
        "our kernel must do what vLLM's would",
        "see get_impl_cls",
        "alibi_slopes sinks kv_sharing_target_layer_name attn_type kv_cache_dtype scale "
        "sliding_window logits_soft_cap",
    ),
    Symbol(
        "vllm.utils.torch_utils:is_quantized_kv_cache",
        "called",
        "kv_cache_dtype",
        "refuses layers whose cache is not of the model's type",
        "our kernels read the cache by address",
        "see get_impl_cls",
    ),
    Symbol(
        f"{_CPU_ATTENTION}:CPUAttentionMetadataBuilder",
        "read",
        "kv_cache_spec layer_names vllm_config device",
        "how many heads a layer has, and its cache's layout",
        "see _set_isa_to_layers",
        "see get_impl_cls",
        "isa num_heads num_kv_heads",
    ),
    Symbol(
        f"{_CPU_ATTENTION}:CPUAttentionBackendImpl.do_kv_cache_update",
        "called",
        "self layer key value kv_cache slot_mapping",
        "writes accepted nodes into the cache",
        "so that every cache format stays right",
        "nothing",
    ),
    Symbol(
        "vllm.v1.attention.backend:CommonAttentionMetadata",
        "read",
        "query_start_loc query_start_loc_cpu seq_lens num_reqs num_actual_tokens "
        "max_query_len max_seq_len block_table_tensor slot_mapping causal "
        "encoder_seq_lens encoder_seq_lens_cpu dcp_local_seq_lens "
        "dcp_local_seq_lens_cpu_upper_bound is_prefilling seq_lens_cpu_upper_bound req_idx "
        "rswa_prefix_lens replayssm_decode_base_cpu mm_req_doc_ranges "
        "_num_computed_tokens_cache _token_to_req_indices_cache",
        "is narrowed to the requests without drafts",
        "vLLM's own builder then does the rest",
        "see get_impl_cls",
    ),
)

BEHAVIOURS = (
    Behaviour(
        "vllm.model_executor.layers.attention.attention:Attention.__init__",
        "may take another type of KV cache than the engine's config has said: the "
        "checkpoint's, where that was auto",
        "such layers are refused when they are built (`refuse_unsupported`)",
        "the checkpoint's type in vLLM's CacheConfig",
        "tests/integration/test_tree_split.py::"
        "test_a_checkpoint_chooses_the_caches_type_when_layers_are_built",
    ),
    Behaviour(
        "vllm.config.compilation:CompilationConfig",
        "has all attention layers by name in `static_forward_context`, and a layer calls "
        "its implementation's `forward`",
        "that is ours in a step with trees; other steps are vLLM's alone",
        "see get_impl_cls",
        f"{OWN}test_layers_are_vllms_alone_in_steps_without_trees",
    ),
    Behaviour(
        f"{_BACKENDS}.get_class",
        "respects an override when a layer is built, and only then",
        "one engine of a process has our backend, the next one vLLM's",
        "a backend that the platform takes from the engine's config",
        "tests/integration/test_lossless.py::test_an_engine_beside_propds_is_plain",
    ),
    Behaviour(
        f"{_CPU_ATTENTION}:CPUAttentionBackend.forward_includes_kv_cache_update",
        "a layer's keys and values are cached before its attention, and apart from it",
        "a tree's root is read from the cache, its nodes are staged",
        "tree drafts in vLLM",
        "tests/integration/test_lossless.py::test_text_is_plain_vllms",
    ),
    Behaviour(
        f"{_CPU_ATTENTION}:CPUAttentionBackendImpl.do_kv_cache_update",
        "writes nothing for the slot -1",
        "drafted nodes must not enter the cache",
        "tree drafts in vLLM",
        f"{OWN}test_no_slot_is_no_write",
    ),
    Behaviour(
        f"{_CPU_ATTENTION}:CPUAttentionBackendImpl.do_kv_cache_update",
        "in the layout vec, keys and values lie as our kernel reads them",
        "our kernel reads the cache by address",
        "see get_impl_cls",
        "tests/integration/test_cache_layout.py::test_roots_attend_to_what_vllm_wrote",
    ),
    Behaviour(
        f"{_CPU_ATTENTION}:CPUAttentionMetadataBuilder._set_isa_to_layers",
        "is all that the cache's layout follows from",
        "vec stands where AMX tiles would",
        "an option for the layout",
        f"{OWN}test_the_layout_is_what_our_builder_sets",
    ),
    Behaviour(
        f"{_CPU_ATTENTION}:CPUAttentionMetadataBuilder.build",
        "makes metadata of some of the batch's requests from what names only these",
        "requests without drafts keep vLLM's kernel",
        "see get_impl_cls",
        "tests/integration/test_lossless.py::test_text_is_plain_vllms",
    ),
)
