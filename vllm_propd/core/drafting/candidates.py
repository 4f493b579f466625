"""The heads' candidates: what may follow, and what may follow that.

Medusa's heads speak of their places alone, whatever stands before. Heads with a transition
term (``heads.transition``) speak of each place once for every candidate of the place before
it, and once for any other token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from vllm_propd.core.tree import Float32s, Ints

SUREST = 0.999
"""The highest probability of a token: other candidates for its place share the rest."""


@dataclass(frozen=True)
class Candidates:
    """Candidates of some sequences.

    Attributes:
        tokens: ``[sequences, heads, rows, ranks]`` int64, in each row best first. A row is
            for one token before; row 0 is for any that has no row of its own, and the first
            head's is for the root.
        log_probs: ``[sequences, heads, rows, ranks]`` float32, their log probabilities.
        next_row: ``[sequences, heads, rows, ranks]`` int64, the next head's row for what
            follows this candidate.
    """

    tokens: Ints
    log_probs: Float32s
    next_row: Ints

    @classmethod
    def independent(cls, tokens: Ints, log_probs: Float32s) -> Candidates:
        """Makes candidates that do not depend on the token before them.

        Both arrays are ``[sequences, heads, ranks]``.
        """
        return cls(
            tokens[:, :, None], log_probs[:, :, None], np.zeros_like(tokens)[:, :, None]
        )

    @classmethod
    def none(cls, sequences: int) -> Candidates:
        """Returns the candidates of no heads, for so many sequences."""
        shape = (sequences, 0, 1)
        return cls.independent(np.empty(shape, np.int64), np.empty(shape, np.float32))

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def together(cls, parts: list[Candidates]) -> Candidates:
        """Joins the candidates of several sequences; all have the same shape."""
        return cls(
            *map(np.concatenate, zip(*(vars(p).values() for p in parts), strict=True))
        )

    @property
    def heads(self) -> int:
        """The number of heads."""
        return self.tokens.shape[1]

    def one(self, sequence: int) -> Candidates:
        """Returns one sequence's candidates (views)."""
        return Candidates(*(one[sequence : sequence + 1] for one in vars(self).values()))

    def of(self, sequences: Ints, ranks: int | None = None) -> Candidates:
        """Returns some sequences' candidates, and of each row at most ``ranks``."""
        return Candidates(
            *(
                np.ascontiguousarray(one[sequences, :, :, :ranks])
                for one in vars(self).values()
            )
        )

    def valued(self, values: Float32s) -> Candidates:
        """Returns the same candidates with other log probabilities, of the same shape."""
        return replace(self, log_probs=values)

    def best_path(self) -> Ints:
        """Returns ``[sequences, heads]`` int64: the first choice, after that the next's."""
        found = np.empty(self.tokens.shape[:2], np.int64)
        every, row = np.arange(len(self)), np.zeros(len(self), np.int64)
        for head in range(self.heads):
            found[:, head] = self.tokens[every, head, row, 0]
            row = self.next_row[every, head, row, 0]
        return found

    def along(self, text: Ints) -> tuple[Ints, Float32s]:
        """Returns the candidates after each token of a text, the root's first.

        Args:
            text: ``[sequences, places]`` int64 tokens after the root; -1 where there is
                none.

        Returns:
            Tokens and log probabilities ``[sequences, heads or places, ranks]``, the fewer.
        """
        places = min(self.tokens.shape[1], text.shape[1])
        if self.tokens.shape[2] == 1:
            return self.tokens[:, :places, 0], self.log_probs[:, :places, 0]
        shape = (len(self), places, self.tokens.shape[3])
        tokens, log_probs = np.empty(shape, np.int64), np.empty(shape, np.float32)
        every, row = np.arange(len(self)), np.zeros(len(self), np.int64)
        for head in range(places):
            tokens[:, head] = self.tokens[every, head, row]
            log_probs[:, head] = self.log_probs[every, head, row]
            same = tokens[:, head] == text[:, head, None]
            following = self.next_row[every, head, row]
            row = np.where(same, following, 0).max(1)
        return tokens, log_probs
