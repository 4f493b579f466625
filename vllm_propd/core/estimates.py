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

from vllm_propd.core.tree import Ints

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


class Estimator(Protocol):
    """What growth asks."""

    def observe(self, hit: Bools, log_probs: Floats) -> None:
        """Learns from graded candidates; both ``[samples, heads, ranks]``."""

    def values(self, log_probs: Floats) -> Floats:
        """``[sequences, heads, ranks]`` log probabilities for growth, from the heads'."""


RAREST = 1e-6
"""No candidate is worth less: a logarithm has to stay finite."""


def hits(tokens: Ints, truth: Ints) -> Bools:
    """Which candidates the text took.

    Args:
        tokens: ``[samples, heads, ranks]`` int64 candidates.
        truth: ``[samples, heads]`` int64 the text's tokens at the heads' places.

    Returns:
        ``[samples, heads, ranks]`` bool, at most one of a head.
    """
    return np.equal(tokens, truth[..., None])


class RankAccuracy:
    """``p_k^i``, smoothed.

    Args:
        start: ``[heads, ranks]`` from a calibration.
        alpha: share of one new sample.
    """

    def __init__(self, start: npt.NDArray[np.float64], alpha: float = 0.002):
        self.accuracy = np.asarray(start, np.float64).copy()
        self.alpha = alpha

    def observe(self, hit: Bools, log_probs: Floats | None = None) -> None:
        """Grades samples; see ``hits``. Head probabilities mean nothing here."""
        if len(hit):
            kept = (1.0 - self.alpha) ** len(hit)
            known = self.accuracy[:, : hit.shape[2]]  # a tiny vocabulary has fewer ranks
            known[:] = kept * known + (1.0 - kept) * hit.mean(0)

    def values(self, log_probs: Floats) -> Floats:
        """What growth takes: ``[sequences, heads, ranks]`` float32, never rising by rank.

        Args:
            log_probs: ``[sequences, heads, ranks]`` the heads'; their shape counts.
        """
        sequences, _, ranks = log_probs.shape
        known = np.minimum.accumulate(self.accuracy[:, :ranks], 1)
        logs = np.log(np.maximum(known, RAREST)).astype(np.float32)
        return np.tile(logs, (sequences, 1, 1))


EDGES = np.linspace(-8.0, 0.0, 17)
"""Bins of log probabilities; what is below the first belongs to the first."""


REFRESH = 32
"""Samples between two looks at the curve, which moves slowly."""


class Reliability:
    """The heads' own probabilities, corrected by what they have been worth.

    Head i is graded where the text lay within the candidates of the heads before it:
    what counts is a node whose parent is right.

    Args:
        heads: how many.
        memory: samples that a bin remembers, roughly.
        trust: samples that the heads' own word weighs at first.
    """

    def __init__(self, heads: int, memory: float = 5000.0, trust: float = 20.0):
        self.memory = memory
        centres = (EDGES[:-1] + EDGES[1:]) / 2
        self._total = np.full((heads, len(centres)), trust)
        # Log probabilities met in a bin are known by their mean, not by its middle.
        self._log_sum = trust * np.tile(centres, (heads, 1))
        self._hit = trust * np.tile(np.exp(centres), (heads, 1))
        self._curve = self.curve()
        self._news = 0

    def observe(self, hit: Bools, log_probs: Floats) -> None:
        """Grades samples.

        Args:
            hit: ``[samples, heads, ranks]``, see ``hits``.
            log_probs: ``[samples, heads, ranks]`` of the candidates; -inf: there is none.
        """
        if not len(hit):
            return
        bins = len(EDGES) - 1
        right = np.logical_or.reduce(hit, -1)
        graded = np.ones_like(right)
        graded[:, 1:] = np.logical_and.accumulate(right[:, :-1], 1)
        place = np.clip(np.searchsorted(EDGES, log_probs, "right") - 1, 0, bins - 1)
        place += bins * np.arange(hit.shape[1])[:, None]
        known = graded[..., None] & np.isfinite(log_probs)
        at = place[known]
        size = self._total.size

        def count(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            counted = np.bincount(at, values, size).astype(np.float64)
            return counted.reshape(self._total.shape)

        logs = np.clip(log_probs[known], EDGES[0], 0.0).astype(np.float64)
        new = count(np.ones(len(at)))
        fades = np.exp(-new / self.memory)
        self._total = fades * self._total + new
        self._log_sum = fades * self._log_sum + count(logs)
        self._hit = fades * self._hit + count(hit[known].astype(np.float64))
        self._news += len(hit)

    def curve(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """The reliability curve: log probability said, and found; both ``[heads, bins]``.

        Found ones never fall where said ones rise (pool-adjacent-violators).
        """
        said = self._log_sum / self._total
        found = np.stack(
            [_rising(h / t, t) for h, t in zip(self._hit, self._total, strict=True)]
        )
        return said, np.log(np.clip(found, RAREST, 1.0))

    def values(self, log_probs: Floats) -> Floats:
        """What growth takes: ``[sequences, heads, ranks]`` float32, never rising by rank.

        Args:
            log_probs: ``[sequences, heads, ranks]`` the heads', sorted best first.
        """
        if self._news >= REFRESH:
            self._curve, self._news = self.curve(), 0
        said, found = self._curve
        return np.stack(
            [
                np.interp(log_probs[:, head], said[head], found[head])
                for head in range(log_probs.shape[1])
            ],
            1,
        ).astype(np.float32)


def _rising(
    values: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """The nearest non-falling sequence in weighted least squares."""
    blocks: list[list[float]] = []
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        blocks.append([value, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            value, weight, count = blocks.pop()
            before = blocks[-1]
            total = before[1] + weight
            blocks[-1] = [
                (before[0] * before[1] + value * weight) / total, total, before[2] + count,
            ]  # fmt: skip
    return np.repeat([b[0] for b in blocks], [int(b[2]) for b in blocks])
