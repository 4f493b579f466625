"""Two ranks: plain vLLM's text, and the same trees whatever the ranks' clocks say."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    PRUNING,
    Prompt,
    Ties,
    engine,
    greedy,
    mixed_prompts,
    rooms,
    run,
    use,
)
from made_heads import heads_in, write_own_outputs
from prices import Line
from ray_on_cpus import refuse
from vllm import LLM
from vllm.outputs import CompletionOutput

from vllm_propd.engine.step import propose

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module", autouse=True)
def _one_core_each() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        yield


@pytest.fixture(scope="module")
def ranks() -> Iterator[LLM]:
    """An engine of two ranks, for all settings in turn: it starts for half a minute."""
    with engine(48, tensor_parallel_size=2) as llm:
        yield llm


PROMPTS = mixed_prompts(24, seed=21)


@pytest.fixture(scope="module")
def plain() -> list[CompletionOutput]:
    """Plain vLLM's answers, by two ranks too: sums have another order than by one."""
    with engine(tensor_parallel_size=2) as llm:
        return run(llm, PROMPTS, greedy(logprobs=2))


def test_text_is_plain_vllms(ranks: LLM, plain: list[CompletionOutput], ties: Ties) -> None:
    for propd in PRUNING.values():
        use(ranks, 48, propd)
        ties.check(plain, run(ranks, PROMPTS, greedy(logprobs=2)))


def test_heads_that_know_the_token_before(
    plain: list[CompletionOutput], tmp_path: Path, ties: Ties
) -> None:
    """Their embeddings and transition term lie on every rank whole."""
    heads = heads_in(tmp_path, "root", "transition")
    with engine(16, propd={"model": str(heads)}, tensor_parallel_size=2) as llm:
        ties.check(plain, run(llm, PROMPTS, greedy(logprobs=2)))


def test_workers_have_room_for_frames(ranks: LLM) -> None:
    assert ranks.collective_rpc(rooms) == [1, 1]


def drafted(llm: LLM, prompts: list[Prompt]) -> list[list[list[int]]]:
    """Tokens of every tree of 16 nodes, step by step."""
    llm.collective_rpc("start_recording", args=(1000,))
    for prompt in prompts:  # which share a step is a matter of when they arrive
        run(llm, [prompt], greedy(24))
    recording = llm.collective_rpc("take_recording")[0]
    return [[tree["token"][:16] for tree in step] for step in recording]


def load_heads_anew(worker: Any) -> None:
    """The worker's heads have 8 bits again."""
    worker.model_runner.drafter.load_model(worker.model_runner.model)


def load_heads_in_targets_dtype(worker: Any) -> None:
    """They compute as the target does: in 8 bits, near-ties may swap places."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(propose, "draft_dtype", lambda target, device: target)
        load_heads_anew(worker)


def test_own_output_layers_are_sharded(ranks: LLM, tmp_path: Path) -> None:
    """Copies of the target's output layer must draft what the shared one drafts."""
    write_own_outputs(tmp_path)
    prompts = mixed_prompts(4, seed=23)
    use(ranks, 16, {})
    ranks.collective_rpc(load_heads_in_targets_dtype)
    shared = drafted(ranks, prompts)
    ranks.collective_rpc(load_heads_anew)
    with engine(16, propd={"model": str(tmp_path)}, tensor_parallel_size=2) as llm:
        llm.collective_rpc(load_heads_in_targets_dtype)
        own = drafted(llm, prompts)
    assert len(shared) > 20
    assert shared == own


def answer_again(worker: Any) -> None:
    """Undoes it."""
    del worker.take_draft_token_ids


def test_drafts_come_with_the_output(ranks: LLM) -> None:
    use(ranks, 16, {})
    ranks.collective_rpc(refuse)
    assert len(drafted(ranks, mixed_prompts(2, seed=24))) > 10
    ranks.collective_rpc(answer_again)


CLOCKS = ("perf_counter", "monotonic", "time")
SLOWED = {"propose_draft_token_ids": 0.004, "_sample": 0.003, "_prepare_inputs": 0.002}


def skew(worker: Any) -> None:
    """Rank 1 gets clocks that run at other speeds, and stumbles in every hook."""
    if worker.rank == 0:
        return
    worker.clocks = {name: getattr(time, name) for name in CLOCKS}

    def skewed(clock: Callable[[], float], speed: float) -> Callable[[], float]:
        return lambda: speed * clock()

    def slowed(method: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def slow(*args: Any, **kwargs: Any) -> Any:
            sleep(seconds)
            return method(*args, **kwargs)

        return slow

    sleep = time.sleep
    time.perf_counter = skewed(time.perf_counter, 3.0)
    time.monotonic = skewed(time.monotonic, 2.0)
    time.time = skewed(time.time, 0.5)
    runner = worker.model_runner
    for method, seconds in SLOWED.items():
        setattr(runner, method, slowed(getattr(runner, method), seconds))


def set_right(worker: Any) -> None:
    """Undoes it."""
    if worker.rank == 0:
        return
    for name, clock in worker.clocks.items():
        setattr(time, name, clock)
    for method in SLOWED:
        delattr(worker.model_runner, method)


def set_price(worker: Any) -> None:
    """Rank 0, which plans, finds that trees pay; rank 1 still believes its clocks."""
    sizing = worker.model_runner.sizing
    if worker.rank == 0 and hasattr(sizing, "planner"):
        sizing.draft = Line(1e-4)
        for planner in (sizing.planner, sizing.planner_without):
            planner.step = Line(0.01, 2e-5, below=0.02)


@pytest.fixture(scope="module")
def skewed_ranks(ranks: LLM) -> Iterator[LLM]:
    """The engine with two clocks, for as long as it is asked for."""
    ranks.collective_rpc(skew)
    yield ranks
    ranks.collective_rpc(set_right)


@pytest.mark.parametrize("sizing", ["fixed", "dynamic"])
@pytest.mark.parametrize("rule", PRUNING)
def test_clocks_cannot_shape_trees(skewed_ranks: LLM, rule: str, sizing: str) -> None:
    llm = skewed_ranks
    use(llm, 48, {**PRUNING[rule], "sizing": sizing})
    llm.collective_rpc(set_price)
    llm.collective_rpc("start_recording", args=(1000,))
    run(llm, mixed_prompts(8, seed=22), greedy(48))
    first, second = llm.collective_rpc("take_recording")
    assert len(first) > 20
    assert first == second
    sizes = {tree["verified"] for step in first for tree in step}
    assert (len(sizes) > 5) == (sizing == "dynamic")
    pruned = any(len(tree["kept"]) < tree["verified"] for step in first for tree in step)
    assert pruned == (rule != "unpruned" or sizing == "dynamic")


@pytest.mark.parametrize("lookup", [True, "shared"])
def test_what_needs_no_heads_is_the_same_on_all_ranks(
    lookup: bool | str, skewed_ranks: LLM
) -> None:
    """Each rank keeps successors, and others' texts, by itself, and grows trees of them."""
    llm = skewed_ranks
    use(llm, 48, {"sizing": "dynamic", "heads": False, "lookup": lookup})
    llm.collective_rpc(set_price)
    llm.collective_rpc("start_recording", args=(1000,))
    run(llm, mixed_prompts(8, seed=25), greedy(128))
    first, second = llm.collective_rpc("take_recording")
    assert len(first) > 20
    assert first == second
    assert any(
        len(set(tree["parent"])) < len(tree["parent"]) for one in first for tree in one
    )
