"""What the largest step with trees takes of a GPU's memory, while vLLM measures it.

vLLM gives the KV cache what its own largest step leaves. A step with trees has a logits row
for every node, keeps the nodes' keys and values aside until some are accepted, and then
asks the heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vllm_propd.core.drafting.growth import nodes_per_sequence
from vllm_propd.engine.startup.cost_table import most_nodes
from vllm_propd.engine.step.sampling import ROWS_AT_ONCE


@dataclass(frozen=True)
class LargestStep:
    """The most that a step with trees can hold.

    Attributes:
        rows: rows of all trees together, roots counted.
        sequences: how many sequences, with a tree or without.
        staged: bytes of keys and values of these rows, in all layers.
    """

    rows: int
    sequences: int
    staged: int

    @classmethod
    def of(cls, runner: Any) -> LargestStep:
        """Computes the largest step of a model runner, whose model is loaded."""
        nodes, budget = most_nodes(runner.propd, runner.scheduler_config)
        sequences = min(runner.max_num_reqs, budget)
        rows = max(
            count * (1 + nodes_per_sequence(nodes, budget, count))
            for count in range(1, sequences + 1)
        )
        specs = runner.get_kv_cache_spec().values()
        of_a_token = sum(spec.page_size_bytes // spec.block_size for spec in specs)
        return cls(rows, sequences, rows * of_a_token)


@torch.inference_mode()
def run_largest_step(runner: Any) -> None:
    """Allocates what the largest step takes, all at once, beside what the model needs.

    Args:
        runner: vLLM's model runner, in its profile run.
    """
    largest = LargestStep.of(runner)
    staged = torch.empty(largest.staged, dtype=torch.uint8, device=runner.device)
    hidden_states, _ = runner._dummy_run(runner.max_num_tokens, is_profile=True)
    logits = runner.model.compute_logits(hidden_states[: largest.rows])
    rows = max(largest.sequences, min(largest.rows, ROWS_AT_ONCE))
    runner._dummy_sampler_run(hidden_states[:rows])
    del staged
    if runner.propd.heads:
        runner.drafter.candidates(hidden_states[: largest.sequences])
    del logits  # which vLLM holds until then
    runner._sync_device()
