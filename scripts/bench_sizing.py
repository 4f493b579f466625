"""Dynamic sizing when things change: a crowd comes and goes; another process takes cores.

    make bench-sizes    (or: python scripts/bench_sizing.py MODEL OUT)

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
from vllm.platforms import current_platform

from vllm_propd.bench.report import wide_console
from vllm_propd.bench.setup import tokenizer_of
from vllm_propd.bench.workloads.points import cut_prompts
from vllm_propd.fast_dtype import fast_dtype
from vllm_propd.outputs import check_writable

CROWD, STEPS, FOLLOWED_WITHIN = 32, 60, 30
"""Requests after the jump; steps of each phase; and after how many sizes are compared."""
JUMPS = 3
"""How often the load jumps there and back, each time on other texts. What is looked up in
few texts is a matter of chance: means over all of them are compared."""
TEXTS = 2 * CROWD
"""Prompts that a phase may need: a crowd's, and those of who comes after."""


@dataclass(frozen=True)
class Phase:
    """Some steps of as many requests, which are new at its begin.

    Attributes:
        name: of all phases of a kind.
        requests: together.
        texts: which prompts they have.
    """

    name: str
    requests: int
    texts: int


ALONE, CROWDED = "1 request after 32", "32 requests after 1"
STEADY = {ALONE: "1 request after 1", CROWDED: "32 requests after 32"}
"""Phases that begin with a jump of the load; and the same texts without one."""
WARM_UP = [Phase("", 1, JUMPS), Phase("", CROWD, JUMPS)]
"""Both loads are met before, on other texts: else the first crowd's sizes would tell of
what candidates have yet to prove."""
PHASES = [
    *(
        phase
        for texts in range(JUMPS)
        for phase in (Phase(ALONE, 1, texts), Phase(CROWDED, CROWD, texts))
    ),
    *(Phase(STEADY[CROWDED], CROWD, texts) for texts in range(JUMPS)),
    Phase("", 1, JUMPS),  # begins with a jump, too, and the next one must not
    *(Phase(STEADY[ALONE], 1, texts) for texts in range(JUMPS)),
]
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

    def start(self, count: int, place: int) -> None:
        """Ends all requests, and begins anew, with the prompt of this place."""
        self.llm.llm_engine.abort_request(self.running)
        self.running, self.place = [], place
        self.join(count)

    def join(self, count: int) -> None:
        """As many requests from now on, as they are or more.

        Those that join together end one after the other, as in a server that has run for
        long: texts of one age would all repeat themselves, or begin anew, at once.
        """
        self.count = count
        joining = count - len(self.running)
        for i in range(joining):
            new_tokens = NEW_TOKENS * (joining - i) // joining
            params = SamplingParams(
                temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
            )
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


def measure(model: Path, console: Console) -> tuple[list[Records], Records, Records]:
    """Of all phases, one after the other; before another process works, and beside it."""
    wanted = TEXTS * (JUMPS + 1)
    prompts = cut_prompts(tokenizer_of(model), [], wanted, PROMPT_TOKENS, seed=0)
    total = (len(WARM_UP) + len(PHASES)) * STEPS + QUIET_STEPS + BUSY_STEPS
    with Progress(console=console) as bar:
        task = bar.add_task("starting", total=total)
        dtype = fast_dtype(current_platform.device_type)
        llm = LLM(
            str(model), dtype=dtype, max_num_seqs=CROWD, enforce_eager=True,
            kv_cache_memory_bytes=2 << 30, max_num_batched_tokens=4096,
            max_model_len=PROMPT_TOKENS + NEW_TOKENS, enable_prefix_caching=False,
            use_tqdm_on_load=False, speculative_config={"method": "propd"},
        )  # fmt: skip
        load, found = Load(llm, prompts), []
        for phase in WARM_UP + PHASES:
            bar.update(task, description=phase.name or "warm up")
            load.start(phase.requests, place=TEXTS * phase.texts)
            found.append(load.steps(STEPS, bar, task))
        load.join(BUSY_REQUESTS)
        bar.update(task, description="before another process")
        quiet = load.steps(QUIET_STEPS, bar, task)
        context = multiprocessing.get_context("spawn")
        begun = context.Event()
        other = context.Process(target=burn, args=(begun,), daemon=True)
        other.start()
        try:
            load.steps_until(begun)
            bar.update(task, description="beside another process")
            disturbed = load.steps(BUSY_STEPS, bar, task)
        finally:
            other.terminate()
        llm.llm_engine.engine_core.shutdown()
    return found[len(WARM_UP) :], quiet, disturbed


