"""How large the next step's trees are: where expected tokens per second are most.

The nodes of all sequences stand in one best-first order. Each cut of it is a plan; its
worth is what it is expected to give over the seconds it is expected to take (paper section
3.3, for the whole batch at once). With early pruning a plan is a pair: n nodes drafted, the
best m of them kept after the shallow layers. No node at all is a plan, too. What asking for
the drafts has taken is part of all plans' seconds: it is spent, whatever is verified.

What a plan gives is a mean of the sequences' tokens, that of order -2. (The paper's batch
has one sum.) All sequences wait for a step. Where a few of them gain and the rest wait
longer for it, more tokens come in a second, and yet the batch ends later than without
drafts: those that gained leave, and the others, which decide when it ends, have had as many
steps, and slower ones. The harmonic mean (order -1) makes the mean time per output token
least, were gains a new lot in each step; but a text that repeats itself goes on so, and
another one does not: with it batches of 16 ended 2% later than with order -2 (`make bench-
never`). Where all gain alike, and for one sequence, all means are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numba import njit

from vllm_propd.core.compiled import with_parts
from vllm_propd.core.sizing import step_cost
from vllm_propd.core.sizing.pruning_recall import PruningRecall
from vllm_propd.core.sizing.step_cost import BARE, CHAINS, TREES
from vllm_propd.core.tree import Bools, Float64s, Ints

MOST_TOKENS = 1 << 16
"""The most tokens that any step holds."""


class Price(Protocol):
    """Seconds of steps, as ``core.sizing.step_cost.StepCost`` estimates them."""

    def estimate(
        self,
        tokens: Ints,
        context: float = 0.0,
        left: Ints | None = None,
        kinds: Ints | None = None,
    ) -> Float64s:
        """Estimates seconds: ``[steps]`` for ``[steps]`` tokens, float64.

        With ``left``, the ``[choices]`` of tokens left after pruning, it is
        ``[steps, choices]``.
        """


def round_totals(most: int, captured: Sequence[int] = ()) -> Ints:
    """Returns the numbers of tokens that a planned step may have, ascending, int64.

    From 8 on they are four in each octave.

    Kernels prepare each number of rows that they have not met, and work in tiles: steps
    of all sizes would meet hundreds, and few of them gain anything by it.

    Args:
        most: the largest number of tokens.
        captured: ascending sizes of CUDA graphs, instead of all numbers up to the last of
            them: steps are padded to these, and would pay for more than they hold.
    """
    octaves = np.arange(4, 8)[None, :] << np.arange(1, 20)[:, None]
    totals = np.concatenate([np.arange(1, 8), octaves.ravel()])
    if len(captured):
        totals = np.concatenate([captured, totals[totals > captured[-1]]])
    return totals[totals <= most]


@njit(cache=True, nogil=True)
@with_parts(step_cost)
def _cuts(  # type: ignore[no-untyped-def]
    probability, tree, straight, sequences, totals, origin, most
):  # fmt: skip
    """Sorts the nodes, and lists the cuts of their order that a plan can choose from.

    With ``origin`` further tokens they are round numbers.

    Returns the nodes from best to worst; the cuts, as ascending numbers of nodes; for each
    cut the tokens that are expected beside the roots': their sum, and what it would be if
    all sequences had their mean of order -2; and the kind of step that it makes.

    A node is worth what it takes from its sequence's ``tokens ** -2``, which falls along a
    tree: parents are worth more.
    """
    worth, reached = np.empty(len(probability)), np.ones(sequences)
    for node in range(len(probability)):
        without = reached[tree[node]]
        reached[tree[node]] += probability[node]
        worth[node] = without**-2 - reached[tree[node]] ** -2
    order = np.arange(len(probability))
    if (worth[1:] > worth[:-1]).any():
        order = np.argsort(-worth, kind="mergesort")  # stable: parents come first
    low, high = np.searchsorted(totals, origin + 1), np.searchsorted(totals, origin + most)
    nodes = np.zeros(1 + max(high - low, 0) + (most > 0), np.int64)
    for i in range(low, high):
        nodes[1 + i - low] = totals[i] - origin
    if most > 0:
        nodes[-1] = most
    gained, fair = np.zeros(len(nodes)), np.zeros(len(nodes))
    kinds = np.full(len(nodes), BARE)
    sum_, left, before, paths = 0.0, float(sequences), 0, True
    for cut, count in enumerate(nodes):
        for node in order[before:count]:
            sum_ += probability[node]
            left -= worth[node]
            paths &= straight[node]
        gained[cut], before = sum_, count
        if count:
            kinds[cut] = CHAINS if paths else TREES
        if sequences:
            fair[cut] = sequences * (np.sqrt(sequences / left) - 1.0)
    return order, nodes, gained, fair, kinds


def _left(drafted: float, kept: float, share: float) -> float:
    """Returns what is left after pruning of the gain of drafted nodes.

    All of what the best nodes alone gain (``kept``), and ``share`` of what the others add.
    """
    return kept + share * (drafted - kept)


_left_inside = njit(cache=True, nogil=True)(_left)


@njit(cache=True, nogil=True)
def _rates(fair, whole, split, asked_s, share, sequences):  # type: ignore[no-untyped-def]
    """Returns the tokens per second of all plans, ``[cuts, 1 + cuts]``; -inf: no plan.

    Column 0 is without pruning, the others are by how many nodes are kept. Tokens are
    counted as if all sequences had the mean of order -2.
    """
    cuts, choices = split.shape
    rates = np.full((cuts, 1 + choices), -np.inf)
    for cut in range(cuts):
        rates[cut, 0] = (sequences + fair[cut]) / (whole[cut] + asked_s)
        for kept in range(1, min(cut, choices)):
            left = _left_inside(fair[cut], fair[kept], share)
            rates[cut, 1 + kept] = (sequences + left) / (split[cut, kept] + asked_s)
    return rates


@njit(cache=True, nogil=True)
def _sizes(tree, chosen, sequences):  # type: ignore[no-untyped-def]
    """Counts the chosen nodes of each sequence: ``[sequences]`` int64."""
    sizes = np.zeros(sequences, np.int64)
    for node in chosen:
        sizes[tree[node]] += 1
    return sizes


@dataclass(frozen=True)
class Batch:
    """The step to plan.

    Attributes:
        probability: ``[nodes]`` float64 that each node is accepted; within a tree never
            above its parent's, nor above that of a node grown before it.
        tree: ``[nodes]`` int64 each node's sequence; a tree's nodes stand as they grew.
        sequences: how many sequences have a root in the step.
        others: further tokens of the step, as of prompts.
        context: tokens of context of all sequences.
        budget: the most tokens that the step may have, roots and others included.
        straight: ``[nodes]`` bool whether each tree is a path up to this node; None: no
            tree is.
        asked_s: seconds that asking for the nodes has taken.
    """

    probability: Float64s
    tree: Ints
    sequences: int
    others: int = 0
    context: float = 0.0
    budget: int = 1 << 30
    straight: Bools | None = None
    asked_s: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What to draft and to keep.

    Attributes:
        sizes: ``[sequences]`` int64 nodes of each tree.
        keep: how many of all these nodes pruning is to leave; None: do not prune.
        tokens: tokens expected of the step, over all sequences.
        seconds: time that the step is expected to take, asking included.
        rate: what plans are compared by: the mean of order -2 of the sequences' tokens,
            times the sequences, per second of a step without its prompts.
        extra_s: how much longer the step is than the same one without nodes.
    """

    sizes: Ints
    keep: int | None
    tokens: float
    seconds: float
    rate: float
    extra_s: float = 0.0


