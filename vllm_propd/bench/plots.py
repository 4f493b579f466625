"""A benchmark's pictures; each function draws one, as PNG."""

from __future__ import annotations

import io
from pathlib import Path
from statistics import mode
from typing import TYPE_CHECKING

from vllm_propd.bench.results import Results

if TYPE_CHECKING:
    from matplotlib.legend import Legend


def _plain(legend: Legend) -> None:
    """Shows names as they are: two dollar signs would begin and end a formula."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def speed(results: Results, target: Path | io.BytesIO) -> None:
    """Draws the speed-up over plain vLLM and tokens per step, by batch size and arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for arm in results.arms:
        rows = [row for row in results.by_batch if row.arm == arm]
        sizes = [row.batch_size for row in rows]
        style = {"color": "black", "linestyle": "--"} if arm == "plain" else {"marker": "o"}
        left.plot(sizes, [row.ratio for row in rows], label=arm, **style)
        right.plot(sizes, [row.per_step for row in rows], label=arm, **style)
    left.set(title="tokens/s against plain vLLM", xlabel="batch size")
    right.set(title="tokens per step", xlabel="batch size")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(results.batch_sizes, labels=map(str, results.batch_sizes))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    _plain(figure.legend(*left.get_legend_handles_labels(), loc="outside right upper"))
    figure.savefig(target, dpi=120, format="png")


def parts(results: Results, target: Path | io.BytesIO) -> None:
    """Draws where a step's time goes, by arm and point; a trace's steps are not timed."""
    from matplotlib.figure import Figure

    rows = [row for row in results.rows if row.step_ms]
    labels = [f"{row.arm}, {row.point}" for row in rows]
    parts = list(dict.fromkeys(part for row in rows for part in row.step_ms))
    figure = Figure(figsize=(11, 1 + 0.3 * max(len(rows), 3)), layout="constrained")
    axes = figure.subplots()
    left, places = [0.0] * len(rows), range(len(rows))
    for part in parts:
        if part == "step":
            continue
        # What is left over is a difference of two clocks' means, and can be below zero.
        widths = [max(row.step_ms.get(part, 0.0), 0.0) for row in rows]
        axes.barh(places, widths, left=left, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(places, labels=labels, parse_math=False)
    axes.invert_yaxis()
    axes.set(title="a step's time by part, means", xlabel="ms")
    if rows:
        axes.legend()
    figure.savefig(target, dpi=120, format="png")


def steps(results: Results, target: Path | io.BytesIO) -> None:
    """Draws estimated against measured step times, and tree sizes (dynamic sizing)."""
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
        _plain(right.legend())
    left.set(title="a step's time, ms", xlabel="measured", ylabel="estimated before")
    right.set(title="nodes per sequence", xlabel="step")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(target, dpi=120, format="png")


def trees(results: Results, target: Path | io.BytesIO) -> None:
    """Draws tokens per step by tree size, and acceptance by depth and rank."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = [row for row in results.rows if row.accepted_by_rank]
    for row in rows:
        if row.tokens_by_size:
            left.plot(row.tokens_by_size, label=f"{row.arm}, {row.point}")
    left.set(title="tokens per step by tree size", xlabel="nodes verified")
    left.grid(alpha=0.3)
    _plain(left.legend())
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
    right.set(xlabel="rank among siblings", ylabel="depth")
    right.set_title(
        f"accepted nodes: {row.arm}, {row.point}, share of trees", parse_math=False
    )
    figure.savefig(target, dpi=120, format="png")


def workloads(results: Results, target: Path | io.BytesIO) -> None:
    """Draws the speed-up over plain vLLM by arm, on each workload beside batch size.

    Of a workload that was measured at several batch sizes, the first: the title says which.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots()
    arms = [arm for arm in results.arms if arm != "plain"]
    rows = {(row.arm, row.workload): row for row in reversed(results.rows)}
    width = 0.8 / max(len(arms), 1)
    for index, arm in enumerate(arms):
        places = [i + (index + 0.5) * width - 0.4 for i in range(len(results.workloads))]
        ratios = [rows[arm, name].ratio for name in results.workloads]
        axes.bar(places, ratios, width, label=arm)
    axes.axhline(1.0, color="black", linestyle="--", label="plain")
    names = results.workloads
    axes.set_xticks(range(len(names)), labels=names, parse_math=False)
    sizes = {name: rows[results.arms[0], name].batch_size for name in names}
    axes.set_title(
        f"tokens/s against plain vLLM, by workload, {_at(sizes)}", parse_math=False
    )
    _plain(figure.legend(loc="outside right upper"))
    figure.savefig(target, dpi=120, format="png")


def _at(sizes: dict[str, int]) -> str:
    """Says at which batch size most workloads were measured, and which were at others."""
    usual = mode(sizes.values())
    others = [f"{name}: {size}" for name, size in sizes.items() if size != usual]
    return f"batch {usual}" + (f" ({', '.join(others)})" if others else "")


def reliability(results: Results, target: Path | io.BytesIO) -> None:
    """Draws the heads' own probabilities against how often they have come true."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.subplots()
    row = next(row for row in results.rows if row.reliability)
    for head, curve in enumerate(row.reliability):
        said, found = zip(*curve, strict=True)
        axes.plot(said, found, ".-", label=f"head {head + 1}")
    axes.plot([0, 1], [0, 1], "k--", label="as said")
    axes.set_title(f"reliability: {row.arm}", parse_math=False)
    axes.set(xlabel="a head's probability", ylabel="came true")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(target, dpi=120, format="png")
