"""What other requests have said, in real engines: faster, the same text, by salt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from conftest import BUSY, Ties, engine, greedy, metric, mixed_prompts, prompts_of, run, use
from prices import pay_always
from vllm import LLM, SamplingParams
from vllm.outputs import CompletionOutput

NODES = 48
SHARED = {"sizing": "dynamic", "lookup": "shared"}
ALONE = {**SHARED, "heads": False, "recycling": False}
SOURCES: dict[str, dict[str, Any]] = {
    "alone": ALONE,
    "beside recycling": {**SHARED, "heads": False},
    "beside all, pruned": SHARED,
}

MIXED = mixed_prompts(20, seed=91)
SHORT = prompts_of([20 + 12 * i for i in range(6)], seed=92)
SEEDED = [
    SamplingParams(temperature=0.8, top_p=0.95, seed=seed, max_tokens=48, logprobs=2)
    for seed in range(len(SHORT))
]


@pytest.fixture(scope="module")
def plain() -> dict[str, list[CompletionOutput]]:
    """What plain vLLM writes."""
    with engine() as llm:
        return {
            "greedy": run(llm, MIXED, greedy(64, logprobs=2)),
            "seeded": run(llm, SHORT, SEEDED),
        }


@pytest.fixture(scope="module")
def llm(plain: dict[str, list[CompletionOutput]]) -> Iterator[LLM]:
    """Comes after plain vLLM: one engine at a time lives in a process."""
    with engine(NODES, propd=SHARED, **{**BUSY, "max_num_batched_tokens": 400}) as found:
        yield found


@pytest.mark.parametrize("source", SOURCES)
def test_text_is_plain_vllms(
    source: str, llm: LLM, plain: dict[str, list[CompletionOutput]], ties: Ties
) -> None:
    use(llm, NODES, SOURCES[source])
    pay_always(llm)
    for _ in range(2):  # the second time all is known
        before = metric(llm, "spec_decode_num_accepted_tokens")
        ties.check(plain["greedy"], run(llm, MIXED, greedy(64)))
        accepted = metric(llm, "spec_decode_num_accepted_tokens") - before
    assert accepted > 700, "what was said before was hardly ever right"


def test_sampled_text_is_plain_vllms_seed_by_seed(
    llm: LLM, plain: dict[str, list[CompletionOutput]], ties: Ties
) -> None:
    use(llm, NODES, SOURCES["beside recycling"])
    pay_always(llm)
    for _ in range(2):
        ties.check(plain["seeded"], run(llm, SHORT, SEEDED))


def steps(llm: LLM, salt: str | None) -> int:
    """Steps of the same request, under a salt."""
    (prompt,) = prompts_of([40], seed=93)
    if salt is not None:
        prompt = {**prompt, "cache_salt": salt}
    llm.collective_rpc("start_sizing_records")
    run(llm, [prompt], greedy(96, ignore_eos=True))
    return len(llm.collective_rpc("take_sizing_records")[0])


def test_requests_of_one_salt_help_each_other(llm: LLM) -> None:
    use(llm, NODES, ALONE)
    pay_always(llm)
    salts = ("mine", None, "yours")
    first, again = ([steps(llm, salt) for salt in salts] for _ in range(2))
    assert min(first) > 0.8 * max(first), "another salt's text has told"
    assert max(again) < 0.6 * min(first)
