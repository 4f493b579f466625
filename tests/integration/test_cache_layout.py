"""Our kernel reads the cache where vLLM's own cache update writes it."""

import numpy as np
import pytest
import torch
from vllm import _custom_ops as ops

from vllm_propd.core.tree import ancestor_masks
from vllm_propd.engine.attention.cpu import ISA
from vllm_propd.kernels.tree_attention_cpu import QueryTiles, tree_attention

BLOCK, CONTEXT, KV_HEADS, GROUP = 32, 77, 2, 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_size", [32, 64, 96, 128, 256])
def test_roots_attend_to_what_vllm_wrote(head_size: int, dtype: torch.dtype) -> None:
    """A tree of one root: plain attention over the paged prefix."""
    torch.manual_seed(head_size)
    blocks = torch.tensor([3, 1, 2])
    cache = torch.full((5, KV_HEADS, BLOCK, 2 * head_size), torch.nan).to(dtype)
    key, value = torch.randn(2, CONTEXT, KV_HEADS, head_size).to(dtype)
    positions = torch.arange(CONTEXT)
    key_cache, value_cache = cache.view(5, KV_HEADS, 2 * BLOCK, head_size).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(
        key, value, key_cache, value_cache,
        blocks[positions // BLOCK] * BLOCK + positions % BLOCK, ISA,
        k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto",
    )  # fmt: skip
    query = torch.randn(1, KV_HEADS * GROUP, head_size).to(dtype)
    out = torch.empty_like(query)
    zero, one = np.zeros(1, np.int64), np.ones(1, np.int64)
    tree_attention(
        query, key[:1].contiguous(), value[:1].contiguous(), out, cache,
        blocks[None].int(), zero, CONTEXT * one, ancestor_masks(zero, zero, one), zero,
        QueryTiles(one, GROUP, KV_HEADS), head_size**-0.5,
    )  # fmt: skip
    keys, values = (x.double().repeat_interleave(GROUP, 1) for x in (key, value))
    scores = torch.einsum("hd,khd->hk", query[0].double(), keys) * head_size**-0.5
    expected = torch.einsum("hk,khd->hd", scores.softmax(-1), values)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out[0].double(), expected, atol=tolerance, rtol=tolerance)
