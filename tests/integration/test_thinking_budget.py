"""Thinking budgets: vLLM forces the end of thinking at the token where plain vLLM does.

Its state of a row counts drafts as a chain, and finds rows by their lengths: others of the
batch, too, would get a forced token.
"""

from typing import Any

import pytest
from conftest import MODEL, SETTINGS, Ties, engine, prompts_of, run, unlogged, use
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.config.reasoning import ReasoningConfig

START, END = "<think>", " # done\n"
"""What begins thinking, and what ends it; each several tokens long."""

BUDGETS = [None, 0, 1, 2, 5, 17, 40, None]


def params(seed: int, budget: int | None, heat: float) -> SamplingParams:
    return SamplingParams(
        temperature=heat,
        seed=seed,
        max_tokens=64,
        logprobs=2,
        thinking_token_budget=budget,
    )


def prompts_and_params() -> tuple[list[Any], list[SamplingParams]]:
    """Thinking begun in the prompt, and (after a start the text repeats) in the text."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    start = tokenizer(START, add_special_tokens=False)["input_ids"]
    texts = prompts_of([40 + 9 * i for i in range(2 * len(BUDGETS))], seed=5)
    prompts, asked = [], []
    for i, prompt in enumerate(texts):
        ids = prompt["prompt_token_ids"]
        begun = ids + start if i % 2 else start + ids
        prompts.append({"prompt_token_ids": begun})
        heat = 0.8 if i % 4 == 3 else 0.0
        asked.append(params(i, BUDGETS[i // 2], heat))
    return prompts, asked


@pytest.fixture(scope="module")
def options() -> dict[str, Any]:
    return {
        "max_num_batched_tokens": 8192,
        "reasoning_config": ReasoningConfig(
            reasoning_start_str=START, reasoning_end_str=END
        ),
    }


def test_budgets_are_kept_as_plain_vllm_keeps_them(
    options: dict[str, Any], ties: Ties
) -> None:
    prompts, asked = prompts_and_params()
    with engine(**options) as llm:
        expected = run(llm, prompts, asked)
        unbudgeted = run(
            llm, prompts, [params(i, None, a.temperature) for i, a in enumerate(asked)]
        )
    forced = sum(
        a.token_ids != b.token_ids for a, b in zip(expected, unbudgeted, strict=True)
    )
    assert forced > len(BUDGETS), "the budgets change hardly any text"
    with engine(48, **options) as llm:
        for propd in SETTINGS.values():
            use(llm, 48, propd)
            ties.check(expected, run(llm, prompts, asked))
        ties.check(expected, run(llm, prompts, unlogged(asked)))
