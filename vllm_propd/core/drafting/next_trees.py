"""The next trees, whoever asks: looked up, drafted if that pays, cut to size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_propd.core.drafting.candidates import Candidates
from vllm_propd.core.drafting.drafter import Drafter
from vllm_propd.core.sizing.node_values import NodeValues
from vllm_propd.core.sizing.protocol import Drafting, Drafts
from vllm_propd.core.sources.combined import Said, Texts
from vllm_propd.core.sources.lookup import Paths
from vllm_propd.core.tree import TokenTree


@dataclass(frozen=True)
class NextTrees:
    """What a step leaves to the next one.

    Attributes:
        trees: by request, the whole tree; the scheduler is given a prefix of each. One
            rank alone leaves out requests without nodes to be verified.
        sizes: by such a request, how many nodes are to be verified.
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


def values_of(trees: Sequence[TokenTree], most: int) -> NodeValues:
    """Returns what the best ``most`` nodes of each of some trees are worth."""
    if isinstance(trees, Paths):
        return NodeValues.of_scores(*trees.scores(most))
    return NodeValues.of(trees, most)


def texts_of(texts: Texts) -> dict[str, list[int]]:
    """Returns by request the tokens that each has put out."""
    return dict(zip(texts.ids, texts.outputs, strict=True))


def next_trees(
    drafter: Drafter,
    drafting: Drafting,
    texts: Texts,
    said: Callable[[], Said],
    candidates: Callable[[], Candidates],
    clock: Callable[[], float],
    most: int,
    extra: int = 0,
    ranks: int = 1,
) -> NextTrees:
    """Drafts trees for some sequences, and chooses how much of them is verified.

    Args:
        drafter: makes the trees.
        drafting: sizing's state of the step that has just been verified.
        texts: the sequences.
        said: gives what the target has said in the step; called only where it is kept.
        candidates: asks the heads; called only if that may pay.
        clock: gives the time in seconds, as sizing's does.
        most: the most nodes of each tree.
        extra: further nodes, which are drafted for a recording.
        ranks: how many tensor-parallel ranks the engine has.
    """
    trees: Sequence[TokenTree] = ()
    looked_up: Sequence[TokenTree] = ()
    values = without = None
    found = None
    drafter.sources.see(texts)  # what others are to know costs the same in every step
    began = clock()
    if drafter.sources and drafting.looks_up():
        found = drafter.sources.find(texts, said)
        if found is None:
            drafting.found_nothing(began)
    if found is not None:
        looked_up = drafter.sources.trees(texts, found, most + extra)
        without = values_of(looked_up, most)
    asked = clock()
    asks = drafting.asks_heads(without)
    if not (asks or looked_up) or not texts.ids:
        return NONE
    if asks:
        sizes = np.full(len(texts.ids), most + extra, np.int64)
        trees = drafter.draft(texts, candidates(), sizes, found)
        values = values_of(trees, most)
    drafts = Drafts(values, began, without, lambda: texts_of(texts), asked)
    choice = drafting.plan(drafts)
    chosen = trees if choice.heads else looked_up
    # Another rank's sizes count where there are several: each holds all trees.
    drafted = range(len(texts.ids)) if ranks > 1 else np.flatnonzero(choice.sizes).tolist()
    return NextTrees(
        {texts.ids[i]: chosen[i] for i in drafted},
        {texts.ids[i]: int(choice.sizes[i]) for i in drafted},
        choice.keep,
    )
