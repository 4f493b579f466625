"""What is drafted without the heads: from the text, from others', from the target's words.

One object holds these sources, for engines and for replays: what a text says itself
(``lookup``), what others have said (``suffix_memory``), and what the target has named
(``successors``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vllm_propd.core.drafting.candidates import Candidates
from vllm_propd.core.drafting.growth import LookedUp, grow_from
from vllm_propd.core.sources.lookup import LookupMatches, Lookups, Paths, TokenMatrix
from vllm_propd.core.sources.successors import (
    ReadTokens,
    Successors,
    SuccessorTable,
)
from vllm_propd.core.sources.suffix_memory import (
    NOTHING,
    NOTHING_RECALLED,
    Recalled,
    SuffixMemory,
)
from vllm_propd.core.tree import Bools, Float32s, Ints, TokenTree


class Texts(Protocol):
    """Sequences that drafts are wanted for, once a step's tokens stand in their texts."""

    @property
    def ids(self) -> list[str]:
        """``[sequences]`` request ids."""

    @property
    def tokens(self) -> TokenMatrix:
        """``[rows, width]`` int32 tokens, prompts included."""

    @property
    def rows(self) -> Ints:
        """``[sequences]`` int64 row of each one's text."""

    @property
    def lengths(self) -> Ints:
        """``[sequences]`` int64 tokens of each text."""

    @property
    def begins(self) -> Ints:
        """``[sequences]`` int64 where each answer begins, behind its prompt."""

    @property
    def outputs(self) -> list[list[int]]:
        """``[sequences]`` the tokens that each has put out."""

    @property
    def put_out(self) -> Ints:
        """``[sequences]`` int64 how many tokens each has put out in the step."""

    @property
    def roots(self) -> Ints:
        """``[sequences]`` int64 the last token of each."""

    @property
    def salts(self) -> Ints:
        """``[sequences]`` int64: texts of different salts never meet."""

    @property
    def sampled(self) -> Bools:
        """``[sequences]`` bool whether a request samples; else it is greedy."""

    @property
    def steered(self) -> Bools:
        """``[sequences]`` bool whether more than the target decides what a request says."""

    @property
    def chain(self) -> Bools:
        """``[sequences]`` bool whether the draft must be a single branch."""


Said = tuple[ReadTokens, npt.NDArray[np.integer], Float32s]
"""What the target has read in a step, ``[tokens, ranks]`` integer its best tokens after
each, and float32 the log of their shares (``SuccessorTable.see``)."""


@dataclass(frozen=True)
class Found:
    """What there is to draft without the heads.

    Attributes:
        matches: what the texts suggest; None: nothing.
        others: what others have said; None: that is not asked.
        successors: what the target has said before; None: nothing is kept of that.
    """

    matches: LookupMatches | None
    others: Recalled | None
    successors: Successors | None


Learned = tuple[SuffixMemory | None, SuccessorTable | None]
"""What is known of texts that have been read."""


class Sources:
    """Sources of drafts beside the heads, and what they have learned.

    Args:
        vocabulary: how many tokens the target knows.
        lookup: whether a text is searched for what it may say next.
        shared: whether others' texts are remembered.
        recycling: whether successors that the target has named are kept.
    """

    def __init__(self, vocabulary: int, lookup: bool, shared: bool, recycling: bool):
        self._lookups = Lookups(vocabulary) if lookup else None
        self._new: Callable[[], Learned] = lambda: (
            SuffixMemory(vocabulary) if shared else None,
            SuccessorTable(vocabulary) if recycling else None,
        )
        self._memory, self._table = self._new()

    def __bool__(self) -> bool:
        """Whether there is any."""
        return any((self._lookups, self._memory, self._table))

    def keep(self) -> None:
        """Keeps what is known of texts, for ``forget``; no request may be running."""
        kept = copy.deepcopy((self._memory, self._table))
        self._new = lambda: copy.deepcopy(kept)

    def forget(self) -> None:
        """Forgets what has been learned of texts since ``keep``, or since the begin."""
        self._memory, self._table = self._new()

    def see(self, texts: Texts) -> None:
        """Takes note of what a step has put out, where others are to know; every step."""
        if self._memory is not None and texts.ids:
            starts = texts.lengths - texts.put_out
            self._memory.see(
                texts.ids, texts.tokens, texts.rows, texts.begins, texts.lengths, starts,
                texts.salts, ~texts.steered, self._suggested(texts),
            )  # fmt: skip

    def _suggested(self, texts: Texts) -> Ints:
        """Returns what texts suggested before the step, if they were searched then."""
        if self._lookups is None:
            return NOTHING
        return self._lookups.suggested(texts.ids, texts.lengths - texts.put_out)

    def find(self, texts: Texts, said: Callable[[], Said]) -> Found | None:
        """Looks up what there is; None where that is nothing.

        Takes note of what the target has said in the step.

        Args:
            texts: the sequences.
            said: returns what the target has said in the step; called if that is kept.
        """
        if not texts.ids:
            return None
        matches = others = successors = None
        if self._memory is not None:
            others = self._memory.of(texts.tokens, texts.rows, texts.lengths, texts.salts)
        if self._table is not None:
            kind = np.where(texts.steered, -1, texts.sampled)
            self._table.see(*said(), kind, self._suggested(texts))
            roots, sampled = texts.roots, texts.sampled
            successors = self._table.after(roots, sampled, others or NOTHING_RECALLED)
        if self._lookups is not None:
            matches = self._lookups.find(texts.ids, texts.tokens, texts.rows, texts.lengths)
            if others is None and not matches.match.any():
                matches = None
        if matches is None and others is None and successors is None:
            return None
        return Found(matches, others, successors)

    def looked_up(
        self, texts: Texts, found: Found, first: Ints | None = None
    ) -> LookedUp | None:
        """Returns how texts may go on, and what that is worth; None: nothing says so.

        Args:
            texts: the sequences.
            found: what ``find`` has just returned of them.
            first: ``[sequences, heads]`` int64 the heads' first choices; None: no head has
                been asked.
        """
        if found.matches is None:
            return None
        assert self._lookups is not None
        path, best = found.matches.token, None
        if self._table is not None:
            best = self._table.best_along(texts.roots, path)
        if found.others is not None:
            theirs = found.others.best_along(path)
            best = theirs if best is None else np.where(theirs < 0, best, theirs)
        worth = self._lookups.worth(first, best)
        if found.others is None:
            return path, worth
        assert self._memory is not None
        return self._memory.suggest(found.others, path, worth)

    def trees(self, texts: Texts, found: Found, most: int) -> Sequence[TokenTree]:
        """Returns a tree for each sequence without asking the heads.

        Args:
            texts: the sequences.
            found: what ``find`` has just returned of them.
            most: the most nodes of each.
        """
        looked_up = self.looked_up(texts, found)
        if found.successors is None:
            assert looked_up is not None
            return Paths(*looked_up, most)
        count = len(texts.ids)
        nothing, sizes = Candidates.none(count), np.full(count, most)
        trees = grow_from(nothing, sizes, looked_up, found.successors)
        for row in np.flatnonzero(texts.chain).tolist():
            trees[row] = trees[row].first_path()
        return trees

    def end(self, request_id: str, answer: Sequence[int]) -> None:
        """Takes note that a request, or a session's turn, has ended with ``answer``."""
        if self._lookups is not None:
            self._lookups.end(request_id)
        if self._memory is not None:
            self._memory.end(request_id, answer)
