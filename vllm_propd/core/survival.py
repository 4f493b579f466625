"""What early pruning leaves of the acceptance that wide drafting adds.

Of a step that drafts n nodes and keeps m, the planner knows two bounds from what it thinks
of each node: *narrow*, tokens expected of the best m nodes alone, which a step without
pruning would have verified; and *wide*, of all n. How much of the difference survives
depends on how good the early head is, and hardly on n or m. So it is one number, learned
from what pruned steps put out.
"""

from __future__ import annotations

START = 0.4
"""Before anything is known. The demo's early heads keep 0.6 of what 64 nodes add to 16, and
0.3 of what 4 nodes add to 1. Too low a start would never try."""

TRUST = 2.0
"""Weight of that, in squared tokens: about 50 steps that hope for 0.2 tokens more."""

MEMORY = 2000.0
"""Steps after which a step's weight is a third."""


class Survival:
    """The share of *wide - narrow* that survives, 0..1."""

    def __init__(self, start: float = START, trust: float = TRUST):
        self.start, self.trust = start, trust
        self._square = self._product = 0.0

    @property
    def share(self) -> float:
        """Least squares, drawn towards ``start``."""
        product = self.trust * self.start + self._product
        return min(max(product / (self.trust + self._square), 0.0), 1.0)

    def observe(self, narrow: float, wide: float, accepted: int, sequences: int) -> None:
        """A pruned step.

        Args:
            narrow, wide: tokens expected beyond one for each sequence; see the module.
            accepted: tokens put out beyond one for each sequence.
            sequences: whose sum these are; the noise grows with their number.
        """
        hoped, fades = wide - narrow, 1.0 - 1.0 / MEMORY
        self._square = fades * self._square + hoped**2 / sequences
        self._product = fades * self._product + hoped * (accepted - narrow) / sequences
