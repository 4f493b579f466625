"""Tree attention against vLLM's own CPU attention for as many causal tokens.

    make bench-host    (or: python scripts/bench_attention.py)

Both kernels take turns on the same queries, cache and threads; medians and their ratio.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from vllm import _custom_ops as ops

from vllm_propd.core.tree import ancestor_masks
from vllm_propd.kernels.tree_attention_cpu import QueryTiles, tree_attention

BLOCK, ROUNDS = 128, 60


@dataclass(frozen=True)
class Shape:
    """A model's attention, a batch and a tree."""

    name: str
    heads: int
    kv_heads: int
    head_size: int
    context: int
    nodes: int
    batch: int
    dtype: torch.dtype


SHAPES = [
    Shape(name, heads, kv, size, context, nodes, batch, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for name, heads, kv, size, context, nodes, batch in (
        ("demo model", 4, 2, 64, 512, 32, 1),
        ("Llama 1B", 32, 8, 64, 512, 32, 1),
        ("Llama 8B", 32, 8, 128, 512, 32, 1),
        ("Llama 8B", 32, 8, 128, 2048, 32, 1),
        ("Llama 1B", 32, 8, 64, 512, 16, 16),
    )
]


def arms(shape: Shape) -> tuple[Callable[[], None], Callable[[], None]]:
    """One call of our kernel, and one of vLLM's, on the same random data."""
    torch.manual_seed(0)
    dtype, rows = shape.dtype, shape.nodes + 1
    blocks = -(-(shape.context + rows) // BLOCK)
    cache = torch.randn(
        shape.batch * blocks, shape.kv_heads, BLOCK, 2 * shape.head_size
    ).to(dtype)
    table = torch.randperm(shape.batch * blocks).int().view(shape.batch, blocks)
    query = torch.randn(shape.batch * rows, shape.heads, shape.head_size).to(dtype)
    key, value = (
        torch.randn(shape.batch * rows, shape.kv_heads, shape.head_size).to(dtype)
        for _ in range(2)
    )
    scale = shape.head_size**-0.5
    ours, theirs = torch.empty_like(query), torch.empty_like(query)

    rng = np.random.default_rng(0)
    parent = np.concatenate([[0], *(rng.integers(0, [n]) for n in range(1, rows))])
    depth = np.zeros(rows, np.int64)
    for node in range(1, rows):
        depth[node] = depth[parent[node]] + 1
    first = np.arange(shape.batch) * rows
    sizes = np.full(shape.batch, rows)
    masks = ancestor_masks(np.tile(parent, shape.batch), first, sizes)
    depths = np.tile(depth, shape.batch)
    prefix = np.full(shape.batch, shape.context)
    tiles = QueryTiles(sizes, shape.heads // shape.kv_heads, shape.kv_heads)

    def tree() -> None:
        tree_attention(
            query, key, value, ours, cache, table, first, prefix, masks, depths, tiles,
            scale,
        )  # fmt: skip

    starts = torch.arange(shape.batch + 1, dtype=torch.int32) * rows
    lengths = torch.full((shape.batch,), shape.context + rows, dtype=torch.int32)
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=shape.batch, num_heads=shape.heads, num_kv_heads=shape.kv_heads,
        head_dim=shape.head_size, seq_lens=lengths, dtype=dtype, query_start_loc=starts,
        causal=True, sliding_window_size=-1, isa="vec", enable_kv_split=True,
        dynamic_causal=None, kv_cache_dtype="auto",
    )  # fmt: skip
    key_cache, value_cache = cache.view(
        len(cache), shape.kv_heads, 2 * BLOCK, shape.head_size
    ).chunk(2, dim=2)

    def causal() -> None:
        ops.cpu_attention_with_kv_cache(
            query=query, key_cache=key_cache, value_cache=value_cache, output=theirs,
            query_start_loc=starts, seq_lens=lengths, scale=scale, causal=True,
            alibi_slopes=None, sliding_window=-1, block_table=table, softcap=0,
            scheduler_metadata=plan, s_aux=None, dynamic_causal=None, k_scale=1.0,
            v_scale=1.0, kv_cache_dtype="auto",
        )  # fmt: skip

    return tree, causal


def measure(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


def main() -> None:
    table = Table(
        "shape", "type", "batch", "nodes", "context", "tree, µs", "causal, µs", "ratio",
        title=f"attention of one layer, {torch.get_num_threads()} threads, medians of "
        f"{ROUNDS} turns",
    )  # fmt: skip
    for shape in track(SHAPES, "attention"):
        tree, causal = arms(shape)
        for _ in range(3):  # compile, then warm caches
            tree()
            causal()
        times = [(measure(tree), measure(causal)) for _ in range(ROUNDS)]
        ours = statistics.median(t for t, _ in times)
        theirs = statistics.median(t for _, t in times)
        table.add_row(
            shape.name, str(shape.dtype).removeprefix("torch."), str(shape.batch),
            str(shape.nodes), str(shape.context), f"{ours:.0f}", f"{theirs:.0f}",
            f"{ours / theirs:.2f}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
