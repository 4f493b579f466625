"""A target on vLLM's Transformers backend: its halves are cut where its stages would be."""

from typing import Any

import numpy as np
import pytest
from conftest import SETTINGS, Ties, engine, greedy, metric, prompts_of, run, use
from prices import pay_always
from vllm import LLM


def counted(llm: LLM) -> np.ndarray:
    """Nodes verified so far, and those that pruning left."""
    return np.array([metric(llm, f"propd_{kind}_nodes") for kind in ("tree", "kept")])


BACKEND: dict[str, Any] = {"model_impl": "transformers"}


@pytest.mark.parametrize(
    "compiled",
    [False, pytest.param(True, marks=pytest.mark.long)],
    ids=["eager", "compiled"],
)
def test_it_prunes_and_gives_plain_vllms_text(compiled: bool, ties: Ties) -> None:
    options = {**BACKEND, "enforce_eager": not compiled}
    prompts = prompts_of([30, 1, 200, 77], seed=12)
    with engine(**options) as llm:
        expected = run(llm, prompts, greedy(48, logprobs=2))
    rules = list(SETTINGS) if not compiled else ["path_probability"]
    with engine(48, propd=SETTINGS[rules[0]], **options) as llm:
        for rule in rules:
            use(llm, 48, SETTINGS[rule])
            if rule == "default":
                pay_always(llm)
            before = counted(llm)
            ties.check(expected, run(llm, prompts, greedy(48)))
            nodes, kept = counted(llm) - before
            assert 0 < kept <= nodes
            if SETTINGS[rule].get("pruning"):
                assert kept < nodes
