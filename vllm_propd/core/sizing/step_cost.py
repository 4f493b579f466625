"""What a step costs: a measured table, kept current while serving (paper section 3.3).

A few timed steps give the table's shape: flat where weights fill a step, a staircase where
kernels work in tiles. A line would misprice both. While serving, least squares say how the
machine differs from its table now:

    T(n, c) = a * table(n) + b * c + d

for n tokens in a step that reads c tokens of context, with weights ``exp(-decay * age)``.
A step in two halves, of whose n tokens k are left after pruning, has the tables of both in
its place: ``lower(n) + upper(k)``. Drafts cost more than as many other tokens, for
verification, attention to trees, and splitting: ``e(kind)`` beside the rest, which is one
machine's, whatever it runs. A step of any kind teaches about the others. What a table
entry's neighbourhood still deviates is smoothed as in the paper,
``T_i <- (1 - alpha) T_i + alpha t_i``, and fades with age.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from vllm_propd.core.monotone import rising
from vllm_propd.core.tree import Float64s, Ints

CONTEXT_UNIT = 4096.0
"""Tokens of context that weigh as much in the fit as the shortest step of the table."""

PRIOR = np.diag([0.1, 1.0, 3.0, 0.02, 0.02, 0.02])
"""How much the fit trusts the table, in steps, by coefficient (a, b, d, and e by kind).

A machine grows slower (a) sooner than context grows dear (b) or its host slow (d); with one
kind of step all three would explain a surprise. A surprise while all steps are of one kind
is first laid to that kind (e): were it the machine, the next step of another kind would
show it; the other way round no other kind would be tried. But drafts make no step cheaper:
e is never below 0, and a step that is faster than that says that the machine is. Otherwise
a machine that was slow for a while would, to its table, still be, as long as all steps have
drafts; and these, seeming to save time, would be in all steps."""

SURPRISE, LEARNING, HASTE = 3.0, 0.1, 16.0
"""How surprising steps are taken in: a pause is no trend, yet a change is soon believed.

A step's time counts as at most SURPRISE usual errors away from its estimate. LEARNING
smooths what is usual. A step beyond that ages those before it as HASTE steps would: they
may be another machine's."""

LEAST_ERROR = 0.05
"""The least usual error, relative to the estimate."""

STALE = 0.1
"""How fast deviations fade, relative to the fit's steps: some sizes are seldom met."""


LEAST = 0.05
"""The least time that a fit gives, in units of the table's first: few steps fit badly."""

LEAST_S = 1e-9
"""The least seconds that a step counts as having taken: a clock may stand still."""

WHOLE = -1.0
"""Stands in place of the tokens that are left where a step is not split."""

BARE, CHAINS, TREES, SPLIT = 0, 1, 2, 3
"""Kinds of steps: without drafts; with paths, which are attended to as vLLM's own drafts;
with trees; with trees that are pruned."""

KINDS = 3
"""The number of kinds of steps beside bare ones."""


@njit(cache=True, nogil=True)
def _between(values, right, share):  # type: ignore[no-untyped-def]
    return values[right - 1] + share * (values[right] - values[right - 1])


@njit(cache=True, nogil=True)
def _place(tokens, count):  # type: ignore[no-untyped-def]
    """Returns the entry to the right of ``count``, and how far ``count`` is towards it.

    That is 0..1 from the entry to the left to that one; beyond the last, more than 1.
    """
    right = min(max(np.searchsorted(tokens, count), 1), len(tokens) - 1)
    before = tokens[right - 1]
    return right, max((count - before) / (tokens[right] - before), 0.0)


@njit(cache=True, nogil=True)
def _read(tokens, values, count):  # type: ignore[no-untyped-def]
    """Reads a table at ``count`` tokens; beyond the last entry the last slope goes on."""
    right, share = _place(tokens, count)
    return _between(values, right, share)


@njit(cache=True, nogil=True)
def _off(tokens, deviation, count):  # type: ignore[no-untyped-def]
    right, share = _place(tokens, count)
    return np.exp(_between(deviation, right, min(share, 1.0)))


@njit(cache=True, nogil=True)
def _by_table(tokens, tables, count, left):  # type: ignore[no-untyped-def]
    """Returns the seconds of a step by the tables alone."""
    if left == WHOLE:
        return _read(tokens, tables[0], count)
    return _read(tokens, tables[1], count) + _read(tokens, tables[2], left)


