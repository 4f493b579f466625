"""Medusa heads whose weights have 8 bits, on the CPU.

Asking heads for a few sequences is reading their weights, and a float32 step of a small
model is not much more than reading its own. Weights are widened to float32 in registers, so
inputs, products and sums are float32; each output has a scale, and the largest weight of
its row counts 127. All blocks of all heads are one call: after a step, with cold caches,
each of torch's steps takes 10 to 20 microseconds to begin.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from vllm_propd.core.compiled import with_parts
from vllm_propd.core.tree import Float32s
from vllm_propd.kernels import gemm
from vllm_propd.kernels.gemm import LANES, VECTOR, VECTORS, data_of, load_vector, spread

WIDTH = VECTORS * LANES
"""Outputs that are computed together; the weights of so many lie side by side."""

ROWS = 4
"""Inputs that share a weight once it has been widened."""

PACKED_AT_ONCE = 4096
"""Outputs whose weights are in float32 at a time while they are packed."""

EPS = np.float32(1e-12)
"""As in ``heads.medusa.root_input``."""

_BYTES = ir.VectorType(ir.IntType(8), LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)


def _tile(rows: int) -> Any:
    """Makes an intrinsic that sets a ``rows x WIDTH`` tile of ``out``.

    It is called as ``tile(states, at, stride, weights, at, scales, at, out, at, stride,
    depth)``: contiguous arrays, each with the offset at which the tile begins, and strides
    of rows, in elements.
    """

    @intrinsic
    def tile(  # type: ignore[no-untyped-def]
        typing, states, state_at, state_stride, weights, weight_at, scales, scale_at, out,
        out_at, out_stride, depth,
    ):  # fmt: skip
        index = types.intp
        signature = types.void(
            states, index, index, weights, index, scales, index, out, index, index, index
        )

        def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
            i64, vector = ir.IntType(64), VECTOR
            given, bytes_, scale, found = (
                data_of(context, builder, sig.args[i], args[i]) for i in (0, 3, 5, 7)
            )
            given_at, given_step, bytes_at, scale_at, found_at, step, depth = (
                args[i] for i in (1, 2, 4, 6, 8, 9, 10)
            )
            zero = ir.Constant(vector, [0.0] * LANES)
            sums = [
                [cgutils.alloca_once_value(builder, zero) for _ in range(VECTORS)]
                for _ in range(rows)
            ]

            def widened(row: Any, v: int) -> Any:
                place = builder.add(row, i64(v * LANES))
                pointer = builder.bitcast(builder.gep(bytes_, [place]), _BYTES.as_pointer())
                narrow = builder.load(pointer, align=1)
                return builder.sitofp(builder.sext(narrow, _INTS), vector)

            with cgutils.for_range(builder, depth) as loop:
                row_at = builder.add(bytes_at, builder.mul(i64(WIDTH), loop.index))
                columns = [widened(row_at, v) for v in range(VECTORS)]
                for row in range(rows):
                    line = builder.add(given_at, builder.mul(given_step, i64(row)))
                    factor = builder.load(
                        builder.gep(given, [builder.add(line, loop.index)])
                    )
                    wide = spread(builder, factor)
                    for v in range(VECTORS):
                        product = builder.fmul(wide, columns[v], flags=("contract",))
                        summed = builder.fadd(
                            builder.load(sums[row][v]), product, flags=("contract",)
                        )
                        builder.store(summed, sums[row][v])
            for v in range(VECTORS):
                factors = load_vector(builder, scale, builder.add(scale_at, i64(v * LANES)))
                for row in range(rows):
                    line = builder.add(found_at, builder.mul(step, i64(row)))
                    place = builder.gep(found, [builder.add(line, i64(v * LANES))])
                    value = builder.fmul(builder.load(sums[row][v]), factors)
                    pointer = builder.bitcast(place, vector.as_pointer())
                    builder.store(value, pointer, align=4)
            return context.get_dummy_value()

        return signature, codegen

    return tile


_rows_tile, _one_tile = _tile(ROWS), _tile(1)


@njit(nogil=True)
def _column(  # type: ignore[no-untyped-def]
    states, state_at, state_stride, weights, weight_at, scales, scale_at, out, out_at,
    out_stride, depth, rows,
):  # fmt: skip
    """Sets ``WIDTH`` outputs of all rows."""
    row = 0
    while row < rows:
        given, found = state_at + row * state_stride, out_at + row * out_stride
        if row + ROWS <= rows:
            _rows_tile(
                states, given, state_stride, weights, weight_at, scales, scale_at, out,
                found, out_stride, depth,
            )  # fmt: skip
            row += ROWS
        else:
            _one_tile(
                states, given, state_stride, weights, weight_at, scales, scale_at, out,
                found, out_stride, depth,
            )  # fmt: skip
            row += 1


@njit(parallel=True, cache=True, nogil=True)
@with_parts(gemm)
def _products(states, weights, scales, out):  # type: ignore[no-untyped-def]
    layers, blocks, depth = weights.shape[:3]
    rows, width = states.shape[1], out.shape[2]
    for item in prange(layers * blocks):
        layer, block = item // blocks, item % blocks
        _column(
            states, layer * rows * depth, depth, weights, item * depth * WIDTH, scales,
            item * WIDTH, out, layer * rows * width + block * WIDTH, width, depth, rows,
        )  # fmt: skip


@njit(parallel=True, cache=True, nogil=True)
@with_parts(gemm)
def _states(  # type: ignore[no-untyped-def]
    hidden, roots, root_weights, root_scales, weights, scales, biases, buffers
):  # fmt: skip
    """Sets the first or second of ``buffers``, by the number of layers, to the states."""
    layers, heads, blocks, depth = weights.shape[:4]
    rows, width, reads = len(hidden), buffers.shape[3], len(root_weights) > 0
    read = np.empty((rows, depth), np.float32)
    if reads:
        for row in range(rows):
            squares = np.float32(0.0)
            for i in range(depth):
                squares += roots[row, i] * roots[row, i]
            scale = np.float32(1.0) / np.sqrt(squares / np.float32(depth) + EPS)
            for i in range(depth):
                read[row, i] = roots[row, i] * scale
    for item in prange(heads * blocks):
        head, block = item // blocks, item % blocks
        first = block * WIDTH
        if reads:
            _column(
                read, 0, depth, root_weights, item * depth * WIDTH, root_scales,
                item * WIDTH, buffers, head * rows * width + first, width, depth, rows,
            )  # fmt: skip
        for row in range(rows):
            for i in range(first, min(first + WIDTH, depth)):
                own = buffers[0, head, row, i] if reads else np.float32(0.0)
                buffers[0, head, row, i] = hidden[row, i] + own
    whole = heads * rows * width
    for layer in range(layers):
        now, after = layer % 2, 1 - layer % 2
        for item in prange(heads * blocks):
            head, block = item // blocks, item % blocks
            first, place = block * WIDTH, layer * heads * blocks + item
            at = head * rows * width
            _column(
                buffers, now * whole + at, width, weights, place * depth * WIDTH, scales,
                place * WIDTH, buffers, after * whole + at + first, width, depth, rows,
            )  # fmt: skip
            for row in range(rows):
                for i in range(first, min(first + WIDTH, depth)):
                    x = buffers[after, head, row, i] + biases[layer, head, i]
                    update = x / (np.float32(1.0) + np.exp(-x))
                    buffers[after, head, row, i] = buffers[now, head, row, i] + update


class Int8Linear:
    """Linear layers of one shape, each with inputs of its own, in 8 bits.

    Args:
        weight: ``[outputs, inputs]`` floating-point of each layer.

    Attributes:
        weights: ``[layers, blocks, inputs, WIDTH]`` int8.
        scales: ``[layers, blocks, WIDTH]`` float32.
    """

    def __init__(self, weight: Sequence[torch.Tensor] | torch.Tensor):
        layers, (self._outputs, inputs) = len(weight), weight[0].shape
        blocks = -(-self._outputs // WIDTH)
        self.weights = np.empty((layers, blocks, inputs, WIDTH), np.int8)
        self.scales = np.empty((layers, blocks, WIDTH), np.float32)
        at_once = PACKED_AT_ONCE // WIDTH
        for layer, whole in enumerate(weight):
            for first in range(0, blocks, at_once):
                some = slice(first, first + at_once)
                rows = whole[first * WIDTH : (first + at_once) * WIDTH].float()
                rows = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % WIDTH))
                scales = rows.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
                packed = (rows / scales).round().to(torch.int8)
                packed = packed.view(-1, WIDTH, inputs).transpose(1, 2)
                self.weights[layer, some] = packed.numpy()
                self.scales[layer, some] = scales.view(-1, WIDTH).numpy()

    def products(self, states: Float32s) -> Float32s:
        """Turns ``[layers, rows, inputs]`` into ``[layers, rows, outputs]`` float32.

        Args:
            states: contiguous float32, as is what is returned: it may be gathered.
        """
        layers, blocks = self.scales.shape[:2]
        found = np.empty((layers, states.shape[1], blocks * WIDTH), np.float32)
        _products(states, self.weights, self.scales, found)
        return np.ascontiguousarray(found[..., : self._outputs])

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Turns ``[layers, rows, inputs]`` into ``[layers, rows, outputs]`` float32."""
        return torch.from_numpy(self.products(states.float().contiguous().numpy()))


