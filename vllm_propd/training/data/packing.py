"""The order in which sequences lie, so that windows hold whole ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]


def packed(lengths: Numbers, room: int) -> Numbers:
    """Orders sequences so that windows of ``room`` tokens hold as many whole ones as fit.

    First-fit decreasing: each goes where it fits, the longest first.

    Args:
        lengths: ``[sequences]`` int64 tokens of each.
        room: tokens of a window.

    Returns:
        ``[sequences]`` int64, their numbers, window by window.
    """
    left = np.full(len(lengths), room)
    window = np.empty(len(lengths), np.int64)
    for sequence in np.argsort(-lengths, kind="stable"):
        fits = left >= lengths[sequence]
        # A longer one than any window has one of its own.
        window[sequence] = at = fits.argmax() if fits.any() else (left == room).argmax()
        left[at] -= lengths[sequence]
    return np.argsort(window, kind="stable")
