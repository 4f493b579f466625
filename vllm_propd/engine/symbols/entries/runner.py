"""The model runner: what a step passes through."""

from __future__ import annotations

from vllm_propd.engine.symbols.behaviour import OWN, Behaviour
from vllm_propd.engine.symbols.symbol import Symbol

_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"

SYMBOLS = (
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
        f"{_RUNNER}._update_streaming_request",
        "overridden",
        "self req_id new_req_data",
        "ends the answer of a session's turn: it teaches, and its tree is forgotten",
        "the next turn has the same request id, and counts its tokens from nothing again",
        "nothing: this is the place for it",
    ),
    Symbol(
        f"{_RUNNER}._bookkeeping_sync",
        "overridden",
        "self scheduler_output sampler_output logits hidden_states num_scheduled_tokens",
        "hides the generators of prompts that go on: nothing is drawn from them",
        "it would set them back by a token, which a CPU's cannot be; and steps with trees "
        "have chunks where plain vLLM has whole prompts",
        "no draw for prompts that go on, in vLLM",
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
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        "read",
        "vllm_config device",
        "the state that our hooks read and correct",
        "positions and slots of drafts are vLLM's until then",
        "tree drafts in vLLM",
        "compilation_config cudagraph_batch_sizes cudagraph_dispatcher "
        "discard_request_mask drafter input_batch input_ids kv_cache_config max_model_len "
        "max_num_reqs max_num_tokens model model_config num_spec_tokens parallel_config "
        "positions requests sampler scheduler_config speculative_config",
    ),
    Symbol(
        "vllm.v1.worker.gpu_input_batch:InputBatch",
        "read",
        "max_num_reqs max_model_len",
        "who is in the batch, how far each request is, its text, and whether it samples",
        "trees are kept by request, rows by position in the batch; candidates are looked "
        "up in the text; greedy and sampled requests teach different things of the heads",
        "tree drafts in vLLM",
        "block_table generators num_computed_tokens_cpu_tensor num_prompt_tokens "
        "num_tokens_no_spec random_reqs "
        "req_id_to_index sampling_metadata token_ids_cpu is_token_ids "
        "req_prompt_embeds",
    ),
    *(
        Symbol(
            f"vllm.v1.worker.gpu_input_batch:InputBatch.{name}",
            "read",
            "",
            "who is in the batch",
            "see InputBatch",
            "see InputBatch",
        )
        for name in ("req_ids", "num_reqs")
    ),
    Symbol(
        "vllm.v1.worker.gpu_input_batch:CachedRequestState",
        "read",
        "output_token_ids sampling_params",
        "a request's text so far, and how long its prompt is",
        "penalties and grading need the text; plans, what prompts leave to later steps",
        "nothing: every proposer needs it",
        "num_prompt_tokens",
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
        "vllm.v1.utils:CpuGpuBuffer",
        "read",
        "",
        "holds an array that the host and the device know: discard_request_mask, slots",
        "see GPUModelRunner",
        "see GPUModelRunner",
        "np gpu",
    ),
    *(
        Symbol(
            path, "read", fields, what, "see MultiGroupBlockTable", "tree drafts in vLLM"
        )
        for path, fields, what in (
            (
                "vllm.v1.kv_cache_interface:KVCacheConfig",
                "kv_cache_groups",
                "its groups' slots are the commit's",
            ),
            (
                "vllm.v1.kv_cache_interface:KVCacheGroupSpec",
                "layer_names",
                "tells the group of each attention layer",
            ),
            (
                "vllm.v1.worker.utils:AttentionGroup",
                "metadata_builders",
                "holds our metadata builders",
            ),
        )
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
        "logits_indices",
        "which rows of the logits belong to which request",
        "verification starts from the roots' rows",
        "tree verification in vLLM",
    ),
    Symbol(
        f"{_RUNNER}._dummy_run",
        "called",
        "self num_tokens",
        "times steps of some sizes at start-up, and shows what vLLM gives its model",
        "a tree's size follows what a step costs; halves are timed as the model is",
        "nothing",
    ),
    Symbol(
        f"{_RUNNER}._sync_device",
        "called",
        "self",
        "waits for what is timed at start-up",
        "see _dummy_run",
        "nothing",
    ),
    Symbol(
        "vllm.config:VllmConfig.compute_hash",
        "called",
        "self",
        "names the table of step costs in vLLM's cache",
        "what is timed once need not be timed at every start",
        "nothing",
    ),
)

