"""A step split in two for attention, on every device: trees, and requests without drafts.

The latter keep vLLM's own metadata and kernel. What one device's attention needs beside
stands in ``cpu.py`` and ``cuda.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, ClassVar

import torch
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_propd.engine.pruning.pruned_step import Pruned
from vllm_propd.engine.step.tree_step import StagedKV, TreeStep


class TreeBuilder(ABC):
    """The base of our metadata builders; it stands before vLLM's among their bases.

    Attributes:
        step: the trees of the next step; the runner sets it before it asks for metadata.
        vllms: vLLM's class of metadata, which ours extends.
    """

    step: TreeStep | None = None
    vllms: ClassVar[type]

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        """Builds vLLM's metadata, or ours where the step has trees."""
        common, vllms_build = common_attn_metadata, super().build  # type: ignore[misc]
        if (step := self.step) is None:
            return vllms_build(common_prefix_len, common, fast_build)
        plain = None
        if (others := without_trees(step, common)) is not None:
            # A schedule made ahead does not pay for part of one step.
            plain = vllms_build(0, others, fast_build=True)
        # The fields of vLLM's own class describe the plain part or, without one, nothing.
        base = plain or self.vllms(**self.nothing(common))
        own = {f.name: getattr(base, f.name) for f in fields(self.vllms)}
        own |= {
            "staged": step.staged,
            "plain": plain,
            "plain_rows": step.here["plain_rows"],
        }
        return self.with_trees(step, common, own)

    def nothing(self, common: CommonAttentionMetadata) -> dict[str, Any]:
        """Returns the fields of vLLM's class of metadata where it describes no request."""
        return {
            "num_actual_tokens": 0,
            "max_query_len": 0,
            "query_start_loc": common.query_start_loc[:1],
            "max_seq_len": 0,
            "seq_lens": common.seq_lens[:0],
            "block_table": common.block_table_tensor[:0],
            "slot_mapping": common.slot_mapping,
        }

    @abstractmethod
    def with_trees(
        self, step: TreeStep, common: CommonAttentionMetadata, own: dict[str, Any]
    ) -> TreeMetadata:
        """Returns our metadata of a step with trees.

        Args:
            step: the trees.
            common: vLLM's metadata of the whole batch.
            own: the fields that our metadata has on every device.
        """


class TreeMetadata(ABC):
    """Our attention metadata of a step with trees, on any device.

    Attributes:
        staged: the step's list that gets the keys and values of the trees' rows.
        plain: vLLM's metadata of the requests without drafts; None where there are none.
        plain_rows: ``[tokens]`` int64 these requests' rows in the batch.
    """

    staged: list[StagedKV]
    plain: Any
    plain_rows: torch.Tensor | None

    @abstractmethod
    def after_pruning(self, pruned: Pruned) -> TreeMetadata:
        """Returns the metadata of what pruning leaves."""


OF_REQUESTS = (
    "seq_lens", "block_table_tensor", "causal", "encoder_seq_lens", "encoder_seq_lens_cpu",
    "dcp_local_seq_lens", "dcp_local_seq_lens_cpu_upper_bound", "is_prefilling",
    "seq_lens_cpu_upper_bound", "req_idx", "rswa_prefix_lens", "replayssm_decode_base_cpu",
)  # fmt: skip
"""What vLLM's metadata has a value of for each request, if at all."""


def without_trees(
    step: TreeStep, common: CommonAttentionMetadata
) -> CommonAttentionMetadata | None:
    """Returns the metadata of the requests without drafts; None where there are none."""
    plain = step.plain
    if not len(plain.request):
        return None
    index = step.here["plain_request"]
    ranges = common.mm_req_doc_ranges
    if ranges is not None:
        places = enumerate(plain.request.tolist())
        ranges = {place: ranges[i] for place, i in places if i in ranges}
    return replace(
        common,
        query_start_loc=step.here["plain_starts"],
        query_start_loc_cpu=torch.from_numpy(plain.starts),
        num_reqs=len(plain.request),
        num_actual_tokens=len(plain.rows),
        max_query_len=plain.longest,
        mm_req_doc_ranges=ranges,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
        **{
            name: values[plain.request if _on_host(values) else index]
            for name in OF_REQUESTS
            if not isinstance(values := getattr(common, name), bool | None)
        },
    )


