"""Results for people: a table in the terminal, plots, one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vllm_propd.bench.results import TRACE, Results

COLUMNS = (
    "arm",
    "workload",
    "batch",
    "tokens/s",
    "min-max",
    "against plain",
    "tokens per step",
    "drafted",
    "kept",
    "work",
    "same text",
)

LATENCY_COLUMNS = (
    "arm",
    "requests/s",
    "first token, ms: median",
    "90%",
    "per token, ms: median",
    "90%",
)

LOG_WIDTH = 180

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>vllm-propd bench</title>
<style>body{{font:15px/1.5 system-ui;max-width:960px;margin:2rem auto;padding:0 1rem}}
table{{border-collapse:collapse}}td,th{{padding:.2rem .8rem;text-align:right;
border-bottom:1px solid #ddd}}td:first-child,th:first-child{{text-align:left}}
img{{max-width:100%}}</style>
<h1>vllm-propd bench: {model}</h1><p>{caption}</p>
{pictures}
{tables}<p>{versions}</p></html>
"""


def wide_console() -> Console:
    """One whose tables are whole in a log file, too."""
    return Console(width=None if sys.stdout.isatty() else LOG_WIDTH)


def cells(results: Results) -> list[list[str]]:
    """The table's rows, as text."""
    return [
        [
            row.arm,
            row.workload,
            str(row.batch_size),
            f"{row.tokens_per_s:.1f}",
            f"{row.tokens_per_s_min:.1f}-{row.tokens_per_s_max:.1f}",
            f"{row.ratio_to_plain:.2f}x",
            f"{row.tokens_per_step:.2f}",
            f"{row.drafted_per_step:.1f}",
            f"{row.kept_per_step:.1f}",
            f"{row.work_ratio:.2f}",
            f"{row.identical_to_plain}/{row.prompts}",
        ]
        for row in results.rows
    ]


def latency_cells(results: Results) -> list[list[str]]:
    """The rows of the trace's latencies, as text; none without a trace."""
    return [
        [
            row.arm,
            f"{row.requests_per_s:.2f}",
            f"{row.first_token_ms:.0f}",
            f"{row.first_token_ms_p90:.0f}",
            f"{row.per_token_ms:.1f}",
            f"{row.per_token_ms_p90:.1f}",
        ]
        for row in results.rows
        if row.workload == TRACE
    ]


def show(results: Results, console: Console) -> None:
    """Prints the table, and the trace's latencies."""
    table = Table(*COLUMNS, title=results.caption())
    for row in cells(results):
        table.add_row(*row)
    console.print(table)
    if latencies := latency_cells(results):
        table = Table(*LATENCY_COLUMNS, title="latencies of the trace's requests")
        for row in latencies:
            table.add_row(*row)
        console.print(table)


def plot(results: Results, target: Path | io.BytesIO) -> None:
    """Speed-up over plain vLLM and tokens per step, by batch size and arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for arm in results.arms:
        rows = [row for row in results.by_batch if row.arm == arm]
        sizes = [row.batch_size for row in rows]
        style = {"color": "black", "linestyle": "--"} if arm == "plain" else {"marker": "o"}
        left.plot(sizes, [row.ratio_to_plain for row in rows], label=arm, **style)
        right.plot(sizes, [row.tokens_per_step for row in rows], label=arm, **style)
    left.set(title="tokens/s against plain vLLM", xlabel="batch size")
    right.set(title="tokens per step", xlabel="batch size")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(results.batch_sizes, labels=map(str, results.batch_sizes))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    right.legend()
    figure.savefig(target, dpi=120, format="png")


def plot_parts(results: Results, target: Path | io.BytesIO) -> None:
    """Where a step's time goes, by arm and point; a trace's steps are not timed."""
    from matplotlib.figure import Figure

    rows = [row for row in results.rows if row.step_ms]
    labels = [f"{row.arm}, {row.point}" for row in rows]
    parts = list(dict.fromkeys(part for row in rows for part in row.step_ms))
    figure = Figure(figsize=(11, 1 + 0.3 * max(len(rows), 3)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(rows)
    for part in parts:
        if part == "step":
            continue
        # Asynchronous scheduling hides a part: what is left over can be below zero.
        widths = [max(row.step_ms.get(part, 0.0), 0.0) for row in rows]
        axes.barh(labels, widths, left=left, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set(title="a step's time by part, medians", xlabel="ms")
    if rows:
        axes.legend()
    figure.savefig(target, dpi=120, format="png")


def plot_steps(results: Results, target: Path | io.BytesIO) -> None:
    """Estimated against measured step times, and tree sizes over time (dynamic sizing)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = [row for row in results.rows if row.measured_step_ms]
    for row in rows:
        label = f"{row.arm}, {row.point}"
        left.loglog(
            row.measured_step_ms, row.estimated_step_ms, ".", label=label, alpha=0.4
        )
        right.plot(row.tree_sizes, label=label, alpha=0.7)
    if rows:
        times = [ms for row in rows for ms in row.measured_step_ms]
        left.plot([min(times), max(times)], [min(times), max(times)], "k--")
        right.legend()
    left.set(title="a step's time, ms", xlabel="measured", ylabel="estimated before")
    right.set(title="nodes per sequence", xlabel="step")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(target, dpi=120, format="png")


