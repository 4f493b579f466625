"""Medusa heads (arXiv 2401.10774): one hidden state in, K future tokens out.

Head k turns the last hidden state ``h_t`` into the hidden state that predicts the token
at ``t + 1 + k`` by residual blocks ``x + SiLU(W x + b)``. What follows is an output layer:
the target's own, shared by all heads, or one that comes with the heads.

The token at ``t + 1``, the root of what is drafted, is known when heads are asked; Medusa's
do not look at it. Ours do: head k begins with ``h_t + R_k e``, e the target's embedding of
the root (EAGLE, arXiv 2401.15077, section 3, found how much a draft gains by that token).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from vllm_propd.heads.checkpoint import HeadsCheckpoint


def root_input(embeddings: torch.Tensor) -> torch.Tensor:
    """Returns embeddings ``[..., hidden]`` as heads read them, at a scale of their own."""
    return functional.rms_norm(embeddings.float(), embeddings.shape[-1:], eps=1e-12)


class MedusaHeads(nn.Module):
    """The residual blocks of all heads, computed together.

    Args:
        num_heads: heads K.
        num_layers: residual blocks of each head.
        hidden_size: hidden size of the target.
        bias: whether the blocks have biases.
        knows_root: whether heads read the root's embedding.
    """

    def __init__(
        self,
        num_heads: int,
        num_layers: int,
        hidden_size: int,
        bias: bool,
        knows_root: bool = False,
    ):
        super().__init__()
        self.num_heads = num_heads
        # Zero weights make every head start as the target's own last state.
        self.weights = nn.ParameterList(
            nn.Parameter(torch.zeros(num_heads, hidden_size, hidden_size))
            for _ in range(num_layers)
        )
        self.biases = nn.ParameterList(
            nn.Parameter(torch.zeros(num_heads, 1, hidden_size))
            for _ in range(num_layers if bias else 0)
        )
        self.roots: nn.Parameter | None = None
        if knows_root:
            self.roots = nn.Parameter(torch.zeros(num_heads, hidden_size, hidden_size))

    @classmethod
    def from_checkpoint(cls, checkpoint: HeadsCheckpoint) -> MedusaHeads:
        """Makes heads with a checkpoint's weights."""
        heads = cls(
            checkpoint.num_heads,
            checkpoint.num_layers,
            checkpoint.hidden_size,
            checkpoint.has_bias,
            checkpoint.knows_root,
        )
        if heads.roots is not None:
            heads.roots.data = torch.stack(
                [checkpoint.root(k) for k in range(heads.num_heads)]
            )
        for layer, weight in enumerate(heads.weights):
            weight.data = torch.stack(
                [checkpoint.block(k, layer, "weight") for k in range(heads.num_heads)]
            )
        for layer, bias in enumerate(heads.biases):
            bias.data = torch.stack(
                [checkpoint.block(k, layer, "bias") for k in range(heads.num_heads)]
            ).unsqueeze(1)
        return heads

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the weights by their names in a checkpoint."""
        named = {}
        for layer, weight in enumerate(self.weights):
            for k in range(self.num_heads):
                named[f"blocks.{k}.layers.{layer}.weight"] = weight.data[k]
        for layer, bias in enumerate(self.biases):
            for k in range(self.num_heads):
                named[f"blocks.{k}.layers.{layer}.bias"] = bias.data[k, 0]
        if self.roots is not None:
            named |= {f"roots.{k}.weight": rows for k, rows in enumerate(self.roots.data)}
        return named

    def forward(
        self, hidden_states: torch.Tensor, roots: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Turns ``[tokens, hidden]`` into ``[heads, tokens, hidden]``, all at once.

        Args:
            hidden_states: ``[tokens, hidden]``.
            roots: ``[tokens, hidden]``, what ``root_input`` makes of the embeddings of the
                tokens after them; needed by heads that know the root.
        """
        states = hidden_states.expand(self.num_heads, *hidden_states.shape)
        if self.roots is not None:
            assert roots is not None
            states = states + torch.matmul(roots, self.roots.mT)
        for layer, weight in enumerate(self.weights):
            if len(self.biases):
                update = torch.baddbmm(self.biases[layer], states, weight.mT)
            else:
                update = torch.bmm(states, weight.mT)
            states = states + nn.functional.silu(update)
        return states
