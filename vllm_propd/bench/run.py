"""``vllm-propd bench``: arms take turns on the same prompts, on the same machine."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress
from safetensors import safe_open
from vllm import SamplingParams
from vllm.platforms import current_platform

from vllm_propd.bench.arms import Arm, Heads, most_nodes, parse_arms
from vllm_propd.bench.engines import (
    FASTEST,
    HUGE_PAGES,
    ArmEngine,
    at_most,
    close_engines,
    start_engines,
)
from vllm_propd.bench.report import show, wide_console, write_report
from vllm_propd.bench.results import Results, Row, installed_versions, this_machine
from vllm_propd.bench.settings import PASSES, BenchSettings
from vllm_propd.bench.timing.measured import Measured
from vllm_propd.bench.timing.paired import Chunks
from vllm_propd.bench.timing.turn import Recording
from vllm_propd.bench.timing.turns import SHOWN, AnyTurn, Turns, at
from vllm_propd.bench.trees import accepted_by_rank, tokens_by_size
from vllm_propd.bench.workloads.points import Point, Tokenize, batch_points, workload_points
from vllm_propd.bench.workloads.trace import latencies, run_trace
from vllm_propd.fast_dtype import fast_dtype
from vllm_propd.heads.checkpoint import load_heads
from vllm_propd.heads.export import export_for_vllm

RECORDED = 32
"""New tokens of each request in the turns whose trees are recorded."""


def run_bench(
    model: Path, heads: Path, prompts: list[Path], out: Path, settings: BenchSettings
) -> Results:
    """Measures all arms and writes ``results.json`` and ``report.html`` into ``out``.

    Args:
        model: folder of the target.
        heads: folder of the heads, in ProPD's format.
        prompts: files whose text is cut into prompts; none: held-out files of Python's
            library.
        out: folder of the results; made if it is not there.
        settings: what to measure.

    Raises:
        ValueError: unknown arms, unusable heads, too little text.
    """
    out.mkdir(parents=True, exist_ok=True)
    # vLLM's n-gram proposer imports numba too late, too (`numba_beside_vllm.py`): the model
    # would run on one thread, in that arm only.
    os.environ.setdefault("NUMBA_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    for name, value in HUGE_PAGES.items():
        os.environ.setdefault(name, value)
    console = wide_console()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = load_heads(heads)
        for_vllm = Path(scratch) / "medusa"
        export_for_vllm(heads, output_layer(model), for_vllm)
        arms = parse_arms(settings.arms, Heads(heads, for_vllm, checkpoint.num_heads))
        tokenize = tokenizer_of(model)
        points = batch_points(tokenize, prompts, settings)
        trace = None
        if settings.workload:
            *others, trace = workload_points(tokenize, prompts, settings)
            points += others
        params = SamplingParams(
            temperature=settings.temperature,
            max_tokens=settings.max_tokens,
            ignore_eos=True,
            detokenize=False,
        )
        results = _results(model, settings)
        if slow := _too_slow(results):
            console.print(f"[yellow]{slow}[/yellow]")
        options = engine_options(model, settings, most_nodes(arms))
        with Progress(console=console) as bar:
            engines = start_engines(arms, options, bar, timed=True)
            measured = [Measured(point, engines, bar) for point in points]

            def note() -> None:  # hours of measuring may end early
                peaks = {engine.arm.name: engine.peak_rss_mib() for engine in engines}
                results.rows = [
                    _with_chunks(row, one.chunks)
                    for one in measured
                    if one.turns.plain
                    for row in _rows(arms, one.point, one.turns, peaks, settings)
                ]
                _save(results, out)

            for passed in range(1, PASSES + 1) if settings.rounds else ():
                for one in measured:
                    one.measure(passed / PASSES, params, settings)
                note()
            for start in range(settings.starts if settings.chunks else 0):
                if start:
                    close_engines(engines)
                    engines = start_engines(arms, options, bar, timed=True)
                for one in measured:
                    one.pair(engines, params, settings, start)
                    note()
            _tell_of_trees(results, engines, points[0], params)
            # Before the trace's engines start: memory is for one set of them.
            close_engines(engines)
            if trace is not None:
                trace = trace.at(settings.trace_rate or _rate(results, settings))
                served, peaks = asyncio.run(
                    run_trace(arms, options, trace, params, settings.rounds, bar)
                )
                for row in _rows(arms, trace, served, peaks, settings):
                    update = latencies(served.of(row.arm))
                    results.rows.append(row.model_copy(update=update))
    _save(results, out)
    write_report(results, out)
    show(results, console)
    console.print(f"{out / 'results.json'}, {out / 'report.html'}")
    return results


def _with_chunks(row: Row, chunks: Chunks) -> Row:
    """Completes a row with what paired chunks say, if there are some, and returns it."""
    if not chunks.done:
        return row
    arm = row.arm
    row.wall_ratio = chunks.ratio_of_sums(arm)
    row.wall_ratio_median = chunks.median(arm)
    row.wall_ratio_quartiles = chunks.quartiles(arm)
    row.wall_ratio_median_quartiles = chunks.quartiles_of_median(arm)
    row.heads_share = chunks.share(arm, "heads_s")
    row.in_vain_share = chunks.share(arm, "in_vain_s")
    parts = [chunk[arm] for chunk in chunks.done]
    row.chunks = [(part.tokens, round(part.seconds, 4)) for part in parts]
    return row


def _save(results: Results, out: Path) -> None:
    (out / "results.json").write_text(results.model_dump_json(indent=1) + "\n")


def _rate(results: Results, settings: BenchSettings) -> float:
    """Returns the requests/s that plain vLLM finishes at the largest batch size."""
    plain = results.row("plain", max(settings.batch_sizes))
    assert plain is not None
    return plain.tokens_per_s / settings.max_tokens


def output_layer(model: Path) -> Any:
    """Reads the target's output layer (its embedding, where they are tied).

    Returns:
        ``[vocabulary, hidden]``, of the dtype in which it is stored.

    Raises:
        ValueError: the folder holds no safetensors with an output layer.
    """
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for name in ("lm_head.weight", "model.embed_tokens.weight"):
                if name in names:
                    return file.get_tensor(name)
    raise ValueError(f"{model} holds no safetensors with an output layer")


def tokenizer_of(model: Path) -> Tokenize:
    """Returns the target's tokenizer, as a function from text to token ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return lambda text: list(tokenizer(text)["input_ids"])


