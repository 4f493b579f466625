"""``vllm-propd bench``: arms take turns on the same prompts, on the same machine."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from safetensors import safe_open
from vllm import SamplingParams
from vllm.platforms import current_platform

from vllm_propd.bench.arms import (
    USUAL_HEADS,
    Arm,
    Heads,
    most_nodes,
    parse_arms,
    use_export,
    use_heads,
)
from vllm_propd.bench.engines import (
    HUGE_PAGES,
    ArmEngine,
    at_most,
    close_engines,
    start_engines,
)
from vllm_propd.bench.report import show, wide_console, write_report
from vllm_propd.bench.results import Results, installed_versions, this_machine
from vllm_propd.bench.settings import PASSES, BenchSettings
from vllm_propd.bench.setup import (
    engine_options,
    load_tokenizer,
    longest_fitting,
    prompt_texts,
    tokenizer_of,
)
from vllm_propd.bench.timing.measured import Measured
from vllm_propd.bench.timing.rows import rows_at, rows_of
from vllm_propd.bench.timing.turn import Recording
from vllm_propd.bench.trees import accepted_by_rank, tokens_by_size
from vllm_propd.bench.workloads.chats import are_chats, chat_points, chat_prompts
from vllm_propd.bench.workloads.points import Point, batch_points, workload_points
from vllm_propd.bench.workloads.trace import latencies, run_trace
from vllm_propd.fast_dtype import fast_dtype
from vllm_propd.heads.checkpoint import load_heads
from vllm_propd.heads.export import export_for_vllm, output_layer
from vllm_propd.outputs import check_writable
from vllm_propd.resume import write_whole

FEWEST_STARTS = 4
"""The fewest starts of engines that can say how far alike ones are apart."""

RECORDED, TOLD_OF = 32, 16
"""New tokens of each request in the turns whose trees are recorded; and about how many
prompts these have, evenly chosen: all would take as long as measuring does."""


def run_bench(
    model: Path, heads: Path, prompts: list[Path], out: Path, settings: BenchSettings
) -> Results:
    """Measures all arms and writes ``results.json`` and ``report.html`` into ``out``.

    Args:
        model: folder of the target.
        heads: folder of the heads, in ProPD's format; it need not be there where no arm
            has a use for heads.
        prompts: files of chats, or whose text is cut into prompts, or folders of them;
            none: held-out files of Python's library.
        out: folder of the results; made if it is not there.
        settings: what to measure.

    Raises:
        ValueError: unknown arms, unusable heads, too little text.
        OSError: ``out`` cannot be written.
    """
    check_writable(out, f"--out {out}")
    # vLLM's n-gram proposer imports numba too late, too (`numba_beside_vllm.py`): the model
    # would run on one thread, in that arm only.
    os.environ.setdefault("NUMBA_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    console = wide_console()
    if settings.in_turn:
        settings = replace(settings, rounds=0)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if hint := _small_pages():
            console.print(f"[yellow]{hint}[/yellow]")
    for name, value in HUGE_PAGES.items():
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory() as scratch:
        num_heads = load_heads(heads).num_heads if heads.exists() else USUAL_HEADS
        shared = Heads(heads, Path(scratch) / "medusa", num_heads)
        arms = parse_arms(settings.arms, shared)
        prepare_heads(model, arms, shared)
        trace = None
        chats = are_chats(prompts)
        if chats:
            points, settings = _of_chats(model, prompts, settings, console)
        else:
            points, trace = _of_text(model, prompts, settings, console)
        params = SamplingParams(
            temperature=settings.temperature,
            seed=settings.seed if settings.temperature else None,
            max_tokens=settings.max_tokens,
            ignore_eos=True,
            detokenize=False,
        )
        results = _results(model, settings)
        results.chats = [file.name for file in prompts] if chats else []
        if slow := _too_slow(results):
            console.print(f"[yellow]{slow}[/yellow]")
        options = engine_options(model, settings, most_nodes(arms))
        with Progress(console=console) as bar:
            engines = _started(arms, options, bar, settings)
            measured = [Measured(point, engines, bar) for point in points]

            def note() -> None:  # hours of measuring may end early
                peaks = {engine.arm.name: engine.peak_rss_mib() for engine in engines}
                results.rows = [
                    row for one in measured for row in rows_of(one, arms, peaks, settings)
                ]
                _save(results, out)

            for passed in range(1, PASSES + 1) if settings.rounds else ():
                for one in measured:
                    one.measure(passed / PASSES, params, settings)
                note()
            for start in range(settings.starts if settings.chunks else 0):
                if start and _are_known(measured, arms, settings):
                    break
                if start:
                    close_engines(engines)
                    engines = _started(arms, options, bar, settings)
                results.starts = start + 1
                for one in measured:
                    one.pair(engines, params, settings, note, start)
            _tell_of_trees(results, engines, points[0], params)
            # Before the trace's engines start: memory is for one set of them.
            close_engines(engines)
            if trace is not None:
                trace = trace.at(settings.trace_rate or _rate(results, settings))
                rounds = max(1, settings.rounds)  # 0 is for points that have chunks
                served, peaks = asyncio.run(
                    run_trace(arms, options, trace, params, rounds, bar)
                )
                for row in rows_at(arms, trace, served, peaks, settings):
                    update = latencies(served.of(row.arm))
                    results.rows.append(row.model_copy(update=update))
    _save(results, out)
    write_report(results, out)
    show(results, console)
    console.print(f"{out / 'results.json'}, {out / 'report.html'}")
    return results


def prepare_heads(model: Path, arms: list[Arm], heads: Heads) -> None:
    """Refuses heads that are wanted and cannot be read; writes them for vLLM's own method.

    Args:
        model: folder of the target, whose output layer is read only where vLLM's own
            method needs a copy: targets name it differently.
        arms: what is compared.
        heads: the heads that they share.

    Raises:
        ValueError: the heads, or the output layer, are not there or cannot be read.
    """
    if use_heads(arms, heads):
        load_heads(heads.folder, shapes_only=True)
    if use_export(arms, heads):
        export_for_vllm(heads.folder, output_layer(model), heads.for_vllm)


def _are_known(measured: list[Measured], arms: list[Arm], settings: BenchSettings) -> bool:
    """Whether all medians are as well known as was asked, by several starts of engines."""
    names = [arm.name for arm in arms]
    return all(
        one.chunks.starts >= FEWEST_STARTS
        and one.chunks.are_enough(names, settings.precision)
        for one in measured
    )


def _started(
    arms: list[Arm], options: dict[str, Any], bar: Progress, settings: BenchSettings
) -> list[ArmEngine]:
    """Starts the arms' engines, in processes or in this one.

    Only where rounds time their steps do they get stopwatches, which put frames beneath
    the model's: whether its calls map memory is another matter then (``frame_room.py``).
    """
    engines = start_engines(
        arms, options, bar, timed=bool(settings.rounds), shared=not settings.in_turn
    )
    if settings.in_turn:  # what vLLM's engine process does once it has started
        gc.collect()
        gc.freeze()
    return engines


def _small_pages() -> str | None:
    """Returns what this process's environment lacks for huge pages; None: nothing."""
    missing = [f"{k}={v}" for k, v in HUGE_PAGES.items() if os.environ.get(k) != v]
    if not missing:
        return None
    return f"Alike engines may be some percent apart: set {' '.join(missing)}"


