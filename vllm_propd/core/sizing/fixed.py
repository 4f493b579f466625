"""Trees of the configured size, whatever they cost."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_propd.core.drafting.growth import nodes_per_sequence
from vllm_propd.core.sizing.node_values import NodeValues
from vllm_propd.core.sizing.protocol import Choice, Drafts, StepLoad, StepRecord
from vllm_propd.core.sizing.pruning_recall import PrunedStep


class FixedSizing:
    """Gives all trees the configured size (``protocol.Sizing``).

    Args:
        nodes: nodes of a tree.
        token_budget: tokens that a step may hold (``max_num_batched_tokens``).
    """

    def __init__(self, nodes: int, token_budget: int):
        self.nodes, self.token_budget = nodes, token_budget

    def most(self, sequences: int) -> int:
        """Returns how many nodes to draft for each sequence; 0: do not draft."""
        return nodes_per_sequence(self.nodes, self.token_budget, sequences)

    def begin(self, began: float, load: StepLoad) -> FixedStep:
        """Begins a step, which nobody times."""
        return FixedStep(load)

    def leave_out(self, seconds: float) -> None:
        """Does nothing: nobody times the engine."""


@dataclass(frozen=True)
class FixedStep:
    """A step with trees of the configured size (``protocol.StepTimer``, ``Drafting``)."""

    load: StepLoad

    def verified(self, pruned: PrunedStep | None) -> FixedStep:
        """Learns nothing from the step."""
        return self

    def looks_up(self) -> bool:
        """Returns True. No texts are searched: trees of fixed size are the heads'."""
        return True

    def found_nothing(self, began: float) -> None:
        """Does nothing: searching has no price."""

    def asks_heads(self, looked_up: NodeValues | None) -> bool:
        """Returns True: the heads are always asked."""
        return True

    def plan(self, drafts: Drafts) -> Choice:
        """Chooses all nodes, to be pruned as the config says."""
        assert drafts.trees is not None
        return Choice(drafts.trees.sizes, None, True)

    def end(self, kept: int, emitted: int) -> StepRecord:
        """Returns what the step was, without times."""
        load = self.load
        return StepRecord(load.sequences, load.tokens, load.nodes, kept, emitted)
