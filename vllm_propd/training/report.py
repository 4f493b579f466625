"""A calibration for people: tables in the terminal, and a plot."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from vllm_propd.heads.calibration import EARLY_RANKS, Calibration


def show(calibration: Calibration, console: Console) -> None:
    """Prints a calibration's tables: Medusa heads, early heads, tokens per step."""
    heads = range(len(calibration.rank_accuracy))
    tops = (1, 2, 3, 5, 10)
    table = Table(
        "head",
        *(f"p{k}" for k in (1, 2, 3)),
        *(f"P{k}" for k in tops[1:]),
        title="Medusa heads: accuracy of rank k (p), of the first k (P)",
    )
    for head in heads:
        shares, sums = calibration.rank_accuracy[head], calibration.cumulative(head)
        row = [*shares[:3], *(sums[k - 1] for k in tops[1:])]
        table.add_row(str(head + 1), *(f"{value:.1%}" for value in row))
    console.print(table)
    if calibration.early_recall:
        table = Table(
            "after layer",
            *(f"top {k}" for k in EARLY_RANKS),
            title="Early heads: how often the next token is in their top K",
        )
        for layer, recall in calibration.early_recall.items():
            table.add_row(str(layer), *(f"{recall[k]:.1%}" for k in EARLY_RANKS))
        console.print(table)
    sizes = calibration.tokens_per_step
    table = Table(
        "nodes",
        *map(str, sizes),
        title=f"Tokens per step by tree size ({calibration.positions:,} positions walked)",
    )
    table.add_row("tokens", *(f"{value:.2f}" for value in sizes.values()))
    console.print(table)


def plot(calibration: Calibration, path: Path) -> None:
    """Plots a calibration: Medusa heads, early heads, tokens per step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for head in range(len(calibration.rank_accuracy)):
        sums = calibration.cumulative(head)
        left.plot(range(1, len(sums) + 1), sums, marker="o", label=f"head {head + 1}")
    left.set(title="Medusa heads", xlabel="candidates k", ylabel="truth among them ($P_k$)")
    for layer, recall in calibration.early_recall.items():
        middle.plot(list(recall), list(recall.values()), marker="o", label=f"layer {layer}")
    middle.set(title="Early heads", xlabel="top K", ylabel="next token among them")
    middle.set_xscale("log")
    middle.set_xticks(EARLY_RANKS, labels=map(str, EARLY_RANKS))
    for axes in (left, middle):
        axes.set_ylim(0, 1)
        if axes.lines:
            axes.legend()
    sizes = calibration.tokens_per_step
    right.plot(list(sizes), list(sizes.values()), marker="o")
    right.set_xscale("log", base=2)
    powers = [size for size in sizes if size & (size - 1) == 0]
    right.set_xticks(powers, labels=map(str, powers))
    right.set(title="Walked acceptance", xlabel="tree nodes", ylabel="tokens per step")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
