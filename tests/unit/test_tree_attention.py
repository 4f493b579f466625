"""Tree attention against a dense float64 reference, on paged caches full of NaN.

Every slot that attention must not read holds NaN: unused slots, blocks of nobody,
blocks that slid out of the window, the roots' in-step keys (the cache has them). One of
them read, and the output is NaN.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_propd.core.tree import ancestor_masks
from vllm_propd.kernels import gemm
from vllm_propd.kernels import tree_attention_cpu as module
from vllm_propd.kernels.exponentials import exponentiate
from vllm_propd.kernels.gemm import LANES, ROWS, accumulate
from vllm_propd.kernels.row_maximum import largest
from vllm_propd.kernels.tree_attention_cpu import QUERY_TILE, QueryTiles, tree_attention

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-3}
"""Against the reference rounded to the type: bfloat16 differs in a rare tie only."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On busy cores torch's and numba's threads would spin, waiting for each other."""
    threads = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    yield
    torch.set_num_threads(threads[0])
    numba.set_num_threads(threads[1])


@dataclass
class Tree:
    """One sequence: its cached tokens, its tree, and its keys and values in order."""

    context: int
    parent: list[int]
    depth: list[int]
    cached: torch.Tensor
    """``[2, context, kv_heads, head_size]``: keys, values."""
    query: torch.Tensor
    """``[rows, heads, head_size]``."""
    staged: torch.Tensor
    """``[2, rows, kv_heads, head_size]``, the root's rows NaN."""

    @property
    def scale(self) -> float:
        return self.query.shape[-1] ** -0.5

    def attend(self, window: int, softcap: float) -> torch.Tensor:
        """The reference: dense, in float64, one softmax over all positions."""
        size = len(self.parent)
        sees = torch.zeros(size, size, dtype=torch.bool)
        for node in range(1, size):
            sees[node] = sees[self.parent[node]]
            sees[node, node] = True
        sees = torch.cat([torch.ones(size, self.context).bool(), sees[:, 1:]], 1)
        depth = torch.tensor(self.depth)
        position = torch.cat([torch.arange(self.context), self.context - 1 + depth[1:]])
        if window:
            sees &= (self.context - 1 + depth)[:, None] - position < window
        key, value = torch.cat([self.cached, self.staged[:, 1:]], 1).double()
        query = self.query.double().unflatten(1, (key.shape[1], -1))
        scores = torch.einsum("qhgd,khd->hgqk", query, key) * self.scale
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
        return torch.einsum("hgqk,khd->qhgd", weights, value).flatten(1, 2)


def random_tree(
    rng: torch.Generator, context: int, size: int, heads: int, kv_heads: int,
    head_size: int, dtype: torch.dtype,
) -> Tree:  # fmt: skip
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng).to(dtype)

    # Mostly deep, in any order: a tile may start with a node deeper than its others.
    parent, depth = [0], [0]
    for node in range(1, size):
        near = int(torch.randint(max(0, node - 3), node, (), generator=rng))
        parent.append(near if node % 7 else 0)
        depth.append(depth[parent[-1]] + 1)
    staged = normal(2, size, kv_heads, head_size)
    staged[:, 0] = torch.nan
    cached = normal(2, context, kv_heads, head_size)
    return Tree(context, parent, depth, cached, normal(size, heads, head_size), staged)


