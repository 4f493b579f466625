"""Arms in pairs: chunks of the same few prompts, whole wall clock, within seconds.

A machine that others share is faster and slower by the minute. So every arm generates a
chunk's prompts right after another, in an order that turns round each time, from the first
request to the last token, to where texts end by themselves. A chunk has a ratio to plain
vLLM for each arm; their median bears a chunk that something else fell into.

Engines that are alike differ, too, and all their lives: one process has better luck with
its memory than the next. More chunks of the same engines do not show it. So engines are
started anew for some of the chunks, and what a median could be is drawn from starts first.
And where plain vLLM runs twice, ratios are to both of its engines together: one that has
bad luck would make all others look fast. Its own two show how far alike engines are apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

RESAMPLED = 4000
"""How often chunks are drawn again, with replacement, to see what their median could be."""

PLAIN = ("plain", "control")
"""Arms of plain vLLM; the second is for those who ask for it."""

FEWEST = 6
"""The fewest chunks that can say how far their median is to be trusted."""


@dataclass(frozen=True)
class Timed:
    """One arm's part of a chunk.

    Attributes:
        tokens: put out, over all sequences.
        seconds: from the first request to the last token.
        heads_s: the part of ``seconds`` that was spent on asking the heads.
        in_vain_s: the part of ``heads_s`` that gave no sequence more than one token.
        decoded: of ``tokens``, those that decode steps put out.
        steps: decode steps, summed over sequences.
    """

    tokens: int
    seconds: float
    heads_s: float = 0.0
    in_vain_s: float = 0.0
    decoded: int = 0
    steps: int = 0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


class Chunks:
    """All chunks of a point.

    Args:
        plain: the arms that all are compared with; those that are there.
    """

    def __init__(self, plain: tuple[str, ...] = PLAIN):
        self._plain = plain
        self.done: list[dict[str, Timed]] = []
        self._starts: list[int] = []
        self._groups: list[int] = []

    def add(self, chunk: dict[str, Timed], start: int = 0, group: int = 0) -> None:
        """Adds a chunk that every arm has finished.

        Args:
            chunk: each arm's part, by the arm's name.
            start: which engines it ran on: those of the first start, of the second, ...
            group: which of the point's prompts it was about.
        """
        self.done.append(chunk)
        self._starts.append(start)
        self._groups.append(group)

    @property
    def starts(self) -> int:
        """How many starts of the engines the chunks are of."""
        return len(set(self._starts))

    def only(self, groups: Sequence[int]) -> Chunks:
        """Returns the chunks about some groups of prompts."""
        found = Chunks(self._plain)
        for chunk, start, group in zip(self.done, self._starts, self._groups, strict=True):
            if group in groups:
                found.add(chunk, start, group)
        return found

    def ratios(self, arm: str) -> list[float]:
        """Returns an arm's tokens/s over plain vLLM's, for each chunk."""
        return [chunk[arm].rate / _rate(self._plains(chunk)) for chunk in self.done]

    def ratio_of_sums(self, arm: str) -> float:
        """Returns an arm's tokens/s of all chunks together, over plain vLLM's."""
        plain = [part for chunk in self.done for part in self._plains(chunk)]
        return _rate([chunk[arm] for chunk in self.done]) / _rate(plain)

    def _plains(self, chunk: dict[str, Timed]) -> list[Timed]:
        return [chunk[name] for name in self._plain if name in chunk]

    def share(self, arm: str, of: str) -> float:
        """Returns the share of an arm's seconds in field ``of`` of ``Timed``, 0 to 1."""
        parts = [chunk[arm] for chunk in self.done]
        return sum(getattr(p, of) for p in parts) / sum(p.seconds for p in parts)

    def tokens_per_step(self, arm: str) -> float:
        """Returns new tokens of a sequence per decode step; 0 where there is no step."""
        parts = [chunk[arm] for chunk in self.done]
        return sum(p.decoded for p in parts) / max(sum(p.steps for p in parts), 1)

    def median(self, arm: str) -> float:
        """Returns the median of the chunks' ratios."""
        return median(self.ratios(arm))

    def quartiles(self, arm: str) -> tuple[float, float]:
        """Returns the lower and the upper quartile of the chunks' ratios."""
        return _quartiles(np.array(self.ratios(arm)))

    def quartiles_of_median(self, arm: str) -> tuple[float, float]:
        """Returns the quartiles that half of the drawn medians lie between (bootstrap).

        A drawn median is that of as many other chunks, of as many other starts of engines:
        starts are drawn with replacement, then their chunks.
        """
        ratios, starts = np.array(self.ratios(arm)), np.array(self._starts)
        of_start = [ratios[starts == start] for start in np.unique(starts)]
        sizes = np.array(list(map(len, of_start)))
        # As wide as the longest; what is beyond a start's own chunks is no number.
        table = np.full((len(of_start), sizes.max()), np.nan)
        for row, values in zip(table, of_start, strict=True):
            row[: len(values)] = values
        rng = np.random.default_rng(0)
        chosen = rng.integers(len(of_start), size=(RESAMPLED, len(of_start), 1))
        places = rng.integers(sizes[chosen], size=(*chosen.shape[:2], sizes.max()))
        again = np.where(
            np.arange(sizes.max()) < sizes[chosen], table[chosen, places], np.nan
        )
        return _quartiles(np.nanmedian(again.reshape(RESAMPLED, -1), axis=1))

    def are_enough(self, arms: Sequence[str], precision: float) -> bool:
        """Whether each median's quartiles are within ``precision`` of each other."""
        if len(self.done) < FEWEST:
            return False
        quartiles = [self.quartiles_of_median(arm) for arm in arms]
        return all(high - low <= precision * (low + high) / 2 for low, high in quartiles)


def _rate(parts: list[Timed]) -> float:
    """All tokens over all seconds."""
    return sum(part.tokens for part in parts) / sum(part.seconds for part in parts)


def _quartiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, (0.25, 0.75)).tolist()
    return low, high
