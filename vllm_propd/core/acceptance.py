"""Which drafted nodes become text.

Exact (the default): at each node one token is drawn from the target's own, processed
distribution. If a child carries it, step there; else it is emitted and the step ends; at
a leaf it is the bonus token. The children were chosen, not sampled, so no probability
ratio enters and the text has the target's distribution at every temperature.

Typical (Medusa, arXiv 2401.10774, section 2.3.1): a node is accepted where the target
finds it probable enough. Longer, and *lossy*.
"""

from __future__ import annotations

import numpy as np
import torch

from vllm_propd.core.tree import Ints


def matching_child(
    current: Ints, drawn: Ints, parent_row: Ints, token: Ints, request: Ints
) -> Ints:
    """Moves each request to the child of its current node that carries the drawn token.

    Args:
        current: ``[requests]`` int64 row of each request's current node; a request that
            has stopped holds -1.
        drawn: ``[requests]`` int64 token drawn there.
        parent_row, token, request: ``[rows]`` int64 for every row of the trees: its
            parent's row, its token (-1 for roots, which nothing steps to) and its
            request.

    Returns:
        ``[requests]`` int64 row of the child; -1 where there is none.
    """
    matches = (parent_row == current[request]) & (token == drawn[request])
    step = np.full_like(current, -1)
    # At most one child matches: siblings carry different tokens.
    found = np.flatnonzero(matches)
    step[request[found]] = found
    return step


def typical_nodes(
    probs: torch.Tensor,
    parent_row: torch.Tensor,
    token: torch.Tensor,
    node_row: torch.Tensor,
    epsilon: float,
    delta: float,
) -> torch.Tensor:
    """Medusa's typical acceptance for every drafted node.

    A node is accepted where its parent is and ``p(token) > min(epsilon, delta *
    exp(-entropy))`` under the target at its parent.

    Args:
        probs: ``[rows, vocabulary]`` float32 target distribution at each row.
        parent_row, token, node_row: ``[nodes]`` int64 of the drafted nodes; every other
            row is a root's.
        epsilon, delta: the rule's threshold and its entropy factor.

    Returns:
        ``[nodes]`` bool.
    """
    entropy = torch.special.entr(probs).sum(-1)
    threshold = torch.clamp(delta * torch.exp(-entropy), max=epsilon)
    likely = probs[parent_row, token.clamp(min=0)] > threshold[parent_row]
    likely &= token >= 0
    accepted = torch.ones(len(probs), dtype=torch.bool, device=probs.device)
    accepted = accepted.index_copy(0, node_row, likely)
    above = torch.arange(len(probs), device=probs.device)
    above = above.index_copy(0, node_row, parent_row)
    # Twice as far up each time; no look at the depths, for which a GPU would be waited.
    for _ in range(len(node_row).bit_length()):
        accepted &= accepted[above]
        above = above[above]
    return accepted[node_row]
