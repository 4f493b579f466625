"""Candidates that wait for the text: what the heads said, until it is known who was right.

Every candidate is graded against the tokens that the sequence took later, drafted or not.
Grading only what a tree happened to hold would flatter the ranks that are always drafted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from vllm_propd.core.drafting.candidates import Candidates
from vllm_propd.core.tree import Float32s, Ints


@dataclass(frozen=True)
class _Waiting:
    """One sequence's candidates at one place of its text."""

    place: int
    candidates: Candidates


@dataclass(frozen=True)
class Graded:
    """Candidates whose text is known.

    Attributes:
        tokens: ``[samples, heads, ranks]`` int64, those after the text's own tokens.
        log_probs: ``[samples, heads, ranks]`` float32 what the heads said of them.
        truth: ``[samples, heads]`` int64 the text's tokens at the heads' places.
    """

    tokens: Ints
    log_probs: Float32s
    truth: Ints


class PendingCandidates:
    """The waiting candidates of all sequences."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[_Waiting]] = {}

    def add(self, request_id: str, place: int, candidates: Candidates) -> None:
        """Remembers candidates for the tokens that follow.

        Args:
            request_id: the request that they are for.
            place: how many tokens the sequence has put out; head i speaks of number
                ``place + i``.
            candidates: the request's alone.
        """
        queue = self._waiting.setdefault(request_id, deque())
        queue.append(_Waiting(place, candidates))

    def take(self, texts: Iterable[tuple[str, list[int]]]) -> Graded | None:
        """Takes out the candidates that can be graded now; None where there are none.

        Args:
            texts: request ids and the tokens that they have put out.
        """
        due: list[Candidates] = []
        truth: list[list[int]] = []
        for request_id, text in texts:
            queue = self._waiting.get(request_id)
            while queue and queue[0].place + queue[0].candidates.heads <= len(text):
                one = queue.popleft()
                due.append(one.candidates)
                truth.append(text[one.place : one.place + one.candidates.heads])
        if not due:
            return None
        true = np.array(truth, np.int64)
        return Graded(*Candidates.together(due).along(true), true)

    def forget(self, request_id: str) -> None:
        """Drops the candidates of a text that has ended; another may have its name."""
        self._waiting.pop(request_id, None)
