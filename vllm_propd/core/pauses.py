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

LOADS_PER_OCTAVE = 2
"""Batch sizes whose logarithms round alike are one load: so many of each doubling."""


@dataclass
class _Pause:
    """Steps left of one load's pause, and those that its next one takes."""

    left: int = 0
    next: int = FIRST


class Pauses:
    """Whether the heads draft after this step.

    Each load has pauses of its own: one sequence may pay where sixteen do not. What was
    found at a load holds when it comes again, as after every wave of new requests.
    """

    def __init__(self) -> None:
        self._of_load: dict[int, _Pause] = {}
        self._now = _Pause()

    @property
    def drafting(self) -> bool:
        """Whether the heads are to draft."""
        return not self._now.left

    def observe(self, sequences: int, drafted: bool, scheduled: bool) -> None:
        """One step.

        Args:
            sequences: in the step.
            drafted: the heads had drafted for some of them.
            scheduled: some nodes of these trees were verified.
        """
        load = round(LOADS_PER_OCTAVE * log2(max(sequences, 1)))
        self._now = pause = self._of_load.setdefault(load, _Pause())
        if scheduled:
            pause.left, pause.next = 0, max(pause.next // 2, FIRST)
        elif drafted:
            pause.left, pause.next = pause.next, min(2 * pause.next, LONGEST)
        elif pause.left:
            pause.left -= 1
