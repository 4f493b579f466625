"""What heads learn: the target's own predictions (distillation)."""

from __future__ import annotations

import torch
from torch.nn import functional

HEAD_DECAY = 0.8
"""Weight of head k's loss: ``HEAD_DECAY ** k`` (Medusa section 2.2.1)."""


def distillation(logits: torch.Tensor, target_probs: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of a head against the target's distribution.

    Args:
        logits, target_probs: ``[..., vocabulary]``, aligned on the predicted token.
    """
    return functional.cross_entropy(
        logits.float().flatten(0, -2), target_probs.flatten(0, -2)
    )


def medusa_loss(logits: torch.Tensor, target_probs: torch.Tensor) -> torch.Tensor:
    """The weighted sum over heads.

    Args:
        logits: ``[heads, batch, length, vocabulary]``; head k (from 1) at position t
            predicts what the target predicts at position t + k.
        target_probs: ``[batch, length, vocabulary]`` float32.
    """
    total = logits.new_zeros(())
    for k in range(1, len(logits) + 1):
        loss = distillation(logits[k - 1][:, :-k], target_probs[:, k:])
        total = total + HEAD_DECAY**k * loss
    return total
