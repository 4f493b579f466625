"""The CUDA backend's layer, whole and pruned steps, against float64.

FlashAttention runs on GPUs only: elsewhere a reference of the same arguments stands in its
place, so that all of ours is tested: what goes where, the kernel, and what is staged.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import cores  # noqa: F401 - before numba counts them
import numpy as np
import pytest
import torch
from random_trees import step_of_trees

from vllm_propd.engine.pruning.pruned_step import Pruned
from vllm_propd.engine.step.tree_step import TreeStep

pytest.importorskip("vllm.v1.attention.backends.flash_attn")

from vllm.v1.attention.backends import fa_utils

from vllm_propd.engine.attention.cuda import (
    TreeFlashAttentionImpl,
    TreeFlashAttentionMetadata,
    send_alone,
)
from vllm_propd.engine.attention.tree_split import attending_to_trees

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
HEADS, KV_HEADS, HEAD, BLOCK = 4, 2, 64, 16
CONTEXT, NODES = [5, 37, 16], [6, 20, 1]
MOST_ERROR = 1e-3


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    return_softmax_lse: bool,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``flash_attn_varlen_func`` as it is called here."""
    assert not causal and return_softmax_lse
    out, lse = torch.empty_like(q), torch.empty(q.shape[1], len(q))
    for i, length in enumerate(seqused_k.tolist()):
        rows = slice(int(cu_seqlens_q[i]), int(cu_seqlens_q[i + 1]))
        keys, values = (cache[block_table[i]].flatten(0, 1)[:length] for cache in (k, v))
        found, lse[:, rows] = attend(q[rows], keys, values, softmax_scale)
        out[rows] = found.to(out.dtype)
    return out, lse


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[rows, heads, head]`` float64, all rows to all keys, and ``[heads, rows]``."""
    group = query.shape[1] // key.shape[1]
    q, k, v = (x.double().transpose(0, 1) for x in (query, key, value))
    scores = q @ k.repeat_interleave(group, 0).mT * scale
    found = scores.softmax(-1) @ v.repeat_interleave(group, 0)
    return found.transpose(0, 1), scores.logsumexp(-1)


@pytest.fixture
def step() -> TreeStep:
    """Trees behind contexts that end inside a block, at its end, and after two."""
    return step_of_trees(np.random.default_rng(3), NODES, CONTEXT)


def wanted(
    step: TreeStep, row: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    cached: list[tuple[torch.Tensor, torch.Tensor]], scale: float,
) -> torch.Tensor:  # fmt: skip
    """A row's attention to its prefix, its ancestors and itself."""
    tree, path = int(step.tree[row]), []
    node = row
    while step.depth[node]:
        path.append(node)
        node = int(step.parent_row[node])
    batch_rows = step.rows[np.array(path, np.int64)]
    keys, values = (
        torch.cat([prefix, own[batch_rows]])
        for prefix, own in zip(cached[tree], (key, value), strict=True)
    )
    return attend(query[step.rows[row]][None], keys, values, scale)[0][0]


def test_rows_attend_to_prefix_and_ancestors_before_and_after_pruning(
    step: TreeStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not CUDA:
        monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", reference, raising=False)
    torch.manual_seed(0)
    scale = HEAD**-0.5
    impl = TreeFlashAttentionImpl(HEADS, HEAD, scale, KV_HEADS, None, None, "auto")
    dtype = torch.bfloat16
    tokens, blocks = len(step.rows), 4
    cache = torch.randn(3 * blocks, KV_HEADS, BLOCK, 2 * HEAD).to(DEVICE, dtype)
    tables = torch.randperm(3 * blocks).view(3, blocks).int().to(DEVICE)
    query = torch.randn(tokens, HEADS, HEAD).to(DEVICE, dtype)
    key, value = (torch.randn(tokens, KV_HEADS, HEAD).to(DEVICE, dtype) for _ in range(2))
    cached = []
    for table, context in zip(tables, CONTEXT, strict=True):
        whole = cache[table].transpose(1, 2).flatten(0, 1)[: context + 1]
        keys, values = whole.split(HEAD, -1)
        cached.append((keys, values))
    empty = torch.empty(0, dtype=torch.int32, device=DEVICE)
    step, here, tree_batch = send_alone(step, HEADS // KV_HEADS, DEVICE)
    meta = TreeFlashAttentionMetadata(
        0, 0, empty, 0, empty, tables, empty,
        here=here, staged=step.staged, tree_blocks=tables,
        plain_rows=step.here["plain_rows"],
    )  # fmt: skip
    kept = np.ones(tokens, np.bool_)
    kept[[tokens - 1, tokens - 3]] = False  # what has no child
    going_on = np.flatnonzero(kept)
    pruned = Pruned(step, torch.from_numpy(going_on).to(DEVICE), tree_batch)
    narrowed, left = meta.after_pruning(pruned), pruned.left
    assert pruned.rows.tolist() == going_on.tolist()
    assert left.rows.tolist() == list(range(len(going_on)))
    layer = SimpleNamespace(layer_name="0", impl=impl)
    for one, now, rows in (
        (meta, step, np.arange(tokens)),
        (narrowed, left, going_on),
    ):
        q, k, v = query[rows], key[rows], value[rows]
        out = torch.zeros_like(q)
        with attending_to_trees([layer]):
            layer.impl.forward(layer, q, k, v, cache, one, out)
        expected = torch.stack(
            [wanted(now, row, q, k, v, cached, scale) for row in range(len(rows))]
        )
        error = (out.double() - expected).norm() / expected.norm()
        assert error < 5 * MOST_ERROR  # the result is rounded to bfloat16
        (staged,) = now.staged
        assert staged.layer is layer and torch.equal(staged.key, k)
        assert torch.equal(staged.value, v)
