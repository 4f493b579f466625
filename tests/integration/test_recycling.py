"""Recycled successors in real engines, beside every other source: the text stays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import (
    BUSY,
    Ties,
    engine,
    greedy,
    metric,
    mixed_prompts,
    prompts_of,
    run,
    seeded,
    use,
)
from prices import pay_always
from vllm import LLM, SamplingParams
from vllm.outputs import CompletionOutput
from vllm.sampling_params import StructuredOutputsParams

NODES = 48
RECYCLING = {"sizing": "dynamic", "recycling": True}
SOURCES: dict[str, dict[str, Any]] = {
    "alone": {**RECYCLING, "heads": False, "lookup": False},
    "beside the text": {**RECYCLING, "heads": False},
    "below the heads": {**RECYCLING, "lookup": False, "pruning": "off"},
    "beside all, pruned": RECYCLING,
}


MIXED = mixed_prompts(20, seed=81)
SHORT = prompts_of([20 + 12 * i for i in range(6)], seed=84)  # one step: see test_sampling
STRUCTURED = StructuredOutputsParams(regex=r"[a-z ]{40,60}")
SEEDED = seeded(len(SHORT))


@pytest.fixture(scope="module")
def plain() -> dict[str, list[CompletionOutput]]:
    """What plain vLLM writes."""
    with engine() as llm:
        return {
            "greedy": run(llm, MIXED, greedy(64, logprobs=2)),
            "seeded": run(llm, SHORT, SEEDED),
            "structured": run(
                llm, SHORT, greedy(48, structured_outputs=STRUCTURED, logprobs=2)
            ),
        }


@pytest.fixture(scope="module")
def llm(plain: dict[str, list[CompletionOutput]]) -> Iterator[LLM]:
    """Comes after plain vLLM: one engine at a time lives in a process."""
    with engine(NODES, **{**BUSY, "max_num_batched_tokens": 400}) as found:
        yield found


@pytest.mark.parametrize("source", SOURCES)
def test_text_is_plain_vllms(
    source: str, llm: LLM, plain: dict[str, list[CompletionOutput]], ties: Ties
) -> None:
    use(llm, NODES, SOURCES[source])
    pay_always(llm)
    before = metric(llm, "spec_decode_num_accepted_tokens")
    ties.check(plain["greedy"], run(llm, MIXED, greedy(64)))
    accepted = metric(llm, "spec_decode_num_accepted_tokens") - before
    assert accepted > 200, "successors were hardly ever right"


def test_a_second_text_gains_by_the_first(llm: LLM) -> None:
    """Nothing else is drafted, and no text repeats another's words."""
    use(llm, NODES, SOURCES["alone"])
    pay_always(llm)
    steps = []
    for seed in (82, 83):
        llm.collective_rpc("start_sizing_records")
        run(llm, prompts_of([60] * 4, seed=seed), greedy(96, ignore_eos=True))
        steps.append(len(llm.collective_rpc("take_sizing_records")[0]))
    assert steps[1] < 0.95 * steps[0]


def test_sampled_text_is_plain_vllms_seed_by_seed(
    llm: LLM, plain: dict[str, list[CompletionOutput]], ties: Ties
) -> None:
    use(llm, NODES, SOURCES["beside the text"])
    pay_always(llm)
    ties.check(plain["seeded"], run(llm, SHORT, SEEDED))


def test_structured_output_is_drafted_a_chain(
    llm: LLM, plain: dict[str, list[CompletionOutput]], ties: Ties
) -> None:
    use(llm, NODES, SOURCES["beside the text"])
    pay_always(llm)
    llm.collective_rpc("start_recording", args=(1000,))
    ours = run(llm, SHORT, greedy(48, structured_outputs=STRUCTURED))
    recording = llm.collective_rpc("take_recording")[0]
    ties.check(plain["structured"], ours)
    trees = [tree for step in recording for tree in step]
    assert len(trees) > 20
    assert all(tree["depth"] == sorted(set(tree["depth"])) for tree in trees)


STEERS: dict[str, dict[str, Any]] = {
    "allowed_token_ids": {"allowed_token_ids": list(range(1, 400))},
    "bad_words": {"bad_words": ["self", "return", "def"]},
    "penalties": {"repetition_penalty": 1.9, "presence_penalty": 1.5},
    "logit_bias": {"logit_bias": {12: 40.0}},
    "temperature": {"temperature": 0.3, "seed": 5, "top_k": 4},
}


@pytest.mark.parametrize("steer", STEERS)
def test_what_steers_a_request_is_not_taken_for_the_targets_word(
    steer: str, llm: LLM
) -> None:
    """Also in a step without trees, where the sampler is given the logits themselves."""
    use(llm, NODES, SOURCES["alone"])
    pay_always(llm)
    prompts = prompts_of([40, 33], seed=85)
    last = [prompt["prompt_token_ids"][-1] for prompt in prompts]
    assert last[0] != last[1]
    (runner,) = llm.collective_rpc(lambda worker: worker.model_runner)
    sources = runner.drafter.trees.sources
    said = []
    for fields in ({}, STEERS[steer]):
        llm.collective_rpc("forget_texts")
        # Of three tokens the first is followed by others, and its step is read.
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 3, **fields})
        run(llm, prompts, params)
        said.append(sources._table._token[last].copy())
    assert (said[0] >= 0).all()
    np.testing.assert_array_equal(said[0], said[1])
