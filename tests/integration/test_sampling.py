"""Sampled text: every SamplingParams field acts on a tree as on plain vLLM.

A seeded request draws one random number per emitted token, like plain vLLM, so its text
is compared token by token.
"""

from itertools import product
from typing import Any

import pytest
from conftest import SETTINGS, Ties, engine, greedy, prompts_of, run, unlogged, use
from vllm import SamplingParams
from vllm.outputs import CompletionOutput
from vllm.sampling_params import StructuredOutputsParams

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
