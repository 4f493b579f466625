"""Dynamic sizing when things change: a crowd comes and goes; another process takes cores.

    make bench    (or: python scripts/bench_sizing.py MODEL OUT)

One engine on the inflated model. Prints whether sizes and estimates follow, and draws them
into OUT/sizing.png.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from pathlib import Path
from statistics import mean, median
from typing import Any

os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table
from vllm import LLM, SamplingParams

from vllm_propd.bench.points import cut_prompts
from vllm_propd.bench.report import wide_console
from vllm_propd.bench.run import fast_dtype, tokenizer_of

CROWD, STEPS, FOLLOWED_WITHIN = 32, 60, 30
"""Requests after the jump; steps of each phase; and after how many sizes are compared."""
PHASES = {
    "alone": 1,
    "crowd": CROWD,
    "crowd once more": CROWD,
    "alone again": 1,
    "alone once more": 1,
}
"""Requests of each phase, in order."""
JUMPS = {"crowd": "crowd once more", "alone again": "alone once more"}
"""Phases that begin with a jump of the load, and those after: the same texts without."""
MET_BEFORE = (1, CROWD)
"""Loads that the engine has met, on other texts: else a first crowd's sizes would tell of
what candidates have yet to prove."""
BUSY_REQUESTS, WINDOW, QUIET_STEPS, BUSY_STEPS = 4, 50, 100, 150
"""While another process works; steps are shown by windows."""
STARTS_WITHIN_S = 120.0
PROMPT_TOKENS, NEW_TOKENS = 64, 128
Records = list[dict[str, Any]]


@dataclass
class Load:
    """An engine with as many requests as wanted: where one ends, another begins.

    Args:
        llm: with ProPD.
        prompts: token ids; one for each request.
    """

    llm: LLM
    prompts: list[list[int]]
    running: list[str] = field(default_factory=list)
    place: int = 0
    requests: int = 0
    count: int = 0

    def start(self, count: int, place: int = 0) -> None:
        """Ends all requests, and begins anew, with the prompt of this place."""
        self.llm.llm_engine.abort_request(self.running)
        self.running, self.place = [], place
        self.join(count)

    def join(self, count: int) -> None:
        """As many requests from now on, as they are or more."""
        self.count = count
        params = SamplingParams(
            temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False
        )
        while len(self.running) < count:
            name, prompt = str(self.requests), self.prompts[self.place % len(self.prompts)]
            self.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)
            self.running.append(name)
            self.place, self.requests = self.place + 1, self.requests + 1

    def step(self) -> None:
        """Runs a step; where a request ends in it, the next one begins."""
        for output in self.llm.llm_engine.step():
            if output.finished:
                self.running.remove(output.request_id)
        self.join(self.count)

    def steps(self, count: int, bar: Progress, task: TaskID) -> Records:
        """Runs steps, and says what sizing saw of them."""
        self.llm.collective_rpc("start_sizing_records")
        for _ in range(count):
            self.step()
            bar.advance(task)
        found: Records = self.llm.collective_rpc("take_sizing_records")[0]
        return found

    def steps_until(self, event: Event) -> None:
        """Runs steps that nobody looks at, lest the engine runs ahead.

        Raises:
            TimeoutError: the event does not come.
        """
        end = time.monotonic() + STARTS_WITHIN_S
        while not event.is_set():
            if time.monotonic() > end:
                raise TimeoutError("the other process has not begun to work")
            self.step()


def sizes(records: Records) -> list[float]:
    """Nodes per sequence, step by step."""
    return [record["nodes"] / max(record["sequences"], 1) for record in records]


def errors(records: Records) -> list[float]:
    """Of estimated step times, relatively."""
    return [r["estimated_s"] / r["measured_s"] - 1 for r in records]


def off(records: Records) -> str:
    """Medians: of the errors' sizes, and of the errors."""
    found = errors(records)
    return f"{median(map(abs, found)):.1%} ({median(found):+.1%})"


def step_ms(records: Records) -> str:
    """Median time of a step, milliseconds."""
    return f"{1e3 * median(r['measured_s'] for r in records):.0f}"


def soon(records: Records) -> float:
    """Nodes per sequence soon after a phase's begin; a mean, since sizes change from step
    to step with how sure the candidates are.
    """
    return mean(sizes(records[FOLLOWED_WITHIN:]))


