"""What one hook of a step hands to the next, in this order; each is made once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_propd.core.sizing.protocol import StepTimer
from vllm_propd.core.sizing.pruning_recall import PrunedStep
from vllm_propd.core.tree import Ints
from vllm_propd.engine.step.tree_step import TreeStep
from vllm_propd.engine.step.verify import Verified


@dataclass(frozen=True)
class PreparedStep:
    """The step that runs next, as vLLM has prepared it; after pruning, what is left of it.

    Attributes:
        trees: the step's trees; None where no request has drafts.
        logits_indices: ``[logits rows]`` vLLM's own tensor of the rows whose logits it
            computes.
        root_row: ``[requests]`` int64 logits row of each request's root, or of its only
            row.
        timer: sizing's timer of this step.
    """

    trees: TreeStep | None
    logits_indices: torch.Tensor
    root_row: Ints
    timer: StepTimer

    @property
    def branching(self) -> TreeStep | None:
        """The step's trees; None if there are none, or only chains like vLLM's drafts."""
        return None if self.trees is None or self.trees.chained else self.trees


@dataclass(frozen=True)
class VerifiedStep:
    """What has become of a step once it is verified.

    Attributes:
        outcome: what was put out and accepted.
        root_row: see ``PreparedStep``.
        kept: how many nodes went through all layers.
        pruned: the step's trees, where a plan had them pruned: it is graded by them.
        timer: see ``PreparedStep``.
        logits: ``[logits rows, vocabulary]``; as the target has said them, where that is
            recycled.
    """

    outcome: Verified
    root_row: Ints
    kept: int
    pruned: PrunedStep | None
    timer: StepTimer
    logits: torch.Tensor | None
