"""What a candidate is worth: two estimators of acceptance, learning from the text.

``RankAccuracy`` is the paper's ``p_k^i``: how often head i's candidate of rank k is the
truth, smoothed exponentially (section 3.3). ``Reliability`` takes the step's own head
probabilities and learns what they are worth: a reliability curve for each head.

Both are graded on every candidate against the tokens that the text took later, drafted or
not: what a tree happened to hold does not censor them.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
from numba import njit

from vllm_propd.core.monotone import rising
from vllm_propd.core.tree import Bools, Float32s, Float64s, Ints


class Estimator(Protocol):
    """What tells growth how probable the heads' candidates are."""

    def observe(self, hit: Bools, log_probs: Float32s) -> None:
        """Learns from graded candidates.

        Args:
            hit: ``[samples, heads, ranks]`` bool whether the text took each candidate.
            log_probs: ``[samples, heads, ranks]`` float32 what the heads said of it.
        """

    def values(self, log_probs: Float32s) -> Float32s:
        """Turns the heads' log probabilities into those that growth takes.

        Both are ``[sequences, heads, (rows,) ranks]`` float32.
        """


RAREST = 1e-6
"""The least probability of a candidate: its logarithm has to stay finite."""


def hits(tokens: Ints, truth: Ints) -> Bools:
    """Returns which candidates the text took.

    Args:
        tokens: ``[samples, heads, ranks]`` int64 candidates.
        truth: ``[samples, heads]`` int64 the text's tokens at the heads' places.

    Returns:
        ``[samples, heads, ranks]`` bool, at most one of a head.
    """
    return np.equal(tokens, truth[..., None])


class RankAccuracy:
    """The paper's ``p_k^i``: how often each rank of each head is right, smoothed.

    Args:
        start: ``[heads, ranks]`` float64 shares from a calibration.
        alpha: share of one new sample.
    """

    def __init__(self, start: npt.NDArray[np.float64], alpha: float = 0.002):
        self.accuracy = np.asarray(start, np.float64).copy()
        self.alpha = alpha

    def observe(self, hit: Bools, log_probs: Float32s | None = None) -> None:
        """Learns from samples; see ``hits``. What the heads said means nothing here."""
        if len(hit):
            kept = (1.0 - self.alpha) ** len(hit)
            known = self.accuracy[:, : hit.shape[2]]  # a tiny vocabulary has fewer ranks
            known[:] = kept * known + (1.0 - kept) * hit.mean(0)

    def values(self, log_probs: Float32s) -> Float32s:
        """Returns float32 log probabilities for growth; they never rise along the ranks.

        Args:
            log_probs: ``[sequences, heads, (rows,) ranks]`` the heads'; only their shape,
                which is that of what is returned, counts.
        """
        known = np.minimum.accumulate(self.accuracy[:, : log_probs.shape[-1]], 1)
        logs = np.log(np.maximum(known, RAREST)).astype(np.float32)
        by_rank = logs[:, None] if log_probs.ndim > 3 else logs
        return np.ascontiguousarray(np.broadcast_to(by_rank, log_probs.shape))


EDGES = np.linspace(-8.0, 0.0, 17)
"""The edges of bins of log probabilities; what is below the first bin belongs to it."""


MEASURED = 500.0
"""The most samples that a bin's measurement in training weighs: other text may follow."""

REFRESH = 32
"""The number of samples after which the curve, which moves slowly, is made anew."""


@njit(cache=True, nogil=True)
def counted(hit, log_probs):  # type: ignore[no-untyped-def]
    """Counts graded candidates by head and bin.

    Args:
        hit: ``[samples, heads, ranks]`` bool, see ``hits``.
        log_probs: ``[samples, heads, ranks]`` float32 what the heads said of them.

    Returns:
        ``[3, heads, bins]`` float64: how many, the sum of their log probabilities, and how
        many were right.
    """
    samples, heads, ranks = hit.shape
    count = np.zeros((3, heads, len(EDGES) - 1))
    for sample in range(samples):
        for head in range(heads):
            for rank in range(ranks):
                said = log_probs[sample, head, rank]
                if np.isfinite(said):
                    place = np.searchsorted(EDGES[1:-1], said, side="right")
                    count[0, head, place] += 1.0
                    count[1, head, place] += min(max(said, EDGES[0]), 0.0)
                    count[2, head, place] += hit[sample, head, rank]
            if not hit[sample, head].any():
                break  # the next head's parent is not what the text took
    return count


@njit(cache=True, nogil=True)
def _by_curves(said, found, log_probs):  # type: ignore[no-untyped-def]
    """Reads each head's curve at its log probabilities; beyond its ends it is flat."""
    samples, heads, _ = log_probs.shape
    values = np.empty(log_probs.shape, np.float32)
    for sample in range(samples):
        for head in range(heads):
            values[sample, head] = np.interp(
                log_probs[sample, head], said[head], found[head]
            )
    return values


class Reliability:
    """The heads' own probabilities, corrected by what they have been worth.

    Head i is graded where the text lay within the candidates of the heads before it:
    what counts is a node whose parent is right.

    Args:
        heads: how many heads there are.
        memory: samples that a bin remembers, roughly.
        trust: samples that the heads' own word weighs at first.
        measured: ``[3, heads, bins]`` float64 what training has counted (``counted``);
            None: nothing.
    """

    def __init__(
        self,
        heads: int,
        memory: float = 5000.0,
        trust: float = 20.0,
        measured: Float64s | None = None,
    ):
        self.memory = memory
        centres = (EDGES[:-1] + EDGES[1:]) / 2
        self._total = np.full((heads, len(centres)), trust)
        # Log probabilities met in a bin are known by their mean, not by its middle.
        self._log_sum = trust * np.tile(centres, (heads, 1))
        self._hit = trust * np.tile(np.exp(centres), (heads, 1))
        if measured is not None:
            weight = np.minimum(1.0, MEASURED / np.maximum(measured[0], 1.0))
            self._total += weight * measured[0]
            self._log_sum += weight * measured[1]
            self._hit += weight * measured[2]
        self._curve = self.curve()
        self._news = 0

    def observe(self, hit: Bools, log_probs: Float32s) -> None:
        """Learns from graded samples.

        Args:
            hit: ``[samples, heads, ranks]``, see ``hits``.
            log_probs: ``[samples, heads, ranks]`` what the heads said of the candidates;
                -inf: there is no candidate.
        """
        if not len(hit):
            return
        new, logs, right = counted(hit, log_probs)
        fades = np.exp(-new / self.memory)
        self._total = fades * self._total + new
        self._log_sum = fades * self._log_sum + logs
        self._hit = fades * self._hit + right
        self._news += len(hit)

    def curve(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Returns the reliability curve: log probabilities said, and those found true.

        Both are ``[heads, bins]`` float64. Found ones never fall where said ones rise
        (pool-adjacent-violators).
        """
        said = self._log_sum / self._total
        found = np.stack(
            [rising(h / t, t) for h, t in zip(self._hit, self._total, strict=True)]
        )
        return said, np.log(np.clip(found, RAREST, 1.0))

    def values(self, log_probs: Float32s) -> Float32s:
        """Returns float32 log probabilities for growth; they never rise along the ranks.

        Args:
            log_probs: ``[sequences, heads, (rows,) ranks]`` the heads', sorted best first;
                what is returned has the same shape.
        """
        if self._news >= REFRESH:
            self._curve, self._news = self.curve(), 0
        by_head = log_probs.reshape(*log_probs.shape[:2], -1)
        values: Float32s = _by_curves(*self._curve, by_head)
        return values.reshape(log_probs.shape)