def engine_options(model: Path, settings: BenchSettings, nodes: int) -> dict[str, Any]:
    """Returns the arguments of ``vllm.LLM`` that all arms share.

    Args:
        model: folder of the target.
        settings: what to measure.
        nodes: how many nodes the largest tree has.
    """
    most = max(settings.batch_sizes)
    config = json.loads((model / "config.json").read_text())
    longest = settings.longest_prompt + FASTEST * settings.max_tokens + 64
    return {
        "model": str(model),
        "dtype": settings.dtype,
        "max_model_len": min(longest, config.get("max_position_embeddings", longest)),
        "max_num_seqs": most,
        # Trees take at most half of it: room for all of them whole.
        "max_num_batched_tokens": max(2048, 2 * most * (nodes + 1)),
        "enforce_eager": settings.enforce_eager,
        # The same prompts come round after round: a cache would skip their prefill.
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 1 << 30,
        "use_tqdm_on_load": False,
        "disable_log_stats": False,
    }


def _results(model: Path, settings: BenchSettings) -> Results:
    config = json.loads((model / "config.json").read_text())
    parameters = 0
    for path in model.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                parameters += int(np.prod(file.get_slice(name).get_shape()))
    return Results(
        model=model.name,
        parameters=parameters,
        inflated="inflated" in config,
        dtype=settings.dtype,
        prompt_tokens=settings.prompt_tokens,
        max_tokens=settings.max_tokens,
        rounds=settings.rounds,
        starts=settings.starts,
        temperature=settings.temperature,
        machine=this_machine(),
        versions=installed_versions(),
    )


def _too_slow(results: Results) -> str | None:
    """Returns a warning where this dtype would take hours on this CPU; else None."""
    fast = fast_dtype(current_platform.device_type)
    if results.dtype != "bfloat16" or fast == "bfloat16":
        return None
    return (
        "This CPU has no AVX-512: vLLM multiplies bfloat16 matrices a row at a time "
        "here, and a step of 32 tokens takes seconds. Try --dtype float32."
    )


def _steps(records: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Returns a row's lists about timed steps: measured and estimated ms, tree sizes."""
    timed = [record for record in records if record["measured_s"]]
    return {
        "measured_step_ms": [round(1e3 * r["measured_s"], 3) for r in timed],
        "estimated_step_ms": [round(1e3 * r["estimated_s"], 3) for r in timed],
        "tree_sizes": [round(r["nodes"] / max(r["sequences"], 1), 3) for r in timed],
    }


def _tell_of_trees(
    results: Results, engines: list[ArmEngine], point: Point, params: SamplingParams
) -> None:
    """Records trees of ProPD's arms at a point, and completes their rows with them."""
    params = at_most(params, RECORDED)
    for engine in engines:
        if not engine.arm.is_ours:
            continue
        row = results.row(engine.arm.name, point.batch_size)
        assert row is not None
        recording: Recording = []
        for group in point.groups:
            recording += engine.record(group, params)[1]
        row.accepted_by_rank = accepted_by_rank(recording)
        row.tokens_by_size = tokens_by_size(recording)
        row.reliability = engine.reliability()


def _agree(text: list[int], other: list[int]) -> bool:
    """Whether two texts are the same as far as both go; False where one is empty."""
    both = min(len(text), len(other))
    return both > 0 and text[:both] == other[:both]


def _rows(
    arms: list[Arm],
    point: Point,
    found: Turns[AnyTurn],
    peaks: dict[str, float],
    settings: BenchSettings,
) -> list[Row]:
    """Returns a row of results for each arm at a point."""
    texts = found.latest("plain").texts
    rows = []
    for arm in arms:
        turns = found.of(arm.name)
        speeds = [turn.tokens_per_s for turn in turns]
        last = found.latest(arm.name)
        # The first pass may have ended before an arm has met all prompts.
        same = sum(map(_agree, last.texts, texts))
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
                    for t in turns
                ],
                steps=[
                    (drafted, len(laps), [round(1e3 * at(laps, q), 3) for q in SHOWN])
                    for drafted, laps in found.steps(arm.name).items()
                ],
                tokens_per_step=last.tokens_per_step,
                drafted_per_step=last.drafted / max(last.drafts, 1),
                kept_per_step=last.kept_per_step,
                work_ratio=last.work.ratio,
                step_ms={part: round(ms, 3) for part, ms in last.step_ms().items()},
                host_ms_per_step=round(last.host_ms(), 3),
                **_steps(last.records),
                peak_rss_mib=round(peaks[arm.name]),
                acceptance_by_depth=[n / last.drafts for n in last.accepted_at if n],
                requests_per_s=point.rate,
                identical_to_plain=same,
                prompts=len(texts),
                config=arm.speculative_config,
                seed=settings.seed,
            )
        )
    return rows
