"""The largest of a row of numbers, inside numba kernels, on LLVM's vector types.

LLVM does not vectorise numba's own loop: a comparison with what is not a number has to come
out as Python's does. Alone it took a quarter of tree attention's time.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from vllm_propd.kernels.gemm import LANES, data_of, load_vector


@intrinsic
def _largest_lane(typing, values, offset, vectors):  # type: ignore[no-untyped-def]
    """Returns the largest of ``vectors * LANES`` float32 from ``offset`` on."""
    signature = types.float32(values, types.intp, types.intp)

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        i64, lane = ir.IntType(64), ir.IntType(32)
        base = data_of(context, builder, sig.args[0], args[0])

        def load(index: Any) -> Any:
            place = builder.add(args[1], builder.mul(index, i64(LANES)))
            return load_vector(builder, base, place)

        def larger(a: Any, b: Any) -> Any:
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        best = cgutils.alloca_once_value(builder, load(i64(0)))
        with cgutils.for_range(builder, args[2]) as loop:
            builder.store(larger(load(loop.index), builder.load(best)), best)
        found, width = builder.load(best), LANES
        while width > 1:
            width //= 2
            upper = ir.Constant(
                ir.VectorType(lane, LANES), [(i + width) % LANES for i in range(LANES)]
            )
            found = larger(builder.shuffle_vector(found, found, upper), found)
        return builder.extract_element(found, lane(0))

    return signature, codegen


@njit(fastmath=True, nogil=True)
def largest(matrix, row, cols):  # type: ignore[no-untyped-def]
    """Returns the largest of ``matrix[row, :cols]``.

    Args:
        matrix: contiguous float32.
        row, cols: which of them; one column or more.
    """
    best, vectors = matrix[row, 0], cols // LANES
    if vectors:
        best = _largest_lane(matrix, row * matrix.shape[1], vectors)
    for col in range(vectors * LANES, cols):
        best = max(best, matrix[row, col])
    return best
