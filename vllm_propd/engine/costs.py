"""The start-up cost table: what steps of some sizes take on this machine.

A few forward passes without context, timed once per model and machine and kept under
vLLM's cache. What they leave out, attention over context and the host's work, is learned
while serving (``core/cost.py``).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
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
    """What was timed: seconds of steps by tokens, and of drafting by sequences."""

    tokens: list[int]
    step_s: list[float]
    sequences: list[int]
    draft_s: list[float]


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
        StepCost(np.array(table.tokens), np.array(table.step_s)),
        StepCost(np.array(table.sequences), np.array(table.draft_s)),
        runner.propd.num_speculative_tokens,
        runner.max_num_tokens,
    )


@torch.inference_mode()
def measure(runner: Any) -> CostTable:
    """Times steps and drafts; every tensor-parallel rank does the same ones."""
    device = runner.device
    most = min(runner.max_num_tokens, TOKENS[-1])
    tokens = [n for n in TOKENS if n < most] + [most]
    sequences = sorted({1, max(2, runner.max_num_reqs)})

    def step(count: int) -> None:
        hidden_states, _ = runner._dummy_run(count)
        runner.model.compute_logits(hidden_states[:count])

    def draft(count: int) -> None:
        hidden_size = runner.model_config.get_hidden_size()
        dtype = runner.model_config.dtype
        runner.drafter.candidates(
            torch.zeros(count, hidden_size, dtype=dtype, device=device)
        )

    quiet = get_tensor_model_parallel_rank() != 0
    with tqdm(
        total=len(tokens) + len(sequences), desc="ProPD: timing steps", disable=quiet
    ) as bar:

        def timed(work: Callable[[int], None], count: int) -> float:
            times = []
            for _ in range(REPEATS + 1):  # the first one also prepares this shape
                began = time.perf_counter()
                work(count)
                runner._sync_device()
                times.append(time.perf_counter() - began)
            bar.update()
            return median(times[1:])

        return CostTable(
            tokens=tokens,
            step_s=[timed(step, count) for count in tokens],
            sequences=sequences,
            draft_s=[timed(draft, count) for count in sequences],
        )


def _cache_file(runner: Any) -> Path | None:
    """Where this model's table on this machine is kept; None with several ranks.

    Ranks time collectives together: one must not read what another has to measure.
    """
    config = runner.vllm_config
    if config.parallel_config.world_size > 1:
        return None
    name = f"{config.compute_hash()}-{torch.get_num_threads()}-threads.json"
    return Path(envs.VLLM_CACHE_ROOT) / "propd" / "costs" / name


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
