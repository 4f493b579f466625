"""A step split in two: what is said of each request is said of the right one."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MODEL
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_propd.engine.attention.cpu import TreeAttentionBackend, TreeAttentionImpl
from vllm_propd.engine.attention.tree_split import OF_REQUESTS, without_trees
from vllm_propd.engine.step.tree_step import PlainRequests

OF_THE_STEP = {
    "query_start_loc", "query_start_loc_cpu", "num_reqs", "num_actual_tokens",
    "max_query_len", "max_seq_len", "slot_mapping", "positions", "logits_indices_padded",
    "num_logits_indices", "max_logits_per_req", "mm_req_doc_ranges",
    "_num_computed_tokens_cache", "_token_to_req_indices_cache",
}  # fmt: skip
"""What is looked at one by one, or says something of all requests together."""


def split(**more: Any) -> CommonAttentionMetadata:
    """Three requests of 1, 4 and 2 tokens; the one in the middle has a tree."""
    starts = torch.tensor([0, 1, 5, 7], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor([10, 20, 30]),
        num_reqs=3,
        num_actual_tokens=7,
        max_query_len=4,
        max_seq_len=30,
        block_table_tensor=torch.arange(6).view(3, 2),
        slot_mapping=torch.arange(7),
        **more,
    )
    plain = PlainRequests(
        np.array([0, 2]), np.array([0, 5, 6]), np.array([0, 1, 3], np.int32), 2
    )
    here = {
        "plain_request": torch.from_numpy(plain.request),
        "plain_starts": torch.from_numpy(plain.starts),
    }
    step: Any = SimpleNamespace(plain=plain, here=here)
    found = without_trees(step, common)
    assert found is not None
    return found


def test_every_field_of_vllms_metadata_is_known() -> None:
    known = {field.name for field in fields(CommonAttentionMetadata)}
    assert known == OF_THE_STEP | set(OF_REQUESTS)


def test_the_plain_requests_keep_what_is_theirs() -> None:
    found = split()
    assert found.seq_lens.tolist() == [10, 30]
    assert found.block_table_tensor.tolist() == [[0, 1], [4, 5]]
    assert found.query_start_loc.tolist() == [0, 1, 3]
    assert (found.num_reqs, found.num_actual_tokens, found.max_query_len) == (2, 3, 2)
    assert found.causal is True


@pytest.mark.parametrize(
    "name", sorted({*OF_REQUESTS} - {"seq_lens", "block_table_tensor"})
)
@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_whatever_is_said_of_requests_is_narrowed(name: str, kind: Any) -> None:
    found = getattr(split(**{name: kind([3, 4, 5])}), name)
    assert found.tolist() == [3, 5]


def test_ranges_of_images_go_with_their_requests() -> None:
    found = split(mm_req_doc_ranges={1: [(2, 3)], 2: [(4, 9)]})
    assert found.mm_req_doc_ranges == {1: [(4, 9)]}


def test_what_was_computed_of_the_whole_batch_is_not_kept() -> None:
    found = split(_num_computed_tokens_cache=torch.tensor([9, 16, 28]))
    assert found.compute_num_computed_tokens().tolist() == [9, 28]


@pytest.mark.parametrize("kv_cache_dtype", ["fp8", "fp8_e5m2", "int8_per_token_head"])
def test_layers_whose_cache_is_of_another_type_are_refused(kv_cache_dtype: str) -> None:
    """Our kernels read it by address, as of the model's type."""
    shape: dict[str, Any] = {
        "num_heads": 2,
        "head_size": 32,
        "scale": 1.0,
        "num_kv_heads": 1,
        "alibi_slopes": None,
        "sliding_window": None,
    }
    with set_current_vllm_config(EngineArgs(model=str(MODEL)).create_engine_config()):
        for works in ("auto", "bfloat16"):
            TreeAttentionImpl(**shape, kv_cache_dtype=works)
        with pytest.raises(ValueError, match=rf"of type {kv_cache_dtype}, .*set --kv-cac"):
            TreeAttentionImpl(**shape, kv_cache_dtype=kv_cache_dtype)


def test_a_checkpoint_chooses_the_caches_type_when_layers_are_built() -> None:
    """After the engine's config has been checked: `auto` says nothing of it there."""
    config = EngineArgs(model=str(MODEL), dtype="bfloat16").create_engine_config()
    scheme: Any = SimpleNamespace(kv_cache_scheme={"num_bits": 8, "type": "float"})
    assert config.cache_config.cache_dtype == "auto"
    with set_current_vllm_config(config), pytest.raises(ValueError, match="of type fp8"):
        Attention(
            2, 32, 1.0, 1, cache_config=config.cache_config, quant_config=scheme,
            prefix="layers.0", attn_backend=TreeAttentionBackend,
        )  # fmt: skip
    assert config.cache_config.cache_dtype == "fp8"
