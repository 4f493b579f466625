"""vLLM's CPU attention backend, with trees.

The builder splits a step: requests without drafts keep vLLM's own metadata and kernel,
the rows of trees go to ours. A step without trees is vLLM's alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_propd.engine.attention.tree_split import (
    TreeBuilder,
    TreeMetadata,
    forward_split,
    refuse_unsupported,
)
from vllm_propd.engine.pruning.pruned_step import Pruned
from vllm_propd.engine.step.tree_step import StagedKV, TreeStep
from vllm_propd.kernels.tree_attention_cpu import QueryTiles, tree_attention

logger = init_logger("vllm.propd.attention")

ISA = "vec"
"""The name of the only cache layout that our kernel reads."""


@dataclass
class TreeAttentionMetadata(CPUAttentionMetadata, TreeMetadata):
    """The attention metadata of a step with trees, on the CPU.

    Attributes:
        step: the trees.
        staged: see ``TreeMetadata``.
        tree_rows: ``[rows]`` int64 the trees' rows in the batch.
        tree_blocks: ``[trees, blocks]`` int32 the trees' block tables.
        tiles: the kernel's work items.
        plain: vLLM's metadata of the requests without drafts; None where there are none.
        plain_rows: ``[tokens]`` int64 these requests' rows in the batch.
        group: query heads per key/value head.
        kv_heads: key/value heads.
    """

    step: TreeStep | None = None
    staged: list[StagedKV] = field(default_factory=list)
    tree_rows: torch.Tensor | None = None
    tree_blocks: torch.Tensor | None = None
    tiles: QueryTiles | None = None
    plain: CPUAttentionMetadata | None = None
    plain_rows: torch.Tensor | None = None
    group: int = 1
    kv_heads: int = 1

    def after_pruning(self, pruned: Pruned) -> TreeAttentionMetadata:
        """Returns the metadata of what pruning leaves; see ``TreeMetadata``."""
        left, rows = pruned.left, self.plain_rows
        assert rows is not None
        return replace(
            self,
            step=left,
            staged=pruned.staged,
            tree_rows=torch.from_numpy(left.rows),
            tiles=QueryTiles(left.sizes, self.group, self.kv_heads),
            plain_rows=pruned.moved[rows],
        )


class TreeAttentionMetadataBuilder(TreeBuilder, CPUAttentionMetadataBuilder):
    """Builds the attention metadata of a step, on the CPU."""

    vllms = CPUAttentionMetadata
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

    def nothing(self, common: CommonAttentionMetadata) -> dict[str, Any]:
        """Returns the fields of metadata for no request; see ``TreeBuilder``."""
        return {**super().nothing(common), "scheduler_metadata": None}

    def with_trees(
        self, step: TreeStep, common: CommonAttentionMetadata, own: dict[str, Any]
    ) -> TreeAttentionMetadata:
        """Returns our metadata of a step with trees; see ``TreeBuilder``."""
        group = self.num_heads // self.num_kv_heads
        return TreeAttentionMetadata(
            **own,
            step=step,
            tree_rows=step.here["rows"],
            tree_blocks=common.block_table_tensor[step.here["request"]].contiguous(),
            tiles=QueryTiles(step.sizes, group, self.num_kv_heads),
            group=group,
            kv_heads=self.num_kv_heads,
        )


class TreeAttentionImpl(CPUAttentionBackendImpl):
    """Computes one layer's attention; refuses at start-up what it cannot do with trees."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        refuse_unsupported(self)

    def forward_trees(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TreeAttentionMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes a layer's attention in a step with trees by ``forward_split``.

        Shapes are those of vLLM's own forward, in whose place it stands in such a step.
        """
        meta, step = attn_metadata, attn_metadata.step
        assert step is not None and meta.tree_rows is not None
        assert meta.tree_blocks is not None and meta.tiles is not None
        blocks, tiles = meta.tree_blocks, meta.tiles

        def attend(
            query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
        ) -> torch.Tensor:
            out = torch.empty_like(query)
            tree_attention(
                query, key, value, out, kv_cache, blocks, step.first,
                step.root_position + 1, step.masks, step.depth, tiles, self.scale,
                max(self.sliding_window, 0), self.logits_soft_cap,
            )  # fmt: skip
            return out

        return forward_split(
            super().forward, attend, meta, meta.tree_rows, layer, query, key, value,
            kv_cache, output,
        )  # fmt: skip


class TreeAttentionBackend(CPUAttentionBackend):
    """Replaces ``CPU_ATTN`` in a worker that runs ProPD."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """Returns the layer implementation with trees."""
        return TreeAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        """Returns the metadata builder with trees."""
        return TreeAttentionMetadataBuilder
