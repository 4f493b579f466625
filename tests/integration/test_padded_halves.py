"""Steps padded as for CUDA graphs: the text stays plain vLLM's. A CPU replays none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import BUSY, HEADS_ALONE, Ties, engine, greedy, mixed_prompts, run
from prices import AnySizes
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor

from vllm_propd.engine.pruning.cuda_graphs import HalfGraphs, in_the_models_place

SIZES = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 200]
RULES: dict[str, dict[str, Any]] = {
    "planned": {**HEADS_ALONE, "pruning": "auto"},
    "top_k": {"pruning": "top_k", "top_k": 4},
    "path_probability": {"pruning": "path_probability", "keep_nodes": 5},
}


class Padding:
    """In the place of vLLM's dispatcher of graphs."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int]] = []

    def dispatch(self, num_tokens: int, *args: Any, **kwargs: Any) -> Any:
        size = next(size for size in SIZES if size >= num_tokens)
        self.rows.append((num_tokens, size))
        return CUDAGraphMode.PIECEWISE, BatchDescriptor(size)


@pytest.mark.parametrize("rule", RULES)
def test_text_is_plain_vllms(rule: str, ties: Ties) -> None:
    options = {**BUSY, "max_num_batched_tokens": SIZES[-1]}
    prompts, params = mixed_prompts(8, seed=11), greedy(32, logprobs=2)
    with engine(**options) as llm:
        expected = run(llm, prompts, params)
    with engine(16, propd=RULES[rule], **options) as llm:
        runner = llm.collective_rpc(lambda worker: worker.model_runner)[0]
        if rule == "planned":
            AnySizes(prunes=True).take_over(runner.sizing)
        padding, forward = Padding(), runner._pruned_forward
        runner.cudagraph_dispatcher.dispatch = padding.dispatch
        runner.cudagraph_batch_sizes = SIZES
        forward.graphs = HalfGraphs(runner)
        with in_the_models_place(runner, forward.unpruned):
            for size in SIZES:
                assert len(runner._dummy_run(size)[0]) == size
        assert {graph.num_tokens for graph in forward.graphs.captured} == {*SIZES}
        upper, read = forward.halves.run_upper, set()

        def run_upper(between: Any, **inputs: Any) -> torch.Tensor:
            """Where the upper half finds what it reads."""
            read.update((k, v.data_ptr()) for k, v in between.tensors.items())
            read.add(("positions", inputs["positions"].data_ptr()))
            return upper(between, **inputs)

        forward.halves.run_upper = run_upper
        padding.rows.clear()
        llm.collective_rpc("start_recording", args=(10_000,))
        ties.check(expected, run(llm, prompts, params))
        trees = [tree for step in llm.collective_rpc("take_recording")[0] for tree in step]
    assert 0 < sum(len(tree["kept"]) for tree in trees) < sum(t["verified"] for t in trees)
    assert len(read) == 3  # hidden states, residual, positions: each in one place
    assert sum(rows < size for rows, size in padding.rows) > 10
