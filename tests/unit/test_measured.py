"""Chunks of arms at a point: in which order arms run them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from rich.progress import Progress
from vllm import SamplingParams

from vllm_propd.bench.arms import Arm
from vllm_propd.bench.settings import BenchSettings
from vllm_propd.bench.timing.measured import Measured
from vllm_propd.bench.timing.rows import rows_of
from vllm_propd.bench.timing.turn import Turn
from vllm_propd.bench.workloads.chats import chat_points
from vllm_propd.bench.workloads.points import Point

PARAMS = SamplingParams(temperature=0.0, max_tokens=4)


class Noting:
    """Stands for an arm's engine: notes who runs which prompts, in chunks."""

    def __init__(self, name: str, ran: list[tuple[str, int]]):
        self.arm, self.ran = Arm(name, None), ran

    def run(self, prompts: list[list[int]], params: Any, full: bool = False) -> Turn:
        if not full:  # else it is a warm-up
            self.ran.append((self.arm.name, prompts[0][0]))
        return Turn(
            began=0.0, seconds=1.0, whole_s=1.0, tokens=3 if full else 2, steps=1,
            texts=[[1]], full=full,
        )  # fmt: skip


def nothing() -> None:
    """What is noted after a chunk."""


def orders(tasks: int, prompts_each: int, starts: int = 1, chunks: int = 0) -> list[bool]:
    """Whether each chunk began with the other arm; of ``tasks`` tasks, or of no task."""
    by_task = {f"task {t}": [[t]] * prompts_each for t in range(tasks)}
    settings = BenchSettings(
        batch_sizes=(1,), prompts_each=prompts_each, rounds=0, chunks=1, starts=starts
    )
    (point,) = chat_points(by_task, settings)
    if chunks:
        settings = replace(settings, chunks=chunks, most_chunks=chunks)
        point = replace(point, tasks=())
    ran: list[tuple[str, int]] = []
    engines: Any = [Noting("plain", ran), Noting("other", ran)]
    with Progress(disable=True) as bar:
        one = Measured(point, engines, bar)
        for start in range(starts):
            one.pair(engines, PARAMS, settings, nothing, start)
    first, second = ran[::2], ran[1::2]
    assert all(a[0] != b[0] and a[1] == b[1] for a, b in zip(first, second, strict=True))
    return [name == "other" for name, _ in first]


@pytest.mark.parametrize("tasks", [1, 2, 5, 6])
def test_each_task_has_both_orders_as_often(tasks: int) -> None:
    found = orders(tasks, prompts_each=4)
    assert len(found) == 4 * tasks
    for task in range(tasks):  # tasks take turns
        of_task = found[task::tasks]
        assert of_task in ([False, True] * 2, [True, False] * 2)


@pytest.mark.parametrize(("tasks", "starts"), [(6, 1), (6, 2), (5, 2)])
def test_tasks_of_one_batch_have_both_orders_together(tasks: int, starts: int) -> None:
    found = orders(tasks, prompts_each=1, starts=starts)
    assert sum(found) == len(found) / 2
    for one, again in zip(found, found[tasks:], strict=False):
        assert one != again


@pytest.mark.parametrize("prompts", [3, 4])
def test_prompts_that_come_again_have_the_other_order(prompts: int) -> None:
    found = orders(1, prompts, chunks=2 * prompts)
    assert found[:prompts] == [i % 2 == 1 for i in range(prompts)]
    assert all(a != b for a, b in zip(found, found[prompts:], strict=False))


def test_what_there_is_is_saved_after_each_chunk() -> None:
    """All arms have had it by then: rows can be made."""
    point = Point("batch", 1, [[1], [2]])
    settings = BenchSettings(batch_sizes=(1,), rounds=0, chunks=3, most_chunks=3)
    engines: Any = [Noting("plain", []), Noting("other", [])]
    arms, peaks = [engine.arm for engine in engines], {"plain": 1.0, "other": 1.0}
    saved: list[int | None] = []

    def save() -> None:
        saved.append(rows_of(one, arms, peaks, settings)[1].num_chunks)

    with Progress(disable=True) as bar:
        one = Measured(point, engines, bar)
        one.pair(engines, PARAMS, settings, save)
    assert saved == [1, 2, 3]


@pytest.mark.parametrize("rounds", [0, 4])
def test_a_row_says_of_how_many_chunks_it_is(rounds: int) -> None:
    """And how many tokens a step of theirs made, whatever rounds with full batches did."""
    settings = BenchSettings(
        batch_sizes=(1,), rounds=rounds, chunks=3, most_chunks=3, arms="plain"
    )
    engines: Any = [Noting("plain", [])]
    with Progress(disable=True) as bar:
        one = Measured(Point("batch", 1, [[1]]), engines, bar)
        if rounds:
            one.measure(1.0, PARAMS, settings)
        one.pair(engines, PARAMS, settings, nothing)
    (row,) = rows_of(one, [engines[0].arm], {"plain": 1.0}, settings)
    assert row.num_chunks == len(row.chunks) == 3
    assert row.rounds == (5 if rounds else 3)  # plain vLLM begins and ends them
    assert row.wall_tokens_per_step == row.per_step == 2.0
    assert row.tokens_per_step == (3.0 if rounds else 2.0)
