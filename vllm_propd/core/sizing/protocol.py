"""What an engine tells sizing of a step, and is told: one object leads to the next.

    timer = sizing.begin(began, load)           # the step has begun
    drafting = timer.verified(pruned)           # its text is known
    if drafting.looks_up(): ...                 # what do the texts suggest? (found_nothing)
    if drafting.asks_heads(looked_up): ...
    choice = drafting.plan(drafts)              # what the next step verifies
    record = drafting.end(kept, emitted)        # it is over, its drafting included

Nothing can be asked too early: who answers is there only when the answer is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from vllm_propd.core.sizing.node_values import NodeValues
from vllm_propd.core.sizing.pruning_recall import PrunedStep
from vllm_propd.core.sizing.step_cost import BARE, CHAINS, TREES
from vllm_propd.core.tree import Ints


@dataclass(frozen=True)
class StepLoad:
    """What a step holds.

    Attributes:
        sequences: how many sequences put out a token.
        tokens: all tokens, drafts and prompts included.
        others: tokens of prompts.
        context: tokens of context, over all sequences.
        waiting: tokens that prompts begun here leave to later steps.
        chained: whether its trees are paths, attended to as vLLM's own drafts.
        fresh: whether none of its sequences has put out a token yet: the engine may have
            waited for them.
    """

    sequences: int
    tokens: int
    others: int
    context: int
    waiting: int = 0
    chained: bool = False
    fresh: bool = False

    @property
    def nodes(self) -> int:
        """How many nodes the step's trees have together."""
        return self.tokens - self.others - self.sequences

    @property
    def teaches(self) -> bool:
        """Whether its time tells what nodes cost: not where most tokens are of prompts.

        These have no logits, and attend to more.
        """
        return self.others <= self.sequences + self.nodes

    @property
    def kind(self) -> int:
        """The kind of step by which prices differ (``core.sizing.step_cost``)."""
        return BARE if not self.nodes else CHAINS if self.chained else TREES


@dataclass
class StepRecord:
    """One step, for metrics and plots.

    Attributes:
        sequences, tokens: as in ``StepLoad``.
        nodes, kept: nodes of all trees, before and after early pruning.
        expected_tokens: tokens that the plan expected; 0 where there was no plan.
        emitted: tokens put out.
        estimated_s, measured_s: seconds of the step without drafting; 0 where sizes are
            fixed.
        heads_s: seconds of asking the heads after the step before, growing and planning
            included; 0 where sizes are fixed.
        in_vain_s: ``heads_s`` if no sequence has put out more than one token, else 0.
    """

    sequences: int
    tokens: int
    nodes: int
    kept: int
    emitted: int
    expected_tokens: float = 0.0
    estimated_s: float = 0.0
    measured_s: float = 0.0
    heads_s: float = 0.0
    in_vain_s: float = 0.0


@dataclass(frozen=True)
class Drafts:
    """What may be verified in the next step.

    Attributes:
        trees: trees of the heads' candidates and what is looked up, of at most
            ``Sizing.most`` nodes each; None where the heads were not asked.
        began: when drafting began, by the clock.
        looked_up: trees without the heads' candidates; None where nothing was looked up.
        texts: returns by request the tokens that each has put out; earlier steps are
            graded by them.
        asked: when asking the heads began, by the clock; None: when drafting began.
    """

    trees: NodeValues | None
    began: float
    looked_up: NodeValues | None = None
    texts: Callable[[], Mapping[str, list[int]]] = dict
    asked: float | None = None


@dataclass(frozen=True)
class Choice:
    """What to verify in a step.

    Attributes:
        sizes: ``[sequences]`` int64 nodes of each tree.
        keep: how many of all these nodes early pruning keeps; None: as configured.
        heads: whether the trees with the heads' candidates are verified; else those that
            were looked up.
    """

    sizes: Ints
    keep: int | None
    heads: bool


class Drafting(Protocol):
    """A step whose text is known: what comes next is planned, and what it took is told."""

    def looks_up(self) -> bool:
        """Whether what the texts suggest is to be looked up now."""

    def found_nothing(self, began: float) -> None:
        """Takes note of a search since ``began``, by the clock, that found nothing."""

    def asks_heads(self, looked_up: NodeValues | None) -> bool:
        """Whether the heads are to draft now, beside what is looked up."""

    def plan(self, drafts: Drafts) -> Choice:
        """Chooses what to verify in the next step."""

    def end(self, kept: int, emitted: int) -> StepRecord:
        """Ends the step, which has kept so many nodes and put out so many tokens."""


class StepTimer(Protocol):
    """A step that is running, until its text is known."""

    def verified(self, pruned: PrunedStep | None) -> Drafting:
        """Takes note that the step's text is known: all but drafting is over."""


class Sizing(Protocol):
    """How trees get their sizes: ``controller.DynamicSizing`` or ``fixed.FixedSizing``."""

    def most(self, sequences: int) -> int:
        """Returns how many nodes to draft for each sequence; 0: do not draft."""

    def begin(self, began: float, load: StepLoad) -> StepTimer:
        """Begins a step that holds ``load``; ``began`` is when, by the clock."""

    def leave_out(self, seconds: float) -> None:
        """Leaves so many seconds since the last step out of what the engine takes."""