@dataclass
class Planner:
    """Chooses plans; stays with the last one until others have been better for a while.

    Attributes:
        step: price of a step.
        recall: says what pruning leaves of acceptance; None: never prune.
        totals: ascending numbers of tokens that a step may have, beside a long prompt,
            before and after pruning; a step without nodes and one with all are possible as
            well.
        hysteresis: how much faster than the last plan others must have been, relatively,
            in sum over the steps since: noise does not move it in each step, and a small
            advantage that stays is taken.
        doubt: how much faster than none a plan must be. What a step without nodes gives is
            known; the best of many guesses is likely one of those that are too high.
    """

    step: Price
    recall: PruningRecall | None = None
    totals: Ints = field(default_factory=lambda: round_totals(MOST_TOKENS))
    hysteresis: float = 0.03
    doubt: float = 0.04
    _last: tuple[float, float | None] | None = field(default=None, init=False)
    _behind: float = field(default=0.0, init=False)

    def plan(self, batch: Batch) -> Plan:
        """Plans a step.

        The last plan is remembered by its nodes per sequence: the batch may grow or shrink.
        """
        taken = batch.sequences + batch.others
        most = min(len(batch.probability), max(0, batch.budget - taken))
        straight = batch.straight
        if straight is None:
            straight = np.zeros(len(batch.probability), np.bool_)
        # Beside a long prompt round totals would be far apart, and the step's is not round.
        origin = batch.sequences if batch.others > batch.sequences else taken
        order, nodes, gained, fair, kinds = _cuts(
            batch.probability, batch.tree, straight, batch.sequences, self.totals, origin,
            most,
        )  # fmt: skip
        whole, split = self._priced(nodes, taken, batch.context, kinds)
        prompts_s = self._prompts_s(batch, float(whole[0]))
        # Each is estimated on its own, beside a long prompt by extrapolation, and where all
        # steps have drafts from steps of long ago: yet no tree costs less than none.
        whole, split = np.maximum(whole, whole[0]), np.maximum(split, whole[0])
        share = 0.0
        if self.recall is not None:
            self.recall.fade()
            share = self.recall.share
        rate = _rates(
            fair, whole - prompts_s, split - prompts_s, batch.asked_s, share,
            batch.sequences,
        )  # fmt: skip
        cut, kept = self._chosen(rate, nodes, batch.sequences)
        keep = int(nodes[kept - 1]) if kept else None
        if batch.sequences:
            each = 1.0 / batch.sequences
            self._last = each * nodes[cut], None if keep is None else each * keep
        seconds = float(split[cut, kept - 1] if kept else whole[cut])
        left = _left(gained[cut], gained[kept - 1], share) if kept else gained[cut]
        return Plan(
            _sizes(batch.tree, order[: nodes[cut]], batch.sequences),
            keep,
            tokens=batch.sequences + float(left),
            seconds=seconds + batch.asked_s,
            rate=float(rate[cut, kept]),
            extra_s=seconds - float(whole[0]),
        )

    def _chosen(self, rate: Float64s, nodes: Ints, sequences: int) -> tuple[int, int]:
        """Returns the best plan's place; that of the last or the empty one, if as good."""
        best, nothing = divmod(int(rate.argmax()), rate.shape[1]), (0, 0)
        before = self._same_as_before(nodes, sequences)
        if before and rate[before] >= rate[nothing]:
            self._behind += rate[best] / rate[before] - 1.0
            if self._behind <= self.hysteresis:
                return before
        self._behind = 0.0
        return nothing if rate[nothing] >= rate[best] / (1.0 + self.doubt) else best

    def _prompts_s(self, batch: Batch, bare_s: float) -> float:
        """Returns what a step without nodes takes longer for the prompts in it, seconds.

        That time is due anyway. Were it part of the rate, each node would look cheap beside
        a long prompt, and steps to come, which its token saves, as long.

        Args:
            batch: the step to plan.
            bare_s: seconds of that step without nodes.
        """
        if not (batch.others and batch.sequences):
            return 0.0
        alone = self.step.estimate(np.array([batch.sequences]), batch.context)
        return max(bare_s - float(alone[0]), 0.0)

    def _priced(
        self, nodes: Ints, taken: int, context: float, kinds: Ints
    ) -> tuple[Float64s, Float64s]:
        """Prices all plans, in seconds.

        Returns ``[cuts]`` for whole steps and ``[cuts, kept cuts]`` for pruned ones.
        """
        count = taken + nodes
        whole = self.step.estimate(count, context, kinds=kinds)
        if self.recall is None:
            return whole, np.empty((len(nodes), 0))
        return whole, self.step.estimate(count, context, count)

    def _same_as_before(self, nodes: Ints, sequences: int) -> tuple[int, int] | None:
        """Returns the last plan's place among these plans; None where it has none."""
        if self._last is None:
            return None
        size, keep = self._last
        cut = int(np.abs(nodes - size * sequences).argmin())
        if keep is None:
            return cut, 0
        kept = int(np.abs(nodes - keep * sequences).argmin())
        return (cut, 1 + kept) if 0 < kept < cut else None