def _of_chats(
    model: Path, files: list[Path], settings: BenchSettings, console: Console
) -> tuple[list[Point], BenchSettings]:
    """Returns points of chats, and settings for prompts as long as theirs, in chunks."""
    if unused := settings.unused_by_chats():
        console.print(
            "Chats are answered once, to their natural ends: no use for "
            f"{', '.join(unused)}"
        )
    if (fitting := longest_fitting(model, settings)) is not None:
        settings = replace(settings, longest_chat=min(settings.longest_chat, fitting))
    tokenizer, others = load_tokenizer(model), max(settings.batch_sizes)
    by_task, too_long = chat_prompts(files, tokenizer, settings, others)
    if not any(len(prompts) > settings.prompts_each for prompts in by_task.values()):
        console.print(
            "No prompts are left to warm up with: arms that learn have seen the first ones"
        )
    if too_long:
        console.print(f"{too_long} prompts of over {settings.longest_chat} tokens left out")
    longest = max(len(ids) for prompts in by_task.values() for ids in prompts)
    settings = replace(settings, rounds=0, chunks=1, prompt_tokens=longest)
    return chat_points(by_task, settings), settings


def _of_text(
    model: Path, files: list[Path], settings: BenchSettings, console: Console
) -> tuple[list[Point], Point | None]:
    """Returns points of prompts that are cut from text, and the trace if one is wanted."""
    if unused := settings.unused_by_text():
        console.print(f"Prompts are cut from text: no use for {', '.join(unused)}")
    tokenize, texts = tokenizer_of(model), prompt_texts(model, files)
    points = batch_points(tokenize, texts, settings)
    if not settings.workload:
        return points, None
    *others, trace = workload_points(tokenize, texts, settings)
    return points + others, trace


def _save(results: Results, out: Path) -> None:
    text = results.model_dump_json(indent=1) + "\n"
    write_whole(out / "results.json", text)  # whenever hours of measuring end


def _rate(results: Results, settings: BenchSettings) -> float:
    """Returns the requests/s that plain vLLM finishes at the largest batch size.

    One, where all texts of its chunks ended with their first token.
    """
    plain = results.row("plain", max(settings.batch_sizes))
    assert plain is not None
    return plain.tokens_per_s / settings.max_tokens or 1.0


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
        in_turn=settings.in_turn,
        temperature=settings.temperature,
        measured=date.today().isoformat(),
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


def _tell_of_trees(
    results: Results, engines: list[ArmEngine], point: Point, params: SamplingParams
) -> None:
    """Records trees of ProPD's arms at a point, and completes their rows with them.

    Its prompts have been measured: arms that learn know them, and forget them first.
    """
    params = at_most(params, RECORDED)
    every = max(1, len(point.prompts) // TOLD_OF)
    for engine in engines:
        if not engine.arm.is_ours:
            continue
        row = results.row(engine.arm.name, point.batch_size)
        assert row is not None
        recording: Recording = []
        for group in point.groups[::every]:
            engine.call("forget_texts")
            recording += engine.record(group, params)[1]
        row.accepted_by_rank = accepted_by_rank(recording)
        row.tokens_by_size = tokens_by_size(recording)
        row.reliability = engine.reliability()
