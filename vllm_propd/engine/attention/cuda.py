"""vLLM's FlashAttention backend, with trees.

A tree row attends to its sequence's cached prefix, root included, by FlashAttention, which
also gives the log-sum-exp; our Triton kernel goes on from there with the row's ancestors in
this step (``kernels/tree_attention_triton.py``). Requests without drafts are vLLM's alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from vllm_propd.engine.attention.tree_split import (
    TreeBuilder,
    TreeMetadata,
    forward_split,
    refuse_unsupported,
)
from vllm_propd.engine.pruning.pruned_step import Pruned
from vllm_propd.engine.startup.dummy_step import one_tree
from vllm_propd.engine.step.tree_step import StagedKV, TreeStep
from vllm_propd.kernels.pruning_triton import DeviceTreeBatch
from vllm_propd.kernels.transfer import Arrays, to_device
from vllm_propd.kernels.tree_attention_triton import DeviceTrees, attend_in_step, tiles_of


@dataclass(frozen=True)
class DeviceStep:
    """A step's trees on the device.

    Attributes:
        rows: ``[rows]`` int64 the trees' rows in the batch.
        starts: ``[trees + 1]`` int32 where each tree's rows begin among ``rows``.
        largest: rows of the largest tree.
        prefix: ``[trees]`` int32 cached tokens of each sequence, root included.
        longest: cached tokens of the longest sequence.
        trees: the arrays that the kernel reads.
    """

    rows: torch.Tensor
    starts: torch.Tensor
    largest: int
    prefix: torch.Tensor
    longest: int
    trees: DeviceTrees

    @classmethod
    def of(cls, step: TreeStep, group: int) -> DeviceStep:
        """Wraps a step's trees, which are on the device already (``attention_arrays``).

        Args:
            step: the trees.
            group: query heads of a KV head.
        """
        here = step.here
        first, size, start = here[f"tiles_{group}"]
        return cls(
            rows=here["rows"],
            starts=here["tree_starts"],
            largest=int(step.sizes.max()),
            prefix=here["prefix"],
            longest=int(step.root_position.max()) + 1,
            trees=DeviceTrees(here["masks"], first, size, start, group),
        )

    def after_pruning(self, pruned: Pruned) -> DeviceStep:
        """Returns the trees that are left; the host learns nothing, and waits for nothing.

        Bounds stay what they were, and so does the number of tiles: some do nothing.
        """
        tree_batch, kept = pruned.tree_batch, pruned.kept
        assert tree_batch is not None
        starts = tree_batch.starts(kept)
        trees = self.trees.narrowed(
            tree_batch.narrowed_masks(kept, starts), tree_batch.tree, starts.int()
        )
        rows = pruned.moved[self.rows[kept]]
        return replace(self, rows=rows, starts=starts.int(), trees=trees)


def attention_arrays(step: TreeStep, groups: Iterable[int]) -> Arrays:
    """Returns the arrays that layers need of a step, beside ``TreeStep.arrays``.

    Args:
        step: the trees.
        groups: query heads of a KV head, as the layers have them.
    """
    return {
        "tree_starts": np.concatenate([[0], np.cumsum(step.sizes)]).astype(np.int32),
        "prefix": (step.root_position + 1).astype(np.int32),
        "masks": step.masks.view(np.int64),
        **{f"tiles_{group}": tiles_of(step.first, step.sizes, group) for group in groups},
    }


@dataclass
class TreeFlashAttentionMetadata(FlashAttentionMetadata, TreeMetadata):
    """The attention metadata of a step with trees, on CUDA.

    Attributes:
        here: the trees on the device.
        staged: see ``TreeMetadata``.
        tree_blocks: ``[trees, blocks]`` int32 the trees' block tables.
        plain: vLLM's metadata of the requests without drafts; None where there are none.
        plain_rows: ``[tokens]`` int64 these requests' rows in the batch.
    """

    here: DeviceStep | None = None
    staged: list[StagedKV] = field(default_factory=list)
    tree_blocks: torch.Tensor | None = None
    plain: FlashAttentionMetadata | None = None
    plain_rows: torch.Tensor | None = None

    def after_pruning(self, pruned: Pruned) -> TreeFlashAttentionMetadata:
        """Returns the metadata of what pruning leaves; see ``TreeMetadata``."""
        assert self.here is not None
        rows = self.plain_rows
        assert rows is not None
        return replace(
            self,
            here=self.here.after_pruning(pruned),
            staged=pruned.staged,
            plain_rows=pruned.moved[rows],
        )


class TreeFlashAttentionMetadataBuilder(TreeBuilder, FlashAttentionMetadataBuilder):
    """Builds the attention metadata of a step, on CUDA."""

    vllms = FlashAttentionMetadata
    # Trees differ from step to step: attention stays outside of CUDA graphs.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER
    supports_update_block_table = False

    @property
    def group(self) -> int:
        """How many query heads share a KV head."""
        group: int = self.num_heads_q // self.num_heads_kv
        return group

    def with_trees(
        self, step: TreeStep, common: CommonAttentionMetadata, own: dict[str, Any]
    ) -> TreeFlashAttentionMetadata:
        """Returns our metadata of a step with trees; see ``TreeBuilder``."""
        return TreeFlashAttentionMetadata(
            **own,
            here=DeviceStep.of(step, self.group),
            tree_blocks=common.block_table_tensor[step.here["request"]],
        )


class TreeFlashAttentionImpl(FlashAttentionImpl):
    """Computes one layer's attention; refuses at start-up what it cannot do with trees."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # A window ends where a row stands, and rows of one tree stand at many depths.
        refuse_unsupported(self, sliding_windows=self.sliding_window != (-1, -1))

    def forward_trees(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TreeFlashAttentionMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes a layer's attention in a step with trees by ``forward_split``.

        Shapes are those of vLLM's own forward, in whose place it stands in such a step.
        """
        meta, here = attn_metadata, attn_metadata.here
        assert here is not None

        def attend(
            query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
        ) -> torch.Tensor:
            prefix, prefix_lse = self._attend_to_prefix(query, kv_cache, meta, here)
            out = torch.empty_like(query)
            attend_in_step(
                query, key, value, prefix, prefix_lse, here.trees, out, self.scale,
                self.logits_soft_cap,
            )  # fmt: skip
            return out

        return forward_split(
            super().forward, attend, meta, here.rows, layer, query, key, value,
            kv_cache, output,
        )  # fmt: skip

    def _attend_to_prefix(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        meta: TreeFlashAttentionMetadata,
        here: DeviceStep,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Lets every row attend to all of its sequence's cached tokens.

        Returns:
            ``[rows, heads, head]`` attention, and ``[heads, rows]`` float32 its
            log-sum-exp.
        """
        # (blocks, kv_heads, block, 2 * head) -> twice (blocks, block, kv_heads, head)
        key_cache, value_cache = (
            canonicalize_singleton_dim_strides(cache)
            for cache in kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        )
        found: tuple[torch.Tensor, torch.Tensor] = fa_utils.flash_attn_varlen_func(
            q=query,
            k=key_cache,
            v=value_cache,
            cu_seqlens_q=here.starts,
            max_seqlen_q=here.largest,
            seqused_k=here.prefix,
            max_seqlen_k=here.longest,
            softmax_scale=self.scale,
            causal=False,
            block_table=meta.tree_blocks,
            softcap=self.logits_soft_cap,
            return_softmax_lse=True,
            fa_version=self.vllm_flash_attn_version,
        )[:2]
        return found


class TreeFlashAttentionBackend(FlashAttentionBackend):
    """Replaces ``FLASH_ATTN`` in a worker that runs ProPD."""

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        """Returns the layer implementation with trees."""
        return TreeFlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        """Returns the metadata builder with trees."""
        return TreeFlashAttentionMetadataBuilder


def send_alone(
    step: TreeStep, group: int, device: torch.device
) -> tuple[TreeStep, DeviceStep, DeviceTreeBatch]:
    """Sends a step to the device without a runner.

    Args:
        step: the trees.
        group: query heads of a KV head.
        device: device of the layers.

    Returns:
        The step that knows its arrays there, the layers' view of it, and pruning's.
    """
    tree_batch = DeviceTreeBatch.arrays(step.masks, step.first, step.sizes)
    arrays = {**step.arrays(), **attention_arrays(step, [group]), **tree_batch}
    step = step.on_device(to_device(arrays, device))
    return step, DeviceStep.of(step, group), DeviceTreeBatch.at(step.here)


def warm_up(
    impls: Iterable[TreeFlashAttentionImpl], dtype: torch.dtype, device: torch.device
) -> None:
    """Compiles all kernels that trees need, pruned ones too, for each kind of layer.

    Args:
        impls: implementations of the model's layers.
        dtype: dtype of their queries.
        device: device of the layers.
    """
    kinds = {
        (impl.num_heads, impl.num_kv_heads, impl.head_size, impl.logits_soft_cap)
        for impl in impls
    }
    for heads, kv_heads, head_size, soft_cap in kinds:
        step, whole, tree_batch = send_alone(one_tree(3), heads // kv_heads, device)
        pruned = Pruned(step, torch.arange(2, device=device), tree_batch)
        for trees, rows in (whole.trees, 3), (whole.after_pruning(pruned).trees, 2):
            query = torch.zeros(rows, heads, head_size, dtype=dtype, device=device)
            key = torch.zeros(rows, kv_heads, head_size, dtype=dtype, device=device)
            lse, out = torch.zeros(heads, rows, device=device), torch.empty_like(query)
            attend_in_step(query, key, key, query, lse, trees, out, 1.0, soft_cap)
