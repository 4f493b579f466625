"""Answers that are known, read as an engine puts them out (``core.sources.combined``).

A greedy answer, what the target thought likely at each of its places, and what the heads
said there is all that drafting ever sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vllm_propd.core.drafting.candidates import Candidates
from vllm_propd.core.sources.combined import Said
from vllm_propd.core.sources.lookup import TokenMatrix
from vllm_propd.core.sources.successors import ReadTokens
from vllm_propd.core.tree import Bools, Float32s, Ints


@dataclass(frozen=True)
class Answer:
    """A greedy answer of the target.

    Attributes:
        task: what kind of question it answers.
        prompt: ``[tokens]`` int64.
        text: ``[tokens]`` int64 the answer.
        best: ``[tokens, ranks]`` int64 the target's best tokens at each place of it.
        log_probs: ``[tokens, ranks]`` float32, theirs.
        candidates: what the heads said after each token of the text, but perhaps not after
            the last ones; None: they were not asked.
    """

    task: str
    prompt: Ints
    text: Ints
    best: Ints
    log_probs: Float32s
    candidates: Candidates | None = None

    @property
    def places(self) -> int:
        """How many tokens of it can be put out before drafts are wanted for the next."""
        known = len(self.text) if self.candidates is None else len(self.candidates)
        return min(known, len(self.text), len(self.best))

    def of_ranks(self, ranks: int) -> Answer:
        """Returns the answer with at most so many candidates of each head."""
        if self.candidates is None:
            return self
        every = np.arange(len(self.candidates))
        return replace(self, candidates=self.candidates.of(every, ranks))


class Reading:
    """Greedy answers as far as they have been put out (``core.sources.combined.Texts``).

    Each begins with its first token, which comes with its prompt.

    Args:
        answers: they are put out together.
    """

    def __init__(self, answers: Sequence[Answer]):
        count, width = len(answers), max(len(a.prompt) + len(a.text) for a in answers)
        self.tokens: TokenMatrix = np.zeros((count, width), np.int32)
        self.rows = np.arange(count)
        self.begins, self.lengths, self.put_out = (np.zeros(count, np.int64) for _ in "abc")
        self.salts = np.zeros(count, np.int64)
        self.sampled: Bools = np.zeros(count, np.bool_)
        self.steered: Bools = np.zeros(count, np.bool_)
        self.chain: Bools = np.zeros(count, np.bool_)
        self.ids = [""] * count
        self._answers = list(answers)
        self._begun = 0
        for row, answer in enumerate(answers):
            self.begin(row, answer)

    def begin(self, row: int, answer: Answer) -> None:
        """Begins an answer in the place of another."""
        whole = np.concatenate([answer.prompt, answer.text])
        if len(whole) > self.tokens.shape[1]:
            wider = len(whole) - self.tokens.shape[1]
            self.tokens = np.pad(self.tokens, ((0, 0), (0, wider)))
        self.tokens[row, : len(whole)] = whole
        self.begins[row] = len(answer.prompt)
        self.lengths[row], self.put_out[row] = len(answer.prompt) + 1, 1
        self._answers[row], self.ids[row] = answer, f"answer {self._begun}"
        self._begun += 1

    @property
    def roots(self) -> Ints:
        """``[answers]`` int64 the last token of each."""
        return self.tokens[self.rows, self.lengths - 1].astype(np.int64)

    @property
    def at(self) -> Ints:
        """``[answers]`` int64 how many tokens of each have been put out."""
        return self.lengths - self.begins

    @property
    def places(self) -> Ints:
        """``[answers]`` int64 how many tokens of each can be put out (``Answer``)."""
        return np.array([answer.places for answer in self._answers], np.int64)

    @property
    def outputs(self) -> list[list[int]]:
        """``[answers]`` the tokens that each has put out."""
        both = zip(self._answers, self.at.tolist(), strict=True)
        return [answer.text[:at].tolist() for answer, at in both]

    def rest(self, row: int) -> Ints:
        """Returns what is to come of an answer."""
        return self._answers[row].text[int(self.at[row]) :]

    def read(self, counts: Ints) -> None:
        """Reads ``[answers]`` int64 further tokens, which one step has put out."""
        self.lengths, self.put_out = self.lengths + counts, counts

    def said(self) -> Said:
        """Returns what the target has said in the step."""
        sequence = np.repeat(self.rows, self.put_out)
        first = np.repeat(np.cumsum(self.put_out) - self.put_out, self.put_out)
        depth = np.arange(len(sequence)) - first
        place = (self.at - self.put_out)[sequence] + depth
        end = self.begins[sequence] + place
        before, truth = (
            self.tokens[sequence, end + ahead].astype(np.int64) for ahead in (-1, 0)
        )
        both = list(zip(sequence.tolist(), place.tolist(), strict=True))
        best = np.stack([self._answers[row].best[at] for row, at in both])
        share = np.stack([self._answers[row].log_probs[at] for row, at in both])
        share = share - np.log(np.exp(share).sum(1, keepdims=True))
        return ReadTokens(before, truth, sequence, depth), best, share

    def candidates(self) -> Candidates:
        """Returns what the heads said of what comes next.

        Raises:
            ValueError: the heads were not asked.
        """
        parts = []
        for answer, at in zip(self._answers, self.at.tolist(), strict=True):
            if answer.candidates is None:
                raise ValueError("no heads were asked when these answers were written")
            parts.append(answer.candidates.one(at - 1))
        return Candidates.together(parts)
