"""An engine without a model: known answers, drafted and sized as in serving.

Drafting and sizing are the engine's own. What is replayed is what they see: the text, what
the target and the heads said of it (``simulation.answers``), and what steps take, by a
table of costs and a clock that runs by it. Nothing is known before it has come: sources and
prices learn as in an engine that has just started.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vllm_propd.core.drafting.candidates import Candidates
from vllm_propd.core.drafting.drafter import Drafter
from vllm_propd.core.drafting.next_trees import NONE, next_trees
from vllm_propd.core.sizing.controller import LOOKING_UP_S, DynamicSizing
from vllm_propd.core.sizing.planner import Price
from vllm_propd.core.sizing.protocol import StepLoad
from vllm_propd.core.tree import Ints, TokenTree
from vllm_propd.simulation.answers import Answer, Reading
from vllm_propd.simulation.offline_acceptance import accepted_path
from vllm_propd.simulation.planned_replay import PlannedReplay

EMPTY = np.empty(0, np.int64)
NOTHING = TokenTree(EMPTY, EMPTY, EMPTY, np.empty(0, np.float32))
"""The tree of a sequence without drafts."""


class Clock:
    """A clock that stands still until it is told what something took."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Returns the time in seconds."""
        return self.now

    def passes(self, seconds: float) -> None:
        """Lets so many seconds pass."""
        self.now += seconds


def replay_drafted(
    answers: Sequence[Answer],
    drafter: Drafter,
    sizing: Callable[[Clock], DynamicSizing],
    step: Price,
    draft: Price,
    batch_size: int,
) -> PlannedReplay:
    """Puts answers out, ``batch_size`` of them together.

    Where one ends the next begins; the replay is over where none is left to begin, so that
    the batch is always full and no answer is known before. Prompts take no time.

    Args:
        answers: at least ``batch_size``; with the heads' candidates, if sizing may ask
            heads.
        drafter: makes the trees; it learns.
        sizing: makes what sizes them, which runs by this clock; it does not prune.
        step: what steps take.
        draft: what asking the heads takes.
        batch_size: how many sequences run together.

    Raises:
        ValueError: too few answers have two tokens or more.
    """
    waiting = [one for one in answers if one.places > 1]
    if len(waiting) < batch_size:
        raise ValueError(
            f"{len(waiting)} recorded answers of two tokens or more are too few to replay "
            f"{batch_size} together"
        )
    clock, reading, waiting = Clock(), Reading(waiting[:batch_size]), waiting[batch_size:]
    planned = sizing(clock)
    steps = tokens = drafted = nodes = 0
    trees, price = [NOTHING] * batch_size, np.array([batch_size])
    emitted = np.ones(batch_size, np.int64)  # by the first step, with all prompts
    host_s = float(np.interp(batch_size, (1, 64), LOOKING_UP_S))

    def asked() -> Candidates:
        clock.passes(draft.estimate(price).item())
        return reading.candidates()

    going_on = True
    while going_on:
        chained = all((tree.parent == np.arange(len(tree))).all() for tree in trees)
        context, rows = int(reading.lengths.sum()), batch_size + nodes
        load = StepLoad(batch_size, rows, 0, context, chained=chained)
        timer = planned.begin(clock(), load)
        kinds = np.array([load.kind])
        clock.passes(step.estimate(np.array([rows]), context, kinds=kinds).item())
        drafting = timer.verified(None)
        found, most = NONE, planned.most(batch_size)
        if most:
            found = next_trees(drafter, drafting, reading, reading.said, asked, clock, most)
            clock.passes(host_s)
        drafting.end(nodes, int(emitted.sum()))
        trees = [
            found.trees[one].prefix(found.sizes[one]) if one in found.trees else NOTHING
            for one in reading.ids
        ]
        nodes = sum(map(len, trees))
        emitted = _accepted(trees, reading)
        reading.read(emitted)
        steps, tokens, drafted = steps + 1, tokens + int(emitted.sum()), drafted + nodes
        for row in np.flatnonzero(reading.at == reading.places).tolist():
            drafter.end(reading.ids[row], reading.outputs[row])
            going_on = going_on and bool(waiting)
            if going_on:
                reading.begin(row, waiting.pop(0))
    each, step_s = steps * batch_size, clock() / steps
    return PlannedReplay(each, tokens, drafted / each, drafted / each, step_s)


def _accepted(trees: Sequence[TokenTree], reading: Reading) -> Ints:
    """Returns ``[answers]`` int64 how many tokens a step puts out, the bonus included."""
    counts = [
        1 + len(accepted_path(tree, reading.rest(row))) for row, tree in enumerate(trees)
    ]
    left: Ints = np.minimum(counts, reading.places - reading.at)
    return left
