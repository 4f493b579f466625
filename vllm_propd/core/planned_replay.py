"""Recorded trees, replayed with sizes that a planner chooses before every step.

Several recorded texts go on together, as the sequences of a batch do. A node counts as
its heads say: what an engine has learned of them meanwhile is in no recording.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_propd.config import ProPDConfig
from vllm_propd.core.planner import Batch, Planner
from vllm_propd.core.pruning import Bools, edges_of, keep_best_paths, own_part
from vllm_propd.core.replay import RecordedText, Replayed, on_text, places_of


@dataclass(frozen=True)
class PlannedReplay(Replayed):
    """What plans would have done.

    Attributes:
        step_s: seconds of a step as the plans priced them, drafting included.
    """

    step_s: float


@dataclass
class _Sequence:
    text: RecordedText
    right: Bools
    places: int
    at: int = 0

    @property
    def goes_on(self) -> bool:
        return self.at < self.places


def replay_planned(
    texts: list[RecordedText], config: ProPDConfig, planner: Planner, batch_size: int
) -> PlannedReplay:
    """Walks over recorded texts, ``batch_size`` of them together.

    Args:
        texts: recorded with trees at least as large as the config's.
        config: the most nodes of a tree, and how the early head is used.
        planner: with prices; it may prune where the recording has an early head.
        batch_size: sequences.

    Raises:
        ValueError: the recording cannot tell.
    """
    most = config.num_speculative_tokens
    steps = engine_steps = tokens = drafted = kept = 0
    seconds = 0.0
    for start in range(0, len(texts), batch_size):
        group = [
            _Sequence(text, on_text(text), places_of(text))
            for text in texts[start : start + batch_size]
        ]
        if any(one.text.token.shape[1] < most for one in group):
            raise ValueError(f"trees of {most} nodes were not recorded")
        while live := [one for one in group if one.goes_on]:
            scores = [one.text.score[one.at, :most] for one in live]
            probability = np.exp(np.concatenate(scores).astype(np.float64))
            owner = np.repeat(np.arange(len(live)), most)
            plan = planner.plan(Batch(probability, owner, len(live)))
            verified = [np.arange(most) < size for size in plan.sizes.tolist()]
            stays = verified
            if plan.keep is not None:
                stays = _kept(live, verified, config, plan.keep)
            for one, of_one in zip(live, stays, strict=True):
                accepted = int((of_one & one.right[one.at, :most]).sum())
                tokens += accepted + 1
                one.at += accepted + 1
            steps += len(live)
            engine_steps += 1
            seconds += plan.seconds
            drafted += int(plan.sizes.sum())
            kept += sum(int(of_one.sum()) for of_one in stays)
    if not steps:
        raise ValueError("the recorded texts are too short to replay")
    return PlannedReplay(
        steps, tokens, drafted / steps, kept / steps, seconds / engine_steps
    )


def _kept(
    live: list[_Sequence], verified: list[Bools], config: ProPDConfig, keep: int
) -> list[Bools]:
    """Which verified nodes are left, the best ``keep`` of all sequences."""
    parents, depths, scores, early, base = [], [], [], [], 0
    root = np.zeros(1, np.int64)
    for one, of_one in zip(live, verified, strict=True):
        text, at, size = one.text, one.at, int(of_one.sum())
        if text.early_log_prob is None:
            raise ValueError("there is no early head in this recording")
        parents.append(base + np.concatenate([root, text.parent[at, :size]]))
        depths.append(np.concatenate([root, text.depth[at, :size]]))
        scores.append(text.score[at, :size])
        early.append(text.early_log_prob[at, :size])
        base += size + 1
    parent_row, depth = np.concatenate(parents), np.concatenate(depths)
    edges = edges_of(parent_row, depth)
    said = own_part(np.concatenate(scores), edges, parent_row)
    log_prob = np.concatenate(early) + np.float32(config.draft_weight) * said
    rows = keep_best_paths(log_prob, edges, parent_row, depth, np.zeros_like(depth), keep)[
        depth > 0
    ]
    found, before = [], 0
    for of_one in verified:
        stays, size = np.zeros_like(of_one), int(of_one.sum())
        stays[:size] = rows[before : before + size]
        found.append(stays)
        before += size
    return found
