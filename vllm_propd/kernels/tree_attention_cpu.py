"""Tree attention on the CPU: paged prefix plus in-step ancestors, one pass.

A draft node attends to its sequence's cached prefix (root included) and, inside this
step, to its own ancestors and itself. The prefix is read where vLLM's CPU cache keeps
it, block by block, and never copied; in-step keys and values have not been cached (most
of them never will be). Softmax runs online over the blocks, as in FlashAttention.

Layout of the cache (vLLM's ``vec`` layout): per block and KV head, the keys as
``[head, block]`` (transposed), then the values as ``[block, head]``.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt
import torch
from numba import njit, prange, types
from numba.extending import overload

from vllm_propd.core.compiled import with_parts
from vllm_propd.core.tree import Ints
from vllm_propd.kernels import exponentials, gemm, row_maximum
from vllm_propd.kernels.exponentials import exponentiate
from vllm_propd.kernels.gemm import ROWS, accumulate
from vllm_propd.kernels.row_maximum import largest

QUERY_TILE = 64
"""Query rows (nodes x grouped heads) of one work item: its scratch stays in L2."""

FEWEST_ROWS = 8
"""Tiles are not cut into smaller ones than this to give all threads something to do."""

TOLERANCE = 1.05
"""How much longer than with the best cut the longest thread may take: fewer tiles read the
context less often."""

_LOWEST = np.float32(-3.0e38)


def _to_float(source, bits, scratch):  # type: ignore[no-untyped-def]
    """Returns ``source`` (2-D) as float32: itself, or widened into ``scratch``."""
    raise NotImplementedError("compiled by numba only")


@overload(_to_float, jit_options={"fastmath": True, "nogil": True})
def _to_float_overload(source, bits, scratch):  # type: ignore[no-untyped-def]
    if source.dtype == types.float32:
        return lambda source, bits, scratch: source

    def widen(source, bits, scratch):  # type: ignore[no-untyped-def]
        rows, cols = source.shape
        for row in range(rows):
            line, target = source[row], bits[row * cols : (row + 1) * cols]
            for col in range(cols):
                target[col] = np.uint32(line[col]) << np.uint32(16)
        return scratch[: rows * cols].reshape((rows, cols))

    return widen


def _store(values, bits, target, inverse):  # type: ignore[no-untyped-def]
    """Sets ``target[:]`` to ``values * inverse``, rounded to the target's type."""
    raise NotImplementedError("compiled by numba only")


@overload(_store, jit_options={"fastmath": True, "nogil": True})
def _store_overload(values, bits, target, inverse):  # type: ignore[no-untyped-def]
    if target.dtype == types.float32:

        def store_float(values, bits, target, inverse):  # type: ignore[no-untyped-def]
            for i in range(target.shape[0]):
                target[i] = values[i] * inverse

        return store_float

    def store_bfloat16(values, bits, target, inverse):  # type: ignore[no-untyped-def]
        for i in range(target.shape[0]):
            values[i] *= inverse
        for i in range(target.shape[0]):
            raw = np.uint32(bits[i])
            # Round to nearest, ties to even.
            raw += np.uint32(0x7FFF) + ((raw >> np.uint32(16)) & np.uint32(1))
            target[i] = np.uint16(raw >> np.uint32(16))

    return store_bfloat16


