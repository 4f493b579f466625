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
)
