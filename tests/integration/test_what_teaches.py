"""Which requests teach what the heads' words are worth."""

from __future__ import annotations

from typing import Any

import numpy as np
from conftest import engine, greedy, metric, prompts_of, run
from prices import pay_always
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams


def curves(llm: LLM) -> list[np.ndarray]:
    """What is learnt of greedy requests, and of sampled ones."""
    runner: Any = llm.collective_rpc(lambda worker: worker.model_runner)[0]
    return [np.stack(one.curve()) for one in runner.drafter.trees.prices.estimators]


def test_greedy_and_sampled_requests_teach_their_own() -> None:
    prompts = prompts_of([20, 33, 27, 40], seed=31)
    sampled = SamplingParams(temperature=1.0, seed=1, max_tokens=48, ignore_eos=True)
    with engine(16, propd={"sizing": "dynamic"}) as llm:
        pay_always(llm)
        before = curves(llm)
        run(llm, prompts, greedy(48, ignore_eos=True))
        first = curves(llm)
        assert (first[0] != before[0]).any() and (first[1] == before[1]).all()
        run(llm, prompts, sampled)
        second = curves(llm)
        assert (second[0] == first[0]).all() and (second[1] != first[1]).any()


def test_steered_requests_teach_nothing() -> None:
    prompts = prompts_of([20, 33, 27, 40, 25, 30, 31], seed=32)
    steers: list[dict[str, Any]] = [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.4},
        {"frequency_penalty": 0.2},
        {"logit_bias": {5: 3.0}},
        {"bad_words": ["def"]},
        {"allowed_token_ids": list(range(1, 900))},
        {"structured_outputs": StructuredOutputsParams(regex="[a-z ]{40,60}")},
    ]
    with engine(16, propd={"sizing": "dynamic"}) as llm:
        pay_always(llm)
        before = curves(llm)
        run(llm, prompts, [greedy(40, **steer) for steer in steers])
        assert metric(llm, "spec_decode_num_accepted_tokens") > 0
        assert all((a == b).all() for a, b in zip(before, curves(llm), strict=True))
