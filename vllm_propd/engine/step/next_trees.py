"""The next trees, whatever runner asks: looked up, drafted if that pays, cut to size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from vllm_propd.core.sizing.protocol import Drafting, Drafts
from vllm_propd.core.tree import TokenTree
from vllm_propd.engine.step.draft_batch import DraftBatch
from vllm_propd.engine.step.propose import MedusaTreeProposer


@dataclass(frozen=True)
class NextTrees:
    """What a step leaves to the next one.

    Attributes:
        trees: by request, the whole tree; the scheduler is given a prefix of each.
        sizes: by request, how many nodes are to be verified.
        keep: how many of all these nodes early pruning keeps; None: as configured.
    """

    trees: dict[str, TokenTree]
    sizes: dict[str, int]
    keep: int | None = None

    def drafts(self, request_ids: list[str]) -> list[list[int]]:
        """Returns ``[requests]`` the tokens that the scheduler is given, perhaps none.

        Args:
            request_ids: ids of the batch's requests.
        """
        return [
            self.trees[i].token[: self.sizes[i]].tolist() if i in self.trees else []
            for i in request_ids
        ]


NONE = NextTrees({}, {})


def next_trees(
    drafter: MedusaTreeProposer,
    drafting: Drafting,
    batch: DraftBatch,
    hidden_states: Callable[[], torch.Tensor],
    began: float,
    most: int,
    extra: int = 0,
) -> NextTrees:
    """Drafts trees for some sequences, and chooses how much of them is verified.

    Args:
        drafter: holds the heads.
        drafting: sizing's state of the step that has just been verified.
        batch: the sequences.
        hidden_states: gives ``[sequences, hidden]``, where each sequence's last token was
            predicted; called only if the heads are asked.
        began: when drafting did, the sequences' texts included, by ``time.perf_counter``.
        most: the most nodes of each tree.
        extra: further nodes, which are drafted for a recording.
    """
    trees: list[TokenTree] = []
    looked_up: list[TokenTree] = []
    if (found := drafter.look_up(batch)) is not None:
        sizes = np.full(len(batch.ids), most + extra, np.int64)
        looked_up = drafter.looked_up_trees(found, sizes)
    first = [tree.prefix(most) for tree in looked_up]
    asks = drafting.asks_heads(first)
    if not (asks or looked_up) or not batch.ids:
        return NONE
    if asks:
        sizes = np.full(len(batch.ids), most + extra, np.int64)
        trees = drafter.draft(batch, hidden_states(), sizes, found)
    texts = dict(zip(batch.ids, batch.outputs, strict=True))
    choice = drafting.plan(
        Drafts([tree.prefix(most) for tree in trees], began, first, texts)
    )
    chosen = trees if choice.heads else looked_up
    return NextTrees(
        dict(zip(batch.ids, chosen, strict=True)),
        dict(zip(batch.ids, choice.sizes.tolist(), strict=True)),
        choice.keep,
    )
