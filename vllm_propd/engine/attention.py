"""vLLM's CPU attention backend, with trees.

The builder splits a step: requests without drafts keep vLLM's own metadata and kernel,
the rows of trees go to ours. A step without trees is vLLM's alone.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_propd.core.tree_attention import QueryTiles, tree_attention
from vllm_propd.engine.step import StagedKV, TreeStep

logger = init_logger("vllm.propd.attention")

ISA = "vec"
"""The cache layout that our kernel reads."""


@dataclass
class TreeAttentionMetadata(CPUAttentionMetadata):
    """A step with trees.

    Attributes:
        step: the trees.
        tree_rows: ``[rows]`` int64 their rows in the batch.
        tree_blocks: ``[trees, blocks]`` their block tables.
        tiles: the kernel's work items.
        plain: vLLM's metadata of the requests without drafts; None where there are none.
        plain_rows: ``[tokens]`` int64 these requests' rows in the batch.
        group: query heads per key/value head.
    """

    step: TreeStep | None = None
    tree_rows: torch.Tensor | None = None
    tree_blocks: torch.Tensor | None = None
    tiles: QueryTiles | None = None
    plain: CPUAttentionMetadata | None = None
    plain_rows: torch.Tensor | None = None
    group: int = 1

    def after_pruning(self, step: TreeStep, moved: torch.Tensor) -> TreeAttentionMetadata:
        """The metadata of what is left.

        Args:
            step: the trees that are left.
            moved: ``[tokens]`` int64 each batch row's new place.
        """
        return replace(
            self,
            step=step,
            tree_rows=torch.from_numpy(step.rows),
            tiles=QueryTiles(step.sizes, self.group),
            plain_rows=None if self.plain_rows is None else moved[self.plain_rows],
        )


class TreeAttentionMetadataBuilder(CPUAttentionMetadataBuilder):
    """Builds metadata for a step; the runner sets ``step`` before it asks."""

    step: TreeStep | None = None
    isa: str  # set by vLLM

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.isa != ISA:
            # Tile-packed layouts (AMX) cannot be read by address.
            logger.info_once(
                "ProPD: KV cache layout %r instead of %r, which tree attention cannot read",
                ISA,
                self.isa,
            )
            self.isa = ISA
            self._set_isa_to_layers(self.layer_names)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata:
        """VLLM's metadata, or ours where the step has trees."""
        if (step := self.step) is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        common = common_attn_metadata
        plain, plain_rows = None, None
        others = np.setdiff1d(np.arange(common.num_reqs), step.request)
        if len(others):
            common, plain_rows = _select(common, others)
            plain = super().build(common_prefix_len, common, fast_build)
        trees = torch.from_numpy(step.request)
        group = self.num_heads // self.num_kv_heads
        # The fields of vLLM's own class describe the plain part or, without one, nothing.
        base = plain or CPUAttentionMetadata(
            num_actual_tokens=0,
            max_query_len=0,
            query_start_loc=common.query_start_loc[:1],
            max_seq_len=0,
            seq_lens=common.seq_lens[:0],
            block_table=common.block_table_tensor[:0],
            slot_mapping=common.slot_mapping,
            scheduler_metadata=None,
        )
        return TreeAttentionMetadata(
            **{f.name: getattr(base, f.name) for f in fields(CPUAttentionMetadata)},
            step=step,
            tree_rows=torch.from_numpy(step.rows),
            tree_blocks=common_attn_metadata.block_table_tensor[trees].contiguous(),
            tiles=QueryTiles(step.sizes, group),
            plain=plain,
            plain_rows=plain_rows,
            group=group,
        )


def _select(
    common: CommonAttentionMetadata, requests: np.ndarray
) -> tuple[CommonAttentionMetadata, torch.Tensor]:
    """The metadata of some of the requests, and their rows in the batch."""
    starts = common.query_start_loc_cpu.numpy()
    lengths = np.diff(starts)[requests]
    ends = np.cumsum(lengths)
    rows = np.arange(ends[-1]) + np.repeat(starts[requests] - (ends - lengths), lengths)
    query_start_loc = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32))
    index = torch.from_numpy(requests)
    seq_lens = common.seq_lens[index]
    return replace(
        common,
        query_start_loc=query_start_loc,
        query_start_loc_cpu=query_start_loc,
        seq_lens=seq_lens,
        num_reqs=len(requests),
        num_actual_tokens=int(ends[-1]),
        max_query_len=int(lengths.max()),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=common.block_table_tensor[index],
    ), torch.from_numpy(rows)


class TreeAttentionImpl(CPUAttentionBackendImpl):
    """One layer's attention. What it cannot do with trees it refuses at start-up."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        unsupported = {
            "ALiBi": self.alibi_slopes is not None,
            "attention sinks": self.sinks is not None,
            "KV sharing between layers": self.kv_sharing_target_layer_name is not None,
            f"attention of type {self.attn_type!r}": self.attn_type != "decoder",
        }
        if found := [name for name, present in unsupported.items() if present]:
            raise ValueError(
                f"ProPD's tree attention does not support {', '.join(found)}: serve this "
                "model without --speculative-config propd"
            )

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """VLLM's forward for plain requests, tree attention for the others.

        Keys and values of the trees' rows are staged in the step: the cache gets only
        what is accepted. Shapes are those of ``CPUAttentionBackendImpl.forward``.
        """
        if not isinstance(attn_metadata, TreeAttentionMetadata):
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output,
                output_scale, output_block_scale,
            )  # fmt: skip
        meta, step = attn_metadata, attn_metadata.step
        assert step is not None and meta.tree_rows is not None
        assert meta.tree_blocks is not None and meta.tiles is not None
        if meta.plain is not None:
            rows = meta.plain_rows
            part = torch.empty_like(output[: meta.plain.num_actual_tokens])
            super().forward(
                layer, query[rows], key[rows], value[rows], kv_cache, meta.plain, part
            )
            output[rows] = part
        # index_select copies: the staged rows outlive the activations they come from.
        tree_query = query.index_select(0, meta.tree_rows)
        tree_key = key.index_select(0, meta.tree_rows)
        tree_value = value.index_select(0, meta.tree_rows)
        step.staged.append(StagedKV(layer, kv_cache, tree_key, tree_value))
        out = torch.empty_like(tree_query)
        tree_attention(
            tree_query,
            tree_key,
            tree_value,
            out,
            kv_cache,
            meta.tree_blocks,
            step.first,
            step.root_position + 1,
            step.masks,
            step.depth,
            meta.tiles,
            self.scale,
            max(self.sliding_window, 0),
            self.logits_soft_cap,
        )
        output[meta.tree_rows] = out
        return output


class TreeAttentionBackend(CPUAttentionBackend):
    """Replaces ``CPU_ATTN`` in a worker that runs ProPD."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """The layer implementation with trees."""
        return TreeAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        """The metadata builder with trees."""
        return TreeAttentionMetadataBuilder
