"""Trees of the configured size, whatever they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_propd.core.drafting.growth import nodes_per_sequence
from vllm_propd.core.sizing.protocol import Choice, Drafts, StepLoad, StepRecord
from vllm_propd.core.sizing.pruning_recall import PrunedStep
from vllm_propd.core.tree import TokenTree


class FixedSizing:
    """Sizes that nothing moves.

    Args:
        nodes: of a tree.
        token_budget: tokens that a step may hold (``max_num_batched_tokens``).
    """

    def __init__(self, nodes: int, token_budget: int):
        self.nodes, self.token_budget = nodes, token_budget

    def most(self, sequences: int) -> int:
        """Nodes to draft for each sequence; 0: do not draft."""
        return nodes_per_sequence(self.nodes, self.token_budget, sequences)

    def begin(self, began: float, load: StepLoad) -> FixedStep:
        """A step has begun; nobody times it."""
        return FixedStep(load)


@dataclass(frozen=True)
class FixedStep:
    """A step of trees of the configured size, from its begin to its end."""

    load: StepLoad

    def verified(self, pruned: PrunedStep | None) -> FixedStep:
        """Nothing is learned of it."""
        return self

    def asks_heads(self, looked_up: Sequence[TokenTree]) -> bool:
        """Always."""
        return True

    def plan(self, drafts: Drafts) -> Choice:
        """All nodes, to be pruned as is configured."""
        sizes = np.array([len(tree) for tree in drafts.trees], np.int64)
        return Choice(sizes, None, True)

    def end(self, kept: int, emitted: int) -> StepRecord:
        """What the step was."""
        load = self.load
        return StepRecord(load.sequences, load.tokens, load.nodes, kept, emitted)
