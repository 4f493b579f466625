"""The ledger of every vLLM symbol that ProPD touches, and of what it relies on beside.

For each: what we do with it, why, and what would let us stop. Tests compare the parameters
with the installed vLLM, so that an upgrade fails at the right line; for what no signature
tells, each behaviour names the test that fails when it ends. Another vLLM's sources are
compared by ``python -m vllm_propd.engine.symbols WHEEL_OR_FOLDER``, which imports none.
"""

from vllm_propd.engine.symbols.entries import (
    attention,
    cuda,
    heads,
    integration,
    process,
    pruning,
    runner,
    scheduler,
    startup,
    tools,
    verify,
)

SOURCE_ONLY = cuda.SOURCE_ONLY

SYMBOLS = (
    *integration.SYMBOLS,
    *startup.SYMBOLS,
    *runner.SYMBOLS,
    *attention.SYMBOLS,
    *cuda.SYMBOLS,
    *pruning.SYMBOLS,
    *heads.SYMBOLS,
    *process.SYMBOLS,
    *scheduler.SYMBOLS,
    *verify.SYMBOLS,
    *tools.SYMBOLS,
)

BEHAVIOURS = (
    *integration.BEHAVIOURS,
    *scheduler.BEHAVIOURS,
    *runner.BEHAVIOURS,
    *verify.BEHAVIOURS,
    *attention.BEHAVIOURS,
    *cuda.BEHAVIOURS,
    *pruning.BEHAVIOURS,
    *process.BEHAVIOURS,
)