BEHAVIOURS = (
    Behaviour(
        f"{_RUNNER}._bookkeeping_sync",
        "sets back the generators, if any, of requests that are marked in "
        "discard_request_mask, and touches no others",
        "they draw nothing, so they are hidden from it; a seeded text is the same in any "
        "chunks of its prompt",
        "no draw for prompts that go on, in vLLM",
        "tests/integration/test_sampling.py::"
        "test_seeded_text_is_the_same_in_chunks_of_prompts",
    ),
    Behaviour(
        f"{_RUNNER}._prepare_inputs",
        "reads speculative_config anew, and prepares a step where it is None as one "
        "without drafts",
        "a step without trees costs what it does without speculation (`_prepare_inputs`)",
        "vLLM choosing by the drafts that a step has",
        f"{OWN}test_a_step_without_drafts_is_prepared_as_a_plain_one",
    ),
    Behaviour(
        f"{_RUNNER}._get_slot_mappings",
        "hands out the block tables' own slots, as they stand after _prepare_inputs",
        "the slots of drafted nodes are -1 by then: nothing rejected enters the cache",
        "tree drafts in vLLM",
        f"{OWN}test_drafts_reach_the_model_without_slots_and_at_their_depths",
    ),
    Behaviour(
        f"{_RUNNER}._preprocess",
        "hands the model runner.positions as they stand after _prepare_inputs",
        "siblings share the position root + depth",
        "tree drafts in vLLM",
        f"{OWN}test_drafts_reach_the_model_without_slots_and_at_their_depths",
    ),
    Behaviour(
        f"{_RUNNER}._calc_spec_decode_metadata",
        "orders the rows of the logits by request, each one's root first, then its drafts "
        "in the order of their list",
        "a node's logits are found by its number",
        "tree verification in vLLM",
        "tests/integration/test_lossless.py::test_text_is_plain_vllms",
    ),
    Behaviour(
        f"{_RUNNER}.execute_model",
        "picks the hidden states of the logits, after the model has run, by the very "
        "tensor that _prepare_inputs returned",
        "pruned rows are taken out of that tensor in place (`_without_pruned`)",
        "a hook of vLLM's between a model and its output layer",
        "tests/integration/test_early_pruning.py::test_eager",
    ),
    Behaviour(
        f"{_RUNNER}.sample_tokens",
        "asks for drafts after its bookkeeping, which has waited for the step's tokens",
        "texts are looked up, and measured times of steps end, where tokens are known",
        "nothing: every proposer on the host needs it",
        "tests/integration/test_cuda_without_a_gpu.py::"
        "test_a_bare_step_is_timed_until_its_tokens_are_there",
    ),
    Behaviour(
        f"{_RUNNER}._bookkeeping_sync",
        "adds a step's tokens in place: to the requests' lists, and to the batch's rows "
        "of tokens",
        "what is looked up is the text, this step's tokens included",
        "nothing: every proposer needs it",
        f"{OWN}test_drafts_are_asked_for_when_the_batch_has_the_text",
    ),
    Behaviour(
        f"{_RUNNER}._prepare_inputs",
        "has marked the requests whose prompt goes on in discard_request_mask when it "
        "returns",
        "a plan counts who puts out a token in this step, and what prompts leave to later "
        "ones",
        "the same in SchedulerOutput",
        f"{OWN}test_prompts_that_go_on_are_marked_before_the_step",
    ),
    Behaviour(
        f"{_RUNNER}._update_states",
        "tells of every request that has ended or been aborted (_on_request_state_removed)",
        "a tree is kept for each request",
        "nothing: this is the place for it",
        f"{OWN}test_no_tree_is_kept_of_requests_that_have_ended",
    ),
    Behaviour(
        f"{_RUNNER}._dummy_run",
        "runs the runner's model once, on the inputs of a step without context, in a "
        "forward context of its own",
        "halves are warmed up and timed on what vLLM would give its model",
        "a forward pass between given layers in vLLM's model interface",
        "tests/integration/test_padded_halves.py::test_text_is_plain_vllms",
    ),
    Behaviour(
        f"{_RUNNER}.load_model",
        "gives the proposer the loaded model (load_model), once",
        "the heads share its output layer",
        "nothing: this is the supported way",
        "tests/integration/test_lossless.py::test_text_is_plain_vllms",
    ),
)
