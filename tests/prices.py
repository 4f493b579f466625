"""Prices of steps that a test sets, in place of measured ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Line:
    """Seconds that grow by ``slope`` for each token beyond ``flat``.

    Of a pruned step's tokens, all pass ``below`` of the layers, the others what is left.
    """

    base: float
    slope: float = 0.0
    flat: int = 0
    below: float = 0.1

    def estimate(
        self,
        tokens: np.ndarray,
        context: float = 0.0,
        left: np.ndarray | None = None,
        kinds: np.ndarray | None = None,
    ) -> np.ndarray:
        if left is not None:
            tokens = self.below * tokens[:, None] + (1.0 - self.below) * left
        return self.base + self.slope * np.maximum(tokens - self.flat, 0)
