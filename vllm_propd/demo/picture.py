"""Drawing one real token tree with the path that was accepted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    "accepted": ("#2a9d5c", "white"),
    "verified": ("#d7e3f4", "#1d3557"),
    "pruned early": ("#f6e3d7", "#a4552a"),
    "not verified": ("#f4f4f4", "#a0a0a0"),
}
"""The fill and the text colour of a node, by what became of it."""


def status(tree: dict[str, Any], node: int) -> str:
    """Says what became of a node (0 is the root): a key of ``COLOURS``."""
    if node == 0 or node in tree["accepted"]:
        return "accepted"
    if node > tree["verified"]:
        return "not verified"
    return "verified" if node in tree["kept"] else "pruned early"


def layout(parents: list[int]) -> list[float]:
    """Gives each node a row, root first: leaves one below another, parents centred."""
    children: list[list[int]] = [[] for _ in range(len(parents) + 1)]
    for node, parent in enumerate(parents, 1):
        children[parent].append(node)
    rows = [0.0] * len(children)
    next_row = 0.0

    def place(node: int) -> None:
        nonlocal next_row
        if not children[node]:
            rows[node], next_row = next_row, next_row + 1
            return
        for child in children[node]:
            place(child)
        rows[node] = sum(rows[child] for child in children[node]) / len(children[node])

    place(0)
    return rows


def draw_tree(
    tree: dict[str, Any], decode: Callable[[int], str], context: str, out: Path
) -> None:
    """Writes a picture of a recorded tree (see ``RecordedTree``).

    Args:
        tree: one tree of ``take_recording``.
        decode: a token's text.
        context: the text before the root.
        out: the PNG file.
    """
    rows = layout(tree["parent"])
    depths = [0, *tree["depth"]]
    tokens = [tree["root"], *tree["token"]]
    figure, axes = plt.subplots(figsize=(13, 0.26 * (max(rows) + 4)))
    for node, parent in enumerate(tree["parent"], 1):
        shown = status(tree, node)
        axes.plot(
            [depths[parent] + 0.36, depths[node] - 0.36],
            [rows[parent], rows[node]],
            color=COLOURS["accepted"][0] if shown == "accepted" else "#c4ccd6",
            linewidth=2.5 if shown == "accepted" else 0.8,
            linestyle=":" if shown == "not verified" else "-",
            zorder=1,
        )
    for node, token in enumerate(tokens):
        fill, ink = COLOURS[status(tree, node)]
        text = repr(decode(token))[1:-1].replace(" ", "␣")
        axes.text(
            depths[node], rows[node], text[:14] or "∅", ha="center", va="center",
            color=ink, fontsize=8, family="monospace", zorder=2, parse_math=False,
            bbox={"boxstyle": "round,pad=0.25", "facecolor": fill, "edgecolor": "none"},
        )  # fmt: skip
    present = {status(tree, node) for node in range(len(tokens))}
    for name, (fill, ink) in COLOURS.items():
        if name not in present:
            continue
        axes.scatter([], [], s=90, marker="s", color=fill, edgecolors=ink, label=name)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    axes.set_xlim(-0.6, max(depths) + 0.6)
    axes.set_ylim(max(rows) + 1, -1.5)
    axes.set_xticks(
        range(max(depths) + 1),
        ["root", *(f"depth {k}" for k in range(1, max(depths) + 1))],
    )
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_yticks([])
    tail = repr(context[-60:])[1:-1]
    axes.set_title(
        f"…{tail}\n{len(tree['kept'])} of {tree['verified']} nodes verified in one step, "
        f"{len(tree['accepted'])} accepted, plus the bonus token "
        f"{decode(tree['bonus'])!r}",
        fontsize=9,
        family="monospace",
        pad=18,
        parse_math=False,  # two dollar signs would begin and end a formula
    )
    figure.savefig(out, dpi=110, bbox_inches="tight")
    plt.close(figure)


def draw_longest(
    recording: list[list[dict[str, Any]]],
    prompts: list[list[int]],
    texts: list[list[int]],
    tokenizer: Any,
    out: Path,
) -> bool:
    """Draws the first recorded tree among those with the longest accepted path.

    Args:
        recording: trees of requests that ran one at a time and in order.
        prompts, texts: their token ids.
        tokenizer: turns them into text.
        out: the PNG file.

    Returns:
        Whether there was a tree.
    """
    trees = [tree for step in recording for tree in step]
    if not trees:
        return False
    tree = max(trees, key=lambda tree: len(tree["accepted"]))
    requests = list(dict.fromkeys(tree["request_id"] for tree in trees))
    which = requests.index(tree["request_id"])
    before_root = texts[which][: tree["put_out"] - 1]
    text = tokenizer.decode(prompts[which] + before_root)
    draw_tree(tree, lambda token: tokenizer.decode([token]), text, out)
    return True
