"""Medusa heads in a worker, on vLLM's own linear layers, or in 8 bits.

vLLM chooses a matrix product for the platform and the dtype. But asking heads for a small
batch is nothing but reading their weights, so on CPUs they have 8 bits for that
(``kernels.int8_heads_cpu``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.layers.linear import ReplicatedLinear

from vllm_propd.fast_dtype import fast_dtype
from vllm_propd.heads.checkpoint import HeadsCheckpoint
from vllm_propd.heads.medusa import root_input
from vllm_propd.kernels.int8_heads_cpu import Int8Heads, Int8Linear

FEW_ROWS = 8
"""The most rows of a product in 8 bits, where CPUs multiply fast in 16: these have one
multiplication for two, so from here on they are as fast, though they read twice as much."""

ANY_ROWS = sys.maxsize
"""What stands for no limit, where CPUs multiply fast in 32 bits only."""


def draft_dtype(target: torch.dtype, device: torch.device) -> torch.dtype:
    """Returns the dtype of the heads' weights: the target's, or one that is faster to read.

    What heads say decides no token: they have 8 bits on a CPU, and 16 elsewhere where the
    target has 32.
    """
    if device.type == "cpu":
        return torch.int8
    return torch.bfloat16 if target == torch.float32 else target


def _of_many(dtype: torch.dtype) -> tuple[torch.dtype, int]:
    """Returns the dtype of products of many rows, and the most rows of others, in 8 bits.

    Args:
        dtype: of the heads' weights.
    """
    if dtype != torch.int8:
        return dtype, 0
    many: torch.dtype = getattr(torch, fast_dtype("cpu"))
    return many, ANY_ROWS if many == torch.float32 else FEW_ROWS


class ServedHeads:
    """Computes the same as ``MedusaHeads``; each tensor-parallel rank computes all of it.

    Args:
        checkpoint: the heads.
        dtype, device: the dtype of the heads' weights (``draft_dtype``) and the target's
            device.

    Attributes:
        knows_root: whether heads read the root's embedding.
    """

    def __init__(self, checkpoint: HeadsCheckpoint, dtype: torch.dtype, device: Any):
        self.num_heads, self.knows_root = checkpoint.num_heads, checkpoint.knows_root
        self._dtype, self._few = _of_many(dtype)
        if self._few:
            self._int8 = _int8_heads(checkpoint)
        if self._few < ANY_ROWS:
            self._make_layers(checkpoint, self._dtype, device)

    def _make_layers(
        self, checkpoint: HeadsCheckpoint, dtype: torch.dtype, device: Any
    ) -> None:
        names = ("weight", "bias") if checkpoint.has_bias else ("weight",)

        def linear(layer: int, *heads: int) -> ReplicatedLinear:
            """Makes one linear layer of some heads' blocks, side by side."""
            tensors = [
                torch.cat([checkpoint.block(head, layer, name) for head in heads])
                for name in names
            ]
            return _linear(dtype, device, *tensors)

        heads = range(self.num_heads)
        # What all heads read, the root or the state that they begin with, they read in one
        # product.
        self._roots = self._first = None
        if self.knows_root:
            roots = torch.cat([checkpoint.root(head) for head in heads])
            self._roots = _linear(dtype, device, roots)
        else:
            self._first = linear(0, *heads)
        alone = range(0 if self._first is None else 1, checkpoint.num_layers)
        self._later = [[linear(layer, head) for head in heads] for layer in alone]

    def _of_all(self, layer: ReplicatedLinear, given: torch.Tensor) -> torch.Tensor:
        """Returns ``[heads, tokens, hidden]`` of a layer with all heads side by side."""
        return layer(given).view(len(given), self.num_heads, -1).transpose(0, 1)

    def __call__(
        self, hidden_states: torch.Tensor, roots: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Turns ``[tokens, hidden]`` states into ``[heads, tokens, hidden]``.

        Args:
            hidden_states: ``[tokens, hidden]``.
            roots: ``[tokens, hidden]``, the target's embeddings of the tokens after them;
                needed by heads that know the root.
        """
        if len(hidden_states) <= self._few:
            return self._int8(hidden_states, roots)
        states = hidden_states.to(self._dtype)
        if self._roots is not None:
            assert roots is not None
            read = root_input(roots).to(self._dtype)
            states = states + self._of_all(self._roots, read)
        if self._first is not None:
            states = states + nn.functional.silu(self._of_all(self._first, states))
        for blocks in self._later:
            pairs = zip(blocks, states, strict=True)
            update = torch.stack([block(state) for block, state in pairs])
            states = states + nn.functional.silu(update)
        return states


class OutputRows:
    """Rows of output layers, shared out over the tensor-parallel ranks.

    Args:
        layers: one ``[tokens, hidden]`` weight for all heads, or one for each.
        size: tokens; further rows are padding, and no tokens.
        scale: a factor of the logits.
        dtype, device: the dtype of the heads' weights and the target's device.
    """

    def __init__(
        self,
        layers: list[torch.Tensor],
        size: int,
        scale: float,
        dtype: torch.dtype,
        device: Any,
    ):
        self._scale, self._size, self._num_layers = scale, size, len(layers)
        self._dtype, self._few = _of_many(dtype)
        shares = [_share(rows) for rows in layers]
        if self._few:
            self._int8 = Int8Linear(shares)
        if self._few < ANY_ROWS:
            self._layers = [_linear(self._dtype, device, rows) for rows in shares]

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Turns ``[heads, rows, hidden]`` into ``[heads, rows, tokens]`` logits.

        They are gathered: every tensor-parallel rank gets all of them.
        """
        given = states if self._num_layers > 1 else states.flatten(0, 1)[None]
        if given.shape[1] <= self._few:
            logits = self._int8(given)
        else:
            pairs = zip(self._layers, given.to(self._dtype), strict=True)
            said = [layer(state) for layer, state in pairs]
            logits = torch.stack(said) if len(said) > 1 else said[0]
        logits = logits.view(*states.shape[:2], logits.shape[-1])
        logits = tensor_model_parallel_all_gather(logits)[..., : self._size]
        return logits * self._scale if self._scale != 1.0 else logits


def own_output(
    checkpoint: HeadsCheckpoint, vocabulary: int, dtype: torch.dtype, device: Any
) -> OutputRows:
    """Makes the output layers that came with the heads: one for all, or one for each.

    Args:
        checkpoint: the heads.
        vocabulary: tokens of the target.
        dtype, device: the dtype of the heads' weights and the target's device.
    """
    size = checkpoint.output_size
    if "token_map" not in checkpoint.tensors:
        size = min(size, vocabulary)
    names = (f"lm_heads.{head}.weight" for head in range(checkpoint.num_outputs))
    layers = [checkpoint.tensors[name] for name in names]
    return OutputRows(layers, size, checkpoint.logit_scale, dtype, device)


ROWS_READ = 64
"""Columns of the target's output layer that are read at once."""

OVER_BIAS = 256.0
"""What weights are multiplied by where a bias is added to them: 16 bits hold the sum."""


def part_of_target(
    compute_logits: Callable[[torch.Tensor], torch.Tensor],
    tokens: torch.Tensor,
    hidden: int,
    target: torch.dtype,
    dtype: torch.dtype,
    device: Any,
) -> OutputRows:
    """Makes the rows of the target's output layer for the tokens that heads may draft.

    They are read by what the layer does with vectors of one number: so it does not matter
    where and how the target keeps it.

    Args:
        compute_logits: the target's, of ``[rows, hidden]`` states: a product, and perhaps
            a bias, which is left out.
        tokens: ``[tokens]`` int64 ids.
        hidden: the target's hidden size.
        target: the target's dtype.
        dtype, device: the dtype of the heads' weights and the target's device.
    """
    columns, (kept, _) = [], _of_many(dtype)
    with torch.inference_mode():
        bias = compute_logits(torch.zeros(1, hidden, dtype=target, device=device)).float()
        length = OVER_BIAS if bias.any() else 1.0
        for first in range(0, hidden, ROWS_READ):
            count = min(ROWS_READ, hidden - first)
            unit = torch.zeros(count, hidden, dtype=target, device=device)
            unit[:, first : first + count].fill_diagonal_(length)
            read = (compute_logits(unit).float() - bias)[:, tokens] / length
            columns.append(read.to(kept))
    rows = torch.cat(columns).T.contiguous().clone()
    return OutputRows([rows], len(tokens), 1.0, dtype, device)


def _int8_heads(checkpoint: HeadsCheckpoint) -> Int8Heads:
    """Packs heads for few rows."""
    heads = range(checkpoint.num_heads)

    def of_all(layer: int, name: str) -> torch.Tensor:
        return torch.stack([checkpoint.block(head, layer, name) for head in heads])

    return Int8Heads(
        [of_all(layer, "weight") for layer in range(checkpoint.num_layers)],
        [
            of_all(i, "bias")
            for i in range(checkpoint.num_layers if checkpoint.has_bias else 0)
        ],
        torch.stack([checkpoint.root(head) for head in heads])
        if checkpoint.knows_root
        else None,
    )


def _linear(
    dtype: torch.dtype,
    device: Any,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> ReplicatedLinear:
    rows, hidden = weight.shape
    with torch.device(device):
        layer = ReplicatedLinear(
            hidden,
            rows,
            bias=bias is not None,
            params_dtype=dtype,
            return_bias=False,
            disable_tp=True,
        )
    layer.weight_loader(layer.weight, weight)
    if bias is not None:
        layer.weight_loader(layer.bias, bias)
    layer.quant_method.process_weights_after_loading(layer)
    return layer.requires_grad_(False)


def _share(rows: torch.Tensor) -> torch.Tensor:
    """Returns this rank's rows of an output layer, padded alike on every rank."""
    world = get_tensor_model_parallel_world_size()
    rank = get_tensor_model_parallel_rank()
    share = -(-len(rows) // world)
    rows = rows[rank * share : (rank + 1) * share]
    return nn.functional.pad(rows, (0, 0, 0, share - len(rows)))
