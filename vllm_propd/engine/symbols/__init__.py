"""The ledger of every vLLM symbol that ProPD touches, and of what it relies on beside.

For each: what we do with it, why, and what would let us stop. Tests compare the parameters
with the installed vLLM, so that an upgrade fails at the right line; for what no signature
tells, each behaviour names the test that fails when it ends. Another vLLM's sources are
compared by ``python -m vllm_propd.engine.symbols WHEEL_OR_FOLDER``, which imports none.
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
    scheduler,
    support,
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
    *support.SYMBOLS,
    *tools.SYMBOLS,
)

BEHAVIOURS = (
    *doors.BEHAVIOURS,
    *scheduler.BEHAVIOURS,
    *runner.BEHAVIOURS,
    *sampling.BEHAVIOURS,
    *delivery.BEHAVIOURS,
    *attention.BEHAVIOURS,
    *cuda.BEHAVIOURS,
    *halves.BEHAVIOURS,
    *process.BEHAVIOURS,
)
