"""What tokens are worth where two sources offer some for the same place of a text."""

from __future__ import annotations

import numpy as np

from vllm_propd.core.drafting.candidates import SUREST, Candidates
from vllm_propd.core.tree import Float32s, Ints


def priced_together(
    candidates: Candidates, looked_up: Ints, worth: Float32s
) -> tuple[Float32s, Float32s]:
    """Prices looked-up tokens beside others for their places, and these beside them.

    A token that the heads offer as well is worth what the surer of them says. The other
    tokens share what is left, in the proportions that they had.

    Args:
        candidates: what the heads offer.
        looked_up: ``[sequences, reach]`` int64 continuations; -1 where there is none.
        worth: ``[sequences, reach]`` float32 log probabilities of them.

    Returns:
        Log probabilities like ``worth``; and ``[sequences, heads or reach, the more]``
        float32 to add to the log probabilities of others that have a looked-up sibling.
    """
    sequences, heads = candidates.tokens.shape[:2]
    reach = looked_up.shape[1]
    rest = np.zeros((sequences, max(heads, reach)), np.float32)
    both = min(heads, reach)
    if both:
        tokens, log_probs = candidates.along(looked_up)
        same = tokens == looked_up[:, :both, None]
        said = np.where(same, np.exp(log_probs), 0.0).sum(-1).clip(max=SUREST)
        surer = np.maximum(np.exp(worth[:, :both]), said).clip(max=SUREST)
        rest[:, :both] = np.log1p(-surer) - np.log1p(-said)
        with np.errstate(divide="ignore"):
            log_surer = np.log(surer).astype(np.float32)
        worth = np.concatenate([log_surer, worth[:, both:]], 1)
    return worth, rest
