"""What other requests have said, in real engines: faster, the same text, by salt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from conftest import (
    BUSY,
    Ties,
    engine,
    greedy,
    metric,
    mixed_prompts,
    prompts_of,
    run,
    seeded,
    use,
)
from prices import pay_always
from vllm import LLM
from vllm.outputs import CompletionOutput
from vllm.v1.request import Request, RequestStatus

from vllm_propd.engine.integration.cache_salts import SALT, salted, salts_of

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
SEEDED = seeded(len(SHORT))


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


def test_a_salt_is_not_what_a_client_says_it_is(llm: LLM) -> None:
    """``extra_args`` come from requests (``vllm_xargs``), and are anything."""
    use(llm, NODES, ALONE)
    pay_always(llm)
    (prompt,) = prompts_of([40], seed=94)
    expected = run(llm, [prompt], greedy(48))
    for sent in ("x", 1 << 63, [1, 2], 5):
        params = greedy(48, extra_args={SALT: sent, "own": 1})
        assert run(llm, [prompt], params)[0].token_ids == expected[0].token_ids
        assert params.extra_args == {SALT: sent, "own": 1}
        assert salted(params, None).extra_args == {"own": 1}
        assert salted(params, "a").extra_args[SALT] != sent


def test_all_of_a_session_has_its_first_parts_salt(llm: LLM) -> None:
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    salts = ("tenant", None, "other")
    for salt in salts:
        scheduler.add_request(
            Request("session", [1, 2, 3], greedy(8), None, cache_salt=salt, resumable=True)
        )
    first = scheduler.requests["session"]
    parts = [first.sampling_params] + [one.sampling_params for one in first.streaming_queue]
    scheduler.finish_requests("session", RequestStatus.FINISHED_ABORTED)
    found = salts_of(parts)
    assert len(found) == len(salts)
    assert set(found.tolist()) == set(salts_of([salted(greedy(8), "tenant")]).tolist())
