"""Drafts trees of all that there is: the heads' candidates, and every other source.

It learns what the heads' word is worth from what became of earlier candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vllm_propd.core.drafting.candidates import Candidates
from vllm_propd.core.drafting.growth import grow_from
from vllm_propd.core.drafting.pending_candidates import PendingCandidates
from vllm_propd.core.drafting.prices import Prices
from vllm_propd.core.drafting.reliability import hits
from vllm_propd.core.sources.combined import Found, Sources, Texts
from vllm_propd.core.tree import Ints, TokenTree


class Drafter:
    """Drafts a token tree for each sequence.

    Args:
        sources: what is drafted beside the heads.
        prices: what the heads' candidates are worth; None: as much as the heads say.
        learns: whether prices learn.
    """

    def __init__(
        self, sources: Sources, prices: Prices | None = None, learns: bool = False
    ):
        self.sources, self.prices, self.learns = sources, prices, learns
        self._pending = PendingCandidates()

    def draft(
        self, texts: Texts, candidates: Candidates, sizes: Ints, found: Found | None = None
    ) -> list[TokenTree]:
        """Drafts a tree for each sequence; learns from what became of earlier candidates.

        Args:
            texts: the sequences.
            candidates: what the heads say of them.
            sizes: ``[sequences]`` int64 wanted nodes.
            found: what ``Sources.find`` has just returned.
        """
        if self.prices is not None:
            if self.learns:
                self._learn(self.prices, texts, candidates)
            values = self.prices.values(texts.sampled, candidates.log_probs)
            candidates = candidates.valued(values)
        looked_up = successors = None
        if found is not None:
            looked_up = self.sources.looked_up(texts, found, candidates.best_path())
            successors = found.successors
        trees = grow_from(candidates, sizes, looked_up, successors)
        if texts.chain.any():
            rows = np.flatnonzero(texts.chain)
            branches = grow_from(candidates.of(rows, ranks=1), sizes[rows])
            for row, branch in zip(rows.tolist(), branches, strict=True):
                trees[row] = branch
        return trees

    def _learn(self, prices: Prices, texts: Texts, candidates: Candidates) -> None:
        # What penalties, bans and grammars do to a text says nothing of the heads.
        teach = ~texts.steered
        for sampled in (False, True):
            rows = np.flatnonzero(teach & (texts.sampled == sampled)).tolist()
            both = [(texts.ids[row], texts.outputs[row]) for row in rows]
            if (graded := self._pending.take(both)) is not None:
                right = hits(graded.tokens, graded.truth)
                prices.observe(sampled, right, graded.log_probs)
            for row, (request_id, text) in zip(rows, both, strict=True):
                self._pending.add(request_id, len(text), candidates.one(row))

    def end(self, request_id: str, answer: Sequence[int]) -> None:
        """Takes note that a request, or a session's turn, has ended with ``answer``."""
        self._pending.forget(request_id)
        self.sources.end(request_id, answer)
