"""Recording real steps: which trees were drafted, and what became of them.

Off unless asked for (``LLM.collective_rpc("start_recording")``). Used to draw trees, and
to compare the trees of tensor-parallel ranks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from vllm_propd.core.drafting.candidates import Candidates
from vllm_propd.core.sources.combined import Said, Texts
from vllm_propd.core.tree import TokenTree
from vllm_propd.engine.step.tree_step import TreeStep

EXTRA_NODES = 12
"""How many candidates are drafted beyond the tree while recording: nearly verified ones."""


@dataclass
class RecordedTree:
    """One tree of one step, in plain Python types.

    Attributes:
        request_id: vLLM's id of the request.
        put_out: tokens that the request had put out before the step; the root is the last.
        root: the root's token.
        token, parent, depth, score: the drafted nodes, as in ``TokenTree``.
        verified: how many of them were scheduled; the rest were candidates only.
        kept: those of them that early pruning let through.
        accepted: nodes on the accepted path, from the root down.
        bonus: the token emitted after them.
        early_rank, early_log_prob: what an early head said of the verified nodes, where
            one did: see ``core.pruning``.
    """

    request_id: str
    put_out: int
    root: int
    token: list[int]
    parent: list[int]
    depth: list[int]
    score: list[float]
    verified: int
    kept: list[int]
    accepted: list[int]
    bonus: int
    early_rank: list[int] = field(default_factory=list)
    early_log_prob: list[float] = field(default_factory=list)


@dataclass
class RecordedAnswer:
    """What there was to draft from at each place of a text, in plain Python types.

    Attributes:
        begins: tokens of the prompt.
        tokens: prompt and answer, as far as heads were asked.
        best, log_share: at each place of the answer the target's best tokens, and the log
            of their shares, as ``SuccessorTable.see`` takes them.
        candidates: after each place what the heads said: the fields of ``Candidates``.
    """

    begins: int
    tokens: list[int] = field(default_factory=list)
    best: list[list[int]] = field(default_factory=list)
    log_share: list[list[float]] = field(default_factory=list)
    candidates: list[dict[str, Any]] = field(default_factory=list)


def _nodes_of(step: TreeStep, tree: int, rows: np.ndarray) -> list[int]:
    """Returns the drafted nodes of one tree that are among ``rows`` of the step."""
    inside = rows - step.first[tree]
    return sorted(inside[(inside > 0) & (inside < step.sizes[tree])].tolist())


class Recorder:
    """Collects the trees of up to ``limit`` steps.

    Args:
        limit: the most steps that are recorded.
        accept: whether nodes are accepted as without a recording; otherwise none is, and
            every token of the text gets a tree (``simulation.replay``).
    """

    def __init__(self, limit: int, accept: bool = True):
        self.limit, self.accept = limit, accept
        self.steps: list[list[RecordedTree]] = []
        self.answers: dict[str, RecordedAnswer] = {}

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
        put_out: list[int],
        roots: list[int],
        proposed: dict[str, TokenTree],
    ) -> None:
        """Records one verified step.

        Args:
            step: what was verified.
            accepted: int64 indices among the step's tree rows.
            emitted: ``[requests]`` tokens emitted by each request of the batch.
            request_ids: ``[requests]`` ids of the batch's requests.
            put_out: ``[requests]`` tokens that each had put out before.
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
            start = int(whole.first[t]) - t  # so many drafted nodes stand before its own
            end = start + len(whole.trees[t])
            rank, log_prob = step.early or (np.empty(0, np.int64), np.empty(0))
            trees.append(
                RecordedTree(
                    request_id=request_ids[request],
                    put_out=put_out[request],
                    root=roots[t],
                    token=tree.token.tolist(),
                    parent=tree.parent.tolist(),
                    depth=tree.depth.tolist(),
                    score=tree.score.tolist(),
                    verified=len(whole.trees[t]),
                    kept=left,
                    accepted=path,
                    bonus=emitted[request][-1],
                    early_rank=rank[start:end].tolist(),
                    early_log_prob=log_prob[start:end].tolist(),
                )
            )
        self.steps.append(trees)

    def keep(self, texts: Texts, candidates: Candidates, said: Said) -> None:
        """Keeps what there is to draft from after a step that has accepted nothing.

        Args:
            texts: the sequences, each with one new token.
            candidates: what the heads say of them.
            said: what the target has said in the step.
        """
        _, best, log_share = said
        for i, name in enumerate(texts.ids):
            begins, length = int(texts.begins[i]), int(texts.lengths[i])
            answer = self.answers.setdefault(name, RecordedAnswer(begins))
            answer.tokens = texts.tokens[texts.rows[i], :length].tolist()
            answer.best.append(best[i].tolist())
            answer.log_share.append(log_share[i].tolist())
            one = vars(candidates.one(i))
            answer.candidates.append({name: v[0].tolist() for name, v in one.items()})

    def take_answers(self) -> list[dict[str, Any]]:
        """Returns what ``keep`` has kept, as plain dicts."""
        return [asdict(answer) for answer in self.answers.values()]

    def take(self) -> list[list[dict[str, Any]]]:
        """Returns the recorded steps, as plain dicts."""
        return [[asdict(tree) for tree in step] for step in self.steps]
