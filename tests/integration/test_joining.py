"""Requests that join with one token left to compute, and budgets smaller than a tree.

vLLM pads such a request to a row for each speculative token: of 48 nodes, more than small
budgets hold. It would wait for ever, or be cut where vLLM asserts that it is whole.
"""

from typing import Any

import pytest
from conftest import HEADS_ALONE, Prompt, Ties, engine, greedy, prompts_of, run
from vllm import LLM
from vllm.outputs import CompletionOutput

SIZING = {"fixed": {"sizing": "fixed"}, "dynamic": {"sizing": "dynamic"}}

STEPS = 4000
"""More than any of these batches takes; a hang is a failure, not a test without end."""


def served(llm: LLM, prompts: list[Prompt], apart: int = 0) -> list[CompletionOutput]:
    """The prompts' completions, each request ``apart`` steps behind the one before it."""
    core, done = llm.llm_engine, {}
    params, waiting = greedy(48, logprobs=2), list(enumerate(prompts))
    for step in range(STEPS):
        while waiting and step >= apart * waiting[0][0]:
            index, prompt = waiting.pop(0)
            core.add_request(str(index), prompt, params)
        for output in core.step():
            if output.finished:
                done[output.request_id] = output.outputs[0]
        if not waiting and not core.has_unfinished_requests():
            return [done[str(index)] for index in range(len(prompts))]
    core.abort_request([str(index) for index in range(len(prompts))])
    pytest.fail(f"{len(done)} of {len(prompts)} requests served in {STEPS} steps")


@pytest.mark.parametrize("budget", [8, pytest.param(32, marks=pytest.mark.long), 48])
def test_a_prompt_in_the_prefix_cache_but_for_one_token(budget: int, ties: Ties) -> None:
    # Blocks of the cache are whole: one token is left of one more than a block's.
    options: dict[str, Any] = {
        "max_num_batched_tokens": budget,
        "max_num_seqs": 4,
        "enable_prefix_caching": True,
        "block_size": 32,
    }
    prompts = [p for p in prompts_of([33, 65, 129], seed=2) for _ in range(3)]
    with engine(**options) as llm:
        expected = served(llm, prompts, apart=3)
    for propd in SIZING.values():
        with engine(48, propd=propd, **options) as llm:
            for _ in range(2):
                ties.check(expected, served(llm, prompts, apart=3))


@pytest.mark.parametrize("threshold", [1, pytest.param(7, marks=pytest.mark.long), 48])
def test_a_threshold_for_long_prefills_below_a_trees_size(
    threshold: int, ties: Ties
) -> None:
    options: dict[str, Any] = {
        "long_prefill_token_threshold": threshold,
        "max_num_batched_tokens": 512,
        "enable_prefix_caching": True,
        "block_size": 32,
    }
    prompts = prompts_of([40, 1, 33, 2, 70, 1, 33, 9], seed=3)
    prompts += prompts[2:5]
    with engine(**options) as llm:
        expected = served(llm, prompts, apart=4)
    for propd in SIZING.values():
        with engine(48, propd=propd, **options) as llm:
            ties.check(expected, served(llm, prompts, apart=4))


def test_no_row_is_a_drafts_that_nobody_drafted() -> None:
    """A padded request would be 49 rows for one token."""
    prompts = prompts_of([33, 200], seed=4)
    options = {"enable_prefix_caching": True, "block_size": 32}
    with engine(48, propd=HEADS_ALONE, **options) as llm:
        run(llm, prompts[:1], greedy(4))
        llm.collective_rpc("start_sizing_records")
        run(llm, prompts[:1], greedy(1))
        (record,) = llm.collective_rpc("take_sizing_records")[0]
    assert record["tokens"] == 1 and record["nodes"] == 0
