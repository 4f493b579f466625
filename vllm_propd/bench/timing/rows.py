"""Results of arms at a point: what was measured, as rows of ``results.json``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_propd.bench.arms import Arm
from vllm_propd.bench.results import Row
from vllm_propd.bench.settings import BenchSettings
from vllm_propd.bench.timing.measured import Measured
from vllm_propd.bench.timing.paired import Chunks
from vllm_propd.bench.timing.turn import Turn
from vllm_propd.bench.timing.turns import SHOWN, AnyTurn, Turns, at
from vllm_propd.bench.workloads.points import Point


def rows_of(
    one: Measured, arms: list[Arm], peaks: dict[str, float], settings: BenchSettings
) -> list[Row]:
    """Returns the rows of a point, and of each of its tasks if it has several.

    Args:
        one: what was measured there; nothing yet: there are no rows.
        arms: what is compared.
        peaks: by arm the most memory that its workers have held, MiB.
        settings: what was asked for.
    """
    return [
        _with_chunks(row, chunks)
        for point, turns, chunks in _parts(one)
        for row in rows_at(arms, point, turns, peaks, settings)
    ]


def _parts(one: Measured) -> Iterator[tuple[Point, Turns[Turn], Chunks]]:
    """Yields a point with what was measured there, whole and by task."""
    if one.turns.plain:
        yield one.point, one.turns, one.chunks
    for task in dict.fromkeys(one.point.tasks):
        point, groups = one.point.of_task(task)
        if (turns := one.turns.only(groups)).plain:
            yield point, turns, one.chunks.only(groups)


def _with_chunks(row: Row, chunks: Chunks) -> Row:
    """Completes a row with what paired chunks say, if there are some, and returns it."""
    if not chunks.done:
        return row
    arm = row.arm
    row.wall_ratio = chunks.ratio_of_sums(arm)
    row.wall_ratio_median = chunks.median(arm)
    row.wall_ratio_quartiles = chunks.quartiles(arm)
    row.wall_ratio_median_quartiles = chunks.quartiles_of_median(arm)
    row.wall_tokens_per_step = chunks.tokens_per_step(arm)
    row.heads_share = chunks.share(arm, "heads_s")
    row.in_vain_share = chunks.share(arm, "in_vain_s")
    parts = [chunk[arm] for chunk in chunks.done]
    row.num_chunks = len(parts)
    row.chunks = [(part.tokens, round(part.seconds, 4)) for part in parts]
    return row


def _steps(records: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Returns a row's lists about timed steps: measured and estimated ms, tree sizes."""
    timed = [record for record in records if record["measured_s"]]
    return {
        "measured_step_ms": [round(1e3 * r["measured_s"], 3) for r in timed],
        "estimated_step_ms": [round(1e3 * r["estimated_s"], 3) for r in timed],
        "tree_sizes": [round(r["nodes"] / max(r["sequences"], 1), 3) for r in timed],
    }


def rows_at(
    arms: list[Arm],
    point: Point,
    found: Turns[AnyTurn],
    peaks: dict[str, float],
    settings: BenchSettings,
) -> list[Row]:
    """Returns a row of results for each arm at a point."""
    prompts = len(found.latest("plain").texts)
    rows = []
    for arm in arms:
        turns = found.of(arm.name)
        decoding = found.decoding(arm.name)
        speeds = [turn.tokens_per_s for turn in decoding] or [0.0]
        last = found.latest(arm.name)
        timed = bool(last.parts)
        rows.append(
            Row(
                arm=arm.name,
                workload=point.workload,
                batch_size=point.batch_size,
                tokens_per_s=found.tokens_per_s(arm.name),
                tokens_per_s_min=min(speeds),
                tokens_per_s_max=max(speeds),
                ratio_to_plain=found.ratio(arm.name),
                rounds=len(turns),
                turns=[
                    (round(found.when(t), 2), t.group, round(t.tokens_per_s, 3))
                    for t in decoding
                ],
                step_times=[
                    (*kind, len(laps), [round(1e3 * at(laps, q), 3) for q in SHOWN])
                    for kind, laps in found.steps(arm.name).items()
                ],
                tokens_per_step=last.tokens_per_step,
                drafted_per_step=last.drafted / max(last.drafts, 1),
                kept_per_step=last.kept_per_step if timed else None,
                work_ratio=last.work.ratio if timed else None,
                step_ms={part: round(ms, 3) for part, ms in last.step_ms().items()},
                host_ms_per_step=round(last.host_ms(), 3) if timed else None,
                **_steps(last.records),
                peak_rss_mib=round(peaks[arm.name]),
                acceptance_by_depth=[n / last.drafts for n in last.accepted_at if n],
                requests_per_s=point.rate,
                identical_to_plain=found.same_texts(arm.name),
                prompts=prompts,
                config=arm.speculative_config,
                seed=settings.seed,
            )
        )
    return rows
