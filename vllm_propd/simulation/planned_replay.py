"""Recorded trees, replayed with sizes that a planner chooses before every step.

Several recorded texts go on together, as the sequences of a batch do. What an engine learns
of its heads' word while serving is learned from the whole recording first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_propd.config import ProPDConfig
from vllm_propd.core.drafting.reliability import Reliability
from vllm_propd.core.pruning import edges_of, keep_best_paths, node_log_probs, own_part
from vllm_propd.core.sizing.backoff import Backoff, on_loan
from vllm_propd.core.sizing.node_values import straight
from vllm_propd.core.sizing.planner import Batch, Planner, Price
from vllm_propd.core.sizing.pruning_recall import PruningRecall, best_by_draft
from vllm_propd.core.tree import Bools, Float32s, Ints
from vllm_propd.simulation.replay import RecordedText, Replayed, on_text, places_of


@dataclass(frozen=True)
class PlannedReplay(Replayed):
    """What trees would have given with sizes that a planner chooses.

    Attributes:
        step_s: seconds of a step as the plans priced them, asking the heads included.
    """

    step_s: float


@dataclass
class _Sequence:
    """One recorded text, and the place up to which it has been replayed.

    Attributes:
        text: the recorded trees, their nodes best first by what they are worth.
        worth: ``[places, nodes]`` float64 probability of each node's path.
        right: ``[places, nodes]`` bool which nodes the text took.
        places: the place where the walk ends.
        at: the place that the walk has reached.
    """

    text: RecordedText
    worth: npt.NDArray[np.float64]
    right: Bools
    places: int
    at: int = 0

    @property
    def goes_on(self) -> bool:
        return self.at < self.places


def replay_planned(
    texts: list[RecordedText],
    config: ProPDConfig,
    planner: Planner,
    draft: Price,
    batch_size: int,
    backoff: Backoff | None = None,
) -> PlannedReplay:
    """Walks over recorded texts, ``batch_size`` of them together.

    Where one text ends the next begins, the first again after the last: the batch stays
    full until it has put out as many tokens as all texts have.

    Args:
        texts: recorded with trees at least as large as the config's.
        config: the most nodes of a tree, and how the early head is used.
        planner: with prices; it may prune where the recording has an early head.
        draft: what asking the heads takes.
        batch_size: how many sequences run together.
        backoff: decides when the heads are asked; None: one that knows nothing yet.

    Raises:
        ValueError: the recorded trees are too small, or the texts too short; or plans
            prune, and no early head was recorded.
    """
    most = config.num_speculative_tokens
    if (nodes := min(text.token.shape[1] for text in texts)) < most:
        raise ValueError(f"recorded were trees of {nodes} nodes, not of {most}")
    sequences = [one for one in _by_worth(texts) if one.places]
    if not sequences:
        raise ValueError("the recorded texts are too short to replay")
    steps = tokens = drafted = kept = 0
    seconds = 0.0
    wanted = sum(one.places for one in sequences)
    live = _Live(cycle(sequences), batch_size, most)
    bare_s = planner.step.estimate(np.array([batch_size])).item()
    draft_s = draft.estimate(np.array([batch_size])).item()
    backoff = backoff or Backoff()
    while tokens < wanted:
        asks = backoff.asks(batch_size, first=on_loan(lambda: bare_s))
        account = backoff.now
        account.earn(bare_s)
        steps += 1
        if not asks:
            tokens, seconds = tokens + batch_size, seconds + bare_s
            live.go_on([np.zeros(most, np.bool_)] * batch_size)
            continue
        plan = planner.plan(live.batch(draft_s))
        promised = bare_s * (plan.tokens / batch_size - 1.0) - plan.extra_s
        account.ask(draft_s, bare_s)
        backoff.wait(account.steps_to_wait(bare_s, promised))
        stays = [np.arange(most) < size for size in plan.sizes.tolist()]
        if plan.keep is not None:
            stays = _pruned(live, stays, config, plan.keep, planner.recall)
        accepted = live.go_on(stays)
        if plan.sizes.any():
            account.repay(bare_s * accepted / batch_size - plan.extra_s, promised)
        tokens, seconds = tokens + batch_size + accepted, seconds + plan.seconds
        drafted += int(plan.sizes.sum())
        kept += sum(int(of_one.sum()) for of_one in stays)
    each = steps * batch_size
    return PlannedReplay(each, tokens, drafted / each, kept / each, seconds / steps)


class _Live:
    """The sequences that run together: where one ends the next begins.

    Args:
        pool: gives the next sequence.
        count: how many run together.
        most: the most nodes of a tree.
    """

    def __init__(self, pool: Iterator[_Sequence], count: int, most: int):
        self._pool, self._most = pool, most
        self.now = [replace(next(pool)) for _ in range(count)]

    def here(self, of_places: str) -> npt.NDArray[Any]:
        """Returns what all sequences have of some kind at their places, one by one."""
        found = (getattr(one, of_places)[one.at, : self._most] for one in self.now)
        return np.concatenate(list(found))

    def batch(self, asked_s: float) -> Batch:
        """Returns the step to plan."""
        count, most = len(self.now), self._most
        depth = np.concatenate([one.text.depth[one.at, :most] for one in self.now])
        paths = straight(depth, np.full(count, most))
        owner = np.repeat(np.arange(count), most)
        return Batch(self.here("worth"), owner, count, straight=paths, asked_s=asked_s)

    def go_on(self, stays: list[Bools]) -> int:
        """Walks as far as nodes reach that stay, and a token further.

        Args:
            stays: of each sequence ``[most]`` which nodes are verified.

        Returns:
            How many nodes were accepted.
        """
        accepted = 0
        for one, of_one in zip(self.now, stays, strict=True):
            longest = int((of_one & one.right[one.at, : self._most]).sum())
            accepted += longest
            one.at += longest + 1
        self.now = [one if one.goes_on else replace(next(self._pool)) for one in self.now]
        return accepted


def _pruned(
    live: _Live,
    verified: list[Bools],
    config: ProPDConfig,
    keep: int,
    recall: PruningRecall | None,
) -> list[Bools]:
    """Returns which nodes pruning leaves; what that is worth is learned, as in serving."""
    stays = _kept(live.now, verified, config, keep)
    if recall is not None:
        drafted = np.concatenate(verified)
        narrow = best_by_draft(np.where(drafted, live.here("worth"), 0.0), keep)
        recall.observe(live.here("right") & drafted, narrow, np.concatenate(stays))
    return stays


def _by_worth(texts: list[RecordedText]) -> list[_Sequence]:
    """Sorts the nodes of all trees into the order in which an engine would grow them."""
    heads = max(int(text.depth.max(initial=1)) for text in texts)
    learned, own = Reliability(heads), []
    for text in texts:
        right = on_text(text)
        node = np.arange(text.token.shape[1])
        at = np.arange(len(text.text))[:, None], text.depth - 1, node
        parts = np.full((len(text.text), heads, len(node)), -np.inf, np.float32)
        parts[at] = _own_parts(text)
        hit = np.zeros(parts.shape, np.bool_)
        hit[at] = right
        # Graded are children of what the text took.
        parents_right = np.concatenate([np.ones((len(right), 1), np.bool_), right], 1)
        graded = parts.copy()
        graded[at] = np.where(
            np.take_along_axis(parents_right, text.parent, 1), graded[at], -np.inf
        )
        learned.observe(hit, graded)
        own.append((parts, at, right))
    found = []
    for text, (parts, at, right) in zip(texts, own, strict=True):
        worth = learned.values(parts)[at].astype(np.float64)
        for level in range(2, heads + 1):
            place, node = np.nonzero(text.depth == level)
            worth[place, node] += worth[place, text.parent[place, node] - 1]
        order = np.argsort(-worth, 1, kind="stable")  # parents stay before children
        moved = np.argsort(order, 1) + 1
        parent = np.concatenate([np.zeros((len(moved), 1), np.int64), moved], 1)
        parent = np.take_along_axis(parent, text.parent, 1)

        def sorted_(values: npt.NDArray[Any], order: Ints = order) -> npt.NDArray[Any]:
            return np.take_along_axis(values, order, 1)

        early = text.early_log_prob
        in_order = replace(
            text,
            token=sorted_(text.token),
            parent=sorted_(parent),
            depth=sorted_(text.depth),
            score=sorted_(text.score),
            early_rank=None if text.early_rank is None else sorted_(text.early_rank),
            early_log_prob=None if early is None else sorted_(early),
        )
        places = places_of(text)
        found.append(_Sequence(in_order, np.exp(sorted_(worth)), sorted_(right), places))
    return found


def _own_parts(text: RecordedText) -> Float32s:
    """Returns ``[places, nodes]`` float32 log probability that a node's head gave it."""
    above = np.concatenate([np.zeros((len(text.score), 1), np.float32), text.score], 1)
    return text.score - np.take_along_axis(above, text.parent, 1)


def _kept(
    live: list[_Sequence], verified: list[Bools], config: ProPDConfig, keep: int
) -> list[Bools]:
    """Returns which verified nodes pruning leaves: the best ``keep`` of all sequences."""
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
    log_prob = node_log_probs(np.concatenate(early), said, config.draft_weight)
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
