"""Items of speed: dynamic sizing on a larger model, and where a step's time goes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from gpu_first_run.engines import FIXED, runner_of
from gpu_first_run.setting import Notes, Setting, generate, greedy, prompts

SCRIPTS = Path(__file__).resolve().parents[1]
DYNAMIC = {"sizing": "dynamic", "num_speculative_tokens": 48}
BATCHES = {True: (1, 8, 32, 128), False: (1, 4)}
"""On a GPU, and in a rehearsal."""

SHORT = {True: (1, 8), False: (1,)}
TOKENS = {True: 96, False: 24}
GROWN = {True: ("--factor", "16", "--layers", "16"), False: ("--factor", "2")}
STEPS = 20


def inflated(setting: Setting) -> Setting:
    """The model made large: exact text, real acceptance, more cost."""
    folder = setting.folder / "inflated"
    script = str(SCRIPTS / "inflate_model.py")
    command = [sys.executable, script, str(setting.model), str(folder)]
    subprocess.run([*command, *GROWN[setting.on_gpu]], check=True)
    return replace(setting, model=folder)


def dynamic_sizing(setting: Setting, notes: Notes) -> None:
    """Tokens/s against plain by batch size, how much is drafted, estimated step times."""
    batches = (SHORT if setting.short else BATCHES)[setting.on_gpu]
    notes["batches"] = list(batches)
    large, count = inflated(setting), TOKENS[setting.on_gpu]
    inputs = prompts(large, max(batches))
    options: dict[str, Any] = {"max_num_seqs": max(batches), "compiled": setting.on_gpu}
    options |= setting.speed_options()
    rates: dict[str, list[float]] = {}
    for name, propd in (("plain", None), ("propd", DYNAMIC)):
        with large.engine(propd, **options) as llm:
            generate(llm, inputs, greedy(8))
            rates[name] = []
            for batch in batches:
                if propd is not None:
                    llm.collective_rpc("start_sizing_records")
                tokens, seconds = generate(llm, inputs[:batch], greedy(count))
                rates[name].append(sum(map(len, tokens)) / seconds)
                if propd is not None:
                    _note_records(llm, notes, batch)
            if propd is not None:
                _note_costs(setting, llm, notes)
        notes[f"tokens/s, {name}"] = [round(rate, 1) for rate in rates[name]]
    pairs = zip(rates["propd"], rates["plain"], strict=True)
    notes["against plain"] = ", ".join(f"{ours / plain:.2f}x" for ours, plain in pairs)


def _note_records(llm: Any, notes: Notes, batch: int) -> None:
    records = llm.collective_rpc("take_sizing_records")[0]
    drafted = [record["nodes"] > 0 for record in records]
    off = [
        abs(record["estimated_s"] / record["measured_s"] - 1.0)
        for record in records
        if record["measured_s"]
    ]
    notes[f"batch {batch}: steps"] = len(records)
    notes[f"batch {batch}: share with drafts"] = round(sum(drafted) / len(drafted), 3)
    notes[f"batch {batch}: estimates off by, median"] = round(median(off), 3)


def _note_costs(setting: Setting, llm: Any, notes: Notes) -> None:
    """The cost table beside steps that the device's own clock has timed."""
    runner = runner_of(llm)
    (table,) = llm.collective_rpc("step_costs")
    notes["cost table, tokens"] = table["tokens"]
    notes["cost table, ms"] = [round(1e3 * seconds, 3) for seconds in table["step_s"]]
    clocked = [
        round(_clocked_ms(setting, partial(runner._dummy_run, tokens)), 3)
        for tokens in table["tokens"]
    ]
    notes["by the device's clock, without logits, ms"] = clocked


def _clocked_ms(setting: Setting, run: Callable[[], object]) -> float:
    import torch

    times = []
    with torch.inference_mode():
        for _ in range(5):
            if setting.on_gpu:
                began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                began.record()
                run()
                ended.record()
                ended.synchronize()
                times.append(began.elapsed_time(ended))
            else:
                start = time.perf_counter()
                run()
                times.append(1e3 * (time.perf_counter() - start))
    return median(times)


def profile_steps(setting: Setting, notes: Notes) -> None:
    """Some steps of plain vLLM and of ProPD: how busy the device is, and the gaps."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if setting.on_gpu:
        activities.append(ProfilerActivity.CUDA)
    for name, propd in (("plain", None), ("propd", FIXED)):
        compiled, options = setting.on_gpu, setting.speed_options()
        with setting.engine(propd, compiled=compiled, **options) as llm:
            inputs = prompts(setting)
            generate(llm, inputs, greedy())
            runner, steps = runner_of(llm), [0]
            execute = runner.execute_model

            def counted(*args: Any, execute: Any = execute, steps: Any = steps) -> Any:
                steps[0] += 1
                return execute(*args)

            runner.execute_model = counted
            with profile(activities=activities) as profiler:
                _, seconds = generate(llm, inputs, greedy(STEPS))
        events = profiler.events()
        on_device = [
            (event.time_range.start, event.time_range.end)
            for event in events
            if event.device_type == torch.autograd.DeviceType.CUDA
            and not event.is_user_annotation  # which last as long as what they name
        ]
        launches = sum("LaunchKernel" in event.name for event in events)
        graphs = sum("GraphLaunch" in event.name for event in events)
        notes[f"step, ms, {name}"] = round(1e3 * seconds / steps[0], 3)
        if not setting.on_gpu:
            notes[f"operators per step, {name}"] = round(len(events) / steps[0])
            continue
        busy, gaps = _busy(on_device)
        notes[f"busy share, {name}"] = round(busy / (1e6 * seconds), 3)
        notes[f"longest gap, us, {name}"] = round(max(gaps, default=0.0))
        notes[f"launches per step, {name}"] = round(launches / steps[0], 1)
        notes[f"graph launches per step, {name}"] = round(graphs / steps[0], 1)


def _busy(spans: list[tuple[float, float]]) -> tuple[float, list[float]]:
    """Microseconds in which some span runs, and those between."""
    busy, gaps, end = 0.0, list[float](), None
    for start, until in sorted(spans):
        if end is None or start > end:
            if end is not None:
                gaps.append(start - end)
            busy, end = busy + until - start, until
        elif until > end:
            busy, end = busy + until - end, until
    return busy, gaps
