"""Compiles the numba kernels before the first request (seconds; then from a cache)."""

from __future__ import annotations

import time

import numba
import numpy as np
import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_propd.core.drafting.candidates import Candidates
from vllm_propd.core.drafting.growth import grow, grow_from
from vllm_propd.core.drafting.reliability import Reliability
from vllm_propd.core.sizing.controller import DynamicSizing
from vllm_propd.core.sizing.node_values import NodeValues
from vllm_propd.core.sizing.protocol import Drafts, StepLoad
from vllm_propd.core.sizing.step_cost import StepCost
from vllm_propd.core.sources.contexts import WAYS
from vllm_propd.core.sources.lookup import REACH, Lookups
from vllm_propd.core.sources.successors import ReadTokens, SuccessorTable
from vllm_propd.core.sources.suffix_memory import NOTHING, SuffixMemory
from vllm_propd.core.tree import ancestor_masks
from vllm_propd.kernels.best_tokens import best_tokens
from vllm_propd.kernels.early_head_ranks import ranks
from vllm_propd.kernels.tree_attention_cpu import QueryTiles, tree_attention

logger = init_logger("vllm.propd.warmup")


def warm_up_kernels(dtype: torch.dtype) -> None:
    """Runs every kernel of a step once on the smallest input of the model's ``dtype``.

    What only CPUs run in numba, GPUs do in Triton and torch, is left out elsewhere.
    """
    start = time.monotonic()
    one = np.ones(1, np.int64)
    trees = grow(np.zeros((1, 1, 1), np.int64), np.zeros((1, 1, 1), np.float32), one)
    assert len(trees[0]) == 1
    lookups, texts = Lookups(), np.zeros((1, 2), np.int32)
    lookups.find(["warm-up"], texts, one - 1, one)
    lookups.find(["warm-up"], texts, one - 1, one + 1)
    lookups.worth()
    memory, path = SuffixMemory(2, WAYS), np.zeros((1, REACH), np.int64)
    memory.see(
        ["warm-up"], texts, one - 1, one - 1, one, one - 1, one, one > 0, NOTHING
    )  # fmt: skip
    others = memory.of(texts, one - 1, one + 1, one)
    others.best_along(path)
    memory.suggest(others, path, np.zeros((1, REACH), np.float32))
    table, on_cpu = SuccessorTable(2), current_platform.is_cpu()
    read = ReadTokens(one, one, one - 1, one)
    if on_cpu:
        table.see(read, *best_tokens(torch.zeros(1, 2), one - 1, 2)(), one - 1)
    else:  # found by torch there, and sent
        table.see(read, np.zeros((1, 2), np.int64), np.zeros((1, 2), np.float32), one - 1)
    looked_up = one[:, None], np.zeros((1, 1), np.float32)
    grow_from(Candidates.none(1), one, looked_up, table.after(one, one > 1, others))
    ancestor_masks(np.zeros(2, np.int64), one - 1, one + 1)
    if on_cpu:
        zero = torch.zeros(1, dtype=torch.int64)
        ranks(torch.zeros(1, 1, dtype=dtype), zero, zero, 0, torch.nn.Identity())
    cost = StepCost(np.arange(1, 3), np.ones(2), (np.ones(2), np.ones(2)))
    cost.observe(1, 0.0, 1.0, 1)
    sizing = DynamicSizing(cost, cost, nodes=1, token_budget=8, pruning=True)
    drafting = sizing.begin(0.0, StepLoad(1, 1, 0, 1)).verified(None)
    nodes = NodeValues.of(trees)
    drafting.looks_up()
    drafting.asks_heads(nodes)
    drafting.plan(Drafts(nodes, 0.0, nodes))
    reliability, said = Reliability(1), np.zeros((1, 1, 1), np.float32)
    reliability.observe(np.ones((1, 1, 1), np.bool_), said)
    reliability.values(said)
    logger.info("Warmed up tree kernels in %.1f s", time.monotonic() - start)


def warm_up_cpu_attention(dtype: torch.dtype) -> None:
    """Runs the CPU's tree attention once on a small input of the model's ``dtype``."""
    start, threads = time.monotonic(), torch.get_num_threads()
    one = np.ones(1, np.int64)
    first, sizes, depth = one - 1, one + 1, np.arange(2)
    masks = ancestor_masks(np.zeros(2, np.int64), first, sizes)
    rows = torch.zeros(2, 1, 32, dtype=dtype)
    tree_attention(
        rows, rows, rows, torch.empty_like(rows),
        torch.zeros(1, 1, 32, 64, dtype=dtype), torch.zeros(1, 1, dtype=torch.int32),
        first, one, masks, depth, QueryTiles(sizes, 1, 1), 1.0,
    )  # fmt: skip
    if numba.get_num_threads() != threads:
        logger.warning(
            "Tree attention runs on %d threads, the model on %d: set NUMBA_NUM_THREADS=%d",
            numba.get_num_threads(),
            threads,
            threads,
        )
    logger.info("Warmed up tree attention in %.1f s", time.monotonic() - start)
