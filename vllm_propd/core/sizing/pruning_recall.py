"""What early pruning leaves of the acceptance that wide drafting adds.

Of n drafted nodes the best m by the draft's own word would have been verified without
pruning. What wide drafting adds are the tokens that lie beyond these; the early head, who
also keeps m, gets some of them, and loses some of the others. The share that survives
depends on how good the early head is, and hardly on n or m. So it is one number.

A pruned step is graded once the text is known that its sequences took: all three counts,
of the same trees and the same tokens, so that the luck of the text is in none of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_propd.core.tree import Bools, Ints

START = 0.3
"""The share that is assumed to survive before anything is known.

The demo's early heads keep 0.6 of what 64 nodes add to 16, and 0.3 of what 4 nodes add to
1. With too low a start pruning would never be tried."""

TRUST = 20.0
"""The weight of ``START``, in tokens that wide drafting has added.

A single step wins or loses two or three by luck; a share of 0 is never tried again, and an
unlucky step must not end there."""

MEMORY = 2000.0
"""The number of steps after which an older step's weight is about a third."""

PATIENCE = 4
"""The most steps after which a pruned one is graded, as far as its text is known."""


def best_by_draft(scores: npt.NDArray[np.floating], count: int) -> Bools:
    """Returns which nodes would be verified if there were no pruning, ``[nodes]`` bool.

    Args:
        scores: ``[nodes]`` the draft's scores in all trees, parents before their children.
        count: how many nodes would be verified.
    """
    chosen = np.zeros(len(scores), np.bool_)
    chosen[np.argsort(-scores, kind="stable")[:count]] = True
    return chosen


class PruningRecall:
    """Learns which share of what wide drafting adds survives pruning, 0..1."""

    def __init__(self, start: float = START, trust: float = TRUST):
        self.start, self.trust = start, trust
        self._added = self._survived = 0.0

    @property
    def share(self) -> float:
        """The share that survived of what was added, drawn towards ``start``, 0..1."""
        survived = self.trust * self.start + self._survived
        return min(max(survived / (self.trust + self._added), 0.0), 1.0)

    def observe(self, right: Bools, narrow: Bools, kept: Bools) -> None:
        """Learns from a pruned step; all arguments are ``[nodes]`` bool.

        Args:
            right: which nodes the text took.
            narrow: which nodes would be verified without pruning, see ``best_by_draft``.
            kept: which nodes the early head left.
        """
        known = int((right & narrow).sum())
        self._added += int(right.sum()) - known
        self._survived += int((right & kept).sum()) - known

    def fade(self) -> None:
        """Lets what is known grow older by a step, whatever that step is.

        Where pruning has once been bad, no plan prunes, and nothing is learned anew: it is
        tried again when that has been long ago.
        """
        self._added *= 1.0 - 1.0 / MEMORY
        self._survived *= 1.0 - 1.0 / MEMORY


@dataclass(frozen=True)
class PrunedStep:
    """The trees of a pruned step, with all nodes that were drafted.

    Attributes:
        requests: ``[trees]`` id of each tree's request.
        places: ``[trees]`` how many tokens each request had put out before the step.
        sizes: ``[trees]`` int64 rows of each tree, the root counted.
        token, depth: ``[rows]`` int64; a root has depth 0.
        parent_row: ``[rows]`` int64 each row's parent among all rows; a root's is itself.
        score: ``[nodes]`` float32 the draft's scores, roots left out.
        kept: ``[rows]`` bool which rows the early head left.
    """

    requests: list[str]
    places: list[int]
    sizes: Ints
    token: Ints
    depth: Ints
    parent_row: Ints
    score: npt.NDArray[np.float32]
    kept: Bools

    @property
    def dropped(self) -> int:
        """How many rows early pruning took out."""
        return len(self.kept) - int(self.kept.sum())

    def right(self, texts: Mapping[str, list[int]]) -> tuple[Bools, Bools]:
        """Returns which nodes the text took, and of which that is known; ``[rows]`` bool.

        A node below a wrong one is known to be wrong, however short the text is.
        """
        deepest = int(self.depth.max(initial=0))
        truth = np.full((len(self.sizes), deepest), -1, np.int64)
        reach = np.full(len(self.sizes), -1)
        for i, (request, place) in enumerate(zip(self.requests, self.places, strict=True)):
            if request in texts:
                text = texts[request][place : place + deepest]
                truth[i, : len(text)], reach[i] = text, len(text)
        tree = np.repeat(np.arange(len(self.sizes)), self.sizes)
        right = self.depth == 0
        known = reach[tree] >= 0
        for level in range(1, deepest + 1):
            rows = np.flatnonzero(self.depth == level)
            above = self.parent_row[rows]
            same = self.token[rows] == truth[tree[rows], level - 1]
            right[rows] = same & (self.token[rows] >= 0) & right[above]
            known[rows] &= known[above] & ((reach[tree[rows]] >= level) | ~right[above])
        return right, known


class Grader:
    """Keeps pruned steps until their text is known, then grades them.

    Args:
        recall: learns from the graded steps.
    """

    def __init__(self, recall: PruningRecall):
        self.recall = recall
        self._waiting: deque[tuple[int, PrunedStep]] = deque()

    def add(self, step: PrunedStep) -> None:
        """Remembers a step until its text is there: each step puts out a token or more.

        Deep trees do not wait for all of it, which a request may end before.
        """
        self._waiting.append((min(int(step.depth.max(initial=0)), PATIENCE), step))

    def grade(self, texts: Mapping[str, list[int]]) -> None:
        """Takes note that one more step is over, and grades the steps that are due.

        Args:
            texts: by request, the tokens that it has put out; the trees of requests that
                are not there are not graded.
        """
        self._waiting = deque((left - 1, step) for left, step in self._waiting)
        while self._waiting and self._waiting[0][0] < 0:
            _, step = self._waiting.popleft()
            right, known = step.right(texts)
            node = step.depth > 0
            graded = known[node]
            keep = int(step.kept[node].sum())
            narrow = best_by_draft(step.score, keep)
            self.recall.observe(
                right[node] & graded, narrow & graded, step.kept[node] & graded
            )
