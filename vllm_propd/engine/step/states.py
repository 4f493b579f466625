"""What one hook of a step hands to the next, in this order; each is made once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from vllm.v1.outputs import SamplerOutput

from vllm_propd.core.sizing.protocol import StepTimer
from vllm_propd.core.sizing.pruning_recall import PrunedStep
from vllm_propd.core.tree import Ints
from vllm_propd.engine.step.tree_step import TreeStep


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


@dataclass
class Verified:
    """What one step accepted.

    Attributes:
        output: the emitted tokens per request, in vLLM's form.
        final_row: ``[requests]`` int64 logits row of each request's last accepted node (or
            root): the next tree is drafted from its hidden state.
        accepted: int64 indices among the step's tree rows of the accepted nodes.
        drawn: ``[requests, depths]`` int64 logits row that each token was drawn from; -1
            where none was.
        put_out: ``[requests]`` int64 how many of its tokens each request puts out: none
            behind its end.
    """

    output: SamplerOutput
    final_row: Ints
    accepted: np.ndarray
    drawn: Ints
    put_out: Ints


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