@njit(cache=True, nogil=True)
def _fitted(fit, table, context, kind):  # type: ignore[no-untyped-def]
    """Returns the fit's time of a step; all times are in units of the table's first."""
    common = fit[0] * table + fit[1] * context / CONTEXT_UNIT + fit[2]
    return max(common + (fit[2 + kind] if kind != BARE else 0.0), LEAST)


@njit(cache=True, nogil=True)
def _whole_steps(tokens, tables, fit, deviation, counts, kinds, context):  # type: ignore[no-untyped-def]
    """Estimates steps that are not split: ``[steps]`` seconds."""
    unit, found = tables[0, 0], np.empty(len(counts))
    for row, count in enumerate(counts):
        table = _read(tokens, tables[0], count) / unit
        fitted = _fitted(fit, table, context, kinds[row])
        found[row] = fitted * unit * _off(tokens, deviation[0], count)
    return found


@njit(cache=True, nogil=True)
def _split_steps(tokens, tables, fit, deviation, counts, lefts, context):  # type: ignore[no-untyped-def]
    """Estimates split steps: ``[steps, choices]`` seconds."""
    unit, found = tables[0, 0], np.empty((len(counts), len(lefts)))
    lower = np.array([_read(tokens, tables[1], count) for count in counts])
    for column, left in enumerate(lefts):
        upper, off = _read(tokens, tables[2], left), _off(tokens, deviation[1], left)
        for row in range(len(counts)):
            fitted = _fitted(fit, (lower[row] + upper) / unit, context, SPLIT)
            found[row, column] = fitted * unit * off
    return found


@njit(cache=True, nogil=True)
def _solve(known, wanted):  # type: ignore[no-untyped-def]
    """Solves ``known @ x = wanted``, in place; returns x."""
    size = len(wanted)
    for i in range(size):  # without pivots: the sums are positive definite
        for j in range(i + 1, size):
            share = known[j, i] / known[i, i]
            for k in range(i, size):
                known[j, k] -= share * known[i, k]
            wanted[j] -= share * wanted[i]
    for i in range(size - 1, -1, -1):
        for j in range(i + 1, size):
            wanted[i] -= known[i, j] * wanted[j]
        wanted[i] /= known[i, i]
    return wanted


@njit(cache=True, nogil=True)
def _refit(moments, target, features, seconds, weight, fades):  # type: ignore[no-untyped-def]
    """Takes a step into the sums, in place, and solves for a, b, d and e >= 0."""
    size = len(features)
    for i in range(size):
        target[i] = fades * target[i] + weight * features[i] * seconds
        for j in range(size):
            moments[i, j] = fades * moments[i, j] + weight * features[i] * features[j]
    known, wanted = moments + PRIOR, target + PRIOR[0]
    while True:
        fit = _solve(known.copy(), wanted.copy())
        least = size - KINDS + fit[size - KINDS :].argmin()
        if fit[least] >= 0.0:
            return fit
        # The others say what is left without it.
        known[least, :], known[:, least], wanted[least] = 0.0, 0.0, 0.0
        known[least, least] = 1.0


@njit(cache=True, nogil=True)
def _believed(error, usual):  # type: ignore[no-untyped-def]
    """Returns a relative error, cut to what is usual; updates what is usual, in place."""
    bound = SURPRISE * usual[0]
    met = min(abs(error), 4.0 * usual[0])
    usual[0] = max(usual[0] + LEARNING * (met - usual[0]), LEAST_ERROR)
    return min(max(error, -min(bound, 0.9)), bound)


@njit(cache=True, nogil=True)
def _take_in(  # type: ignore[no-untyped-def]
    tokens, tables, fit, deviation, moments, target, usual, decay, alpha,
    count, context, left, kind, seconds,
):  # fmt: skip
    """Updates fit, deviations and sums by a step's time, in place; returns the estimate.

    It is one kernel because every step pays for it, also where nothing is drafted.
    """
    unit = tables[0, 0]
    row, near = (0, count) if left == WHOLE else (1, left)
    table = _by_table(tokens, tables, count, left) / unit
    right, share = _place(tokens, near)
    share = min(share, 1.0)
    off = np.exp(_between(deviation[row], right, share))
    before = _fitted(fit, table, context, kind) * unit * off
    error = seconds / before - 1.0
    believed = _believed(error, usual)
    haste = 1.0 if believed == error else HASTE
    found = before * (1.0 + believed)
    features = np.zeros(3 + KINDS)
    features[:3] = table, context / CONTEXT_UNIT, 1.0
    if kind != BARE:
        features[2 + kind] = 1.0
    # Relative errors count alike: a long step must not outweigh many short ones.
    weight = (unit / before) ** 2
    fades = np.exp(-haste * decay)
    fit[:] = _refit(moments, target, features, found / unit, weight, fades)
    deviation *= np.exp(-STALE * decay)
    new = np.log(found / (_fitted(fit, table, context, kind) * unit))
    for entry, close in ((right - 1, 1.0 - share), (right, share)):
        deviation[row, entry] += alpha * close * (new - deviation[row, entry])
    return before


