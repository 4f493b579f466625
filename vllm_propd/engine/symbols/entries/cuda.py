"""Trees on CUDA: worker and attention."""

from __future__ import annotations

from vllm_propd.engine.symbols.behaviour import OWN, Behaviour
from vllm_propd.engine.symbols.symbol import Symbol

_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_FLASH = "vllm.v1.attention.backends.flash_attn"

SYMBOLS = (
    Symbol(
        "vllm.v1.worker.gpu_worker:Worker._make_model_runner",
        "overridden",
        "self",
        "returns our runner",
        "this is vLLM's place for another runner",
        "nothing: this is the place for it",
    ),
    Symbol(
        f"{_FLASH}:FlashAttentionBackend.get_impl_cls",
        "overridden",
        "",
        "returns our layer implementation",
        "trees need a mask that FlashAttention does not take",
        "tree attention in vLLM",
    ),
    Symbol(
        f"{_FLASH}:FlashAttentionBackend.get_builder_cls",
        "overridden",
        "",
        "returns our metadata builder",
        "see get_impl_cls",
        "see get_impl_cls",
    ),
    Symbol(
        f"{_FLASH}:FlashAttentionMetadataBuilder.build",
        "overridden",
        "self common_prefix_len common_attn_metadata fast_build",
        "splits a step into requests with and without drafts",
        "each part has its kernel",
        "see get_impl_cls",
    ),
    Symbol(
        f"{_FLASH}:FlashAttentionMetadataBuilder",
        "read",
        "kv_cache_spec layer_names vllm_config device",
        "how many heads a layer has",
        "the kernel serves the query heads of a KV head together",
        "see get_impl_cls",
        "num_heads_q num_heads_kv",
    ),
    Symbol(
        f"{_FLASH}:FlashAttentionMetadataBuilder._cudagraph_support",
        "replaced",
        "",
        "says never",
        "trees differ from step to step",
        "see get_impl_cls",
    ),
    Symbol(
        f"{_FLASH}:FlashAttentionMetadataBuilder.supports_update_block_table",
        "replaced",
        "",
        "says no: metadata of one KV cache group is not another's with other blocks",
        "a step's trees have block tables of their own",
        "see get_impl_cls",
    ),
    Symbol(
        "vllm.v1.attention.backend:AttentionCGSupport.NEVER",
        "read",
        "",
        "see FlashAttentionMetadataBuilder._cudagraph_support",
        "trees differ from step to step",
        "see get_impl_cls",
    ),
    Symbol(
        "vllm.v1.attention.backend:AttentionCGSupport",
        "read",
        "",
        "keeps attention out of CUDA graphs",
        "trees differ from step to step",
        "see get_impl_cls",
    ),
    Symbol(
        f"{_FLASH}:FlashAttentionMetadata",
        "read",
        "num_actual_tokens max_query_len query_start_loc max_seq_len seq_lens block_table "
        "slot_mapping",
        "is extended by the step's trees",
        "the builder's product is what layers see",
        "see get_impl_cls",
    ),
    Symbol(
        f"{_FLASH}:FlashAttentionImpl.forward",
        "overridden",
        "self layer query key value kv_cache attn_metadata output output_scale "
        "output_block_scale",
        "attends trees by FlashAttention and our kernel, stages their keys and values",
        "see get_impl_cls",
        "see get_impl_cls",
    ),
    Symbol(
        f"{_FLASH}:FlashAttentionImpl.do_kv_cache_update",
        "called",
        "self layer key value kv_cache slot_mapping",
        "writes accepted nodes into the cache",
        "so that every cache format stays right",
        "nothing",
    ),
    Symbol(
        f"{_FLASH}:FlashAttentionImpl",
        "read",
        "num_heads head_size scale num_kv_heads",
        "a layer's shape, window, soft cap and FlashAttention's version",
        "the prefix part is attended as vLLM would",
        "see get_impl_cls",
        "scale head_size sliding_window logits_soft_cap vllm_flash_attn_version "
        "alibi_slopes sinks kv_sharing_target_layer_name attn_type kv_cache_dtype",
    ),
    Symbol(
        "vllm.utils.torch_utils:canonicalize_singleton_dim_strides",
        "called",
        "t",
        "mends the strides of a cache with one KV head, as vLLM does",
        "FlashAttention 3 reads it by TMA",
        "the same inside flash_attn_varlen_func",
    ),
    Symbol(
        f"{_RUNNER}.profile_run",
        "overridden",
        "self randomize_inputs",
        "compiles both halves of a model that is to be pruned, and on CUDA runs what the "
        "largest step with trees needs",
        "what is captured later must have been compiled; vLLM measures the memory here",
        "nothing: this is the place for it",
    ),
    Symbol(
        f"{_RUNNER}.capture_model",
        "overridden",
        "self",
        "notes that there are graphs, and captures again when settings bring other halves",
        "halves that `use_settings` adds are to be captured, too",
        "nothing: this is the place for it",
    ),
    Symbol(
        f"{_RUNNER}.get_kv_cache_spec",
        "called",
        "self",
        "how many bytes a token's keys and values take in all layers",
        "those of a step's tree rows are kept aside until some are accepted",
        "a KV cache that takes rows back",
    ),
    Symbol(
        "vllm.v1.kv_cache_interface:KVCacheSpec",
        "read",
        "block_size",
        "over it, ``page_size_bytes``, which is a token's",
        "see get_kv_cache_spec",
        "see get_kv_cache_spec",
    ),
    Symbol(
        f"{_RUNNER}._dummy_sampler_run",
        "called",
        "self hidden_states",
        "samples beside the logits of a whole step of trees, for the memory profile",
        "verification gives the sampler so many rows at once",
        "nothing",
    ),
    Symbol(
        f"{_RUNNER}._warmup_and_capture",
        "overridden",
        "self desc cudagraph_runtime_mode profile_seq_lens allow_microbatching num_warmups "
        "profiler",
        "captures each size again, with both halves in the model's place",
        "vLLM captures graphs of the whole model",
        "a forward pass between given layers in vLLM's model interface",
    ),
)

SOURCE_ONLY = (
    Symbol(
        "vllm.vllm_flash_attn.flash_attn_interface:flash_attn_varlen_func",
        "called",
        "q k v max_seqlen_q cu_seqlens_q max_seqlen_k seqused_k softmax_scale causal "
        "softcap block_table return_softmax_lse fa_version",
        "attends tree rows to their cached prefix, and gives the log-sum-exp",
        "FlashAttention reads the paged cache fastest",
        "see get_impl_cls",
    ),
)
"""More touched symbols, which vLLM's builds for CPUs hold as source but cannot import."""

BEHAVIOURS = (
    Behaviour(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._warmup_and_capture",
        "captures one size of what stands in the model's place, in a context that names "
        "the mode and the size",
        "a second run captures the graphs of both halves",
        "a forward pass between given layers in vLLM's model interface",
        f"{OWN}test_a_capture_runs_what_stands_in_the_models_place",
    ),
    Behaviour(
        "vllm.vllm_flash_attn.flash_attn_interface:flash_attn_varlen_func",
        "gives the log-sum-exp as [heads, rows] float32, of the natural logarithm",
        "our kernel goes on from there; on GPUs only, elsewhere the test has a reference "
        "in its place",
        "tree attention in vLLM",
        "tests/kernels/test_cuda_attention.py::"
        "test_rows_attend_to_prefix_and_ancestors_before_and_after_pruning",
    ),
)
