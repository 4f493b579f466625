"""The ledger of every vLLM symbol that ProPD touches or relies on.

For each: what we do with it, why, and what would let us stop. A test compares the
parameters with the installed vLLM, so that an upgrade fails at the right line.
"""

from vllm_propd.engine.symbols import (
    attention,
    cuda,
    delivery,
    doors,
    halves,
    heads,
    process,
    runner,
    sampling,
    tools,
    worker,
)

SOURCE_ONLY = cuda.SOURCE_ONLY

SYMBOLS = (
    *doors.SYMBOLS,
    *worker.SYMBOLS,
    *runner.SYMBOLS,
    *delivery.SYMBOLS,
    *attention.SYMBOLS,
    *cuda.SYMBOLS,
    *halves.SYMBOLS,
    *heads.SYMBOLS,
    *process.SYMBOLS,
    *sampling.SYMBOLS,
    *tools.SYMBOLS,
)
