"""A step whose trees have been pruned: what is left, on the device and on the host."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_propd.engine.step.tree_step import Early, StagedKV, TreeStep
from vllm_propd.kernels.transfer import to_host

if TYPE_CHECKING:
    from vllm_propd.kernels.pruning_triton import DeviceTreeBatch


class Pruned:
    """Holds the rows that go on.

    The host knows how many there are, and need not know which: it can send the upper half
    on its way first. ``left`` waits until the lower one is over.

    Args:
        step: the trees as they were.
        kept: ``[kept]`` int64 which of their rows go on, ascending; on the device.
        tree_batch: the trees as they were, on a GPU.
        early: what the early head said of them, if it is recorded.

    Attributes:
        rows: ``[going on]`` int64 which rows of the batch do, ascending; on the device.
        moved: ``[tokens]`` int64 each batch row's new place, if it goes on; likewise.
        staged: what the upper half's attention leaves for the commit.
    """

    def __init__(
        self,
        step: TreeStep,
        kept: torch.Tensor,
        tree_batch: DeviceTreeBatch | None = None,
        early: Early | None = None,
    ):
        self.step, self.kept, self.tree_batch, self.early = step, kept, tree_batch, early
        self.staged: list[StagedKV] = []
        self._fetched = to_host(kept)
        going_on = step.here["rows"][kept]
        self.rows = torch.cat([step.here["plain_rows"], going_on]).sort().values
        every = torch.arange(step.tokens, device=kept.device)
        self.moved = torch.searchsorted(self.rows, every)

    @cached_property
    def left(self) -> TreeStep:
        """The step that is left, as the host knows it; waits until it does."""
        kept = np.zeros(len(self.step.rows), np.bool_)
        kept[self._fetched()] = True
        rows, gone = self.step.rows[kept], self.step.rows[~kept]
        moved = rows - np.searchsorted(gone, rows)
        return self.step.keep(kept, moved, self.staged, self.early)
