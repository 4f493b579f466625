"""Results for people: a table in the terminal, plots, one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vllm_propd.bench.results import Results

COLUMNS = (
    "arm",
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

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>vllm-propd bench</title>
<style>body{{font:15px/1.5 system-ui;max-width:960px;margin:2rem auto;padding:0 1rem}}
table{{border-collapse:collapse}}td,th{{padding:.2rem .8rem;text-align:right;
border-bottom:1px solid #ddd}}td:first-child,th:first-child{{text-align:left}}
img{{max-width:100%}}</style>
<h1>vllm-propd bench: {model}</h1><p>{caption}</p>
<img alt="speed-up and tokens per step" src="data:image/png;base64,{plot}">
<img alt="a step's time by part" src="data:image/png;base64,{parts}">
<img alt="estimated times and tree sizes" src="data:image/png;base64,{steps}">
<table><tr>{head}</tr>{body}</table><p>{versions}</p></html>
"""


def cells(results: Results) -> list[list[str]]:
    """The table's rows, as text."""
    return [
        [
            row.arm,
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


def show(results: Results, console: Console) -> None:
    """Prints the table."""
    table = Table(*COLUMNS, title=results.caption())
    for row in cells(results):
        table.add_row(*row)
    console.print(table)


def plot(results: Results, target: Path | io.BytesIO) -> None:
    """Speed-up over plain vLLM and tokens per step, by batch size and arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for arm in results.arms:
        rows = [row for row in results.rows if row.arm == arm]
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
    """Where a step's time goes, by arm and batch size."""
    from matplotlib.figure import Figure

    rows = [row for row in results.rows if row.step_ms]
    labels = [f"{row.arm}, batch {row.batch_size}" for row in rows]
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
        label = f"{row.arm}, batch {row.batch_size}"
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


def _embedded(draw: Callable[[Results, io.BytesIO], None], results: Results) -> str:
    picture = io.BytesIO()
    draw(results, picture)
    return base64.b64encode(picture.getvalue()).decode()


def write_report(results: Results, out: Path) -> None:
    """Writes ``report.html``, and its plot as ``bench.png``."""
    plot(results, out / "bench.png")
    head = "".join(f"<th>{column}</th>" for column in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in cells(results)
    )
    versions = ", ".join(f"{name} {number}" for name, number in results.versions.items())
    page = PAGE.format(
        model=html.escape(results.model),
        caption=html.escape(results.caption()),
        plot=_embedded(plot, results),
        parts=_embedded(plot_parts, results),
        steps=_embedded(plot_steps, results),
        head=head,
        body=body,
        versions=html.escape(versions),
    )
    (out / "report.html").write_text(page, encoding="utf-8")
