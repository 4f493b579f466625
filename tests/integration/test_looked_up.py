"""Looked-up candidates in real engines, with the heads and without: the text stays."""

from __future__ import annotations

import pytest
import torch
from conftest import (
    BUSY,
    MODEL,
    Ties,
    engine,
    greedy,
    metric,
    mixed_prompts,
    prompts_of,
    run,
)
from prices import Line, pay_always, sizing_of, watch_plans
from safetensors.torch import load_file
from vllm import LLM

from vllm_propd.core.sizing.protocol import Choice, Drafts

DEFAULT = {"sizing": "dynamic", "recycling": False}


def watch(llm: LLM, draft_s: float) -> list[tuple[bool, bool, int]]:
    """Sets prices; notes of each plan: heads asked, their trees chosen, nodes."""
    sizing = sizing_of(llm)
    found: list[tuple[bool, bool, int]] = []
    sizing.draft = Line(draft_s)
    for planner in (sizing.planner, sizing.planner_without):
        planner.step = Line(0.01, 2e-4, below=0.02)

    def note(drafts: Drafts, choice: Choice) -> None:
        found.append((drafts.trees is not None, choice.heads, int(choice.sizes.sum())))

    watch_plans(sizing, note)
    return found


@pytest.mark.parametrize("draft_s", [1e-5, 1.0], ids=["cheap heads", "dear heads"])
def test_text_is_plain_vllms(draft_s: float, ties: Ties) -> None:
    prompts = mixed_prompts(28, seed=51)
    with engine(**BUSY) as llm:
        expected = run(llm, prompts, greedy(logprobs=2))
    with engine(48, propd=DEFAULT, **{**BUSY, "max_num_batched_tokens": 400}) as llm:
        plans = watch(llm, draft_s)
        ours = run(llm, prompts, greedy())
        accepted = metric(llm, "spec_decode_num_accepted_tokens")
    ties.check(expected, ours)
    assert accepted > len(prompts)
    asked = sum(heads_asked for heads_asked, _, _ in plans) / len(plans)
    by_heads = sum(heads and nodes > 0 for _, heads, nodes in plans) / len(plans)
    without = sum(not heads and nodes > 0 for _, heads, nodes in plans) / len(plans)
    assert without > 0.2
    if draft_s < 1:
        assert by_heads > 0.1
    else:  # They pause, though nodes are verified in most steps.
        assert by_heads == 0 and asked < 0.4


def test_a_text_that_repeats_itself_takes_few_steps() -> None:
    """What was there before is drafted deeper than any head reaches."""
    (prompt,) = prompts_of([40], seed=52)
    repeated = {"prompt_token_ids": prompt["prompt_token_ids"] * 8}
    steps = {}
    for lookup in (False, True):
        with engine(48, propd={**DEFAULT, "lookup": lookup}) as llm:
            watch(llm, 1e-5)
            llm.collective_rpc("start_sizing_records")
            run(llm, [repeated], greedy(96, ignore_eos=True))
            records = llm.collective_rpc("take_sizing_records")[0]
            steps[lookup] = len(records)
    assert steps[True] < 0.7 * steps[False]


def test_a_prompt_of_embeddings_is_not_the_rows_last_text(ties: Ties) -> None:
    """It has no tokens to look up; vLLM leaves there what its row's last request had."""
    embeddings = load_file(MODEL / "model.safetensors")["model.embed_tokens.weight"]
    before, asked = prompts_of([200, 200], seed=53)
    embedded = {"prompt_embeds": embeddings[torch.tensor(asked["prompt_token_ids"])]}
    options = {"enable_prompt_embeds": True, "max_num_seqs": 1, "dtype": "float32"}
    with engine(**options) as llm:
        expected = run(llm, [embedded], greedy(logprobs=2))
    alone = {**DEFAULT, "heads": False}
    with engine(48, propd=alone, **options) as llm:
        pay_always(llm)
        drafted = []
        for _ in range(2):
            tokens = metric(llm, "spec_decode_num_draft_tokens")
            ties.check(expected, run(llm, [embedded], greedy()))
            drafted.append(metric(llm, "spec_decode_num_draft_tokens") - tokens)
            run(llm, [before], greedy())
    assert drafted[0] == drafted[1], "another's prompt was looked up"
