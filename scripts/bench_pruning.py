"""What it costs to judge trees: the early head by vocabulary and rank, the test, the masks.

    make bench-pruning    (or: python scripts/bench_pruning.py)

Random weights and trees of a real shape, all ways in turns; medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_propd.core.drafting.growth import grow
from vllm_propd.core.pruning import edges_of, keep_top_k
from vllm_propd.core.tree import TokenTree, ancestor_masks
from vllm_propd.heads.early import EarlyHead
from vllm_propd.kernels.early_head_ranks import ranks

HIDDEN, NODES, ROUNDS, KEPT = 2048, 64, 30, 20
VOCABULARIES, RANKS, BATCHES = (2048, 32_000, 151_936), (0, 256), (1, 16)


def trees_of(batch: int, vocabulary: int) -> list[TokenTree]:
    """Trees of four heads with ten candidates each, as unsure as the demo's."""
    rng = np.random.default_rng(0)
    shares = -np.sort(-rng.dirichlet(np.full(10, 0.4), (batch, 4)), axis=-1)
    tokens = rng.integers(0, vocabulary, (batch, 4, 10))
    return grow(tokens, np.log(shares).astype(np.float32), np.full(batch, NODES))


def rows_of(trees: list[TokenTree]) -> tuple[npt.NDArray[np.int64], ...]:
    """Token, parent, parent's row and depth of all rows, roots included; first, sizes."""
    root = np.zeros(1, np.int64)
    sizes = np.array([len(tree) + 1 for tree in trees])
    first = np.cumsum(sizes) - sizes

    def rows(name: str) -> npt.NDArray[np.int64]:
        return np.concatenate([x for t in trees for x in (root, getattr(t, name))])

    parent = rows("parent")
    parent_row = np.repeat(first, sizes) + parent
    return rows("token"), parent, parent_row, rows("depth"), first, sizes


@njit(cache=True)
def _subsample(masks, kept, first, sizes, new_first, out):  # type: ignore[no-untyped-def]
    for tree in range(len(first)):
        for i in range(new_first[tree], new_first[tree + 1]):
            for j in range(new_first[tree], new_first[tree + 1]):
                node = kept[j] - first[tree]
                bit = masks[kept[i], node >> 6] >> np.uint64(node & 63) & np.uint64(1)
                place = j - new_first[tree]
                out[i, place >> 6] |= bit << np.uint64(place & 63)


def medians(ways: dict[str, Callable[[], object]], label: str) -> dict[str, float]:
    """Milliseconds of each way; they take turns."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in track(range(ROUNDS + 3), label, transient=True):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if round_ >= 3:
                spent[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in spent.items()}


@torch.inference_mode()
def head_cells(batch: int, vocabulary: int) -> list[str]:
    """The early head and the rank test."""
    token, _, parent_row, depth, _, _ = rows_of(trees_of(batch, vocabulary))
    edges = edges_of(parent_row, depth)
    states = torch.randn(len(edges.parents), HIDDEN).bfloat16()
    output = torch.nn.Linear(HIDDEN, vocabulary, bias=False).bfloat16()
    logits = output(states)
    asked = torch.from_numpy(token[edges.child]), torch.from_numpy(edges.place)
    rank = ranks(logits, *asked, 0, torch.nn.Identity()).numpy()
    ways: dict[str, Callable[[], object]] = {}
    for own in RANKS:
        head = EarlyHead(HIDDEN, 1e-6, own, vocabulary).bfloat16()
        ways[str(own)] = partial(head.logits, states, output)
    ways["test"] = lambda: ranks(logits, *asked, 0, torch.nn.Identity())
    ways["rule"] = lambda: keep_top_k(rank, edges, parent_row, depth, 20)
    found = medians(ways, f"batch {batch}, vocabulary {vocabulary}")
    return [str(len(states)), *(f"{found[name]:.2f}" for name in ways)]


def mask_cells(batch: int) -> list[str]:
    """Ancestor masks of what is left: made anew from the parents, or cut out of the old."""
    _, parent, parent_row, _, first, sizes = rows_of(trees_of(batch, 2048))
    masks = ancestor_masks(parent, first, sizes)
    node = np.arange(len(parent)) - np.repeat(first, sizes)
    kept = np.flatnonzero(node <= KEPT)  # any prefix is closed under parents
    left = np.full(batch, KEPT + 1)
    ends = np.concatenate([[0], np.cumsum(left)])
    moved = np.cumsum(node <= KEPT) - 1

    def rebuild() -> npt.NDArray[np.uint64]:
        new = moved[parent_row[kept]] - np.repeat(ends[:-1], left)
        return ancestor_masks(new, ends[:-1], left)

    def subsample() -> npt.NDArray[np.uint64]:
        out = np.zeros((len(kept), 1), np.uint64)
        _subsample(masks, kept, first, sizes, ends, out)
        return out

    assert np.array_equal(rebuild(), subsample())
    found = medians({"rebuilt": rebuild, "cut": subsample}, f"masks, batch {batch}")
    return [f"{1e3 * ms:.0f}" for ms in found.values()]


def main() -> None:
    console = Console()
    names = [f"rank {own}" if own else "target's output" for own in RANKS]
    table = Table(
        "batch", "vocabulary", "parents", *names, "rank test", "rule",
        title=f"early head, hidden size {HIDDEN}, bfloat16, by its output layer: ms",
    )  # fmt: skip
    for batch in BATCHES:
        for vocabulary in VOCABULARIES:
            cells = head_cells(batch, vocabulary)
            table.add_row(str(batch), f"{vocabulary:,}", *cells)
    console.print(table)
    table = Table(
        "batch", "rebuilt", "sub-sampled",
        title=f"masks after pruning {NODES} nodes to {KEPT}: us",
    )  # fmt: skip
    for batch in BATCHES:
        table.add_row(str(batch), *mask_cells(batch))
    console.print(table)


if __name__ == "__main__":
    main()
