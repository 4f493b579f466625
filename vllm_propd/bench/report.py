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

from vllm_propd.bench import plots
from vllm_propd.bench.results import TRACE, Results, Row

COLUMNS = (
    "arm",
    "workload",
    "batch",
    "tokens/s",
    "min-max",
    "against plain",
    "quartiles",
    "in vain",
    "fast steps",
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
    """Returns a console that prints tables whole, also into a log file."""
    return Console(width=None if sys.stdout.isatty() else LOG_WIDTH)


def cells(results: Results) -> list[list[str]]:
    """Returns the rows of the results' table (``COLUMNS``), as text."""
    return [
        [
            row.arm,
            row.workload,
            str(row.batch_size),
            f"{row.tokens_per_s:.1f}",
            f"{row.tokens_per_s_min:.1f}-{row.tokens_per_s_max:.1f}",
            *wall_cells(row),
            f"{row.ratio_to_plain:.2f}x",
            f"{row.tokens_per_step:.2f}",
            f"{row.drafted_per_step:.1f}",
            "" if row.kept_per_step is None else f"{row.kept_per_step:.1f}",
            "" if row.work_ratio is None else f"{row.work_ratio:.2f}",
            f"{row.identical_to_plain}/{row.prompts}",
        ]
        for row in results.rows
    ]


def wall_cells(row: Row) -> tuple[str, str, str]:
    """Returns the median ratio of a row's chunks, its quartiles, and the time in vain."""
    if row.wall_ratio_median is None or row.wall_ratio_median_quartiles is None:
        return "", "", ""
    low, high = row.wall_ratio_median_quartiles
    in_vain = row.in_vain_share or 0.0
    return f"{row.wall_ratio_median:.3f}x", f"{low:.3f}-{high:.3f}", f"{in_vain:.2%}"


def latency_cells(results: Results) -> list[list[str]]:
    """Returns the trace's latencies (``LATENCY_COLUMNS``), as text; [] without a trace."""
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
    """Prints the results' table, and one of the trace's latencies."""
    table = Table(*COLUMNS, title=results.caption())
    for row in cells(results):
        table.add_row(*row)
    console.print(table)
    if latencies := latency_cells(results):
        table = Table(*LATENCY_COLUMNS, title="latencies of the trace's requests")
        for row in latencies:
            table.add_row(*row)
        console.print(table)


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
    """Writes ``report.html`` and its plots into folder ``out``.

    The plots are ``bench.png``, and ``workloads.png`` where more than batch size varies.
    """
    plots.speed(results, out / "bench.png")
    pictures = [
        _embedded(plots.speed, results, "speed-up and tokens per step"),
        _embedded(plots.parts, results, "a step's time by part"),
    ]
    if any(row.measured_step_ms for row in results.rows):
        pictures.append(_embedded(plots.steps, results, "estimated times and tree sizes"))
    if any(row.accepted_by_rank for row in results.rows):
        pictures.append(_embedded(plots.trees, results, "tree sizes, depths and ranks"))
    if any(row.reliability for row in results.rows):
        pictures.append(_embedded(plots.reliability, results, "reliability of the heads"))
    if results.workloads:
        plots.workloads(results, out / "workloads.png")
        pictures.append(_embedded(plots.workloads, results, "speed-up by workload"))
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
