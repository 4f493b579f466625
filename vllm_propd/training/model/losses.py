"""What heads learn: the target's own predictions (distillation), among fewer tokens.

The whole vocabulary makes training slow and large: a head's logits of 8 x 256 positions and
49,152 tokens are 400 MB. Its most probable tokens matter; the others matter as a sum. So
the loss of each part of a batch (a worker's, or one of ``--accumulate``) is over columns:
tokens that the target had among its best anywhere in the part, and random ones of the rest,
each of which stands for as many as were left out (importance sampling: the sum of
exponentials is unbiased).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

HEAD_DECAY = 0.8
"""The weight of head k's loss is ``HEAD_DECAY ** k`` (Medusa section 2.2.1)."""

FORGOTTEN = 1e-3
"""Of the target's best tokens, those less probable than this are not learnt."""


@dataclass
class Labels:
    """What to learn at ``[rows, length]`` positions, among some columns of logits.

    Attributes:
        columns: ``[columns]`` int64, the tokens whose logits are computed.
        log_stands_for: ``[columns]`` float32, log of how many tokens each stands for.
        places: ``[rows, length, best]`` int64, places of the target's best tokens in
            ``columns``; None: ``shares`` has all columns.
        shares: ``[rows, length, best]`` float32, their probabilities; 0 where a token is
            not among ``columns``, so that a position that heads cannot draft counts less.
    """

    columns: torch.Tensor
    log_stands_for: torch.Tensor
    places: torch.Tensor | None
    shares: torch.Tensor

    def said(self, logits: torch.Tensor, where: torch.Tensor, later: int) -> torch.Tensor:
        """Returns the mean of logits ``[positions, columns]`` by the target's shares.

        Args:
            logits: a head's, at the positions ``where``.
            where: ``[rows, length - later]`` bool, the positions.
            later: how many tokens later the labels are.
        """
        shares = self.shares[:, later:][where]
        if self.places is not None:
            logits = logits.gather(-1, self.places[:, later:][where])
        return (shares * logits).sum(-1)


def labels_of(
    best: torch.Tensor,
    log_probs: torch.Tensor,
    learn: torch.Tensor,
    tokens: torch.Tensor,
    sampled: int,
    kind: str,
    generator: torch.Generator,
) -> Labels:
    """Draws a step's columns, and finds the target's best tokens among them.

    Args:
        best, log_probs: as in ``States``.
        learn: ``[rows, length]`` bool, where to learn.
        tokens: ``[vocabulary]`` int64 in ascending order, tokens that heads may draft.
        sampled: how many random tokens there are beside the best, 1 or more; all of
            ``tokens`` where these are fewer.
        kind: ``kl``, the target's distribution, or ``hard``, its most probable token.
        generator: of the random tokens.
    """
    probs = log_probs.float().exp()
    if kind == "hard":
        best, probs = best[..., :1], torch.ones_like(probs[..., :1])
    best = best.long()
    wanted = best[learn][probs[learn] >= FORGOTTEN].unique()
    wanted = wanted[torch.isin(wanted, tokens, assume_unique=True)]
    rest = len(tokens) - len(wanted)
    if sampled >= rest:
        columns, log_stands_for = tokens, torch.zeros(len(tokens), device=best.device)
    else:
        others = tokens[~torch.isin(tokens, wanted, assume_unique=True)]
        drawn = torch.randperm(rest, generator=generator)[:sampled].to(best.device)
        columns, order = torch.cat([wanted, others[drawn]]).sort()
        stands_for = torch.zeros(len(columns), device=best.device)
        stands_for[len(wanted) :] = math.log(rest / sampled)
        log_stands_for = stands_for[order]
    places = torch.searchsorted(columns, best).clamp(max=len(columns) - 1)
    shares = probs / probs.sum(-1, keepdim=True)
    shares = shares * (columns[places] == best) * (probs >= FORGOTTEN)
    return Labels(columns, log_stands_for, places, shares)


def exact_labels(logits: torch.Tensor, tokens: torch.Tensor, kind: str) -> Labels:
    """Returns labels over all tokens that heads may draft.

    Args:
        logits: the target's, ``[rows, length, vocabulary]``.
        tokens, kind: as ``labels_of`` takes them.
    """
    if kind == "kl":
        shares = logits.float().softmax(-1)[..., tokens]
    else:
        shares = (logits.argmax(-1, keepdim=True) == tokens).float()
    return Labels(tokens, torch.zeros(len(tokens), device=tokens.device), None, shares)


def learnt(learn: torch.Tensor, later: int = 0) -> torch.Tensor:
    """Returns ``[rows, length - later]`` bool where a head learns what is said ``later``.

    Where one text ends and the next begins, a head is not to guess what comes.

    Args:
        learn: ``[rows, length]`` bool, where to learn.
        later: see ``distillation``.
    """
    size = learn.shape[1] - later
    return learn[:, :size] & learn[:, later:]


def distillation(
    logits: torch.Tensor,
    labels: Labels,
    learn: torch.Tensor,
    later: int = 0,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns a head's mean cross-entropy against the target, a float32 scalar.

    With the target's distribution as labels it is the KL divergence up to a constant.

    Args:
        logits: ``[rows, length - later, columns]``, a head's at each position.
        labels: what the target says.
        learn: ``[rows, length]`` bool, where to learn.
        later: how many tokens after the position the target says it (k of head k).
        positions: scalar, what the sum is divided by; None: how many positions these are.
            Of a batch that is cut into parts each gives its share of the whole's mean.
    """
    where = learnt(learn, later)
    logits = logits[where].float()
    log_sum = torch.logsumexp(logits + labels.log_stands_for, -1)
    mass = labels.shares[:, later:][where].sum(-1)
    loss = mass * log_sum - labels.said(logits, where, later)
    return loss.sum() / (where.sum() if positions is None else positions).clamp(min=1)
