"""Acceptance: vLLM's sampler at every node of the walk."""

from __future__ import annotations

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
        "temperature all_greedy generators max_num_logprobs output_token_ids logitsprocs "
        "no_penalties logprob_token_ids bad_words_token_ids allowed_token_ids_mask "
        "thinking_budget_state_holder spec_token_ids",
        "is advanced along the walk: without drafts, and generators of finished requests "
        "taken out; tells whether a row's token depends on its logits alone",
        "a seeded request must draw once per emitted token; what depends on nothing else "
        "is drawn for all rows at once",
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
        "vllm.v1.sample.logits_processor.builtin:LogitBiasLogitsProcessor",
        "read",
        "",
        "empty: no request of the batch needs it",
        "nothing else tells whether a processor has something to do",
        "a property of LogitsProcessor that says so",
        "biases",
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
