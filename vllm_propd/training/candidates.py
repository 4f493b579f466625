"""Candidates of heads in training, as a worker computes them in serving.

Imported late: ``core`` needs llvmlite, which vLLM's workers must not meet first.
"""

from __future__ import annotations

import torch

from vllm_propd.core.drafting.candidates import Candidates
from vllm_propd.training.model.trainee import Trainee


def candidates_of(
    trainee: Trainee, logits: torch.Tensor, roots: torch.Tensor, ranks: int
) -> Candidates:
    """Returns the candidates of each position.

    Args:
        trainee: target and heads.
        logits: ``[heads, positions, draft tokens]`` float32, the heads' own.
        roots: ``[positions]`` int64 tokens that stand before what head 1 predicts.
        ranks: candidates of each head.
    """
    if trainee.transition is None:
        best, places = logits.log_softmax(-1).topk(min(ranks, logits.shape[-1]))
        both = (trainee.tokens[places].transpose(0, 1), best.transpose(0, 1))
        tokens, log_probs = (one.contiguous().cpu().numpy() for one in both)
        return Candidates.independent(tokens, log_probs)
    found = trainee.transition.couple(logits, trainee.place[roots], ranks)
    return Candidates(
        trainee.tokens[found.tokens].cpu().numpy(),
        found.log_probs.float().cpu().numpy(),
        found.next_row.cpu().numpy(),
    )
