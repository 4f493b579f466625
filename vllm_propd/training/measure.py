"""What trained heads know, measured on the text that the target writes itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from vllm_propd.config import ProPDConfig
from vllm_propd.heads.calibration import BINS, EARLY_RANKS, TREE_SIZES, Calibration
from vllm_propd.training.model.states import States
from vllm_propd.training.model.trainee import Trainee

CANDIDATES = ProPDConfig().num_candidates
"""How many candidates of each head are measured: as many as serving takes by default."""


def ranks_of(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Counts tokens that stand before the true one: ``[..., tokens]`` to ``[...]``.

    A truth beyond the tokens, which heads cannot draft, comes after all of them.
    """
    tokens = logits.shape[-1]
    value = logits.gather(-1, truth.clamp(max=tokens - 1)[..., None])
    return torch.where(truth < tokens, (logits > value).sum(-1), tokens)


def head_ranks(
    trainee: Trainee, drafts: torch.Tensor, ids: torch.Tensor, truth: torch.Tensor
) -> torch.Tensor:
    """Returns ranks of the truth among a head's candidates after the text's own tokens.

    Args:
        trainee: target and heads.
        drafts: ``[positions, draft tokens]``, the head's own logits.
        ids: ``[positions]`` int64, the token before the one that is predicted.
        truth: ``[positions]`` int64, the true one.
    """
    logits = drafts.float()
    if trainee.transition is not None:
        logits = logits + trainee.transition(trainee.place[ids]).float()
    return ranks_of(logits, trainee.place[truth])


def long_enough(text: list[int], num_heads: int) -> bool:
    """Whether a continuation goes on beyond what heads draft from its first token."""
    return len(text) > num_heads + 1


def check_measurable(texts: list[list[int]], num_heads: int) -> None:
    """Refuses continuations that heads cannot be measured on.

    Args:
        texts: token ids.
        num_heads: heads K.

    Raises:
        ValueError: all of them are too short.
    """
    if not any(long_enough(text, num_heads) for text in texts):
        raise ValueError(
            "the target ends its continuations at once: the heads cannot be measured on "
            "them. Give --held-out text that it goes on from"
        )


class _Measured:
    """Ranks of the truth, and paths of trees, gathered sequence by sequence."""

    def __init__(self, num_heads: int, layers: list[int], candidates: int):
        self.candidates = candidates
        self.medusa: list[list[torch.Tensor]] = [[] for _ in range(num_heads)]
        self.early: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
        self.paths: list[list[list[int]]] = []
        self.reliability = np.zeros((3, num_heads, BINS))

    def add(self, trainee: Trainee, prompt: list[int], text: list[int]) -> None:
        """Measures the heads on one prompt and its continuation, both token ids."""
        ids = torch.tensor([prompt + text], device=trainee.device)
        predicted = trainee.predict(ids)
        heads, row = predicted.medusa[:, 0].float(), ids[0]
        # From the first step, which knows the text's first token, to the last one whose
        # deepest draft lies inside the text.
        first, last = len(prompt) - 1, ids.shape[1] - 1 - len(heads)
        for k, logits in enumerate(heads, 1):
            before, truth = row[first + k : last + k], row[first + 1 + k : last + 1 + k]
            ranks = head_ranks(trainee, logits[first:last], before, truth)
            self.medusa[k - 1].append(ranks.cpu())
        for layer, logits in predicted.early.items():
            ranks = ranks_of(logits[0, first:-1].float(), row[first + 1 :])
            self.early[layer].append(ranks.cpu())
        # Late: vLLM's workers re-import the main script, and vLLM 0.32 on the CPU does not
        # start where that has imported llvmlite (its kernel dispatcher trips over it).
        from vllm_propd.core.drafting.growth import grow_from
        from vllm_propd.core.drafting.reliability import counted, hits
        from vllm_propd.simulation.offline_acceptance import accepted_path
        from vllm_propd.training.candidates import candidates_of

        candidates = candidates_of(
            trainee, heads[:, first:last], row[first + 1 : last + 1], self.candidates
        )
        trees = grow_from(candidates, np.full(last - first, max(TREE_SIZES)))
        told = row.cpu().numpy()
        reached = np.lib.stride_tricks.sliding_window_view(told, len(heads))
        after = reached[first + 2 : last + 2]
        tokens, said = candidates.along(after)
        self.reliability += counted(hits(tokens, after), said)
        self.paths.append(
            [
                accepted_path(tree, told[t + 2 : t + 2 + len(heads)])
                for t, tree in enumerate(trees, first)
            ]
        )


