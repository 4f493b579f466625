"""When the heads pause: while their trees do not pay, the cost of drafting is saved too.

Whether trees pay is one worker's plan. The others see only what was scheduled, and of which
trees; a pause follows from that alone, and all tensor-parallel ranks take it together.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

FIRST, LONGEST = 4, 64
"""Steps of a pause: the next one doubles with each tree that does not pay, and halves with
each that is verified. One that seemed to pay once is no reason to try again soon."""

LOADS_PER_OCTAVE, SHARES = 2, 3
"""Batch sizes whose logarithms round alike are one load: so many of each doubling; and so
many shares of sequences are told apart."""


@dataclass
class _Pause:
    """Steps left of one load's pause, and those that its next one takes."""

    left: int = 0
    next: int = FIRST


class Pauses:
    """Whether the heads draft after a step.

    Each load has pauses of its own: one sequence may pay where sixteen do not; and so has
    each share of sequences whose texts suggest something without the heads. What was found
    at a load holds when it comes again, as after every wave of new requests.
    """

    def __init__(self) -> None:
        self._of_load: dict[tuple[int, int], _Pause] = {}
        self._now = _Pause()

    def asks(self, sequences: int, share: float = 0.0) -> bool:
        """Whether the heads are to draft now; in each step once.

        Args:
            sequences: in the step.
            share: of them need no heads, 0..1.
        """
        load = round(LOADS_PER_OCTAVE * log2(max(sequences, 1)))
        level = min(int(SHARES * share), SHARES - 1)
        self._now = pause = self._of_load.setdefault((load, level), _Pause())
        if pause.left:
            pause.left -= 1
            return False
        return True

    def observe(self, paid: bool) -> None:
        """What became of trees for which the heads had been asked.

        Args:
            paid: some of their nodes were verified.
        """
        pause = self._now
        if paid:
            pause.left, pause.next = 0, max(pause.next // 2, FIRST)
        else:
            pause.left, pause.next = pause.next, min(2 * pause.next, LONGEST)
