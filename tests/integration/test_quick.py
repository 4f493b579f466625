"""One engine through every rule, against plain vLLM's recorded tokens (`make quick`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import HEADS_ALONE, SETTINGS, engine, greedy, metric, run, use
from prices import AnySizes, sizing_of

RECORDED = json.loads((Path(__file__).parent / "quick.json").read_text())
NODES = 24
RULES: dict[str, dict[str, Any]] = {
    **SETTINGS,
    "chain": {"tree": "chain"},
    "planned pruning": {**HEADS_ALONE, "pruning": "auto"},
}


@pytest.fixture(scope="module")
def llm() -> Iterator[Any]:
    with engine(NODES, max_num_batched_tokens=256) as found:
        yield found


@pytest.mark.parametrize("rule", RULES)
def test_text_is_what_plain_vllm_wrote(rule: str, llm: Any) -> None:
    use(llm, NODES, RULES[rule])
    if rule == "planned pruning":  # which this machine may find not worth its while
        AnySizes(prunes=True).take_over(sizing_of(llm))
    before = metric(llm, "propd_tree_nodes")
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in RECORDED]
    found = run(llm, prompts, greedy(len(RECORDED[0][1])))
    assert [list(one.token_ids) for one in found] == [tokens for _, tokens in RECORDED]
    assert metric(llm, "propd_tree_nodes") > before