def run(
    trees: list[Tree], block_size: int, window: int, softcap: float, padding: int
) -> torch.Tensor:
    """The kernel's output for all rows of ``trees``."""
    kv_heads, head_size = trees[0].staged.shape[2:]
    dtype, heads = trees[0].query.dtype, trees[0].query.shape[1]
    most = max(-(-tree.context // block_size) for tree in trees)
    blocks = len(trees) * most + 1
    shape = (kv_heads, block_size, 2 * head_size)
    pages = torch.full((blocks, math.prod(shape) + padding), torch.nan, dtype=dtype)
    cache = pages[:, : math.prod(shape)].unflatten(1, shape)
    halves = cache.view(blocks, kv_heads, 2, block_size * head_size)
    keys = halves[:, :, 0].view(blocks, kv_heads, head_size, block_size)
    values = halves[:, :, 1].view(blocks, kv_heads, block_size, head_size)
    order = torch.randperm(blocks - 1, generator=torch.Generator().manual_seed(0)) + 1
    table = torch.zeros(len(trees), most, dtype=torch.int32)  # block 0 is nobody's
    for t, tree in enumerate(trees):
        gone = max(0, tree.context - window) // block_size if window else 0
        for position in range(gone * block_size, tree.context):
            index, slot = divmod(position, block_size)
            block = table[t, index] = order[t * most + index]
            keys[block, :, :, slot] = tree.cached[0, position]
            values[block, :, slot] = tree.cached[1, position]
    sizes = np.array([len(tree.parent) for tree in trees])
    first = np.cumsum(sizes) - sizes
    parent = np.concatenate([tree.parent for tree in trees])
    query = torch.cat([tree.query for tree in trees])
    key, value = torch.cat([tree.staged for tree in trees], 1)
    out = torch.full_like(query, torch.nan)
    tree_attention(
        query, key, value, out, cache, table, first,
        np.array([tree.context for tree in trees]),
        ancestor_masks(parent, first, sizes),
        np.concatenate([tree.depth for tree in trees]),
        QueryTiles(sizes, heads // kv_heads, kv_heads), trees[0].scale, window, softcap,
    )  # fmt: skip
    return out


def check(
    sizes_and_contexts: list[tuple[int, int]],
    group: int = 4,
    head_size: int = 32,
    block_size: int = 32,
    dtype: torch.dtype = torch.float32,
    window: int = 0,
    softcap: float = 0.0,
    kv_heads: int = 2,
    padding: int = 0,
) -> None:
    rng = torch.Generator().manual_seed(1)
    trees = [
        random_tree(rng, context, size, group * kv_heads, kv_heads, head_size, dtype)
        for size, context in sizes_and_contexts
    ]
    expected = torch.cat([tree.attend(window, softcap) for tree in trees])
    rounded = expected.to(dtype).double()
    error = run(trees, block_size, window, softcap, padding).double() - rounded
    worst = error.flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert worst.max() < TOLERANCE[dtype]  # of any row


dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
block_sizes = pytest.mark.parametrize("block_size", [32, 128])


@dtypes
@block_sizes
@pytest.mark.parametrize("head_size", [32, 64, 96, 128])
@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_ragged_trees_on_contexts_around_block_boundaries(
    group: int, head_size: int, block_size: int, dtype: torch.dtype
) -> None:
    contexts = [1, block_size - 1, block_size, block_size + 1, 2 * block_size, 391]
    sizes = [2, 9, 1, 30, 70, 5]
    batch = list(zip(sizes, contexts, strict=True))
    check(batch, group, head_size, block_size, dtype)


@dtypes
@block_sizes
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("window", [0, 1, 4, 40, 500])
def test_windows_and_softcaps(
    window: int, softcap: float, block_size: int, dtype: torch.dtype
) -> None:
    # The windows of one tile's nodes begin on both sides of a block boundary.
    edge = block_size + window
    batch = [(40, context) for context in (1, edge - 9, edge - 4, edge, 300)]
    check(batch, 8, 32, block_size, dtype, window, softcap, kv_heads=1)


@dtypes
def test_pages_with_padding_at_their_ends(dtype: torch.dtype) -> None:
    """As vLLM pads the pages of layers whose size does not divide the largest layer's."""
    check([(9, 31), (5, 100)], dtype=dtype, padding=96)


@pytest.mark.alone
@pytest.mark.parametrize("size", [64, 65, 200, 256])
def test_trees_of_several_mask_words_and_tiles_on_all_threads(size: int) -> None:
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    check([(size, 77), (3, 5)], group=2)


def exponentials(scores: np.ndarray) -> np.ndarray:
    """``exp(scores - max)`` as the kernel computes it; its sum is checked."""
    line = scores.copy()
    total = exponentiate(line, len(line), scores.max())
    assert total == pytest.approx(line.sum(dtype=np.float64), rel=1e-5)
    return line


def test_exponentials_are_accurate_to_float32() -> None:
    # One octave: the polynomial's whole range, and the argument's rounding is small.
    scores = np.linspace(-np.log(2), 0, 1 << 16, dtype=np.float32)
    exact = np.exp(scores.astype(np.float64))
    np.testing.assert_allclose(exponentials(scores), exact, rtol=2e-7)


def test_exponentials_of_far_scores_vanish() -> None:
    scores = np.array([2, 1, -30, -86, -200, -3e38], np.float32)
    exact = np.exp(scores.astype(np.float64) - 2)
    np.testing.assert_allclose(exponentials(scores), exact, rtol=1e-5, atol=2e-38)


def test_the_kernels_cache_file_changes_with_gemm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its machine code contains gemm's, which numba does not watch."""

    def load(name: str, path: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded

    def cache_file() -> str:
        kernel = load("again", Path(str(module.__file__)))._tree_attention
        return str(kernel._cache._impl.filename_base)

    before, again = cache_file(), cache_file()
    edited = tmp_path / "gemm.py"
    edited.write_text(Path(str(gemm.__file__)).read_text() + "# edited\n")
    monkeypatch.setattr("vllm_propd.kernels.gemm", load("edited", edited))
    assert before == again != cache_file()


@given(
    st.lists(st.integers(1, 256), min_size=1, max_size=9),
    st.integers(1, 16),
    st.integers(1, 9),
    st.integers(1, 64),
)
def test_tiles_cover_every_row_once(
    sizes: list[int], group: int, kv_heads: int, threads: int
) -> None:
    with patch("numba.get_num_threads", lambda: threads):
        tiles = QueryTiles(np.array(sizes), group, kv_heads)
    covered = [
        (tree, row)
        for tree, start, nodes in zip(tiles.tree, tiles.start, tiles.nodes, strict=True)
        for row in range(start, start + nodes)
    ]
    assert covered == [(t, row) for t, size in enumerate(sizes) for row in range(size)]
    assert (tiles.nodes > 0).all()
    assert ((tiles.nodes - 1) * group < QUERY_TILE).all()


@pytest.mark.parametrize(
    ("nodes", "kv_heads", "threads", "tiles"),
    [(8, 3, 2, 2), (8, 4, 2, 1), (16, 8, 16, 2), (1, 3, 2, 1), (16, 1, 2, 2)],
)
def test_all_threads_have_as_much_to_do(
    nodes: int, kv_heads: int, threads: int, tiles: int
) -> None:
    with patch("numba.get_num_threads", lambda: threads):
        assert len(QueryTiles(np.array([nodes]), 3, kv_heads).nodes) == tiles


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(0, 7))
def test_the_largest_of_a_row(cols: int, beyond: int) -> None:
    matrix = np.random.default_rng(cols).normal(size=(3, cols + beyond)).astype(np.float32)
    matrix[:, cols:] = np.inf
    for row in range(3):
        assert largest(matrix, row, cols) == matrix[row, :cols].max()


@settings(deadline=None)
@given(st.integers(1, 19), st.integers(0, 40), st.integers(1, 150))
def test_accumulate_adds_a_product(rows: int, depth: int, cols: int) -> None:
    """NaN lies beyond ``a`` and ``b``; beyond ``c``'s padding nothing is written."""
    rng = np.random.default_rng(rows * cols)
    tall, wide = -(-rows // ROWS) * ROWS, -(-cols // LANES) * LANES
    a = np.full((tall, depth + 3), np.nan, np.float32)
    b = np.full((depth + 2, wide + 5), np.nan, np.float32)
    c = np.full((tall + 1, wide + 7), 5, np.float32)
    a[:rows, :depth] = rng.normal(size=(rows, depth))
    b[:depth, :cols] = rng.normal(size=(depth, cols))
    c[:rows, :cols] = rng.normal(size=(rows, cols))
    product = a[:rows, :depth].astype(np.float64) @ b[:depth, :cols]
    expected = c[:rows, :cols] + product
    accumulate(a, b, c, rows, depth, cols)
    np.testing.assert_allclose(c[:rows, :cols], expected, rtol=1e-5, atol=1e-5)
    assert (c[tall:] == 5).all() and (c[:, wide:] == 5).all()
