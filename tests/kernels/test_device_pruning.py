"""Real engines whose nodes are chosen on the device: the text stays plain vLLM's.

The device is a CPU, its kernels run in Triton's interpreter: the choice, and what the host
learns late, are those of a GPU; attention is the CPU's.
"""

from __future__ import annotations

from typing import Any

import cores  # noqa: F401 - before numba counts them
import pytest
import torch
from conftest import BUSY, HEADS_ALONE, TIES, engine, greedy, metric, mixed_prompts, run
from prices import AnySizes

RULES: dict[str, dict[str, Any]] = {
    "planned": {**HEADS_ALONE, "pruning": "auto"},
    "tree by tree": {"pruning": "path_probability", "keep_nodes": 5},
    "with the draft's say": {
        "pruning": "path_probability",
        "keep_nodes": 5,
        "draft_weight": 0.5,
    },
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM for CUDA runs on no CPU")
@pytest.mark.parametrize("rule", RULES)
def test_text_is_plain_vllms(rule: str) -> None:
    options, prompts = {**BUSY, "max_num_batched_tokens": 200}, mixed_prompts(6, seed=3)
    with engine(**options) as llm:
        expected = run(llm, prompts, greedy(24, logprobs=2))
    with engine(16, propd=RULES[rule], **options) as llm:
        runner = llm.collective_rpc(lambda worker: worker.model_runner)[0]
        if rule == "planned":
            AnySizes(prunes=True).take_over(runner.sizing)
        host = runner._pruned_forward.judge.keep
        chosen = []

        def keep(*args: Any) -> torch.Tensor:
            """On the device; and what the host would choose."""
            kept = host(*args)
            chosen.append((kept.tolist(), host(*args[:3]).tolist()))
            return kept

        runner._pruned_forward.on_device = True
        runner._pruned_forward.judge.keep = keep
        ours = run(llm, prompts, greedy(24, logprobs=2))
        assert metric(llm, "spec_decode_num_accepted_tokens") > 0
    TIES.check(expected, ours)
    same = sum(here == there for here, there in chosen)
    # Near-ties may fall either way: sums are not rounded alike.
    assert len(chosen) > 10 and same > 0.9 * len(chosen)
