"""Early heads: what a shallow layer already knows about the next token.

After layer n of the target, ``RMSNorm -> x + SiLU(W x + b) -> an output layer`` predicts
the next token (paper section 3.2). Early pruning ranks a node's children by it. The output
layer is the target's, or with a large vocabulary a product of two thin ones.
"""

from __future__ import annotations

import torch
from torch import nn


class EarlyHead(nn.Module):
    """One early head.

    Args:
        hidden_size: of the target.
        eps: of the norm; the target's.
        rank: of the head's own output layer ``up(down(x))``; 0: the target's serves.
        vocab_size: rows of its own output layer.
    """

    def __init__(self, hidden_size: int, eps: float, rank: int = 0, vocab_size: int = 0):
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=eps)
        self.linear = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.down = nn.Linear(hidden_size, rank, bias=False) if rank else None
        self.up = nn.Linear(rank, vocab_size, bias=False) if rank else None

    @torch.no_grad()
    def factorise(self, output: torch.Tensor) -> None:
        """Starts the own output layer as nearly the best one of its rank.

        Args:
            output: the target's output layer, ``[vocabulary, hidden]``.
        """
        assert self.down is not None and self.up is not None
        rank = self.down.out_features
        sampled = min(rank + 16, *output.shape)
        left, scale, right = torch.svd_lowrank(output.float(), q=sampled, niter=4)
        root = scale[:rank].sqrt()
        self.up.weight.copy_(left[:, :rank] * root)
        self.down.weight.copy_((right[:, :rank] * root).T)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[..., hidden]`` residual stream after the layer, to the same shape."""
        states = self.norm(hidden_states)
        return states + nn.functional.silu(self.linear(states))

    def logits(self, hidden_states: torch.Tensor, output: nn.Module) -> torch.Tensor:
        """``[..., hidden]`` to ``[..., vocabulary]``; ``output`` is the target's layer."""
        states = self(hidden_states)
        if self.down is None or self.up is None:
            return output(states)
        return self.up(self.down(states))