def plot_trees(results: Results, target: Path | io.BytesIO) -> None:
    """Tokens per step by tree size, and acceptance by depth and rank."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = [row for row in results.rows if row.accepted_by_rank]
    for row in rows:
        if row.tokens_by_size:
            left.plot(row.tokens_by_size, label=f"{row.arm}, {row.point}")
    left.set(title="tokens per step by tree size", xlabel="nodes verified")
    left.grid(alpha=0.3)
    left.legend()
    row = max(rows, key=lambda row: len(row.accepted_by_rank[0]))
    shares = row.accepted_by_rank
    depths, ranks = len(shares), len(shares[0])
    right.imshow(shares, aspect="auto", cmap="viridis")
    for depth, of_depth in enumerate(shares):
        for rank, share in enumerate(of_depth):
            dark = share < 0.5 * max(map(max, shares))
            style = {"ha": "center", "va": "center", "fontsize": 7}
            right.text(
                rank, depth, f"{share:.1%}", color="white" if dark else "black", **style
            )
    right.set_xticks(range(ranks), labels=[str(rank + 1) for rank in range(ranks)])
    right.set_yticks(range(depths), labels=[str(depth + 1) for depth in range(depths)])
    right.set(
        title=f"accepted nodes: {row.arm}, {row.point}, share of trees",
        xlabel="rank among siblings",
        ylabel="depth",
    )
    figure.savefig(target, dpi=120, format="png")


def plot_workloads(results: Results, target: Path | io.BytesIO) -> None:
    """Speed-up over plain vLLM by arm, on each workload beside batch size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots()
    arms = [arm for arm in results.arms if arm != "plain"]
    rows = {(row.arm, row.workload): row for row in results.rows}
    width = 0.8 / max(len(arms), 1)
    for index, arm in enumerate(arms):
        places = [i + (index + 0.5) * width - 0.4 for i in range(len(results.workloads))]
        ratios = [rows[arm, name].ratio_to_plain for name in results.workloads]
        axes.bar(places, ratios, width, label=arm)
    axes.axhline(1.0, color="black", linestyle="--", label="plain")
    axes.set_xticks(range(len(results.workloads)), labels=results.workloads)
    axes.set(title="tokens/s against plain vLLM, by workload")
    figure.legend(loc="outside right upper")
    figure.savefig(target, dpi=120, format="png")


def _table(columns: Sequence[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{column}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _embedded(
    draw: Callable[[Results, io.BytesIO], None], results: Results, alt: str
) -> str:
    picture = io.BytesIO()
    draw(results, picture)
    data = base64.b64encode(picture.getvalue()).decode()
    return f'<img alt="{alt}" src="data:image/png;base64,{data}">'


def write_report(results: Results, out: Path) -> None:
    """Writes ``report.html``, and its plots: ``bench.png``, and ``workloads.png`` where
    there are others than batch size.
    """
    plot(results, out / "bench.png")
    pictures = [
        _embedded(plot, results, "speed-up and tokens per step"),
        _embedded(plot_parts, results, "a step's time by part"),
    ]
    if any(row.measured_step_ms for row in results.rows):
        pictures.append(_embedded(plot_steps, results, "estimated times and tree sizes"))
    if any(row.accepted_by_rank for row in results.rows):
        pictures.append(_embedded(plot_trees, results, "tree sizes, depths and ranks"))
    if results.workloads:
        plot_workloads(results, out / "workloads.png")
        pictures.append(_embedded(plot_workloads, results, "speed-up by workload"))
    tables = [_table(COLUMNS, cells(results))]
    if latencies := latency_cells(results):
        tables.append(_table(LATENCY_COLUMNS, latencies))
    versions = ", ".join(f"{name} {number}" for name, number in results.versions.items())
    page = PAGE.format(
        model=html.escape(results.model),
        caption=html.escape(results.caption()),
        pictures="\n".join(pictures),
        tables="\n".join(tables),
        versions=html.escape(versions),
    )
    (out / "report.html").write_text(page, encoding="utf-8")
