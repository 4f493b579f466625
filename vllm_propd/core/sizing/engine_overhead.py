"""The engine's own time between steps: scheduling, and its part of texts and drafts."""

from __future__ import annotations

from collections import deque
from statistics import median

WINDOW = 31
"""How many gaps, and differences of neighbouring gaps, the medians are taken of."""

AFRESH = 8
"""After how many gaps their median is taken again: every step waits for it."""


class EngineOverhead:
    """Gaps between steps, and what drafting adds to them.

    Attributes:
        extra: seconds by which a gap is longer where the step before it has drafted. Known
            from neighbours of which one has and one has not: any two others may be of
            another load.
        plain: seconds of a gap where nothing is drafted; 0 before any gap.
    """

    def __init__(self) -> None:
        self._found: deque[tuple[bool, float]] = deque(maxlen=WINDOW)
        self._differences: deque[float] = deque(maxlen=WINDOW)
        self._gaps = 0
        self.extra = self.plain = 0.0

    def add(self, drafted: bool, seconds: float) -> None:
        """Adds the gap between two steps.

        Args:
            drafted: whether the step before the gap has drafted trees.
            seconds: time from that step's end to the next one's begin.
        """
        if self._found and self._found[-1][0] is not drafted:
            longer = seconds - self._found[-1][1]
            self._differences.append(longer if drafted else -longer)
            self.extra = max(median(self._differences), 0.0)
        self._found.append((drafted, seconds))
        self._gaps += 1
        if self._gaps <= WINDOW or self._gaps % AFRESH == 0:
            plain = [s - self.extra if drafted else s for drafted, s in self._found]
            self.plain = max(median(plain), 0.0)
