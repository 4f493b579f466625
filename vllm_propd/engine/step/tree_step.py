"""One step's trees: from the scheduler's flat draft lists to rows of the batch.

The scheduler knows drafts only as a list per request, which it may cut at the tail. Each
worker remembers the tree behind the list it proposed, takes the prefix that was
scheduled, and checks the tokens: the scheduled list is the only channel of a tree's size.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from vllm_propd.core.pruning import Edges, edges_of
from vllm_propd.core.sizing.pruning_recall import PrunedStep
from vllm_propd.core.tree import Ints, TokenTree, ancestor_masks
from vllm_propd.kernels.transfer import Arrays, Tensors


@dataclass
class StagedKV:
    """One layer's keys and values of all tree rows, until the accepted ones are known."""

    layer: Any
    kv_cache: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True)
class PlainRequests:
    """A step's requests without drafts.

    Attributes:
        request: ``[requests]`` int64 their indices in the batch.
        rows: ``[tokens]`` int64 their rows in the batch.
        starts: ``[requests + 1]`` int32 where each one's begin among these.
        longest: rows of the one that has most; 0 where there is none.
    """

    request: Ints
    rows: Ints
    starts: np.ndarray
    longest: int


Early = tuple[Ints, np.ndarray]
"""``[drafted]`` int64 ranks and float32 log probabilities, which an early head gives."""


@dataclass(frozen=True)
class TreeStep:
    """All trees of one step, their rows one after another, each root first.

    Attributes:
        trees: the drafted nodes, in batch order, before any pruning.
        request: ``[trees]`` index of each tree's request in the batch.
        first: ``[trees]`` each root's index among the tree rows.
        sizes: ``[trees]`` rows of each tree, the root counted.
        rows: ``[rows]`` each tree row's index in the batch.
        parent, depth, token: ``[rows]`` parent node in its tree, depth, token (-1 for
            roots).
        root_position: ``[trees]`` position of each root in its sequence.
        starts: ``[requests + 1]`` int64 where each request's rows begin in the batch.
        slots: per KV cache group ``[rows]`` int64: the cache slot of the position
            ``root + i`` at the i-th row of a tree, for the commit.
        here: what the step needs on the device, by name (see ``arrays``).
        staged: gets what the attention layers of this step leave for the commit.
        early: after pruning, what the early head said of all drafted nodes, if it is
            recorded.
        whole: after pruning, the step as it was; the lower half's layers staged there.
        kept: after pruning, ``[rows]`` each row's index in ``whole``.
        split: the step goes through two halves, and the trees are pruned between them.
    """

    trees: list[TokenTree]
    request: Ints
    first: Ints
    sizes: Ints
    rows: Ints
    parent: Ints
    depth: Ints
    token: Ints
    root_position: Ints
    starts: Ints
    slots: tuple[torch.Tensor, ...] = ()
    here: Tensors = field(default_factory=dict)
    staged: list[StagedKV] = field(default_factory=list)
    early: Early | None = None
    whole: TreeStep | None = None
    kept: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    split: bool = False

    @cached_property
    def masks(self) -> np.ndarray:
        """The ancestor bit matrix, ``[rows, words]``; steps of chains need none."""
        return ancestor_masks(self.parent, self.first, self.sizes)

    @cached_property
    def chained(self) -> bool:
        """Whether no tree branches and none is pruned.

        Such trees are attended to, and cached, as vLLM's own drafts are.
        """
        return not self.split and bool(np.array_equal(self.depth, self.node))

    @property
    def is_root(self) -> np.ndarray:
        """Whether each row is a root, ``[rows]`` bool."""
        return self.depth == 0

    @property
    def tree(self) -> Ints:
        """The number of each row's tree, ``[rows]`` int64."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    @property
    def node(self) -> Ints:
        """Each row's node number in its tree, ``[rows]`` int64; 0 for roots."""
        return np.arange(len(self.rows)) - np.repeat(self.first, self.sizes)

    @property
    def parent_row(self) -> Ints:
        """Each node's parent among the tree rows, ``[rows]`` int64; a root's is itself."""
        return np.repeat(self.first, self.sizes) + self.parent

    @cached_property
    def edges(self) -> Edges:
        """The edges from each drafted node to its parent, by tree rows."""
        return edges_of(self.parent_row, self.depth)

    @property
    def looked_up(self) -> np.ndarray:
        """Whether each drafted node was looked up in the text, ``[nodes]`` bool."""
        return np.concatenate(
            [
                np.zeros(len(tree), np.bool_) if tree.looked_up is None else tree.looked_up
                for tree in self.trees
            ]
        )

    @property
    def tokens(self) -> int:
        """The rows of the batch, without padding; other requests' are among them."""
        return int(self.starts[-1])

    @cached_property
    def plain(self) -> PlainRequests:
        """The requests without drafts. Those with drafts have no rows but their trees'."""
        lengths = np.diff(self.starts)
        request = np.delete(np.arange(len(lengths)), self.request)
        lengths = lengths[request]
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        rows = np.delete(np.arange(self.tokens), self.rows)
        return PlainRequests(request, rows, starts, int(lengths.max(initial=0)))

    def arrays(self) -> Arrays:
        """Returns what the device has to know of a step that is not a chain's."""
        return {
            "rows": self.rows,
            "drafted": self.rows[~self.is_root],
            "positions": self.positions(),
            "request": self.request,
            "plain_request": self.plain.request,
            "plain_rows": self.plain.rows,
            "plain_starts": self.plain.starts,
        }

    def positions(self) -> Ints:
        """Returns ``[rows]`` int64 each row's position in its sequence: root plus depth."""
        return np.repeat(self.root_position, self.sizes) + self.depth

    def root_rows(self, requests: int) -> Ints:
        """Returns ``[requests]`` each one's logits row: its root's, or its only row."""
        rows = np.ones(requests, np.int64)
        rows[self.request] = self.sizes
        return np.cumsum(rows) - rows

    def as_pruned(self, requests: list[str], places: list[int]) -> PrunedStep:
        """Returns what is left of a step, as it is graded when its text is known.

        Args:
            requests: ``[trees]`` whose trees these are.
            places: ``[trees]`` tokens that each had put out before the step.
        """
        whole = self.whole
        assert whole is not None
        kept = np.zeros(len(whole.rows), np.bool_)
        kept[self.kept] = True
        return PrunedStep(
            requests, places, whole.sizes, whole.token, whole.depth, whole.parent_row,
            np.concatenate([tree.score for tree in whole.trees]), kept,
        )  # fmt: skip

    def on_device(self, here: Tensors, slots: tuple[torch.Tensor, ...] = ()) -> TreeStep:
        """Returns the step as the device knows it; what was computed of it is kept.

        Args:
            here, slots: see ``TreeStep``.
        """
        sent = copy(self)
        vars(sent).update(here=here, slots=slots)
        return sent

    def keep(
        self,
        kept: np.ndarray,
        rows: Ints,
        staged: list[StagedKV] | None = None,
        early: Early | None = None,
    ) -> TreeStep:
        """Returns the step that is left after pruning.

        Args:
            kept: ``[rows]`` bool, closed under parents.
            rows: ``[kept rows]`` their places in the batch that goes on.
            staged: gets what its attention layers leave for the commit.
            early: see ``TreeStep``.
        """
        index = np.flatnonzero(kept)
        sizes = np.add.reduceat(kept, self.first, dtype=np.int64)
        first = np.cumsum(sizes) - sizes
        moved = np.cumsum(kept) - 1  # each kept row's new number
        parent = moved[self.parent_row[index]] - np.repeat(first, sizes)
        return TreeStep(
            trees=self.trees,
            request=self.request,
            first=first,
            sizes=sizes,
            rows=rows,
            parent=parent,
            depth=self.depth[index],
            token=self.token[index],
            root_position=self.root_position,
            starts=np.concatenate([[0], np.cumsum(self._lengths_left(sizes))]),
            staged=[] if staged is None else staged,
            early=early,
            whole=self,
            kept=index,
            split=True,
        )

    def _lengths_left(self, sizes: Ints) -> Ints:
        """Returns ``[requests]`` rows of each, where trees have other sizes."""
        lengths = np.diff(self.starts)
        lengths[self.request] = sizes
        return lengths

    @property
    def slot_rows(self) -> Ints:
        """``[rows]`` int64: the row before pruning whose slot each row keeps.

        A path of depth d has d + 1 rows, so a tree's first rows' slots are enough.
        """
        assert self.whole is not None
        return np.repeat(self.whole.first, self.sizes) + self.node


