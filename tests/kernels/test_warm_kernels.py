"""No step compiles a kernel: what steps launch has been launched while warming up.

Triton compiles a kernel anew for another type, constant or property of an argument. Which
ones those are its own binder says, for a GPU's target, without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import cores  # noqa: F401 - before numba counts them
import numpy as np
import pytest
import torch
from conftest import BUSY, HEADS_ALONE, engine, greedy, mixed_prompts, run
from prices import AnySizes
from random_trees import step_of_trees
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from vllm_propd.engine.pruning.pruned_step import Pruned
from vllm_propd.kernels import early_head_ranks, pruning_triton, tree_attention_triton
from vllm_propd.kernels.tree_attention_triton import attend_in_step

pytest.importorskip("vllm.v1.attention.backends.flash_attn")

from vllm_propd.engine.attention.cuda import send_alone, warm_up

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's monitor watches")

KERNELS = {
    "_in_step": tree_attention_triton,
    "_over_vocabulary": pruning_triton,
    "_over_path": pruning_triton,
    "_narrow": pruning_triton,
}
CPU = torch.device("cpu")


class Launches:
    """Stands where a kernel is, and notes for what each launch would be compiled."""

    def __init__(self, kernel: Any):
        self.kernel, self.seen = kernel, set[str]()
        function = JITFunction(kernel.fn, **kernel.kwargs)
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.bind = create_function_from_signature(
            function.signature, function.params, backend
        )

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            _, specialization, options = self.bind(*args, debug=False, **kwargs)
            self.seen.add(f"{specialization} {options}")
            return self.kernel[grid](*args, **kwargs)

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, Launches]:
    found = {}
    for name, module in KERNELS.items():
        found[name] = Launches(getattr(module, name))
        monkeypatch.setattr(module, name, found[name])
    return found


def seen(launches: dict[str, Launches]) -> dict[str, set[str]]:
    return {name: set(kernel.seen) for name, kernel in launches.items()}


@pytest.mark.parametrize("soft_cap", [0.0, 30.0])
def test_attention_of_any_trees_is_warm(
    launches: dict[str, Launches], soft_cap: float
) -> None:
    heads, kv_heads, head = 6, 2, 64
    impl = SimpleNamespace(
        num_heads=heads, num_kv_heads=kv_heads, head_size=head, logits_soft_cap=soft_cap
    )
    warm_up([impl], torch.bfloat16, CPU)
    warm = seen(launches)
    assert len(warm["_in_step"]) == len(warm["_narrow"]) == 1
    for seed, nodes in enumerate([[1], [16], [63, 1], [64], [9, 30, 2], [150]]):
        rng = np.random.default_rng(seed)
        step = step_of_trees(rng, nodes, rng.integers(1, 99, len(nodes)).tolist())
        step, whole, tree_batch = send_alone(step, heads // kv_heads, CPU)
        kept = torch.from_numpy(np.flatnonzero(step.depth <= 1 + seed % 3))
        pruned = Pruned(step, kept, tree_batch)
        for trees, left in (
            (whole.trees, len(step.rows)),
            (whole.after_pruning(pruned).trees, len(kept)),
        ):
            query = torch.randn(left, heads, head).bfloat16()
            key = torch.randn(left, kv_heads, head).bfloat16()
            attend_in_step(
                query, key, key, query, torch.zeros(heads, left), trees,
                torch.empty_like(query), head**-0.5, soft_cap,
            )  # fmt: skip
    assert seen(launches) == warm


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pruning_of_any_trees_is_warm(
    launches: dict[str, Launches], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(early_head_ranks, "_relative_mass", pruning_triton.relative_mass)
    monkeypatch.setattr(early_head_ranks, "_count_larger", pruning_triton.count_larger)
    options = {**BUSY, "max_num_batched_tokens": 400, "dtype": dtype}
    propd = {**HEADS_ALONE, "pruning": "auto"}
    with engine(80, propd=propd, **options) as llm:
        runner = llm.collective_rpc(lambda worker: worker.model_runner)[0]
        AnySizes(prunes=True).take_over(runner.sizing)
        runner._pruned_forward.on_device = True
        for kernel in launches.values():
            kernel.seen.clear()  # of the host's own warming up
        runner.warm_up_halves()
        warm = seen(launches)
        assert len(warm["_over_vocabulary"]) == 2 and len(warm["_over_path"]) == 1
        run(llm, mixed_prompts(5, seed=2), greedy(16))
        assert seen(launches) == warm
