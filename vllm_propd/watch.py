"""``vllm-propd watch URL``: a running server's trees, live in the terminal."""

from __future__ import annotations

import time
import urllib.request
from collections import deque
from dataclasses import dataclass, field
from http.client import HTTPException

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vllm_propd.config import METRIC_PREFIX

PER_DEPTH = "vllm:spec_decode_num_accepted_tokens_per_pos"
DRAFTS = "spec_decode_num_drafts"
COUNTED = "propd_steps"
"""What a server counts from its start on, whatever it does."""

BARS = " ▁▂▃▄▅▆▇█"
HISTORY = 60
TIMEOUT_S = 10


@dataclass
class Reading:
    """A server's metrics at one time.

    Attributes:
        at: time of the reading in seconds, of a clock that never jumps.
        values: metrics by name without ``vllm:`` and ``_total``, summed over engines.
        per_depth: accepted tokens by depth.
    """

    at: float
    values: dict[str, float] = field(default_factory=dict)
    per_depth: dict[int, float] = field(default_factory=dict)


def parse(text: str, at: float) -> Reading:
    """Reads Prometheus's text format.

    Raises:
        ValueError: these are not the metrics of a server that runs ProPD.
    """
    reading = Reading(at)
    for family in text_string_to_metric_families(text):
        if not family.name.startswith("vllm:") or family.type == "histogram":
            continue
        for sample in family.samples:
            if sample.name.endswith("_created"):
                continue
            if family.name == PER_DEPTH:
                depth = int(sample.labels["position"]) + 1
                so_far = reading.per_depth.get(depth, 0.0)
                reading.per_depth[depth] = so_far + sample.value
            else:
                name = family.name.removeprefix("vllm:")
                reading.values[name] = reading.values.get(name, 0.0) + sample.value
    if not any(f"vllm:{name}".startswith(METRIC_PREFIX) for name in reading.values):
        raise ValueError(
            f"no {METRIC_PREFIX} metrics there: does the server run with propd?"
        )
    return reading


def read(url: str) -> Reading:
    """Reads a server's metrics.

    Raises:
        ValueError: it is not one that runs ProPD.
        OSError: it does not answer.
    """
    where = f"{url.rstrip('/')}/metrics"
    try:
        with urllib.request.urlopen(where, timeout=TIMEOUT_S) as answer:
            text = answer.read().decode()
    except HTTPException as error:  # it ended in the middle of its answer
        raise OSError(f"{where}: {error!r}") from error
    return parse(text, time.monotonic())


@dataclass
class Rates:
    """What happened between two readings; None where there is nothing to divide by."""

    running: float
    waiting: float
    tokens_per_s: float
    tree_size: float | None
    kept: float | None
    tokens_per_step: float | None
    expected: float | None
    step_ms: float | None
    estimated_ms: float | None
    per_depth: list[float]


def rates(before: Reading, now: Reading) -> Rates:
    """Returns what happened between two readings.

    Counters that have fallen belong to a server that was started anew: they count from 0.
    """
    if any(now.values.get(k, 0.0) < before.values.get(k, 0.0) for k in (COUNTED, DRAFTS)):
        before = Reading(before.at)

    def new(name: str) -> float:
        key = f"propd_{name}"
        return now.values.get(key, 0.0) - before.values.get(key, 0.0)

    def per(name: str, unit: str, scale: float = 1.0) -> float | None:
        return scale * new(name) / new(unit) if new(unit) else None

    timed = new("measured_step_seconds") > 0
    drafted = now.values.get(DRAFTS, 0.0) - before.values.get(DRAFTS, 0.0)
    depths = [d for d, total in sorted(now.per_depth.items()) if total]
    return Rates(
        running=now.values.get("num_requests_running", 0.0),
        waiting=now.values.get("num_requests_waiting", 0.0),
        tokens_per_s=new("emitted_tokens") / max(now.at - before.at, 1e-9),
        tree_size=per("tree_nodes", "sequences"),
        kept=per("kept_nodes", "sequences"),
        tokens_per_step=per("emitted_tokens", "sequences"),
        expected=per("expected_tokens", "sequences"),
        step_ms=per("measured_step_seconds", "steps", 1e3) if timed else None,
        estimated_ms=per("estimated_step_seconds", "steps", 1e3) if timed else None,
        per_depth=[
            (now.per_depth[depth] - before.per_depth.get(depth, 0.0)) / drafted
            for depth in depths
        ]
        if drafted
        else [],
    )


def bars(values: list[float | None]) -> str:
    """Draws values as a line of bars, the largest one full; those below 0 as 0."""
    heights = [max(value or 0.0, 0.0) for value in values]
    top = max(heights, default=0.0) or 1.0
    return "".join(BARS[round(height / top * (len(BARS) - 1))] for height in heights)


def view(url: str, history: list[Rates]) -> Group:
    """Draws the whole screen: the latest rates, and bars of their history."""
    now = history[-1]
    table = Table(title=f"ProPD at {url}", show_header=False, min_width=64)

    def row(
        name: str, value: float | None, unit: str, of: str = "", places: int = 1
    ) -> None:
        shown = "-" if value is None else f"{value:.{places}f}"
        table.add_row(name, f"{shown} {unit}", bars([getattr(r, of) for r in history]))

    table.add_row("requests", f"{now.running:.0f} running, {now.waiting:.0f} waiting", "")
    row("tokens out", now.tokens_per_s, "/s", "tokens_per_s")
    row("tree size", now.tree_size, "nodes", "tree_size")
    row("kept by pruning", now.kept, "nodes", "kept")
    row("tokens per step", now.tokens_per_step, "", "tokens_per_step", 2)
    row("  expected", now.expected, "", "expected", 2)
    row("step", now.step_ms, "ms", "step_ms")
    row("  estimated", now.estimated_ms, "ms", "estimated_ms")
    depths = "  ".join(f"{share:.2f}" for share in now.per_depth) or "-"
    return Group(table, Text(f"accepted by depth: {depths}"))


def watch(url: str, interval: float, once: bool) -> None:
    """Shows a server until interrupted, or one interval of it.

    Where it does not answer, as while it is started anew, that is said, and it is asked
    again; what comes then is compared with what it said last.

    Args:
        url: address of the server.
        interval: seconds between readings.
        once: print one interval, and end.

    Raises:
        ValueError: it does not run ProPD.
        OSError: it does not answer the first time, or ``once``.
    """
    console = Console()
    before = read(url)
    history: deque[Rates] = deque(maxlen=HISTORY)
    try:
        with Live(console=console, auto_refresh=False, transient=once) as live:
            while True:
                time.sleep(interval)
                try:
                    now = read(url)
                except OSError as error:
                    if once:
                        raise
                    silence = Text(f"no answer from {url}: {error}", style="yellow")
                    shown = [view(url, list(history))] if history else []
                    live.update(Group(*shown, silence), refresh=True)
                    continue
                history.append(rates(before, now))
                before = now
                if once:
                    break
                live.update(view(url, list(history)), refresh=True)
    except KeyboardInterrupt:
        return
    console.print(view(url, list(history)))
