"""Verification's walk: what it leaves as it was, and what it says was put out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.sampling_params import RepetitionDetectionParams
from vllm.v1.sample.logits_processor import (
    AdapterLogitsProcessor,
    BatchUpdate,
    LogitsProcessors,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from vllm_propd.config import ProPDConfig
from vllm_propd.core.tree import TokenTree
from vllm_propd.engine.step.request_ends import Answers, StopTokens
from vllm_propd.engine.step.sampling import drawn
from vllm_propd.engine.step.states import Verified
from vllm_propd.engine.step.tree_step import TreeStep, build_step
from vllm_propd.engine.step.verify import draw, verify

VOCABULARY = 16
LONG, SHORT, PROMPT = range(3)
"""A request whose drafts are right, one whose are wrong, and one whose prompt goes on."""

PATH = [3, 5, 7, 9]


class Counting(AdapterLogitsProcessor):
    """Counts the calls of each request's own processor."""

    def __init__(self) -> None:
        super().__init__(None, None, False)  # type: ignore[arg-type]
        self.calls: list[list[int]] = []
        texts = [(i, SamplingParams(), None, []) for i in (LONG, SHORT, PROMPT)]
        self.update_state(BatchUpdate(3, removed=[], added=texts, moved=[]))

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        calls: list[int] = []
        self.calls.append(calls)

        def count(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            calls.append(len(output_ids))
            return logits

        return count


def metadata_of(**more: Any) -> SamplingMetadata:
    """Three greedy requests that ask for nothing."""
    ones = torch.ones(3)
    fields: dict[str, Any] = {
        "temperature": None,
        "all_greedy": True,
        "all_random": False,
        "top_p": None,
        "top_k": None,
        "generators": {},
        "max_num_logprobs": None,
        "no_penalties": True,
        "prompt_token_ids": None,
        "frequency_penalties": 0 * ones,
        "presence_penalties": 0 * ones,
        "repetition_penalties": ones,
        "output_token_ids": [[], [], []],
        "allowed_token_ids_mask": None,
        "bad_words_token_ids": {},
        "logitsprocs": LogitsProcessors(),
    }
    return SamplingMetadata(**{**fields, **more})


def chains() -> TreeStep:
    """Two requests with the same chain, and a prompt's chunk."""
    chain = np.arange(len(PATH))
    tree = TokenTree(np.array(PATH), chain, chain + 1, np.zeros(len(PATH), np.float32))
    rows = len(PATH) + 1
    step = build_step(
        {"a": PATH, "b": PATH},
        {"a": tree, "b": tree},
        {"a": LONG, "b": SHORT},
        np.cumsum([rows, rows, 1]),
        np.array([8, 8, 0]),
        np.array([rows, rows, 1]),
    )
    assert isinstance(step, TreeStep)
    return step


def walked(
    metadata: SamplingMetadata,
    left: int = 99,
    stops: tuple[int, ...] = (-1,),
    repeating: dict[int, SamplingParams] | None = None,
    sampler: Any = None,
) -> Verified:
    """Verifies a chain that is right, and one that is wrong, beside a prompt's chunk."""
    step, rows = chains(), len(PATH) + 1
    logits = torch.zeros(2 * rows + 1, VOCABULARY)
    logits[range(rows), [*PATH, 11]] = 30.0
    logits[rows:, 2] = 30.0
    answers = Answers(
        metadata.output_token_ids,
        np.full(3, left),
        StopTokens.of([stops, (-1,), (-1,)]),
        repeating or {},
    )
    putting_out = np.array([True, True, False])
    return verify(
        logits, step, step.root_rows(3), sampler or Sampler(), metadata, putting_out,
        answers, ProPDConfig(heads=False),
    )  # fmt: skip


def test_a_requests_own_processor_is_called_once_for_each_of_its_tokens() -> None:
    processor = Counting()
    metadata = metadata_of(logitsprocs=LogitsProcessors([processor]))
    found = walked(metadata)
    assert found.output.sampled_token_ids[:2].tolist() == [[*PATH, 11], [2] + [-1] * 4]
    assert list(map(len, processor.calls)) == [len(PATH) + 1, 1, 0]
    assert found.put_out.tolist() == [len(PATH) + 1, 1, 0]
    assert len(processor.req_info) == 3
    bare = Counting()
    metadata = metadata_of(logitsprocs=LogitsProcessors([bare]))
    here = np.array([True, False, True])
    draw(torch.zeros(3, VOCABULARY), np.arange(3), Sampler(), metadata, here, True)
    assert list(map(len, bare.calls)) == [1, 0, 1]


@pytest.mark.parametrize("trees", [True, False])
def test_nothing_is_drawn_for_a_prompt_that_goes_on(trees: bool) -> None:
    seeds = {i: torch.Generator().manual_seed(7) for i in (LONG, SHORT, PROMPT)}
    fresh = seeds[PROMPT].get_state()
    metadata = metadata_of(
        all_greedy=False, all_random=True, temperature=torch.ones(3), generators=seeds
    )
    here = np.array([True, True, False])
    if trees:
        walked(metadata)
    else:
        draw(torch.zeros(3, VOCABULARY), np.arange(3), Sampler(), metadata, here, False)
    moved = [not one.get_state().equal(fresh) for one in seeds.values()]
    assert moved == [True, True, False]
    assert metadata.generators is seeds and len(seeds) == 3


ALLOWED = torch.zeros(3, VOCABULARY, dtype=torch.bool)
ALLOWED[:, 4:] = True  # as vLLM has it: what is not allowed
STEERED: dict[str, dict[str, Any]] = {
    "allowed_token_ids": {"allowed_token_ids_mask": ALLOWED},
    "bad_words": {"bad_words_token_ids": {0: [[5]]}},
    "penalties": {
        "no_penalties": False,
        "presence_penalties": torch.ones(3),
        "prompt_token_ids": torch.full((3, 1), 5),
        "output_token_ids": [[5], [5], [5]],
    },
    "temperature": {
        "all_greedy": False,
        "all_random": True,
        "temperature": torch.full((3,), 0.5),
    },
    "nothing": {},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steered", STEERED)
def test_what_is_recycled_stays_as_the_target_has_said_it(
    steered: str, dtype: torch.dtype
) -> None:
    said = torch.arange(3.0 * VOCABULARY).view(3, VOCABULARY).to(dtype)
    logits, metadata = said.clone(), metadata_of(**STEERED[steered])
    draw(logits, np.arange(3), Sampler(), metadata, np.ones(3, bool), keeps=True)
    assert torch.equal(logits, said)


def test_logits_are_copied_only_where_they_would_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.Tensor, "clone", lambda self: pytest.fail("copied"))
    every, rows = np.ones(3, bool), np.arange(3)
    logits, steered = torch.zeros(3, VOCABULARY), metadata_of(**STEERED["bad_words"])
    draw(logits, rows, Sampler(), metadata_of(), every, keeps=True)
    draw(logits, rows, Sampler(), steered, every, keeps=False)
    draw(logits.bfloat16(), rows, Sampler(), steered, every, keeps=True)


@pytest.mark.parametrize(
    ("left", "stops", "expected"),
    [(99, (-1,), 5), (3, (-1,), 3), (1, (-1,), 1), (99, (7,), 3), (2, (7,), 2)],
)
def test_what_stands_behind_a_requests_end_is_not_put_out(
    left: int, stops: tuple[int, ...], expected: int
) -> None:
    """The scheduler cuts it; where all are greedy, all rows are drawn at once."""
    found = walked(metadata_of(), left, stops)
    assert found.put_out.tolist() == [expected, 1, 0]


@given(st.integers(0, 2**32 - 1))
def test_lengths_are_counted_token_by_token(seed: int) -> None:
    rng = np.random.default_rng(seed)
    requests, places = int(rng.integers(1, 5)), int(rng.integers(1, 7))
    tokens = rng.integers(0, 6, (requests, places))
    for row in tokens:
        row[int(rng.integers(1, places + 1)) :] = -1
    stops = rng.integers(-1, 6, (requests, int(rng.integers(0, 3))))
    stop_tokens = StopTokens.of(stops.tolist())
    left = rng.integers(1, 9, requests)
    expected = []
    for row, ends, most in zip(tokens.tolist(), stops.tolist(), left, strict=True):
        count = 0
        for token in row:
            if token < 0 or count == most:
                break
            count += 1
            if token in ends:
                break
        expected.append(count)
    found = Answers([[]] * requests, left, stop_tokens).lengths(tokens)
    assert found.tolist() == expected


class Recording(Sampler):
    """Keeps how many rows each call has, and the generators by row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.generators: list[dict[int, torch.Generator]] = []

    def forward(
        self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, **more: Any
    ) -> Any:
        self.rows.append(len(logits))
        self.generators.append(dict(sampling_metadata.generators))
        return super().forward(logits, sampling_metadata, **more)


def sampled_of(**more: Any) -> SamplingMetadata:
    """Three requests that sample, of which the long one alone takes its best token."""
    fields = {
        "all_greedy": False,
        "temperature": torch.tensor([0.0, 1.0, 1.0]),
        "top_p": torch.tensor([1.0, 0.5, 0.5]),
        "top_k": torch.tensor([VOCABULARY, 1, 1]),
    }
    return metadata_of(**{**fields, **more})


def test_who_has_stopped_is_sampled_no_more() -> None:
    """A row is sorted for ``top_p``: each is as dear as the first."""
    sampler, seeds = Recording(), {i: torch.Generator() for i in (LONG, PROMPT)}
    metadata = sampled_of(generators=seeds)
    found = walked(metadata, sampler=sampler)
    assert found.output.sampled_token_ids[:2].tolist() == [[*PATH, 11], [2] + [-1] * 4]
    assert found.put_out.tolist() == [len(PATH) + 1, 1, 0]
    assert sampler.rows == [2, 1, 1, 1, 1]
    assert sampler.generators == [{0: seeds[LONG]}] * 5
    assert metadata.generators is seeds


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.booleans(), min_size=2, max_size=6).filter(any), st.integers(0, 2**32 - 1)
)
def test_some_are_sampled_as_beside_the_others(drawing: list[bool], seed: int) -> None:
    """A request's seed, temperature, top_p and top_k are its own at whatever place."""
    rng, some = np.random.default_rng(seed), np.flatnonzero(drawing).tolist()
    count = len(drawing)
    fields = {
        "all_greedy": False,
        "temperature": torch.from_numpy(rng.choice([0.0, 0.7, 1.5], count)).float(),
        "top_p": torch.from_numpy(rng.choice([0.4, 0.9, 1.0], count)).float(),
        "top_k": torch.from_numpy(rng.choice([2, 5, VOCABULARY], count)),
    }
    logits = torch.from_numpy(rng.normal(0.0, 2.0, (count + 3, VOCABULARY))).float()
    rows, found = rng.permutation(count + 3)[:count], []
    for more in ({}, {"logprob_token_ids": {0: [1]}}):  # which wants all rows
        own = {i: torch.Generator().manual_seed(i) for i in range(count)}
        metadata, sampler = metadata_of(**fields, **more, generators=own), Recording()
        token, _ = drawn(logits, rows, sampler, metadata, np.array(drawing))
        assert sampler.rows == [count if more else len(some)]
        states = [one.get_state().tolist() for one in own.values()]
        found.append((token[some].tolist(), states))
    assert found[0] == found[1]


def test_all_rows_are_sampled_where_a_processor_knows_them_by_number() -> None:
    sampler = Recording()
    metadata = sampled_of(logitsprocs=LogitsProcessors([Counting()]))
    walked(metadata, sampler=sampler)
    assert sampler.rows == [3] * 5


def repeating(**more: Any) -> SamplingParams:
    detection = RepetitionDetectionParams(max_pattern_size=2, min_count=2)
    return SamplingParams(repetition_detection=detection, **more)


@pytest.mark.parametrize("sampled", [True, False], ids=["walk", "all rows at once"])
@pytest.mark.parametrize(
    ("said", "params", "expected"),
    [
        ([3, 5], repeating(), 2),
        ([3], repeating(), 1),
        ([3], repeating(min_tokens=3), 5),
        ([3, 5], repeating(min_tokens=5), 5),
        ([9], repeating(), 5),
    ],
)
def test_a_text_that_is_not_to_repeat_itself_ends_where_it_does(
    said: list[int], params: SamplingParams, expected: int, sampled: bool
) -> None:
    """No number is drawn behind that: a seeded session's next turn goes on with them."""
    outputs = [list(said), [], []]
    make = sampled_of if sampled else metadata_of
    metadata, sampler = make(output_token_ids=outputs), Recording()
    found = walked(metadata, repeating={LONG: params}, sampler=sampler)
    assert found.put_out.tolist() == [expected, 1, 0]
    assert outputs == [said, [], []]
    if sampled:
        assert len(sampler.rows) == expected
        assert int((found.output.sampled_token_ids[LONG] >= 0).sum()) == expected


@pytest.mark.parametrize(
    ("asked", "takes"),
    [
        ({}, True),
        ({"top_k": torch.full((3,), 1)}, False),
        ({"top_k": torch.full((3,), 2)}, True),
        ({"top_p": torch.full((3,), 0.5)}, False),
        ({"top_p": torch.full((3,), 0.9)}, True),
    ],
)
def test_typical_acceptance_takes_nothing_that_would_never_be_sampled(
    asked: dict[str, Any], takes: bool
) -> None:
    """The target gives the chain's first token 0.4, and another 0.55."""
    sampled = {"all_greedy": False, "all_random": True, "temperature": torch.ones(3)}
    step, config = chains(), ProPDConfig(heads=False, acceptance="typical")
    logits = torch.full((2 * (len(PATH) + 1) + 1, VOCABULARY), -30.0)
    logits[:, 1], logits[:, PATH[0]] = np.log(0.55), np.log(0.4)
    answers = Answers([[], [], []], np.full(3, 99), StopTokens.of([(-1,)] * 3))
    found = verify(
        logits, step, step.root_rows(3), Sampler(), metadata_of(**sampled, **asked),
        np.array([True, True, False]), answers, config,
    )  # fmt: skip
    first = found.output.sampled_token_ids[:2, 0].tolist()
    assert first == ([PATH[0]] * 2 if takes else [1] * 2)
