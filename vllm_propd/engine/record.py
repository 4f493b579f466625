"""Recording real steps: which trees were drafted, and what became of them.

Off unless asked for (``LLM.collective_rpc("start_recording")``). Used to draw trees, and
to compare the trees of tensor-parallel ranks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vllm_propd.core.tree import TokenTree
from vllm_propd.engine.step import TreeStep

EXTRA_NODES = 12
"""Candidates drafted beyond the tree while recording: what was nearly verified."""


@dataclass
class RecordedTree:
    """One tree of one step, in plain Python types.

    Attributes:
        request_id: vLLM's.
        root: the root's token.
        token, parent, depth, score: the drafted nodes, as in ``TokenTree``.
        verified: how many of them were scheduled; the rest were candidates only.
        kept: those of them that early pruning let through.
        accepted: nodes on the accepted path, from the root down.
        bonus: the token emitted after them.
    """

    request_id: str
    root: int
    token: list[int]
    parent: list[int]
    depth: list[int]
    score: list[float]
    verified: int
    kept: list[int]
    accepted: list[int]
    bonus: int


def _nodes_of(step: TreeStep, tree: int, rows: np.ndarray) -> list[int]:
    """The drafted nodes of one tree that are among ``rows`` of the step."""
    inside = rows - step.first[tree]
    return sorted(inside[(inside > 0) & (inside < step.sizes[tree])].tolist())


class Recorder:
    """Collects the trees of up to ``limit`` steps."""

    def __init__(self, limit: int):
        self.limit = limit
        self.steps: list[list[RecordedTree]] = []

    @property
    def is_full(self) -> bool:
        """Whether later steps are no longer recorded."""
        return len(self.steps) >= self.limit

    def add(
        self,
        step: TreeStep,
        accepted: np.ndarray,
        emitted: list[list[int]],
        request_ids: list[str],
        roots: list[int],
        proposed: dict[str, TokenTree],
    ) -> None:
        """Records one verified step.

        Args:
            step: what was verified.
            accepted: int64 indices among the step's tree rows.
            emitted: ``[requests]`` tokens emitted by each request of the batch.
            request_ids: ``[requests]``.
            roots: ``[trees]`` root tokens.
            proposed: the trees as drafted, with the extra candidates.
        """
        if self.is_full:
            return
        whole = step.whole or step
        kept = np.arange(len(step.rows)) if step.whole is None else step.kept
        trees = []
        for t, request in enumerate(step.request.tolist()):
            path, left = (_nodes_of(whole, t, rows) for rows in (kept[accepted], kept))
            tree = proposed.get(request_ids[request], step.trees[t])
            trees.append(
                RecordedTree(
                    request_id=request_ids[request],
                    root=roots[t],
                    token=tree.token.tolist(),
                    parent=tree.parent.tolist(),
                    depth=tree.depth.tolist(),
                    score=tree.score.tolist(),
                    verified=len(whole.trees[t]),
                    kept=left,
                    accepted=path,
                    bonus=emitted[request][-1],
                )
            )
        self.steps.append(trees)

    def take(self) -> list[list[dict[str, Any]]]:
        """The recorded steps, as plain dicts."""
        return [[asdict(tree) for tree in step] for step in self.steps]