class Int8Heads:
    """Computes what ``heads.medusa.MedusaHeads`` computes.

    Args:
        blocks: the weights of each layer of residual blocks, ``[heads, hidden, hidden]``.
        biases: ``[heads, hidden]`` for each of them; or none.
        roots: ``[heads, hidden, hidden]`` weights for the root's embedding, or None.
    """

    def __init__(
        self,
        blocks: list[torch.Tensor],
        biases: list[torch.Tensor],
        roots: torch.Tensor | None,
    ):
        layers = [Int8Linear(weight) for weight in blocks]
        self._weights = np.stack([layer.weights for layer in layers])
        self._scales = np.stack([layer.scales for layer in layers])
        heads, self._hidden = blocks[0].shape[:2]
        self._biases = np.zeros((len(blocks), heads, self._hidden), np.float32)
        for layer, bias in enumerate(biases):
            self._biases[layer] = bias.float().numpy()
        none = np.empty((0, *layers[0].weights.shape[1:]), np.int8), self._scales[0, :0]
        self._roots = none
        if roots is not None:
            packed = Int8Linear(roots)
            self._roots = packed.weights, packed.scales

    def __call__(
        self, hidden_states: torch.Tensor, roots: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Turns ``[tokens, hidden]`` states into ``[heads, tokens, hidden]`` float32.

        Args:
            hidden_states: ``[tokens, hidden]``.
            roots: ``[tokens, hidden]``, the target's embeddings of the tokens after them;
                needed by heads that know the root.
        """
        hidden = hidden_states.float().contiguous().numpy()
        assert roots is not None or not len(self._roots[0])
        known = hidden if roots is None else roots.float().contiguous().numpy()
        layers, heads, blocks = self._scales.shape[:3]
        buffers = np.empty((2, heads, len(hidden), blocks * WIDTH), np.float32)
        _states(
            hidden, known, *self._roots, self._weights, self._scales, self._biases, buffers
        )
        return torch.from_numpy(buffers[layers % 2, ..., : self._hidden])
