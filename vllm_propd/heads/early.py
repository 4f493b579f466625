"""Early heads: what a shallow layer already knows about the next token.

After layer n of the target, ``RMSNorm -> x + SiLU(W x + b) -> the target's output layer``
predicts the next token (paper section 3.2). Early pruning ranks a node's children by it.
"""

from __future__ import annotations

import torch
from torch import nn


class EarlyHead(nn.Module):
    """One early head up to the output layer.

    Args:
        hidden_size: of the target.
        eps: of the norm; the target's.
    """

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=eps)
        self.linear = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[..., hidden]`` residual stream after the layer, to the same shape."""
        states = self.norm(hidden_states)
        return states + nn.functional.silu(self.linear(states))
