"""Where requests end: stop tokens in any number, and texts that repeat themselves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.sampling_params import RepetitionDetectionParams

from vllm_propd.engine.step.request_ends import RequestEnds, StopTokens


def batch_of(prompts: list[list[int]], outputs: list[list[int]], params: Any) -> Any:
    """A worker's batch and its requests, each with these parameters."""
    ids = [f"request {i}" for i in range(len(prompts))]
    texts = [a + b for a, b in zip(prompts, outputs, strict=True)]
    tokens = np.full((len(texts), max(map(len, texts)) + 2), 7, np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    batch = SimpleNamespace(
        req_ids=ids,
        token_ids_cpu=tokens,
        num_tokens_no_spec=np.array(list(map(len, texts)), np.int32),
        num_prompt_tokens=np.array(list(map(len, prompts)), np.int32),
    )
    requests = {
        one: SimpleNamespace(sampling_params=asked, output_token_ids=output)
        for one, asked, output in zip(ids, params, outputs, strict=True)
    }
    return batch, requests


@given(st.lists(st.lists(st.integers(0, 9), max_size=6, unique=True), min_size=1))
def test_stop_tokens_are_found_in_lists_of_any_length(lists: list[list[int]]) -> None:
    tokens = np.tile(np.arange(-1, 10), (len(lists), 1))
    found = StopTokens.of(lists).among(tokens)
    assert found.tolist() == [[token in one for token in range(-1, 10)] for one in lists]


def test_a_long_list_of_stop_tokens_is_one_requests_alone() -> None:
    """Other requests of the batch neither hold as many, nor are compared with them."""
    many = list(range(9000, 1000, -1))
    params = [SamplingParams(stop_token_ids=stops) for stops in (many, [3], [])]
    batch, requests = batch_of([[1, 2]] * 3, [[4, 1001], [4, 3], [4, 3]], params)
    ends = RequestEnds(99)
    assert ends.going_on(batch, requests).tolist() == [2]
    answers = ends.answers(batch, requests)
    assert answers.ended(1, np.array([9000, 9000, 9000])).tolist() == [True, False, False]
    told = np.array([[5, 1001, 5], [5, 5, 3], [9000, 3, -1]])
    assert answers.lengths(told).tolist() == [2, 3, 2]
    held = [*vars(ends).values(), *vars(answers.stops).values()]
    assert max(one.size for one in held if isinstance(one, np.ndarray)) == len(many) + 1


def test_nothing_is_drafted_for_a_text_that_has_repeated_itself() -> None:
    """As vLLM's scheduler sees it: in what has been put out, from min_tokens on."""
    detection = RepetitionDetectionParams(max_pattern_size=2, min_count=3)
    asked = SamplingParams(repetition_detection=detection)
    later = SamplingParams(repetition_detection=detection, min_tokens=7)
    outputs = [[8, 4, 5, 4, 5, 4, 5]] * 4 + [[4, 5, 4, 5, 4, 5], [5, 4, 5]]
    params = [asked, SamplingParams(), later, asked, later, asked]
    prompts = [[1]] * 5 + [[4, 5, 4]]
    batch, requests = batch_of(prompts, outputs, params)
    ends = RequestEnds(99)
    assert ends.going_on(batch, requests).tolist() == [1, 4, 5]
    answers = ends.answers(batch, requests)
    assert set(answers.repeating) == {0, 2, 3, 4, 5}
    assert answers.ended(1, np.array([4, 4, 5, 6, 4, 4])).tolist() == [
        True, False, False, False, True, False,
    ]  # fmt: skip
