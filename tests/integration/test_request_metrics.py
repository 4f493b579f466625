"""What a request's metrics tell in the engines of batch jobs."""

from dataclasses import asdict

import pytest
from conftest import engine, greedy, mixed_prompts
from vllm import SamplingParams

from vllm_propd.engine.integration.patches import apply
from vllm_propd.engine.integration.request_metrics import PATCHES


@pytest.mark.parametrize("nodes", [0, 8])
def test_metrics_tell_how_a_request_ended(nodes: int) -> None:
    apply(PATCHES)
    asked = {"per_request_spec_decode_metrics": "summary"} if nodes else {}
    prompts = mixed_prompts(2, seed=61)
    with engine(nodes, **asked) as llm:
        long = llm.generate(prompts, greedy(12), use_tqdm=False)
        stopped = SamplingParams(
            temperature=0.0, max_tokens=64, stop=[long[0].outputs[0].text[:3]]
        )
        short = llm.generate(prompts[:1], stopped, use_tqdm=False)
    for out, reason in ((long[0], "length"), (long[1], "length"), (short[0], "stop")):
        told = asdict(out.metrics)
        assert told["finish_reason"] == out.outputs[0].finish_reason == reason
        assert told["num_generation_tokens"] == len(out.outputs[0].token_ids)
        drafts = told["speculative_decoding"]
        if not nodes or reason == "stop":  # stop strings end a request in the front end
            assert drafts is None
            continue
        # The first token comes with the prompt; each step after that gives one at least.
        steps, accepted = drafts["num_spec_steps"], drafts["num_accepted_draft_tokens"]
        assert 1 + steps + accepted >= told["num_generation_tokens"]
        assert drafts["mean_acceptance_length"] == pytest.approx(1 + accepted / steps)
