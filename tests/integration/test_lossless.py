"""Greedy text in float32 is plain vLLM's, token by token, whatever the load does."""

from typing import Any

import pytest
from conftest import (
    BUSY,
    PRUNING,
    SETTINGS,
    Prompt,
    Ties,
    engine,
    greedy,
    metric,
    mixed_prompts,
    prompts_of,
    rooms,
    run,
    unlogged,
)
from vllm import SamplingParams
from vllm.outputs import CompletionOutput

from vllm_propd.engine.frame_room import FRAME_ROOM

ARMS = [(1, "unpruned"), (7, "unpruned"), *((48, rule) for rule in SETTINGS)]
LOGGED = greedy(logprobs=2)


def stop_cases() -> tuple[list[Prompt], list[SamplingParams]]:
    """Requests that end inside accepted paths: stop tokens, stop strings, max_tokens."""
    prompts = prompts_of([40 + i for i in range(32)], seed=5)
    # Frequent tokens of code: they end a request wherever they stand in a path.
    params = [greedy(stop_token_ids=[201 + i], logprobs=2) for i in range(8)]
    params += [greedy(stop=[s], logprobs=2) for s in (":", "self", "(", "\n", ")", "=")]
    params += [greedy(max_tokens=i, logprobs=2) for i in range(1, 19)]
    return prompts, params


def workload(name: str) -> tuple[dict[str, Any], list[Prompt], Any]:
    """Engine options, prompts and sampling parameters of a named workload."""
    if name == "busy":
        return BUSY, mixed_prompts(56), LOGGED
    if name == "full_trees":
        # Half of this budget holds 16 whole trees; chunks of prompts run beside them.
        return {**BUSY, "max_num_batched_tokens": 1600}, mixed_prompts(28, 7), LOGGED
    if name == "max_model_len":
        # Drafts are cut where root + drafts would pass the model's length.
        lengths = list(range(130, 160, 2)) + [100] * 5
        options = {"max_model_len": 160, "block_size": 32}
        return options, prompts_of(lengths, seed=1), LOGGED
    if name == "block_boundaries":
        lengths = [32 * n + d for n in (1, 2, 4) for d in (-2, -1, 0, 1, 2)]
        return {"block_size": 32}, prompts_of(lengths, seed=2), LOGGED
    if name == "preemption":
        # 16 sequences of up to 260 tokens want 144 blocks; there are 60.
        options = {"block_size": 32, "num_gpu_blocks_override": 60}
        lengths = [100 + 4 * i for i in range(16)]
        return options, prompts_of(lengths, seed=3), LOGGED
    assert name == "stops"
    return BUSY, *stop_cases()


NAMES = ("busy", "full_trees", "max_model_len", "block_boundaries", "preemption", "stops")


@pytest.fixture(scope="module", params=NAMES)
def plain(request: pytest.FixtureRequest) -> tuple[str, list[CompletionOutput]]:
    """Plain vLLM's answer to each workload."""
    options, prompts, params = workload(request.param)
    with engine(**options) as llm:
        return request.param, run(llm, prompts, params)


@pytest.mark.parametrize(("nodes", "rule"), ARMS)
def test_text_is_plain_vllms(
    plain: tuple[str, list[CompletionOutput]], nodes: int, rule: str, ties: Ties
) -> None:
    name, expected = plain
    options, prompts, params = workload(name)
    with engine(nodes, propd=SETTINGS[rule], **options) as llm:
        ours = run(llm, prompts, unlogged(params))
        assert metric(llm, "spec_decode_num_accepted_tokens") > 0
        if name == "preemption":
            assert metric(llm, "num_preemptions") > 0
    excused = ties.check(expected, ours)
    for index, (left, right) in enumerate(zip(expected, ours, strict=True)):
        if index not in excused:
            assert left.finish_reason == right.finish_reason
            assert left.text == right.text


@pytest.mark.parametrize("rule", ["unpruned", "top_k"])
def test_aborted_request_leaves_the_others_alone(rule: str, ties: Ties) -> None:
    """A request aborted in mid-flight, with drafts outstanding, is simply gone."""
    prompts = prompts_of([60 + 9 * i for i in range(12)], seed=4)
    with engine() as llm:
        expected = run(llm, prompts, LOGGED)
    with engine(48, propd=PRUNING[rule]) as llm:
        core = llm.llm_engine
        for i, prompt in enumerate(prompts):
            core.add_request(str(i), prompt, LOGGED)
        finished: dict[str, CompletionOutput] = {}
        steps = 0
        while core.has_unfinished_requests():
            for output in core.step():
                if output.finished:
                    finished[output.request_id] = output.outputs[0]
            steps += 1
            if steps == 6:
                core.abort_request(["3", "7"])
    kept = [i for i in range(len(prompts)) if i not in (3, 7)]
    assert sorted(map(int, finished.keys() - {"3", "7"})) == kept
    ties.check([expected[i] for i in kept], [finished[str(i)] for i in kept])


@pytest.mark.alone
@pytest.mark.parametrize(
    "rules",
    [["top_k"], pytest.param(["unpruned", "path_probability"], marks=pytest.mark.long)],
    ids=" and ".join,
)
def test_compiled_engine(rules: list[str], ties: Ties) -> None:
    """VLLM's default on the CPU compiles the model; tree attention stays outside."""
    prompts = mixed_prompts(8, seed=6)
    options = {"enforce_eager": False, "own_processes": True}
    with engine(**options) as llm:
        expected = run(llm, prompts, LOGGED)
        assert llm.collective_rpc(rooms) == [0]
    for rule in rules:
        with engine(48, propd=PRUNING[rule], **options) as llm:
            ours = run(llm, prompts, LOGGED)
            assert llm.collective_rpc(rooms) == [1]
        ties.check(expected, ours)


@pytest.mark.alone
def test_plain_vllm_has_room_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FRAME_ROOM, "1")
    with engine(own_processes=True) as llm:
        assert llm.collective_rpc(rooms) == [1]


def backends(worker: Any) -> list[str]:
    """Where each attention layer's backend comes from."""
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    return [layer.get_attn_backend().__module__.partition(".")[0] for layer in layers]


def test_an_engine_beside_propds_is_plain() -> None:
    """One process, one registry of backends: another engine gets vLLM's own."""
    for nodes, expected in ((0, "vllm"), (8, "vllm_propd"), (0, "vllm")):
        with engine(nodes) as llm:
            assert set(llm.collective_rpc(backends)[0]) == {expected}
