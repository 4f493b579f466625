"""A request whose prompt is NaN: the engine goes on, beside it texts are plain vLLM's."""

from __future__ import annotations

from math import isfinite
from typing import Any

import pytest
import torch
from conftest import HEADS_ALONE, Ties, engine, greedy, metric, prompts_of, run
from prices import pay_always, sizing_of

RULES: dict[str, dict[str, Any]] = {
    "unpruned": {"pruning": "off"},
    "path_probability": {"pruning": "path_probability", "keep_nodes": 4},
}
TOKENS, HIDDEN = 8, 256


@pytest.mark.parametrize("rule", RULES)
def test_nan_stays_with_its_request(rule: str, ties: Ties) -> None:
    broken = {"prompt_embeds": torch.full((TOKENS, HIDDEN), torch.nan)}
    prompts = prompts_of([20, 30], seed=1)
    with engine(enable_prompt_embeds=True) as llm:
        expected = run(llm, prompts, greedy(24, ignore_eos=True, logprobs=2))
    propd = {**HEADS_ALONE, **RULES[rule]}
    with engine(8, propd=propd, enable_prompt_embeds=True) as llm:
        pay_always(llm)
        # NaN's token is 0, which would end its text.
        ours = run(llm, [broken, *prompts, broken], greedy(24, ignore_eos=True))[1:3]
        drafted = metric(llm, "spec_decode_num_draft_tokens")
        # Plain vLLM's attention on CPUs, too, reads NaN that lies in blocks used again:
        # these texts may be anything, but the engine is to live.
        run(llm, prompts, greedy(24, ignore_eos=True))
        assert metric(llm, "spec_decode_num_draft_tokens") > drafted > 0
        assert all(map(isfinite, vars(sizing_of(llm).backoff.now).values()))
    ties.check(expected, ours)
