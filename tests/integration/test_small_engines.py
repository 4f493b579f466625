"""Engines whose steps hold hardly a token, or one sequence."""

from typing import Any

import pytest
from conftest import Ties, engine, greedy, metric, prompts_of, run

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {"sizing": "dynamic"},
    "fixed": {"sizing": "fixed", "pruning": "path_probability", "keep_nodes": 2},
}


@pytest.mark.parametrize(
    ("tokens", "sequences", "compiled"),
    [
        (1, 1, False),
        pytest.param(3, 2, False, marks=pytest.mark.long),
        (5, 4, False),
        pytest.param(9, 4, False, marks=pytest.mark.long),
        # Two minutes where a machine is slow: four tokens stand for both in `make test`.
        pytest.param(1, 1, True, marks=pytest.mark.long),
        (4, 4, True),
    ],
)
def test_it_starts_and_decodes(
    tokens: int, sequences: int, compiled: bool, ties: Ties
) -> None:
    options: dict[str, Any] = {
        "max_num_batched_tokens": tokens,
        "max_num_seqs": sequences,
        "max_model_len": 128,
        "enforce_eager": not compiled,
    }
    prompts = prompts_of([9, 1, 14], seed=8)
    with engine(**options) as llm:
        expected = run(llm, prompts, greedy(24, logprobs=2))
    for propd in [SETTINGS["default"]] if compiled else SETTINGS.values():
        with engine(48, propd=propd, **options) as llm:
            ties.check(expected, run(llm, prompts, greedy(24)))
            drafted = metric(llm, "spec_decode_num_draft_tokens")
    # Half of a step may hold trees: of four tokens one node beside its root.
    assert (drafted > 0) == (tokens >= 4)