def _on_host(values: Any) -> bool:
    return not isinstance(values, torch.Tensor) or values.device.type == "cpu"


@contextmanager
def attending_to_trees(layers: Sequence[Any]) -> Iterator[None]:
    """Lets layers attend to a step's trees inside: ``forward_trees`` is their forward.

    Most steps have no trees and are vLLM's alone, without a question in each layer.

    Args:
        layers: vLLM's attention layers, with our implementations.
    """
    for layer in layers:
        layer.impl.forward = layer.impl.forward_trees
    try:
        yield
    finally:
        for layer in layers:
            del layer.impl.forward


def forward_split(
    vllms: Callable[..., torch.Tensor],
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    meta: TreeMetadata,
    tree_rows: torch.Tensor,
    layer: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
) -> torch.Tensor:
    """Computes a layer's attention: vLLM's for plain requests, ours for the trees' rows.

    Keys and values of the trees' rows are staged in the step: the cache gets only what is
    accepted.

    Args:
        vllms: the forward of vLLM's implementation.
        attend: the trees' rows of query, key and value to ``[rows, heads, head]``.
        meta: metadata of the step.
        tree_rows: ``[rows]`` int64 the trees' rows in the batch.
        layer, query, key, value, kv_cache, output: as vLLM's forward takes them.
    """
    if meta.plain is not None:
        rows = meta.plain_rows
        part = torch.empty_like(output[: meta.plain.num_actual_tokens])
        vllms(layer, query[rows], key[rows], value[rows], kv_cache, meta.plain, part)
        output[rows] = part
    # index_select copies: the staged rows outlive the activations they come from.
    own_query, own_key, own_value = (
        values.index_select(0, tree_rows) for values in (query, key, value)
    )
    meta.staged.append(StagedKV(layer, kv_cache, own_key, own_value))
    output[tree_rows] = attend(own_query, own_key, own_value)
    return output


def refuse_other_builders(builders: Iterable[Any]) -> None:
    """Refuses attention layers whose metadata another class builds than ours.

    Some layers of vLLM's derive one of their own from a backend's (chunked local attention,
    static sinks): it would rearrange what trees are split by.

    Args:
        builders: the metadata builders of all layers of a worker.

    Raises:
        ValueError: there are such layers; the message names their builders.
    """
    own = __name__.partition(".")[0]
    others = {
        type(builder).__name__
        for builder in builders
        if not isinstance(builder, TreeBuilder)
        or type(builder).__module__.partition(".")[0] != own
    }
    if others:
        names = ", ".join(sorted(others))
        raise ValueError(
            f"ProPD's tree attention does not support layers with {names}: serve this "
            "model without --speculative-config propd"
        )


def refuse_unsupported(impl: Any, **more: bool) -> None:
    """Refuses a layer that tree attention cannot do.

    Args:
        impl: vLLM's implementation, which ours extends.
        more: by name, what else is not possible on this device, and whether the layer has
            it; underscores in names stand for spaces.

    Raises:
        ValueError: the layer has such a thing; the message names it.
    """
    # Not known before: vLLM changes the type as layers are built, if a checkpoint asks.
    if is_quantized_kv_cache(impl.kv_cache_dtype):
        raise ValueError(
            "ProPD's tree attention does not support a KV cache of type "
            f"{impl.kv_cache_dtype}, which checkpoints may ask for where --kv-cache-dtype "
            "is auto: set --kv-cache-dtype bfloat16 and --dtype bfloat16"
        )
    unsupported = {
        "ALiBi": impl.alibi_slopes is not None,
        "attention sinks": impl.sinks is not None,
        "KV sharing between layers": impl.kv_sharing_target_layer_name is not None,
        f"attention of type {impl.attn_type!r}": impl.attn_type != "decoder",
        **{name.replace("_", " "): present for name, present in more.items()},
    }
    if found := [name for name, present in unsupported.items() if present]:
        raise ValueError(
            f"ProPD's tree attention does not support {', '.join(found)}: serve this "
            "model without --speculative-config propd"
        )