class StepCost:
    """Estimates step times.

    Args:
        tokens: ``[entries]`` int64 ascending, at least two: tokens of the timed steps.
        seconds: ``[entries]`` float64 times of these steps, without context.
        halves: ``[entries]`` times of the lower half, early head included, and of the
            upper half; None: no step is split.
        decay: lambda: a step of age 1 / decay weighs a third.
        alpha: share of a new time in its entry's deviation.

    Raises:
        ValueError: tokens do not ascend, or times are not above 0.
    """

    def __init__(
        self,
        tokens: Ints,
        seconds: Float64s,
        halves: tuple[Float64s, Float64s] | None = None,
        decay: float = 0.03,
        alpha: float = 0.1,
    ):
        if len(tokens) < 2 or (np.diff(tokens) <= 0).any():
            raise ValueError(f"a cost table needs ascending tokens, not {tokens.tolist()}")
        self.tokens = tokens.astype(np.float64)
        # Of whole steps, and where they may be split of their lower and upper halves.
        self._tables = np.stack([self._checked(one) for one in (seconds, *(halves or ()))])
        self.decay, self.alpha = decay, alpha
        self._moments = np.zeros_like(PRIOR)
        self._target = np.zeros(len(PRIOR))
        self._fit = np.zeros(len(PRIOR))
        self._fit[0] = 1.0
        # Of whole steps by their tokens, and of split ones by those that are left.
        self._deviation = np.zeros((2, len(tokens)))
        self._usual_error = np.array([LEAST_ERROR])

    def _checked(self, seconds: Float64s) -> Float64s:
        """Checks a table's times, and makes them rise: more tokens never cost less.

        Times that say so are noise, or a kernel's whim.
        """
        if (
            len(seconds) != len(self.tokens)
            or not (np.isfinite(seconds) & (seconds > 0)).all()
        ):
            raise ValueError(f"a cost table needs times above 0, not {seconds.tolist()}")
        return rising(seconds, np.ones_like(seconds))

    def estimate(
        self,
        tokens: Ints | Float64s,
        context: float = 0.0,
        left: Ints | None = None,
        kinds: Ints | None = None,
    ) -> Float64s:
        """Estimates the seconds of steps, float64.

        Args:
            tokens: ``[steps]`` tokens of each; of a mean step they may be no whole number.
            context: tokens of context that the step's sequences have together.
            left: ``[choices]`` how many tokens may be left after the lower half; None:
                the steps are not split.
            kinds: ``[steps]`` what whole steps hold: ``CHAINS``...; None: no drafts.

        Returns:
            ``[steps]`` for whole steps; ``[steps, choices]`` for split ones.
        """
        known = self.tokens, self._tables, self._fit, self._deviation, tokens
        found: Float64s
        if left is None:
            if kinds is None:
                kinds = np.full(len(tokens), BARE)
            found = _whole_steps(*known, kinds, float(context))
        else:
            assert len(self._tables) > 1, "no step is split"
            found = _split_steps(*known, left, float(context))
        return found

    def seconds_of(
        self,
        tokens: float,
        context: float = 0.0,
        left: float | None = None,
        kind: int = BARE,
    ) -> float:
        """Estimates the seconds of one step; see ``estimate``."""
        lefts = None if left is None else np.array([left])
        kinds = np.array([kind])
        return float(self.estimate(np.array([tokens]), context, lefts, kinds).item())

    def observe(
        self,
        tokens: int,
        context: float,
        seconds: float,
        left: int | None = None,
        kind: int = BARE,
    ) -> float:
        """Takes a step's time into account, and lets all earlier steps age.

        Returns:
            The seconds that had been estimated for the step; see ``estimate``.
        """
        # Floats for all: kernels are compiled for each type they meet.
        before: float = _take_in(
            self.tokens, self._tables, self._fit, self._deviation,
            self._moments, self._target, self._usual_error, self.decay, self.alpha,
            float(tokens), float(context), WHOLE if left is None else float(left),
            kind if left is None else SPLIT, max(float(seconds), LEAST_S),
        )  # fmt: skip
        return before