@torch.no_grad()
def calibrate(
    trainee: Trainee,
    prompts: list[list[int]],
    texts: list[list[int]],
    on_sequence: Callable[[], None] = lambda: None,
    candidates: int = CANDIDATES,
) -> Calibration:
    """Measures heads on the target's continuations.

    Args:
        trainee: target and heads.
        prompts, texts: token ids of prompts and continuations; a continuation no longer
            than the heads reach is left out.
        on_sequence: called after each sequence.
        candidates: how many of each head trees are grown from; 1: chains.

    Raises:
        ValueError: all continuations are too short.
    """
    num_heads = trainee.medusa.num_heads
    check_measurable(texts, num_heads)
    measured = _Measured(num_heads, [int(layer) for layer in trainee.early], candidates)
    for prompt, text in zip(prompts, texts, strict=True):
        if long_enough(text, num_heads):
            measured.add(trainee, prompt, text)
        on_sequence()
    from vllm_propd.simulation.offline_acceptance import tokens_per_step  # late, as above

    ranks = [torch.cat(rows) for rows in measured.medusa]
    return Calibration(
        positions=len(ranks[0]),
        rank_accuracy=[_shares(row) for row in ranks],
        early_recall={
            layer: _recall(torch.cat(rows)) for layer, rows in measured.early.items()
        },
        tokens_per_step={
            nodes: round(tokens_per_step(measured.paths, nodes), 4) for nodes in TREE_SIZES
        },
        reliability=measured.reliability.round(2).tolist(),
    )


def _shares(ranks: torch.Tensor) -> list[float]:
    """Returns the share of positions whose truth has rank 0, 1, ..."""
    counts = torch.bincount(ranks.clamp(max=CANDIDATES), minlength=CANDIDATES)
    return [round(float(n) / len(ranks), 5) for n in counts[:CANDIDATES]]


def _recall(ranks: torch.Tensor) -> dict[int, float]:
    return {k: round(float((ranks < k).float().mean()), 5) for k in EARLY_RANKS}


@torch.no_grad()
def top_accuracy(
    trainee: Trainee, ids: torch.Tensor, learn: torch.Tensor, states: States
) -> list[tuple[float, float]]:
    """Returns each head's top-1 and top-10 accuracy on text, 0 to 1.

    Args:
        trainee: target and heads.
        ids: ``[rows, length]`` int64 token ids.
        learn: ``[rows, length]`` bool, positions that count.
        states: what the target says of them.
    """
    hits = torch.zeros(trainee.medusa.num_heads, 3, device=ids.device)
    best = states.best[..., 0].long()
    for row in range(len(ids)):  # all logits together would be large
        one = slice(row, row + 1)
        drafts = trainee.draft_logits(states.last[one], ids[one], trainee.tokens)
        for k, logits in enumerate(drafts[:, 0], 1):
            counts = learn[row, :-k] & learn[row, k:]
            before, truth = ids[row, k:][counts], best[row, k:][counts]
            ranks = head_ranks(trainee, logits[:-k][counts], before, truth)
            found = [(ranks < 1).sum(), (ranks < 10).sum(), counts.sum()]
            hits[k - 1] += torch.stack(found)
    shares = hits[:, :2] / hits[:, 2:].clamp(min=1)
    return [(top1, top10) for top1, top10 in shares.tolist()]