def burn(begun: Event) -> None:
    """Another process's work."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    matrix = torch.randn(1024, 1024)
    begun.set()
    while True:
        matrix = matrix @ matrix
        matrix /= matrix.norm()


def measure(model: Path, console: Console) -> dict[str, Records]:
    """All phases, one after the other."""
    prompts = cut_prompts(tokenizer_of(model), [], 2 * CROWD, PROMPT_TOKENS, seed=0)
    total = (len(MET_BEFORE) + len(PHASES)) * STEPS + QUIET_STEPS + BUSY_STEPS
    with Progress(console=console) as bar:
        task = bar.add_task("starting", total=total)
        llm = LLM(
            str(model), dtype=fast_dtype(), max_num_seqs=CROWD, enforce_eager=True,
            kv_cache_memory_bytes=2 << 30, max_num_batched_tokens=4096,
            max_model_len=PROMPT_TOKENS + NEW_TOKENS, enable_prefix_caching=False,
            use_tqdm_on_load=False, speculative_config={"method": "propd"},
        )  # fmt: skip
        load = Load(llm, prompts)
        bar.update(task, description="warm up")
        for requests in MET_BEFORE:
            load.start(requests, place=CROWD)
            load.steps(STEPS, bar, task)
        found: dict[str, Records] = {}
        for name, requests in PHASES.items():
            bar.update(task, description=name)
            load.start(requests)
            found[name] = load.steps(STEPS, bar, task)
        load.join(BUSY_REQUESTS)
        bar.update(task, description="before another process")
        found["quiet"] = load.steps(QUIET_STEPS, bar, task)
        context = multiprocessing.get_context("spawn")
        begun = context.Event()
        other = context.Process(target=burn, args=(begun,), daemon=True)
        other.start()
        try:
            load.steps_until(begun)
            bar.update(task, description="beside another process")
            found["disturbed"] = load.steps(BUSY_STEPS, bar, task)
        finally:
            other.terminate()
        llm.llm_engine.engine_core.shutdown()
    return found


def show(found: dict[str, Records], console: Console) -> None:
    """Prints what was followed."""
    table = Table(
        "phase", "requests", f"nodes, steps {FOLLOWED_WITHIN}-{STEPS}", "step, ms",
        "estimate off by (signed)",
        title="sizes after a jump of the load, and without one on the same texts",
        caption="nodes of a sequence, means; medians of times",
    )  # fmt: skip
    for name in PHASES:
        records = found[name]
        table.add_row(
            name, str(max(r["sequences"] for r in records)), f"{soon(records):.2f}",
            step_ms(records), off(records),
        )  # fmt: skip
    together = [record for name in PHASES for record in found[name]]
    table.add_row("all", "", "", "", off(together))
    console.print(table)
    for jump, steady in JUMPS.items():
        apart = soon(found[jump]) / soon(found[steady]) - 1
        console.print(f"{jump}: {apart:+.0%} beside {steady}")
    table = Table(
        "steps", "step, ms", "estimate off by (signed)", title="a second process works"
    )
    rows, disturbed = {"before": found["quiet"][-WINDOW:]}, found["disturbed"]
    for start in range(0, BUSY_STEPS, WINDOW):
        rows[f"{start} to {start + WINDOW} after"] = disturbed[start : start + WINDOW]
    for name, records in rows.items():
        table.add_row(name, step_ms(records), off(records))
    console.print(table)


def plot(found: dict[str, Records], target: Path) -> None:
    """Sizes over the jump, and estimated beside measured times over the slow-down."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([size for name in PHASES for size in sizes(found[name])], linewidth=0.8)
    for index, name in enumerate(PHASES):
        start = STEPS * index
        left.axvline(start, color="grey", linestyle=":")
        left.hlines(
            soon(found[name]), start + FOLLOWED_WITHIN, start + STEPS, color="black"
        )
        left.text(start + 2, left.get_ylim()[1], name.replace(" ", "\n"), va="top")
    left.set(title="nodes per sequence", xlabel="step")
    records = found["quiet"] + found["disturbed"]
    for key, style in (("measured_s", "."), ("estimated_s", "-")):
        label = key.removesuffix("_s")
        right.plot([1e3 * r[key] for r in records], style, label=label, markersize=3)
    right.axvline(len(found["quiet"]), color="grey", linestyle=":")
    right.set(title="a step's time, ms; another process starts", xlabel="step", ylim=0)
    right.legend()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)


def main() -> None:
    model, out = map(Path, sys.argv[1:])
    console = wide_console()
    found = measure(model, console)
    show(found, console)
    plot(found, out / "sizing.png")
    console.print(f"{out / 'sizing.png'}")


if __name__ == "__main__":
    main()
