"""Sampled text: every SamplingParams field acts on a tree as on plain vLLM.

A seeded request draws one random number per emitted token, like plain vLLM, so its text
is compared token by token.
"""

from itertools import product
from typing import Any

import pytest
import torch
from conftest import (
    BUSY,
    SETTINGS,
    Ties,
    engine,
    greedy,
    metric,
    prompts_of,
    run,
    seeded,
    unlogged,
    use,
)
from vllm import SamplingParams
from vllm.outputs import CompletionOutput
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

FIELDS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "top_k": {"top_k": 8},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "presence_penalty": {"presence_penalty": 1.0},
    "frequency_penalty": {"frequency_penalty": 0.7},
    "logit_bias": {"logit_bias": {12: 4.0, 300: -100.0}},
    "bad_words": {"bad_words": ["self", "return", "is not None"]},
    "min_tokens": {"min_tokens": 40, "stop_token_ids": list(range(200, 300))},
    "allowed_token_ids": {"allowed_token_ids": list(range(1, 1200))},
    "all": {
        "top_k": 50,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.2,
        "logit_bias": {40: 1.0},
        "bad_words": ["import"],
        "min_tokens": 30,
    },
}

CASES = [
    SamplingParams(**fields, temperature=heat, seed=seed, max_tokens=64, logprobs=2)
    for (seed, fields), heat in product(enumerate(FIELDS.values()), (0.0, 0.7, 1.0))
]


PROMPTS = prompts_of([30 + 7 * i for i in range(len(CASES))], seed=11)
# Whole prompts: vLLM 0.32 on the CPU dies of a seeded request in a chunked prefill.
WHOLE = {"max_num_batched_tokens": 8192}


@pytest.fixture(scope="module")
def plain() -> list[CompletionOutput]:
    """Plain vLLM's answer to each case."""
    with engine(**WHOLE) as llm:
        return run(llm, PROMPTS, CASES)


@pytest.mark.parametrize("rule", SETTINGS)
def test_every_field_gives_plain_vllms_text(
    plain: list[CompletionOutput], rule: str, ties: Ties
) -> None:
    expected = plain
    with engine(48, propd=SETTINGS[rule], **WHOLE) as llm:
        ours = run(llm, PROMPTS, CASES)
    ties.check(expected, ours)
    for left, right in zip(expected, ours, strict=True):
        if left.token_ids != right.token_ids:
            continue  # excused above
        assert left.logprobs is not None
        assert right.logprobs is not None
        assert left.cumulative_logprob == pytest.approx(right.cumulative_logprob, abs=1e-2)
        for a, b in zip(left.logprobs, right.logprobs, strict=True):
            assert {t: p.rank for t, p in a.items()}.keys() == b.keys()


def test_every_field_acts_where_all_are_greedy(ties: Ties) -> None:
    """One field at a time: what is drawn for all rows at once must not pass over it."""
    prompts = prompts_of([40, 90, 150], seed=12)
    cases = [greedy(64, logprobs=2, **fields) for fields in FIELDS.values()]
    with engine() as llm:
        expected = [run(llm, prompts, params) for params in cases]
    with engine(48) as llm:
        ours = [run(llm, prompts, unlogged(params)) for params in cases]
    for left, right in zip(expected, ours, strict=True):
        ties.check(left, right)
    texts = [[list(output.token_ids) for output in outputs] for outputs in expected]
    assert sum(text == texts[0] for text in texts) <= 4  # most fields change something


def test_structured_output_gives_plain_vllms_text(ties: Ties) -> None:
    """Grammars mask a draft list as a chain: drafted as one, and not pruned."""
    shape = StructuredOutputsParams(regex=r"(self\.[a-z_]{1,12} = [a-z]{1,8}\n){4}")
    structured = SamplingParams(
        temperature=0.0, max_tokens=80, logprobs=2, structured_outputs=shape
    )
    free = SamplingParams(temperature=0.0, max_tokens=80, logprobs=2)
    params = [structured if i % 2 else free for i in range(10)]
    prompts = prompts_of([50 + 11 * i for i in range(10)], seed=12)
    with engine() as llm:
        expected = run(llm, prompts, params)
    with engine(48) as llm:
        for propd in SETTINGS.values():
            use(llm, 48, propd)
            ties.check(expected, run(llm, prompts, params))


def test_seeded_text_is_the_same_in_chunks_of_prompts(ties: Ties) -> None:
    """Beside trees a step holds less of a prompt, and plain vLLM would die of chunks."""
    prompts = prompts_of([200, 30, 130, 1, 90], seed=13)
    params = seeded(len(prompts))
    with engine(**WHOLE) as llm:
        expected = run(llm, prompts, params)
    rules = list(SETTINGS)
    # No rule is to find a prompt's beginning in the cache.
    busy = {**BUSY, "enable_prefix_caching": False, "max_num_seqs": 4}
    with engine(48, propd=SETTINGS[rules[0]], **busy) as llm:
        for rule in rules:
            use(llm, 48, SETTINGS[rule])
            # Without logprobs, who has stopped is no longer sampled.
            for asked in (params, unlogged(params)):
                ties.check(expected, run(llm, prompts, asked))
        assert metric(llm, "spec_decode_num_accepted_tokens") > 20


class EveryThirdCall(AdapterLogitsProcessor):
    """A request's own processor, which keeps a state: with every third call it forbids."""

    calls: list[list[int]] = []

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        calls: list[int] = []
        self.calls.append(calls)

        def forbid(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            calls.append(len(output_ids))
            if len(calls) % 3 == 0:
                logits[logits.argmax()] = -float("inf")
            return logits

        return forbid


def test_a_requests_own_processor_is_called_as_by_plain_vllm(ties: Ties) -> None:
    """One text repeats itself, and is accepted far; beside it others and prompts go on."""
    short, *others = prompts_of([24, 40, 150, 77], seed=14)
    again = {"prompt_token_ids": 4 * short["prompt_token_ids"]}
    prompts, params = [again, *others], greedy(48, logprobs=2, ignore_eos=True)
    options: dict[str, Any] = {"logits_processors": [EveryThirdCall]}
    EveryThirdCall.calls.clear()
    with engine(**WHOLE, **options) as llm:
        expected = run(llm, prompts, params)
    plain = [list(calls) for calls in EveryThirdCall.calls]
    EveryThirdCall.calls.clear()
    with engine(48, **BUSY, **options) as llm:
        found = run(llm, prompts, params)
        assert metric(llm, "spec_decode_num_accepted_tokens") > 10
    if not ties.check(expected, found):
        assert sorted(EveryThirdCall.calls) == sorted(plain)
    assert all(calls == [*range(48)] for calls in plain)
