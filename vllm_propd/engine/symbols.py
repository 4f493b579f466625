"""The ledger of every vLLM symbol that ProPD touches or relies on.

For each: what we do with it, why, and what would let us stop. A test compares the
parameters with the installed vLLM, so that an upgrade fails at the right line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Symbol:
    """One touched symbol.

    Attributes:
        path: ``module:qualified.name``.
        use: how it is touched.
        parameters: its parameters (of a dataclass: its fields) that must exist, by name,
            with spaces between; for ``patched`` and ``overridden`` ones exactly these,
            in this order.
        what, why, retired_by: one line each.
        attributes: those of its instances that we use, likewise.
    """

    path: str
    use: Literal["patched", "overridden", "replaced", "called", "read"]
    parameters: str
    what: str
    why: str
    retired_by: str
    attributes: str = ""


_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_CPU_ATTENTION = "vllm.v1.attention.backends.cpu_attn"

SYMBOLS = (
    Symbol(
        "vllm.engine.arg_utils:EngineArgs.add_cli_args",
        "patched",
        "parser",
        "teaches --speculative-config and --spec-method the word propd",
        "argparse validates both before any plugin could translate them",
        "an extension point for speculative methods in vLLM's argument parser",
    ),
    Symbol(
        "vllm.engine.arg_utils:EngineArgs.create_engine_config",
        "patched",
        "self usage_context headless",
        "translates method propd to custom_class plus worker_cls, then checks support",
        "SpeculativeConfig.method is a closed list, and drops keys it does not know",
        "a registry of speculative methods with their own config classes",
    ),
    Symbol(
        "vllm.sampling_params:SamplingParams._validate_spec_decode",
        "patched",
        "self speculative_config",
        "accepts min_p and logit_bias when the method is propd",
        "vLLM's rejection sampler ignores them, so it refuses them for every method",
        "min_p and logit_bias with speculative decoding in vLLM",
    ),
    Symbol(
        "vllm.v1.worker.cpu_worker:CPUWorker.init_device",
        "overridden",
        "self",
        "puts our attention backend and runner in place while vLLM builds its own",
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
        "vllm.v1.worker.cpu_worker:CPUWorker.compile_or_warm_up_model",
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
    Symbol(
        f"{_RUNNER}._prepare_inputs",
        "overridden",
        "self scheduler_output num_scheduled_tokens",
        "positions root + depth and slot -1 for tree nodes, after vLLM's own work",
        "vLLM lays drafts out as a chain of cached positions",
        "tree drafts in vLLM",
    ),
    Symbol(
        f"{_RUNNER}._build_attention_metadata",
        "overridden",
        "self num_tokens num_reqs max_query_len num_tokens_padded num_reqs_padded "
        "ubatch_slices logits_indices max_num_sampled_tokens use_spec_decode "
        "for_cudagraph_capture num_scheduled_tokens slot_mappings",
        "hands this step's trees to our metadata builders",
        "CommonAttentionMetadata has no place for a tree",
        "tree masks in CommonAttentionMetadata",
    ),
    Symbol(
        f"{_RUNNER}._sample",
        "overridden",
        "self logits spec_decode_metadata",
        "verifies trees and commits their accepted keys and values",
        "vLLM's rejection sampler knows chains",
        "tree verification in vLLM",
    ),
    Symbol(
        f"{_RUNNER}._input_fits_in_drafter",
        "overridden",
        "self common_attn_metadata",
        "says yes",
        "near max_model_len vLLM would schedule token 0 as every request's drafts",
        "a drafter that can say it has no context limit",
    ),
    Symbol(
        f"{_RUNNER}.propose_draft_token_ids",
        "overridden",
        "self scheduler_output sampled_token_ids sampling_metadata hidden_states "
        "sample_hidden_states aux_hidden_states spec_decode_metadata "
        "common_attn_metadata slot_mappings",
        "drafts from the hidden states of the last accepted nodes",
        "custom_class proposers are not given hidden states",
        "hidden states in the custom_class interface",
    ),
    Symbol(
        f"{_RUNNER}._on_request_state_removed",
        "overridden",
        "self req_id req_state",
        "forgets the tree of a request that has ended",
        "trees are kept by request id",
        "nothing: this is the place for it",
    ),
    Symbol(
        f"{_RUNNER}._attn_group_iterator",
        "called",
        "self",
        "finds our metadata builders",
        "they are made by vLLM",
        "see _build_attention_metadata",
    ),
    Symbol(
        "vllm.engine.arg_utils:EngineArgs",
        "read",
        "model speculative_config spec_method spec_model spec_tokens worker_cls "
        "additional_config",
        "its fields carry the user's wishes in, and our worker and settings out",
        "all doors meet here",
        "see create_engine_config",
    ),
    Symbol(
        "vllm.config:SpeculativeConfig",
        "read",
        "method model num_speculative_tokens",
        "holds method custom_class and the dotted path of our proposer",
        "the supported door for proposers of third parties",
        "nothing: this is the supported way",
    ),
    Symbol(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        "read",
        "vllm_config device",
        "the state that our hooks read and correct",
        "positions and slots of drafts are vLLM's until then",
        "tree drafts in vLLM",
        "input_batch input_ids kv_cache_config positions requests sampler scheduler_config",
    ),
    Symbol(
        "vllm.v1.worker.gpu_input_batch:InputBatch",
        "read",
        "max_num_reqs max_model_len",
        "who is in the batch, and how far each request is",
        "trees are kept by request, rows by position in the batch",
        "tree drafts in vLLM",
        "block_table num_computed_tokens_cpu_tensor req_id_to_index sampling_metadata",
    ),
    Symbol(
        "vllm.v1.worker.block_table:MultiGroupBlockTable",
        "read",
        "",
        "the slot mapping of each KV cache group: saved for the commit, -1 for drafts",
        "rejected drafts must never enter the cache",
        "tree drafts in vLLM",
        "block_tables",
    ),
    Symbol(
        "vllm.v1.worker.block_table:BlockTable",
        "read",
        "",
        "see MultiGroupBlockTable",
        "see MultiGroupBlockTable",
        "see MultiGroupBlockTable",
        "slot_mapping",
    ),
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
        "vllm.v1.spec_decode.custom_class_proposer:create_custom_proposer",
        "called",
        "vllm_config",
        "vLLM builds our proposer by its dotted path, and its load_model runs",
        "the supported door for proposers of third parties; forces the V1 runner",
        "nothing: this is the supported way",
    ),
    Symbol(
        "vllm.v1.core.sched.output:SchedulerOutput",
        "read",
        "scheduled_spec_decode_tokens",
        "the scheduled drafts",
        "the only channel of a tree's size",
        "tree drafts in vLLM",
    ),
    Symbol(
        "vllm.v1.spec_decode.metadata:SpecDecodeMetadata",
        "read",
        "num_draft_tokens logits_indices",
        "which rows of the logits belong to which request",
        "verification starts from the roots' rows",
        "tree verification in vLLM",
    ),
    Symbol(
        "vllm.v1.sample.sampler:Sampler.forward",
        "called",
        "self logits sampling_metadata predict_bonus_token logprobs_mode_override",
        "draws the next token at every node of the walk",
        "so that every SamplingParams field means what it means in plain vLLM",
        "nothing: this is the promise",
    ),
    Symbol(
        "vllm.v1.sample.metadata:SamplingMetadata",
        "read",
        "temperature all_greedy generators max_num_logprobs output_token_ids logitsprocs",
        "is advanced along the walk: generators of finished requests taken out",
        "a seeded request must draw once per emitted token",
        "nothing",
    ),
    Symbol(
        "vllm.v1.sample.logits_processor.interface:LogitsProcessor.update_state",
        "called",
        "self batch_update",
        "tells processors, after each node, that the outputs have grown",
        "vLLM does so between steps; a walk takes several tokens in one",
        "nothing",
    ),
    Symbol(
        "vllm.v1.outputs:SamplerOutput",
        "called",
        "sampled_token_ids logprobs_tensors",
        "returns emitted tokens, -1 padded, as vLLM's rejection sampler does",
        "RejectionSampler.parse_output reads them",
        "nothing",
    ),
    Symbol(
        "vllm.v1.outputs:LogprobsTensors",
        "called",
        "logprob_token_ids logprobs selected_token_ranks",
        "returns the logprobs of all emitted tokens",
        "the order is parse_output's",
        "nothing",
    ),
    Symbol(
        "vllm.v1.attention.backends.registry:register_backend",
        "called",
        "backend class_path is_mamba",
        "puts our CPU attention backend in place of vLLM's, in workers with ProPD only",
        "the supported way to override a backend",
        "nothing: this is the supported way",
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
        "num_actual_tokens query_start_loc seq_lens block_table",
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
        "max_query_len max_seq_len block_table_tensor slot_mapping",
        "is narrowed to the requests without drafts",
        "vLLM's own builder then does the rest",
        "see get_impl_cls",
    ),
    Symbol(
        "vllm.distributed:tensor_model_parallel_all_gather",
        "called",
        "input_ dim",
        "gathers the logits of heads with output layers of their own",
        "all ranks must grow the same tree",
        "nothing",
    ),
    Symbol(
        "vllm.model_executor.models.registry:_ModelRegistry.is_pp_supported_model",
        "called",
        "architectures model_config",
        "refuses to train heads for a model that cannot stop after a layer",
        "early pruning runs a model in two parts, as pipeline parallelism does",
        "nothing",
    ),
    Symbol(
        "vllm:LLM.generate",
        "called",
        "prompts sampling_params use_tqdm",
        "writes the texts that heads are measured on, and with --self-distill trained on",
        "what heads meet in serving is the target's own text",
        "nothing",
    ),
    Symbol(
        "vllm.config:ModelConfig",
        "called",
        "model",
        "names the architectures of a model without loading it",
        "see is_pp_supported_model",
        "nothing",
    ),
)
