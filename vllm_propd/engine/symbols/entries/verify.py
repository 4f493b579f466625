"""Acceptance: vLLM's sampler at every node of the walk."""

from __future__ import annotations

from vllm_propd.engine.symbols.behaviour import OWN, Behaviour
from vllm_propd.engine.symbols.symbol import Symbol

SYMBOLS = (
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
        "temperature top_p top_k all_greedy generators max_num_logprobs output_token_ids "
        "logitsprocs "
        "no_penalties logprob_token_ids bad_words_token_ids allowed_token_ids_mask "
        "thinking_budget_state_holder spec_token_ids",
        "is advanced along the walk: without drafts, and generators of finished requests "
        "taken out, or all that is theirs; tells whether a row's token depends on its "
        "logits alone",
        "a seeded request must draw once per emitted token; what depends on nothing else "
        "is drawn for all rows at once",
        "nothing",
    ),
    Symbol(
        "vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_top_p",
        "called",
        "logits k p",
        "masks what a request's top_k and top_p leave out, for typical acceptance",
        "a draft that the request would never sample is not to be accepted",
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
        "vllm.v1.sample.logits_processor.builtin:MinTokensLogitsProcessor",
        "read",
        "",
        "empty: no request of the batch needs it",
        "nothing else tells whether a processor has something to do",
        "a property of LogitsProcessor that says so",
        "min_toks",
    ),
    Symbol(
        "vllm.v1.sample.logits_processor.builtin:MinPLogitsProcessor",
        "read",
        "",
        "empty: no request of the batch needs it",
        "nothing else tells whether a processor has something to do",
        "a property of LogitsProcessor that says so",
        "min_p_count",
    ),
    Symbol(
        "vllm.v1.sample.logits_processor.builtin:LogitBiasLogitsProcessor",
        "read",
        "",
        "empty: no request of the batch needs it",
        "nothing else tells whether a processor has something to do",
        "a property of LogitsProcessor that says so",
        "biases",
    ),
    Symbol(
        "vllm.v1.sample.logits_processor:AdapterLogitsProcessor",
        "read",
        "vllm_config device is_pin_memory",
        "holds requests' own processors; those of requests that draw no token are left out "
        "for a call",
        "they may count their calls, each of which is a token of theirs in plain vLLM",
        "logits processors that are told whose tokens count",
        "req_info",
    ),
    Symbol(
        "vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder.has_tracked_requests",
        "called",
        "self",
        "tells whether a request of the batch has a budget",
        "its logits then depend on what has been put out",
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
        "vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder",
        "read",
        "reasoning_config num_spec_tokens",
        "is told that it is not in_spec_mode",
        "it would count drafts as a chain that is put out, and look for a request's row "
        "behind those of the drafts before it (tests/integration/test_thinking_budget.py)",
        "thinking budgets that ask the sampler which rows it has",
        "in_spec_mode",
    ),
    Symbol(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._get_nans_in_logits",
        "overridden",
        "self logits",
        "gets the rows of the requests' roots",
        "it takes row i for request i's",
        "counts by request in vLLM",
    ),
)

BEHAVIOURS = (
    Behaviour(
        "vllm.v1.sample.logits_processor:AdapterLogitsProcessor.apply",
        "calls the processors in req_info, each on the row of its number",
        "riders and prompts that go on are left out of it (`called_for`)",
        "logits processors that are told whose tokens count",
        "tests/unit/test_verify.py::"
        "test_a_requests_own_processor_is_called_once_for_each_of_its_tokens",
        package=True,
    ),
    Behaviour(
        "vllm.v1.sample.sampler:Sampler.forward",
        "changes float32 logits in place, others never, and these neither where all are "
        "greedy and nothing else is asked for",
        "what is recycled is copied before, and only then (`draw`)",
        "a sampler that leaves logits as they are",
        "tests/unit/test_verify.py::test_what_is_recycled_stays_as_the_target_has_said_it",
    ),
    Behaviour(
        "vllm.v1.worker.gpu_input_batch:InputBatch.add_request",
        "shows samplers and logits processors the request's own list of output tokens",
        "the walk makes it longer, node by node, and shorter again (`_history`)",
        "logits processors that are given the tokens at each call",
        f"{OWN}test_processors_see_the_requests_own_lists",
    ),
    Behaviour(
        "vllm.v1.sample.logits_processor.builtin:MinTokensLogitsProcessor.update_state",
        "looks again at its requests' outputs, also where the batch has not changed",
        "the walk calls it after each node (`_advance`)",
        "nothing",
        "tests/integration/test_sampling.py::test_every_field_gives_plain_vllms_text",
    ),
    Behaviour(
        "vllm.v1.sample.sampler:Sampler.forward",
        "finds a request's parameters by the row's number",
        "requests that have stopped ride along in the walk's rows, or are left out with "
        "their parameters (`drawn`)",
        "nothing",
        "tests/integration/test_sampling.py::test_every_field_gives_plain_vllms_text",
    ),
    Behaviour(
        "vllm.v1.sample.sampler:Sampler.sample",
        "takes any number of rows where all are greedy and nothing else is asked for",
        "the tokens of all nodes are drawn at once (`all_rows`)",
        "nothing",
        "tests/integration/test_sampling.py::test_every_field_acts_where_all_are_greedy",
    ),
    Behaviour(
        "vllm.v1.sample.ops.topk_topp_sampler:TopKTopPSampler.forward_cpu",
        "draws once from each generator that it is given, and from no other of a seeded "
        "request",
        "a seeded request draws as often as in plain vLLM; who has stopped, no more",
        "nothing",
        "tests/integration/test_sampling.py::test_every_field_gives_plain_vllms_text",
    ),
    Behaviour(
        "vllm.v1.sample.rejection_sampler:RejectionSampler.parse_output",
        "ends a request's tokens at -1, and takes logprobs in the order of all its "
        "places, then the next request's",
        "verification answers in this form",
        "tree verification in vLLM",
        "tests/integration/test_sampling.py::test_every_field_gives_plain_vllms_text",
    ),
    Behaviour(
        "vllm.v1.sample.logits_processor:build_logitsprocs",
        "builds every processor where there is no speculative_config",
        "the walk applies them all (`all_logits_processors`)",
        "logits processors with speculative decoding in vLLM",
        "tests/integration/test_sampling.py::test_every_field_gives_plain_vllms_text",
        package=True,
    ),
    Behaviour(
        "vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder.update_state",
        "counts tokens that are put out, and no drafts, while in_spec_mode is False",
        "the walk has no rows of drafts (`without_drafts`)",
        "see ThinkingBudgetStateHolder",
        "tests/integration/test_thinking_budget.py::"
        "test_budgets_are_kept_as_plain_vllm_keeps_them",
    ),
    Behaviour(
        "vllm.v1.structured_output.utils:apply_grammar_bitmask",
        "masks the rows of the scheduled drafts as those of a chain",
        "such requests are drafted chains, and such steps are not pruned",
        "grammars that follow a tree in vLLM",
        "tests/integration/test_sampling.py::test_structured_output_gives_plain_vllms_text",
    ),
)