@njit(parallel=True, fastmath=True, cache=True, nogil=True)
@with_parts(exponentials, gemm, row_maximum)
def _tree_attention(  # type: ignore[no-untyped-def]
    query, key, value, out, cache, block_stride, head_stride, block_table, first, prefix,
    masks, depth, tile_tree, tile_start, tile_nodes, scale, window, softcap, block_size,
):  # fmt: skip
    heads, head_size = query.shape[1], query.shape[2]
    kv_heads = key.shape[1]
    group = heads // kv_heads
    tiles = tile_tree.shape[0]
    for item in prange(tiles * kv_heads):
        tree, head = tile_tree[item // kv_heads], item % kv_heads
        row0, nodes = tile_start[item // kv_heads], tile_nodes[item // kv_heads]
        rows = nodes * group
        tile = (rows + ROWS - 1) // ROWS * ROWS
        base, context = first[tree], prefix[tree]

        q = np.empty((tile, head_size), np.float32)
        acc = np.zeros((tile, head_size), np.float32)
        acc_bits = acc.view(np.uint32)
        scores = np.empty((tile, block_size), np.float32)
        maxima = np.full(tile, _LOWEST, np.float32)
        sums = np.zeros(tile, np.float32)
        bits = np.empty(head_size * max(block_size, group), np.uint32)
        scratch = bits.view(np.float32)

        for node in range(nodes):
            source = query[base + row0 + node, head * group : (head + 1) * group]
            widened = _to_float(source, bits, scratch)
            for g in range(group):
                for d in range(head_size):
                    q[node * group + g, d] = widened[g, d] * scale

        # A window hides blocks that end before every row's window begins. The order is
        # best first: a later row may be shallower.
        start = 0
        if window > 0:
            shallowest = depth[base + row0 : base + row0 + nodes].min()
            start = max(0, context + shallowest - window) // block_size
        for index in range(start, (context + block_size - 1) // block_size):
            at = block_table[tree, index] * block_stride + head * head_stride
            half = at + block_size * head_size
            own_keys = cache[at:half].reshape((head_size, block_size))
            own_values = cache[half : half + half - at].reshape((block_size, head_size))
            cols = min(block_size, context - index * block_size)
            keys = _to_float(own_keys, bits, scratch)
            for row in range(rows):
                for col in range(cols):
                    scores[row, col] = np.float32(0.0)
            accumulate(q, keys, scores, rows, head_size, cols)
            for row in range(rows):
                line = scores[row]
                if softcap > 0:
                    for col in range(cols):
                        line[col] = softcap * np.tanh(line[col] / softcap)
                if window > 0:
                    # The node's position is context - 1 + its depth.
                    seen = context + depth[base + row0 + row // group] - window
                    for col in range(cols):
                        if index * block_size + col < seen:
                            line[col] = _LOWEST
                best = max(maxima[row], largest(scores, row, cols))
                if best > maxima[row]:
                    shrink = np.exp(maxima[row] - best)
                    for d in range(head_size):
                        acc[row, d] *= shrink
                    sums[row] *= shrink
                    maxima[row] = best
                sums[row] += exponentiate(line, cols, best)
            values = _to_float(own_values, bits, scratch)
            accumulate(scores, values, acc, rows, cols, head_size)

        # In-step keys: the ancestors of each node and the node itself.
        for node in range(nodes):
            own = row0 + node
            for other in range(1, own + 1):  # the root is in the cache already
                word = masks[base + own, other >> 6]
                if (word >> np.uint64(other & 63)) & np.uint64(1) == np.uint64(0):
                    continue
                if window > 0 and depth[base + own] - depth[base + other] >= window:
                    continue
                near = base + other
                k_row = _to_float(key[near, head : head + 1], bits, scratch)[0]
                for g in range(group):
                    row = node * group + g
                    score = np.float32(0.0)
                    for d in range(head_size):
                        score += q[row, d] * k_row[d]
                    if softcap > 0:
                        score = softcap * np.tanh(score / softcap)
                    scores[row, 0] = score
                v_row = _to_float(value[near, head : head + 1], bits, scratch)[0]
                for g in range(group):
                    row = node * group + g
                    score = scores[row, 0]
                    best = max(maxima[row], score)
                    shrink = np.exp(maxima[row] - best)
                    weight = np.exp(score - best)
                    for d in range(head_size):
                        acc[row, d] = acc[row, d] * shrink + weight * v_row[d]
                    sums[row] = sums[row] * shrink + weight
                    maxima[row] = best

        for row in range(rows):
            target = out[base + row0 + row // group, head * group + row % group]
            _store(acc[row], acc_bits[row], target, np.float32(1.0) / sums[row])


def _as_numpy(tensor: torch.Tensor) -> npt.NDArray[np.generic]:
    """Returns a NumPy view; bfloat16, which NumPy lacks, as its bits in uint16."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.numpy()


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """Returns all that lies between a tensor's first element and its last, ``[elements]``.

    vLLM pads the KV pages of some models: numba cuts what is contiguous out of this alone.
    """
    last = sum(
        (n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.as_strided((last + 1,), (1,))


class QueryTiles:
    """The work items of the kernel: which rows of which tree each one computes.

    They depend on the trees' sizes only, so one object per step serves all layers.

    Args:
        sizes: ``[trees]`` int64, rows of each tree with its root.
        group: query heads per key/value head.
        kv_heads: key/value heads: each makes a work item of a tile.
    """

    def __init__(self, sizes: Ints, group: int, kv_heads: int):
        rows = sizes * group
        tiles = -(-rows // QUERY_TILE)
        items, threads = int(tiles.sum()) * kv_heads, numba.get_num_threads()
        if items % threads:
            # Three items on two threads take as long as four: their halves do not.
            most = np.minimum(rows // FEWEST_ROWS, sizes)
            parts = np.arange(1, max(int(most.max()), 1) + 1)
            longest = -(-items * parts // threads) / parts
            enough = parts[longest <= TOLERANCE * longest.min()][0]
            tiles = np.clip(tiles * enough, tiles, np.maximum(tiles, most))
        self.tree = np.repeat(np.arange(len(sizes)), tiles)
        index = np.arange(len(self.tree)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
        # Tiles of one tree are as equal as can be: they run side by side.
        size, count = sizes[self.tree], tiles[self.tree]
        self.start = index * size // count
        self.nodes = (index + 1) * size // count - self.start


def tree_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    first: Ints,
    prefix: Ints,
    masks: npt.NDArray[np.uint64],
    depth: Ints,
    tiles: QueryTiles,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> None:
    """Computes the attention of all rows of all trees, and writes it into ``out``.

    Args:
        query: ``[rows, heads, head_size]`` float32 or bfloat16, contiguous, the rows of
            the trees one after another, each root first; ``out`` likewise.
        key, value: ``[rows, kv_heads, head_size]``, this step's, contiguous.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]``, ``vec`` layout, a
            head's part of a block contiguous; the root's key and value are in it already.
        block_table: ``[trees, max_blocks]`` int32, contiguous.
        first: ``[trees]`` row of each tree's root.
        prefix: ``[trees]`` cached tokens of each sequence, the root counted.
        masks: ``[rows, words]`` uint64, as ``ancestor_masks`` gives them.
        depth: ``[rows]`` depth in the tree, 0 for roots.
        tiles: the work items.
        scale: factor of the query-key products.
        window: sliding window in tokens, 0 for none.
        softcap: cap of the scores, 0 for none.
    """
    block_stride, head_stride, *_ = kv_cache.stride()
    _tree_attention(
        _as_numpy(query),
        _as_numpy(key),
        _as_numpy(value),
        _as_numpy(out),
        _as_numpy(_flat(kv_cache)),
        block_stride,
        head_stride,
        block_table.numpy(),
        first,
        prefix,
        masks,
        depth,
        tiles.tree,
        tiles.start,
        tiles.nodes,
        np.float32(scale),
        window,
        np.float32(softcap),
        kv_cache.shape[2],
    )
