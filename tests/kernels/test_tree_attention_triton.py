"""The GPU kernel against float64: in Triton's interpreter, on a GPU where there is one.

`make test` runs this folder in a process of its own, with ``TRITON_INTERPRET=1`` where
there is no GPU: Triton decides for the whole process, when it is imported.
"""

from __future__ import annotations

import cores  # noqa: F401 - before numba counts them
import numpy as np
import pytest
import torch

from vllm_propd.core.tree import ancestor_masks
from vllm_propd.kernels.tree_attention_triton import DeviceTrees, attend_in_step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tree_batch(sizes: list[int], seed: int) -> tuple[np.ndarray, ...]:
    """Random trees: each row's parent in its tree, and the trees' first rows and sizes."""
    rng = np.random.default_rng(seed)
    parents = np.concatenate(
        [[0, *(rng.integers(0, node) for node in range(1, size))] for size in sizes]
    )
    rows = np.array(sizes)
    return parents, np.cumsum(rows) - rows, rows


def noise(rows: int, heads: int, head: int, dtype: torch.dtype) -> torch.Tensor:
    """As layers leave it: a slice of each row of one product."""
    return torch.randn(rows, heads + 1, head).to(DEVICE, dtype)[:, :heads]


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor,
    soft_cap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64: ``[rows, heads, head]``, and the log-sum-exp ``[heads, rows]``."""
    group = query.shape[1] // key.shape[1]
    q, k, v = (x.double().transpose(0, 1) for x in (query, key, value))
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = q @ k.mT * query.shape[2] ** -0.5
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = scores.masked_fill(~seen.to(scores.device), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1), scores.logsumexp(-1)


CASES = {
    "one tree": ([33], 4, 4, 64, torch.bfloat16, 0.0),
    "ragged": ([1, 17, 64, 2, 5], 8, 2, 64, torch.bfloat16, 0.0),
    "two words": ([65, 130, 64], 2, 2, 64, torch.bfloat16, 0.0),
    "tiles' bounds": ([16, 15, 32, 31], 8, 2, 128, torch.float16, 0.0),
    "grouped": ([49, 9], 7, 1, 96, torch.float32, 0.0),
    "wide head": ([20, 3], 2, 1, 256, torch.bfloat16, 0.0),
    "soft cap": ([40, 12], 4, 2, 64, torch.float32, 5.0),
    "roots alone": ([1, 1, 1], 4, 2, 64, torch.bfloat16, 0.0),
    "large tree": ([256], 2, 1, 64, torch.bfloat16, 0.0),
}
MOST_ERROR = 1e-3
"""Relative, of bfloat16 and float16 inputs too: what the kernel adds is rounded later."""


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("context", [1, 37, 4096])
def test_trees_attend_to_prefix_and_ancestors(case: str, context: int) -> None:
    sizes, heads, kv_heads, head, dtype, soft_cap = CASES[case]
    parents, first, many = tree_batch(sizes, seed=len(case))
    rows = sum(sizes)
    torch.manual_seed(rows)
    query = noise(rows, heads, head, dtype)
    key, value = (noise(rows, kv_heads, head, dtype) for _ in range(2))
    prefix = torch.empty(rows, heads, head, device=DEVICE)
    prefix_lse = torch.empty(rows, heads, device=DEVICE).T  # any strides will do
    wanted = torch.empty(rows, heads, head, dtype=torch.float64, device=DEVICE)
    for start, size in zip(first.tolist(), sizes, strict=True):
        own = slice(start, start + size)
        cached_key, cached_value = (
            noise(context, kv_heads, head, dtype).contiguous() for _ in range(2)
        )
        cached_key[-1], cached_value[-1] = key[start], value[start]  # the root
        seen = torch.zeros(size, size, dtype=torch.bool)
        for node in range(1, size):
            seen[node] = seen[parents[start + node]]
            seen[node, node] = True
        everything = torch.ones(size, context, dtype=torch.bool)
        out, lse = attention(query[own], cached_key, cached_value, everything, soft_cap)
        prefix[own], prefix_lse[:, own] = out.float(), lse.float()
        wanted[own], _ = attention(
            query[own],
            torch.cat([cached_key, key[own]]),
            torch.cat([cached_value, value[own]]),
            torch.cat([everything, seen], 1),
            soft_cap,
        )
    masks = ancestor_masks(parents, first, many)
    trees = DeviceTrees.of(masks, first, many, heads // kv_heads, DEVICE)
    out = torch.full((rows, heads, head), torch.nan, device=DEVICE)
    attend_in_step(query, key, value, prefix, prefix_lse, trees, out, head**-0.5, soft_cap)
    error = (out.double() - wanted).norm() / wanted.norm()
    assert error < (1e-5 if dtype == torch.float32 else MOST_ERROR)


def test_results_have_the_type_that_is_asked_for() -> None:
    parents, first, many = tree_batch([9], seed=0)
    query, key, value, prefix, out = (noise(9, 2, 64, torch.bfloat16) for _ in range(5))
    trees = DeviceTrees.of(ancestor_masks(parents, first, many), first, many, 1, DEVICE)
    lse = torch.zeros(2, 9, device=DEVICE)
    exact = torch.empty(9, 2, 64, device=DEVICE)
    for target in (out, exact):
        attend_in_step(query, key, value, prefix, lse, trees, target, 0.125)
    torch.testing.assert_close(out.float(), exact, rtol=2**-7, atol=1e-6)
    # A prefix of overwhelming weight leaves nothing to the tree, and a root has no other.
    lse += 1e4
    attend_in_step(query, key, value, prefix, lse, trees, exact, 0.125)
    assert torch.equal(exact, prefix.float())
