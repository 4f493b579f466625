"""The start-up cost table: what steps of some sizes take on this machine.

A few forward passes without context, timed once per model and machine and kept under
vLLM's cache. What they leave out, attention over context and the host's work, is learned
while serving (``core/cost.py``).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
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

REPEATS = 3


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
    """Sizing for this worker, from a table measured now or found in the cache."""
    path = _cache_file(runner)
    table = _cached(path)
    if table is None:
        began = time.monotonic()
        table = measure(runner)
        logger.info("Timed steps and drafts in %.1f s", time.monotonic() - began)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(table.model_dump_json() + "\n")
    return DynamicSizing(
        table.step_cost(),
        table.draft_cost(),
        runner.propd.num_speculative_tokens,
        runner.max_num_tokens,
        pruning=runner.propd.plans_pruning,
    )


@torch.inference_mode()
def measure(runner: Any) -> CostTable:
    """Times steps and drafts; every tensor-parallel rank does the same ones."""
    device = runner.device
    most = min(runner.max_num_tokens, TOKENS[-1])
    tokens = [n for n in TOKENS if n < most] + [most]
    sequences = sorted({1, max(2, runner.max_num_reqs)})

    split = runner._pruned_forward

    def logits(hidden_states: torch.Tensor) -> None:
        runner.model.compute_logits(hidden_states)

    def whole(count: int) -> None:
        logits(runner._dummy_run(count)[0][:count])

    def draft(count: int) -> None:
        hidden_size = runner.model_config.get_hidden_size()
        dtype = runner.model_config.dtype
        runner.drafter.candidates(
            torch.zeros(count, hidden_size, dtype=dtype, device=device)
        )

    def timed(work: Callable[[], None]) -> float:
        """Seconds; the first time also prepares the shape.

        The least of some: whatever else the machine does only adds, and what it always
        does is learned while serving.
        """
        times = []
        for _ in range(REPEATS + 1):  # as often on every rank
            began = time.perf_counter()
            work()
            runner._sync_device()
            times.append(time.perf_counter() - began)
        return min(times[1:])

    def halves(count: int) -> tuple[float, float]:
        lower, upper = split.dummy_run(count)
        return timed(lower), timed(lambda: logits(upper()))

    found: dict[str, list[float]] = {"step_s": [], "draft_s": []}
    quiet = get_tensor_model_parallel_rank() != 0
    for count in tqdm(tokens, desc="ProPD: timing steps", disable=quiet):
        found["step_s"].append(timed(partial(whole, count)))
        if split is not None:
            for name, seconds in zip(("lower_s", "upper_s"), halves(count), strict=True):
                found.setdefault(name, []).append(seconds)
    for count in sequences:
        found["draft_s"].append(timed(partial(draft, count)))
    return CostTable(tokens=tokens, sequences=sequences, **found)


def _cache_file(runner: Any) -> Path | None:
    """Where this model's table on this machine is kept; None with several ranks.

    Ranks time collectives together: one must not read what another has to measure.
    """
    config = runner.vllm_config
    if config.parallel_config.world_size > 1:
        return None
    name = f"{config.compute_hash()}-{torch.get_num_threads()}-threads"
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
