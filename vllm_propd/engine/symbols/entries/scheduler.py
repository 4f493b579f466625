"""The scheduler: what it does with draft lists, and what two patches change."""

from __future__ import annotations

from vllm_propd.engine.symbols.behaviour import OWN, Behaviour
from vllm_propd.engine.symbols.symbol import Symbol

_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"

SYMBOLS = (
    Symbol(
        "vllm.v1.core.sched.scheduler:Scheduler._handle_stopped_request",
        "patched",
        "self request",
        "a session's turn that stops inside an accepted path goes on from the stop",
        "the next turn's context is cut at the number of computed tokens, which is beyond "
        "the stop (tests/integration/test_draft_counts.py)",
        "a cut at the text's end in vLLM, which is wrong with any speculation",
    ),
    Symbol(
        "vllm.v1.core.sched.scheduler:Scheduler.add_request",
        "patched",
        "self request",
        "puts what a request's cache_salt comes to into its sampling parameters",
        "workers are not told the salt, and what others have said is shared by it "
        "(tests/integration/test_shared_texts.py)",
        "cache_salt in vLLM's NewRequestData",
    ),
    Symbol(
        "vllm.v1.core.sched.scheduler:Scheduler",
        "read",
        "",
        "tells whether this engine speculates, and how",
        "see _handle_stopped_request and add_request",
        "see _handle_stopped_request and add_request",
        "vllm_config requests",
    ),
    Symbol(
        "vllm.v1.core.sched.utils:check_sequence_repetition",
        "called",
        "token_ids params",
        "tells whether a request with repetition_detection ends",
        "see check_stop, which takes a scheduler's request",
        "nothing",
    ),
    Symbol(
        "vllm.v1.request:Request",
        "read",
        "",
        "a session's computed tokens are cut, and a salt is read",
        "see _handle_stopped_request and add_request",
        "see _handle_stopped_request and add_request",
        "num_computed_tokens resumable cache_salt sampling_params",
    ),
)

BEHAVIOURS = (
    Behaviour(
        f"{_SCHEDULER}.schedule",
        "schedules a beginning of a request's draft list, however long, beside its last "
        "token alone",
        "any beginning of a list of nodes is a tree; `build_step` refuses all else",
        "tree drafts in vLLM",
        "tests/integration/test_lossless.py::test_text_is_plain_vllms",
    ),
    Behaviour(
        f"{_SCHEDULER}.schedule",
        "pads no request to a row for each draft where the number of drafts depends on "
        "the batch's size",
        "one with one token left would take as many rows as the largest tree "
        "(`_pad_no_request`)",
        "padding only where whole uniform batches have CUDA graphs",
        "tests/integration/test_joining.py::test_no_row_is_a_drafts_that_nobody_drafted",
    ),
    Behaviour(
        f"{_SCHEDULER}.update_draft_token_ids",
        "replaces a request's drafts by the new list, also by an empty one, and of any "
        "length",
        "trees differ in size by request and step",
        "nothing",
        f"{OWN}test_an_empty_list_takes_drafts_back",
    ),
    Behaviour(
        f"{_SCHEDULER}.update_from_output",
        "counts as computed as many of the scheduled tokens as were put out",
        "an accepted path is in the cache at positions of its own",
        "nothing: it is so for every method",
        "tests/integration/test_lossless.py::test_text_is_plain_vllms",
    ),
    Behaviour(
        "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots",
        "has a slot for every scheduled draft, and caches no block beyond the text",
        "accepted nodes are written where they end up; the rest of a block is nobody's "
        "prefix",
        "nothing: it is so for every method",
        f"{OWN}test_what_was_accepted_is_read_from_the_prefix_cache",
    ),
    Behaviour(
        "vllm.v1.core.sched.utils:check_stop",
        "ends a request by stop tokens, max_tokens, the model's length and, from "
        "min_tokens on, repetition_detection, as the worker can see",
        "nothing is drafted for one that ends, or has one token left (`RequestEnds`)",
        "nothing",
        "tests/integration/test_draft_counts.py::"
        "test_nothing_is_drafted_for_whom_it_could_not_help",
    ),
    Behaviour(
        "vllm.v1.executor.multiproc_executor:MultiprocExecutor.execute_model",
        "sends all ranks what one scheduler has decided",
        "the scheduled lists give all ranks the first one's sizes, whatever their clocks "
        "say; with `external_launcher`, where each rank has a scheduler, it is refused",
        "nothing: it is so but for that launcher",
        "tests/integration/test_tensor_parallel.py::test_clocks_cannot_shape_trees",
    ),
    Behaviour(
        f"{_SCHEDULER}._handle_stopped_request",
        "goes on with a session from its number of computed tokens",
        "that is cut at the stop (`engine/integration/sessions.py`)",
        "a cut at the text's end in vLLM",
        "tests/integration/test_draft_counts.py::"
        "test_a_sessions_turn_goes_on_from_where_the_last_one_stopped",
    ),
    Behaviour(
        "vllm.v1.structured_output:StructuredOutputManager.validate_tokens",
        "cuts a draft list that a grammar refuses from its end",
        "what is left is a beginning of the chain",
        "grammars that follow a tree in vLLM",
        "tests/integration/test_sampling.py::test_structured_output_gives_plain_vllms_text",
        package=True,
    ),
)
