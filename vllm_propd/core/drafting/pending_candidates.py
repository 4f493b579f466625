"""Candidates that wait for the text: what the heads said, until it is known who was right.

Every candidate is graded against the tokens that the sequence took later, drafted or not.
Grading only what a tree happened to hold would flatter the ranks that are always drafted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from vllm_propd.core.tree import Float32s, Ints


@dataclass(frozen=True)
class _Waiting:
    """One sequence's candidates at one place of its text."""

    place: int
    tokens: Ints
    log_probs: Float32s


@dataclass(frozen=True)
class Graded:
    """Candidates whose text is known.

    Attributes:
        tokens: ``[samples, heads, ranks]`` int64.
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

    def add(self, request_id: str, place: int, tokens: Ints, log_probs: Float32s) -> None:
        """Remembers candidates for the tokens that follow.

        Args:
            request_id: the request that they are for.
            place: how many tokens the sequence has put out; head i speaks of number
                ``place + i``.
            tokens, log_probs: ``[heads, ranks]`` int64 and float32.
        """
        queue = self._waiting.setdefault(request_id, deque())
        queue.append(_Waiting(place, tokens, log_probs))

    def take(self, texts: Iterable[tuple[str, list[int]]]) -> Graded | None:
        """Takes out the candidates that can be graded now; None where there are none.

        Args:
            texts: request ids and the tokens that they have put out.
        """
        due: list[_Waiting] = []
        truth: list[list[int]] = []
        for request_id, text in texts:
            queue = self._waiting.get(request_id)
            while queue and queue[0].place + len(queue[0].tokens) <= len(text):
                one = queue.popleft()
                due.append(one)
                truth.append(text[one.place : one.place + len(one.tokens)])
        if not due:
            return None
        return Graded(
            np.stack([one.tokens for one in due]),
            np.stack([one.log_probs for one in due]),
            np.array(truth, np.int64),
        )

    def forget(self, request_id: str) -> None:
        """Drops the candidates of a sequence that has ended."""
        self._waiting.pop(request_id, None)
