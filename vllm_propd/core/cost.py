"""What a step costs: a measured table, kept current while serving (paper section 3.3).

A few timed steps give the table's shape: flat where weights fill a step, a staircase where
kernels work in tiles. A line would misprice both. While serving, least squares say how the
machine differs from its table now:

    T(n, c) = a * table(n) + b * c + d

for n tokens in a step that reads c tokens of context, with weights ``exp(-decay * age)``.
A step in two halves, of whose n tokens k are left after pruning, has the tables of both:
``lower(n) + upper(k)``. The rest is one machine's, whatever it runs: a step of either kind
teaches about the other. What a table entry's neighbourhood still deviates is smoothed as
in the paper, ``T_i <- (1 - alpha) T_i + alpha t_i``, and fades with age.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_propd.core.tree import Ints

Floats = npt.NDArray[np.float64]

CONTEXT_UNIT = 4096.0
"""Tokens of context that weigh as much in the fit as the shortest step of the table."""

PRIOR = np.diag([0.1, 1.0, 3.0])
"""Trust in the table, in steps: a machine grows slower (a) sooner than context dear (b) or
its host slow (d). With one kind of step all three would explain it."""

SURPRISE, LEARNING = 3.0, 0.1
"""A step counts as at most so many usual errors beside its estimate, and what is usual is
smoothed by so much: a pause is no trend; a machine that has changed is soon believed."""

STALE = 0.1
"""Deviations fade so much slower than the fit's steps: some sizes are seldom met."""


class StepCost:
    """Estimates step times.

    Args:
        tokens: ``[entries]`` int64 ascending, at least two: tokens of the timed steps.
        seconds: ``[entries]`` their times, without context.
        halves: the same of the lower half, early head included, and of the upper half;
            None: no step is split.
        decay: lambda: a step of age 1 / decay weighs a third.
        alpha: share of a new time in its entry's deviation.

    Raises:
        ValueError: a table that is not one.
    """

    def __init__(
        self,
        tokens: Ints,
        seconds: Floats,
        halves: tuple[Floats, Floats] | None = None,
        decay: float = 0.03,
        alpha: float = 0.1,
    ):
        if len(tokens) < 2 or (np.diff(tokens) <= 0).any():
            raise ValueError(f"a cost table needs ascending tokens, not {tokens.tolist()}")
        self.tokens = tokens.astype(np.float64)
        self.seconds = self._checked(seconds)
        self.halves = halves and (self._checked(halves[0]), self._checked(halves[1]))
        self.decay, self.alpha = decay, alpha
        self._unit = float(self.seconds[0])
        self._moments = np.zeros((3, 3))
        self._target = np.zeros(3)
        self._fit = np.array([1.0, 0.0, 0.0])
        # Of whole steps by their tokens, and of split ones by those that are left.
        self._deviation = np.zeros((2, len(tokens)))
        self._usual_error = 0.05

    def _checked(self, seconds: Floats) -> Floats:
        """More tokens never cost less: what says so is noise."""
        if (
            len(seconds) != len(self.tokens)
            or not (np.isfinite(seconds) & (seconds > 0)).all()
        ):
            raise ValueError(f"a cost table needs times above 0, not {seconds.tolist()}")
        return np.maximum.accumulate(seconds)

    def _interpolated(self, seconds: Floats, tokens: Floats) -> Floats:
        """Beyond the last entry its last slope goes on."""
        slope = (seconds[-1] - seconds[-2]) / (self.tokens[-1] - self.tokens[-2])
        beyond = np.maximum(tokens - self.tokens[-1], 0.0)
        return np.interp(tokens, self.tokens, seconds) + slope * beyond

    def _features(self, tokens: Floats, context: float, left: Floats | None) -> Floats:
        if left is None:
            table = self._interpolated(self.seconds, tokens)
        else:
            assert self.halves is not None
            lower, upper = self.halves
            table = self._interpolated(lower, tokens) + self._interpolated(upper, left)
        same = np.ones_like(table)
        return np.stack([table / self._unit, same * (context / CONTEXT_UNIT), same], -1)

    def estimate(
        self,
        tokens: Ints | Floats,
        context: float = 0.0,
        left: Ints | Floats | None = None,
    ) -> Floats:
        """Seconds of steps.

        Args:
            tokens: ``[...]`` in each; of a mean step they may be no whole number.
            context: tokens of context that the step's sequences have together.
            left: ``[...]``, broadcast with ``tokens``: how many are left after the lower
                half; None: the steps are not split.
        """
        at = tokens.astype(np.float64)
        remaining = None if left is None else left.astype(np.float64)
        fitted = self._features(at, context, remaining) @ self._fit
        near, deviation = (at, 0) if remaining is None else (remaining, 1)
        off = np.exp(np.interp(near, self.tokens, self._deviation[deviation]))
        # A fit of few steps may go below anything real.
        return np.maximum(fitted, 0.05) * off * self._unit

    def observe(
        self, tokens: int, context: float, seconds: float, left: int | None = None
    ) -> None:
        """Takes a step's time into account, and all others' age."""
        at = np.array([tokens], np.float64)
        remaining = None if left is None else np.array([left], np.float64)
        before = float(self.estimate(at, context, remaining)[0])
        seconds = before * (1.0 + self._believed(seconds / before - 1.0))
        features = self._features(at, context, remaining)[0]
        # Relative errors count alike: a long step must not outweigh many short ones.
        weight = (self._unit / before) ** 2
        fades = np.exp(-self.decay)
        self._moments = fades * self._moments + weight * np.outer(features, features)
        self._target = fades * self._target + weight * features * (seconds / self._unit)
        prior = PRIOR @ np.array([1.0, 0.0, 0.0])
        self._fit = np.linalg.solve(self._moments + PRIOR, self._target + prior)
        self._deviation *= np.exp(-STALE * self.decay)
        fitted = max(float(features @ self._fit), 0.05) * self._unit
        near, row = (tokens, 0) if left is None else (left, 1)
        right = int(np.clip(np.searchsorted(self.tokens, near), 1, len(self.tokens) - 1))
        span = self.tokens[right] - self.tokens[right - 1]
        share = float(np.clip((near - self.tokens[right - 1]) / span, 0.0, 1.0))
        found = np.log(seconds / fitted)
        for entry, close in ((right - 1, 1.0 - share), (right, share)):
            deviation = self._deviation[row, entry]
            self._deviation[row, entry] += self.alpha * close * (found - deviation)

    def _believed(self, error: float) -> float:
        """A relative error, cut to what is usual; and what is usual, made current."""
        bound = SURPRISE * self._usual_error
        met = min(abs(error), 4.0 * self._usual_error)
        self._usual_error += LEARNING * (met - self._usual_error)
        self._usual_error = max(self._usual_error, 0.05)
        return min(max(error, -min(bound, 0.9)), bound)
