"""What heads learn: the target's own predictions (distillation)."""

from __future__ import annotations

import torch
from torch.nn import functional

HEAD_DECAY = 0.8
"""The weight of head k's loss is ``HEAD_DECAY ** k`` (Medusa section 2.2.1)."""


def labels_of(logits: torch.Tensor, kind: str) -> torch.Tensor:
    """Returns what to learn from a target's logits ``[..., vocabulary]``.

    ``kl``: its probabilities, float32, ``[..., vocabulary]`` (cross-entropy with them is
    the KL divergence up to a constant). ``hard``: its best tokens, int64, ``[...]``.
    """
    return logits.float().softmax(-1) if kind == "kl" else logits.argmax(-1)


def distillation(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns a head's mean cross-entropy against labels, a scalar.

    Args:
        logits: ``[batch, length, vocabulary]``.
        labels: see ``labels_of``.
    """
    return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(0, 1))


def medusa_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the weighted sum of the heads' losses, a float32 scalar.

    Args:
        logits: ``[heads, batch, length, vocabulary]``; head k (from 1) at position t
            predicts what the target predicts at position t + k.
        labels: the target's labels at ``[batch, length]``, see ``labels_of``.
    """
    total = logits.new_zeros((), dtype=torch.float32)
    for k in range(1, len(logits) + 1):
        loss = distillation(logits[k - 1][:, :-k], labels[:, k:])
        total = total + HEAD_DECAY**k * loss
    return total