def _scheduled_tree(
    request_id: str, drafts: list[int], proposed: TokenTree | None
) -> TokenTree:
    """Returns the tree behind a scheduled draft list.

    Raises:
        RuntimeError: this worker drafted other tokens than the scheduler was given.
    """
    nodes = len(drafts)
    tokens = np.asarray(drafts, np.int64)
    if proposed is not None and np.array_equal(proposed.token[:nodes], tokens):
        return proposed.prefix(nodes)
    raise RuntimeError(
        f"request {request_id}: the scheduled drafts are not those this worker proposed "
        "(tensor-parallel ranks have diverged)"
    )


def build_step(
    scheduled: dict[str, list[int]],
    proposed: dict[str, TokenTree],
    request_index: dict[str, int],
    query_ends: np.ndarray,
    num_computed: np.ndarray,
    num_scheduled: np.ndarray,
    split: bool = False,
) -> TreeStep | None:
    """Returns this step's trees, or None where no request has drafts.

    Args:
        scheduled: request id to drafted tokens, as the scheduler cut them.
        proposed: request id to the tree drafted for it.
        request_index: request id to its index in the batch.
        query_ends: ``[requests]`` end of each request's rows in the batch.
        num_computed: ``[requests]`` tokens in the cache before this step.
        num_scheduled: ``[requests]`` rows of each request.
        split: see ``TreeStep``.
    """
    ids = [request_id for request_id, drafts in scheduled.items() if drafts]
    if not ids:
        return None
    ids.sort(key=request_index.__getitem__)
    trees = [_scheduled_tree(i, scheduled[i], proposed.get(i)) for i in ids]
    request = np.fromiter((request_index[i] for i in ids), np.int64, len(ids))
    sizes = np.fromiter((len(tree) + 1 for tree in trees), np.int64, len(trees))
    if not np.array_equal(num_scheduled[request], sizes):
        raise RuntimeError("a request was scheduled with drafts and more than its root")
    first = np.cumsum(sizes) - sizes
    total = int(sizes.sum())
    within = np.arange(total) - np.repeat(first, sizes)
    rows = np.repeat(query_ends[request] - sizes, sizes) + within
    parent, depth = np.zeros(total, np.int64), np.zeros(total, np.int64)
    token = np.full(total, -1, np.int64)
    drafted = within > 0
    parent[drafted] = np.concatenate([tree.parent for tree in trees])
    depth[drafted] = np.concatenate([tree.depth for tree in trees])
    token[drafted] = np.concatenate([tree.token for tree in trees])
    return TreeStep(
        trees=trees,
        request=request,
        first=first,
        sizes=sizes,
        rows=rows,
        parent=parent,
        depth=depth,
        token=token,
        root_position=num_computed[request].astype(np.int64),
        starts=np.concatenate([[0], query_ends]),
        split=split,
    )
