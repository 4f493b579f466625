"""Small float32 matrix products inside numba kernels, written on LLVM's vector types.

Numba's own loops over short rows spend their time in alias checks and in loading and
storing the accumulators; a register tile of fixed size has neither. One tile is ROWS
rows by ``VECTORS`` vectors of ``LANES`` floats, chosen for the host's registers.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

ROWS = 4
"""Rows of a register tile: callers pad the rows of their scratch to this."""

_WIDE = binding.get_host_cpu_features().get("avx512f", False)
LANES = 16 if _WIDE else 8
VECTORS = 4 if _WIDE else 2

VECTOR = ir.VectorType(ir.FloatType(), LANES)


def data_of(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    """Returns, inside an intrinsic, the address of an array's first element."""
    return context.make_array(kind)(context, builder, array).data


def load_vector(builder: Any, base: Any, offset: Any) -> Any:
    """Loads, inside an intrinsic, ``LANES`` floats, ``offset`` of them behind a base."""
    pointer = builder.bitcast(builder.gep(base, [offset]), VECTOR.as_pointer())
    return builder.load(pointer, align=4)


def spread(builder: Any, number: Any) -> Any:
    """Returns, inside an intrinsic, a vector of ``LANES`` times the same float."""
    undefined = ir.Constant(VECTOR, ir.Undefined)
    lone = builder.insert_element(undefined, number, ir.IntType(32)(0))
    first = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(lone, lone, first)


def _tile(vectors: int) -> Any:
    """Makes an intrinsic adding a ``ROWS x (vectors * LANES)`` tile of ``a @ b`` to ``c``.

    It is called as ``tile(a, a_offset, a_stride, b, b_offset, b_stride, c, c_offset,
    c_stride, depth)``: contiguous float32 arrays, offsets and strides in elements.
    """

    @intrinsic
    def tile(  # type: ignore[no-untyped-def]
        typing, a, a_offset, a_stride, b, b_offset, b_stride, c, c_offset, c_stride,
        depth,
    ):  # fmt: skip
        index = types.intp
        signature = types.void(
            a, index, index, b, index, index, c, index, index, index
        )  # fmt: skip

        def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
            i64, vector = ir.IntType(64), VECTOR

            a_data, b_data, c_data = (
                data_of(context, builder, sig.args[i], args[i]) for i in (0, 3, 6)
            )
            a_off, a_step, b_off, b_step, c_off, c_step = (
                args[i] for i in (1, 2, 4, 5, 7, 8)
            )

            def c_at(row: int, lane_block: int) -> Any:
                offset = builder.add(
                    builder.add(c_off, builder.mul(c_step, i64(row))),
                    i64(lane_block * LANES),
                )
                return builder.gep(c_data, [offset])

            accumulators = [
                [cgutils.alloca_once(builder, vector) for _ in range(vectors)]
                for _ in range(ROWS)
            ]
            for row in range(ROWS):
                for v in range(vectors):
                    pointer = builder.bitcast(c_at(row, v), vector.as_pointer())
                    builder.store(builder.load(pointer, align=4), accumulators[row][v])
            with cgutils.for_range(builder, args[9]) as loop:
                b_row = builder.add(b_off, builder.mul(b_step, loop.index))
                columns = [
                    load_vector(builder, b_data, builder.add(b_row, i64(v * LANES)))
                    for v in range(vectors)
                ]
                for row in range(ROWS):
                    a_row = builder.add(a_off, builder.mul(a_step, i64(row)))
                    factor = builder.load(
                        builder.gep(a_data, [builder.add(a_row, loop.index)])
                    )
                    wide = spread(builder, factor)
                    for v in range(vectors):
                        product = builder.fmul(wide, columns[v], flags=("fast",))
                        summed = builder.fadd(
                            builder.load(accumulators[row][v]), product, flags=("fast",)
                        )
                        builder.store(summed, accumulators[row][v])
            for row in range(ROWS):
                for v in range(vectors):
                    pointer = builder.bitcast(c_at(row, v), vector.as_pointer())
                    builder.store(builder.load(accumulators[row][v]), pointer, align=4)
            return context.get_dummy_value()

        return signature, codegen

    return tile


_wide_tile = _tile(VECTORS)
_narrow_tile = _tile(1)


@njit(fastmath=True, nogil=True)
def accumulate(a, b, c, rows, depth, cols):  # type: ignore[no-untyped-def]
    """Adds a product: ``c[:rows, :cols] += a[:rows, :depth] @ b[:depth, :cols]``.

    Args:
        a, b, c: contiguous float32 matrices. ``a`` and ``c`` have at least ``rows``
            rounded up to ROWS rows, ``b`` and ``c`` at least ``cols`` rounded up to
            LANES columns: what lies beyond is read and overwritten, never used.
    """
    a_stride, b_stride, c_stride = a.shape[1], b.shape[1], c.shape[1]
    for row in range(0, rows, ROWS):
        col = 0
        while col + VECTORS * LANES <= cols:
            _wide_tile(
                a, row * a_stride, a_stride, b, col, b_stride,
                c, row * c_stride + col, c_stride, depth,
            )  # fmt: skip
            col += VECTORS * LANES
        while col < cols:
            _narrow_tile(
                a, row * a_stride, a_stride, b, col, b_stride,
                c, row * c_stride + col, c_stride, depth,
            )  # fmt: skip
            col += LANES
