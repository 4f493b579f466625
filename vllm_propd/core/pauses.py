"""When drafting itself pauses: while no tree pays, its cost is saved too.

Whether trees pay is one worker's plan. The others see only that none was scheduled; so a
pause follows from scheduled lists alone, and all tensor-parallel ranks take it together.
"""

from __future__ import annotations

FIRST, LONGEST = 4, 64
"""Steps of a pause: it doubles while trees still do not pay after it."""

OTHER_LOAD = 1.25
"""A batch so many times larger, or smaller, than when a pause began is another one."""


class Pauses:
    """Whether to draft after this step."""

    def __init__(self) -> None:
        self._left = 0
        self._next = FIRST
        self._sequences = 0

    @property
    def drafting(self) -> bool:
        """Whether trees are to be drafted."""
        return not self._left

    def observe(self, sequences: int, drafted: bool, scheduled: bool) -> None:
        """One step.

        Args:
            sequences: in the step.
            drafted: there were trees for some of them.
            scheduled: some nodes of them were verified.
        """
        if scheduled:
            self._left, self._next = 0, FIRST
        elif drafted:
            self._left, self._next = self._next, min(2 * self._next, LONGEST)
            self._sequences = sequences
        elif self._left:
            larger = sequences > OTHER_LOAD * self._sequences
            smaller = sequences * OTHER_LOAD < self._sequences
            self._left = 0 if larger or smaller else self._left - 1
            self._next = FIRST if larger or smaller else self._next
