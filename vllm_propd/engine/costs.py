"""The start-up cost table: what steps of some sizes take on this machine.

A few forward passes without context, timed once per model and machine and kept under
vLLM's cache. The short ones are timed again at every start: a table of a bad minute would
keep some sizes from ever being tried. What passes leave out, attention over context and the
host's work, is learned while serving (``core/cost.py``).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ValidationError
from tqdm import tqdm
from vllm import envs
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger

from vllm_propd.core.cost import StepCost
from vllm_propd.core.sizing import DynamicSizing

logger = init_logger("vllm.propd.costs")

TOKENS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Tokens of the timed steps; beyond the last the line goes on."""

SHORT = 48
"""Tokens of steps whose times decide most plans."""

REPEATS, OFTEN = 2, 6
"""How often steps are timed, and those of up to ``SHORT`` tokens."""


class CostTable(BaseModel):
    """What was timed: seconds of steps by tokens, and of drafting by sequences.

    ``lower_s``, the early head included, and ``upper_s`` are those of the halves, where the
    model is split.
    """

    tokens: list[int]
    step_s: list[float]
    sequences: list[int]
    draft_s: list[float]
    lower_s: list[float] | None = None
    upper_s: list[float] | None = None

    def least(self, others: CostTable) -> CostTable:
        """The faster of each time: whatever else a machine did has only added.

        Args:
            others: timed again; of steps perhaps only the first of these.
        """
        again = others.model_dump()
        return self.model_copy(
            update={
                name: [min(both) for both in zip(times, again[name], strict=False)]
                + times[len(again[name]) :]
                for name, times in self.model_dump(exclude_none=True).items()
                if name not in ("tokens", "sequences")
            }
        )

    def step_cost(self) -> StepCost:
        """What steps cost before any was served."""
        halves = None
        if self.lower_s is not None and self.upper_s is not None:
            halves = np.array(self.lower_s), np.array(self.upper_s)
        return StepCost(np.array(self.tokens), np.array(self.step_s), halves)

    def draft_cost(self) -> StepCost:
        """The same of drafting."""
        return StepCost(np.array(self.sequences), np.array(self.draft_s))


def dynamic_sizing(runner: Any) -> DynamicSizing:
    """Sizing for this worker, from a table measured now, and the cache's if it has one."""
    path = _cache_file(runner)
    known = _cached(path)
    began = time.monotonic()
    table = measure(runner, again=known is not None)
    logger.info("Timed steps and drafts in %.1f s", time.monotonic() - began)
    if known is not None:
        table = known.least(table)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(table.model_dump_json() + "\n")
    return DynamicSizing(
        table.step_cost(),
        table.draft_cost(),
        runner.propd.num_speculative_tokens,
        runner.max_num_tokens,
        pruning=runner.propd.plans_pruning,
        captured=runner.cudagraph_batch_sizes,
    )


@torch.inference_mode()
def measure(runner: Any, again: bool = False) -> CostTable:
    """Times steps and drafts; every tensor-parallel rank does the same ones.

    Args:
        runner: the worker's model runner, loaded.
        again: only those of up to ``SHORT`` tokens, once each.
    """
    device = runner.device
    most = min(runner.max_num_tokens, SHORT if again else TOKENS[-1])
    tokens = [n for n in TOKENS if n < most] + [most]
    sequences = sorted({1, max(2, runner.max_num_reqs)})
    split = runner._pruned_forward

    def logits(hidden_states: torch.Tensor) -> None:
        runner.model.compute_logits(hidden_states)

    def whole(count: int) -> None:
        logits(runner._dummy_run(count)[0][:count])

    def finished(upper: Callable[[], torch.Tensor]) -> None:
        logits(upper())

    def draft(count: int) -> None:
        hidden_size = runner.model_config.get_hidden_size()
        dtype = runner.model_config.dtype
        runner.drafter.candidates(
            torch.zeros(count, hidden_size, dtype=dtype, device=device)
        )

    works: dict[tuple[str, int], Callable[[], object]] = {}
    for count in tokens:
        works["step_s", count] = partial(whole, count)
        if split is not None:
            lower, upper = split.dummy_run(count)
            works["lower_s", count] = lower
            works["upper_s", count] = partial(finished, upper)
    for count in sequences:
        works["draft_s", count] = partial(draft, count)
    quiet = get_tensor_model_parallel_rank() != 0
    times = _timed(works, runner._sync_device, quiet, often=1 if again else OFTEN)
    found: dict[str, list[float]] = {}
    for (name, _), seconds in times.items():
        found.setdefault(name, []).append(seconds)
    return CostTable(tokens=tokens, sequences=sequences, **found)


def _timed(
    works: dict[tuple[str, int], Callable[[], object]],
    finish: Callable[[], None],
    quiet: bool,
    often: int = OFTEN,
) -> dict[tuple[str, int], float]:
    """Seconds of each, all in turns: a slow moment of the machine must not fall on one.

    The least of some: whatever else the machine does only adds, and what it always does is
    learned while serving. The first time prepares a shape and does not count. Every
    tensor-parallel rank times as often.
    """
    least = dict.fromkeys(works, float("inf"))
    turns = [
        work
        for turn in range(1 + often)
        for work in works
        if turn <= REPEATS or work[1] <= SHORT
    ]
    met = set()
    for work in tqdm(turns, desc="ProPD: timing steps", disable=quiet):
        began = time.perf_counter()
        works[work]()
        finish()
        if work in met:
            least[work] = min(least[work], time.perf_counter() - began)
        met.add(work)
    return least


def _cache_file(runner: Any) -> Path | None:
    """Where this model's table on this machine is kept; None with several ranks.

    Ranks time collectives together: one must not read what another has to measure.
    """
    config = runner.vllm_config
    if config.parallel_config.world_size > 1:
        return None
    threads = torch.get_num_threads()
    name = f"{config.compute_hash()}-{version('vllm-propd')}-{threads}-threads"
    if runner._pruned_forward is not None:
        name += f"-layer-{runner.propd.early_layer}"
    return Path(envs.VLLM_CACHE_ROOT) / "propd" / "costs" / f"{name}.json"


def _cached(path: Path | None) -> CostTable | None:
    if path is None or not path.is_file():
        return None
    try:
        found = CostTable.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        logger.warning("%s is of no use (%s): timing anew", path, error)
        return None
    logger.info("Step costs from %s", path)
    return found