def show_jumps(found: list[Records], console: Console) -> None:
    """Prints whether sizes and estimates followed the load."""
    table = Table(
        "load", f"nodes, steps {FOLLOWED_WITHIN}-{STEPS}", "mean", "step, ms",
        "estimate off by (signed)",
        title="sizes after a jump of the load, and without one on the same texts",
        caption="nodes of a sequence, by text; medians of times",
    )  # fmt: skip
    means = {}
    for name in (CROWDED, STEADY[CROWDED], ALONE, STEADY[ALONE]):
        phases = [r for phase, r in zip(PHASES, found, strict=True) if phase.name == name]
        each = [soon(records) for records in phases]
        means[name], together = mean(each), [one for records in phases for one in records]
        table.add_row(
            name, ", ".join(f"{one:.2f}" for one in each), f"{means[name]:.2f}",
            step_ms(together), off(together),
        )  # fmt: skip
    table.add_row("all", "", "", "", off([one for records in found for one in records]))
    console.print(table)
    for jump, steady in STEADY.items():
        apart = means[jump] / means[steady] - 1
        console.print(f"{jump}: trees {apart:+.0%} beside those of {steady}")


def show_slow_down(quiet: Records, disturbed: Records, console: Console) -> None:
    """Prints whether estimates followed the machine."""
    table = Table(
        "steps", "step, ms", "estimate off by (signed)", title="a second process works"
    )
    rows = {"before": quiet[-WINDOW:]}
    for start in range(0, BUSY_STEPS, WINDOW):
        rows[f"{start} to {start + WINDOW} after"] = disturbed[start : start + WINDOW]
    for name, records in rows.items():
        table.add_row(name, step_ms(records), off(records))
    console.print(table)


def plot(found: list[Records], quiet: Records, disturbed: Records, target: Path) -> None:
    """Sizes over the jumps, and estimated beside measured times over the slow-down."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([size for records in found for size in sizes(records)], linewidth=0.8)
    for index, (phase, records) in enumerate(zip(PHASES, found, strict=True)):
        start = STEPS * index
        left.axvline(start, color="grey", linestyle=":", linewidth=0.8)
        left.hlines(soon(records), start + FOLLOWED_WITHIN, start + STEPS, color="black")
        left.text(start + 2, left.get_ylim()[1], str(phase.requests), va="top")
    left.set(title="nodes per sequence; requests (above)", xlabel="step")
    records = quiet + disturbed
    for key, style in (("measured_s", "."), ("estimated_s", "-")):
        label = key.removesuffix("_s")
        right.plot([1e3 * r[key] for r in records], style, label=label, markersize=3)
    right.axvline(len(quiet), color="grey", linestyle=":")
    right.set(title="a step's time, ms; another process starts", xlabel="step", ylim=0)
    right.legend()
    figure.savefig(target, dpi=120)


def main() -> None:
    model, out = map(Path, sys.argv[1:])
    console = wide_console()
    check_writable(out, f"OUT {out}")
    found, quiet, disturbed = measure(model, console)
    show_jumps(found, console)
    show_slow_down(quiet, disturbed, console)
    plot(found, quiet, disturbed, out / "sizing.png")
    console.print(f"{out / 'sizing.png'}")


if __name__ == "__main__":
    main()
