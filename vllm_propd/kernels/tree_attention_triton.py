"""Tree attention on GPUs, the part inside the step: one Triton kernel.

A draft node attends to its sequence's cached prefix, root included, and to its own
ancestors and itself in this step. The prefix part is any paged attention that also gives
the log-sum-exp. From there this kernel goes on: a softmax that runs online does not care
who has begun it, so nothing is left to merge. It reads keys and values as
the layer has just made them, ``[rows, kv_heads, head]``, and one bit for each two nodes.

One program serves a tile of query rows of one tree (nodes x query heads of a group) and one
KV head. Softmax runs online over blocks of nodes, in float32.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from vllm_propd.core.tree import Ints
from vllm_propd.kernels.transfer import to_device

QUERY_ROWS, KEY_ROWS = 64, 64
"""The rows of a tile: tensor cores take so many, and so does a whole tree of 64 nodes."""

SHARED_BYTES = {
    2: {
        64: (24576, 57344, 90112),
        128: (49152, 81920, 114688),
        256: (98304, 131072, 163840),
    },
    4: {
        64: (49408, 98304, 163840),
        128: (82176, 147712, 246016),
        256: (147712, 246016, 409856),
    },
}
"""The bytes of a multiprocessor's shared memory that the kernel takes, by bytes of a value,
padded head size and stages (1 to 3): the most over GPUs, as Triton compiles it."""


def stages_that_fit(head: int, shared: int, value_bytes: int = 2) -> int:
    """Returns in how many stages keys and values can be loaded ahead: 3, or fewer.

    Args:
        head: size of a head.
        shared: bytes of shared memory that a block of threads can have.
        value_bytes: of a key's or value's number: 2, or 4 for float32.

    Raises:
        ValueError: the memory does not even hold one stage.
    """
    taken = SHARED_BYTES[value_bytes]
    size = next(size for size in taken if head <= size)
    fit = sum(most <= shared for most in taken[size])
    if not fit:
        raise ValueError(
            f"tree attention with heads of {head} needs {taken[size][0]} bytes of "
            f"shared memory, and this GPU has {shared}"
        )
    return fit


@functools.cache
def _stages_on(head: int, value_bytes: int, device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 1
    properties = torch.cuda.get_device_properties(device)
    shared = properties.shared_memory_per_block_optin
    return stages_that_fit(head, shared, value_bytes)


# What changes from step to step must not be compiled for: numbers of rows, and where the
# arrays of a packed copy begin.
@triton.jit(
    do_not_specialize=["words", "lse_stride", "lse_head"],
    do_not_specialize_on_alignment=["masks", "tile_first", "tile_size", "tile_start"],
)
def _in_step(  # type: ignore[no-untyped-def]
    query, key, value, out, prefix, prefix_lse, masks,
    tile_first, tile_size, tile_start, words, scale, soft_cap,
    query_stride, query_head, key_stride, key_head, value_stride, value_head,
    out_stride, out_head, prefix_stride, prefix_head, lse_stride, lse_head,
    GROUP: tl.constexpr, HEAD: tl.constexpr, HEAD_PADDED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    first = tl.load(tile_first + tile)
    size = tl.load(tile_size + tile)
    at = tl.load(tile_start + tile) + tl.arange(0, BLOCK_M)
    node, head = at // GROUP, kv_head * GROUP + at % GROUP
    row, here = first + node, node < size
    column = tl.arange(0, HEAD_PADDED)
    inside = column < HEAD
    q = tl.load(
        query + row[:, None] * query_stride + head[:, None] * query_head + column[None, :],
        mask=here[:, None] & inside[None, :],
        other=0.0,
    )
    if WIDEN:
        q = q.to(tl.float32)
    # As if one key, with the prefix's whole weight and mean value, had been seen.
    top = tl.load(prefix_lse + head * lse_head + row * lse_stride, mask=here, other=0.0)
    total = tl.full([BLOCK_M], 1.0, tl.float32)
    sums = tl.load(
        prefix
        + row[:, None] * prefix_stride
        + head[:, None] * prefix_head
        + column[None, :],
        mask=here[:, None] & inside[None, :],
        other=0.0,
    ).to(tl.float32)
    for start in range(0, size, BLOCK_N):
        other = start + tl.arange(0, BLOCK_N)
        exists = other < size
        k = tl.load(
            key + (first + other)[None, :] * key_stride + kv_head * key_head
            + column[:, None],
            mask=exists[None, :] & inside[:, None],
            other=0.0,
        )  # fmt: skip
        if WIDEN:
            k = k.to(tl.float32)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if CAPPED:
            # tanh, which Triton's language lacks; exp of what is never above 0.
            capped = tl.abs(scores) / soft_cap
            shrunk = tl.exp(-2.0 * capped)
            capped = soft_cap * (1.0 - shrunk) / (1.0 + shrunk)
            scores = tl.where(scores < 0, -capped, capped)
        word = tl.load(
            masks + row[:, None] * words + (other // 64)[None, :],
            mask=here[:, None] & exists[None, :],
            other=0,
        )
        # The root, node 0, stands in the cache already: it belongs to the prefix.
        seen = ((word >> (other % 64)[None, :]) & 1) != 0
        seen = seen & exists[None, :] & (other > 0)[None, :]
        scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        fades = tl.exp(top - higher)
        total = total * fades + tl.sum(weights, 1)
        v = tl.load(
            value + (first + other)[:, None] * value_stride + kv_head * value_head
            + column[None, :],
            mask=exists[:, None] & inside[None, :],
            other=0.0,
        )  # fmt: skip
        sums = sums * fades[:, None]
        # Weights rounded to bfloat16 would lose more than the sums' own rounding.
        sums += tl.dot(weights, v.to(tl.float32), input_precision=PRECISION)
        top = higher
    tl.store(
        out + row[:, None] * out_stride + head[:, None] * out_head + column[None, :],
        (sums / total[:, None]).to(out.dtype.element_ty),
        mask=here[:, None] & inside[None, :],
    )


def tiles_of(first: Ints, sizes: Ints, group: int) -> npt.NDArray[np.int32]:
    """Returns the kernel's tiles for some trees: one program each for every KV head.

    Args:
        first, sizes: ``[trees]`` each tree's root row and rows.
        group: query heads of a KV head.

    Returns:
        ``[3, tiles]`` int32: first row and rows of each tile's tree, and where in its
        tree's query rows the tile begins.
    """
    tiles = -(-sizes * group // QUERY_ROWS)
    ends = np.cumsum(tiles)
    within = np.arange(int(ends[-1])) - np.repeat(ends - tiles, tiles)
    rows = np.repeat(first, tiles), np.repeat(sizes, tiles), QUERY_ROWS * within
    return np.stack(rows).astype(np.int32)


@dataclass(frozen=True)
class DeviceTrees:
    """A step's trees, where the kernel reads them.

    Attributes:
        masks: ``[rows, words]`` int64, the bits of ``core.tree.ancestor_masks``.
        tile_first, tile_size: ``[tiles]`` int32 first row and rows of each tile's tree.
        tile_start: ``[tiles]`` int32 where in its tree's query rows each tile begins.
        group: query heads of a KV head.
    """

    masks: torch.Tensor
    tile_first: torch.Tensor
    tile_size: torch.Tensor
    tile_start: torch.Tensor
    group: int

    @classmethod
    def of(
        cls,
        masks: npt.NDArray[np.uint64],
        first: Ints,
        sizes: Ints,
        group: int,
        device: torch.device,
    ) -> DeviceTrees:
        """Sends trees to the device, by one copy.

        Args:
            masks: ``[rows, words]`` as ``ancestor_masks`` gives them.
            first, sizes: ``[trees]`` each tree's root row and rows.
            group: query heads of a KV head.
            device: device of the keys.
        """
        tiles = tiles_of(first, sizes, group)
        here = to_device({"masks": masks.view(np.int64), "tiles": tiles}, device)
        first, size, start = here["tiles"]
        return cls(here["masks"], first, size, start, group)

    def narrowed(
        self, masks: torch.Tensor, tree: torch.Tensor, starts: torch.Tensor
    ) -> DeviceTrees:
        """Returns what is left of the trees; some of their tiles may hold nothing.

        Args:
            masks: ``[rows left, words]`` int64.
            tree: ``[rows]`` int64 the tree of each row as it was.
            starts: ``[trees + 1]`` int32 where each tree's rows begin among those left.
        """
        of_tile = tree[self.tile_first]
        first = starts[of_tile]
        sizes = starts[of_tile + 1] - first
        return replace(self, masks=masks, tile_first=first, tile_size=sizes)


def attend_in_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix: torch.Tensor,
    prefix_lse: torch.Tensor,
    trees: DeviceTrees,
    out: torch.Tensor,
    scale: float,
    soft_cap: float = 0.0,
) -> None:
    """Completes the attention of trees' rows, whose prefix part is known.

    Args:
        query: ``[rows, heads, head]`` bfloat16, float16 or float32; head size up to 256.
        key, value: ``[rows, kv_heads, head]`` of the same rows.
        prefix: ``[rows, heads, head]`` each row's attention to its cached prefix, which
            holds the root at least.
        prefix_lse: ``[heads, rows]`` float32 its log-sum-exp.
        trees: which rows belong together.
        out: ``[rows, heads, head]`` gets the result; for roots, that is the prefix part.
        scale: factor of the scores.
        soft_cap: scores s become ``soft_cap * tanh(s / soft_cap)``; 0: they stay.
    """
    head = query.shape[2]
    grid = (len(trees.tile_first), query.shape[1] // trees.group)
    _in_step[grid](
        query, key, value, out, prefix, prefix_lse, trees.masks,
        trees.tile_first, trees.tile_size, trees.tile_start, trees.masks.shape[1],
        scale, soft_cap or 1.0,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1),
        value.stride(0), value.stride(1), out.stride(0), out.stride(1),
        prefix.stride(0), prefix.stride(1), prefix_lse.stride(1), prefix_lse.stride(0),
        GROUP=trees.group, HEAD=head, HEAD_PADDED=max(16, triton.next_power_of_2(head)),
        CAPPED=soft_cap > 0,
        BLOCK_M=QUERY_ROWS, BLOCK_N=KEY_ROWS,
        PRECISION="ieee" if value.dtype == torch.float32 else "tf32",
        # Triton's interpreter would multiply the bits of bfloat16.
        WIDEN=bool(triton.knobs.runtime.interpret),
        num_stages=_stages_on(head, key.element_size(), query.device),
    )  # fmt: skip
