"""Early pruning's kernels against float64, and the choice on the device against the host's.

See ``test_tree_attention_triton.py`` for where they run.
"""

from __future__ import annotations

import cores  # noqa: F401 - before numba counts them
import numpy as np
import pytest
import torch

from vllm_propd.core.pruning import edges_of, keep_best_paths
from vllm_propd.core.tree import Ints, ancestor_masks
from vllm_propd.kernels.pruning_triton import DeviceTreeBatch, count_larger, relative_mass

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MOST_ERROR = 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocabulary", [1, 100, 9001])
def test_children_are_compared_with_their_parents_logits(
    vocabulary: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(vocabulary)
    # As an output layer leaves it: a slice of padded rows.
    logits = (4 * torch.randn(5, vocabulary + 7)).to(DEVICE, dtype)[:, :vocabulary]
    place = torch.tensor([0, 0, 1, 3, 4, 4, 4], device=DEVICE)
    token = torch.randint(vocabulary, (7,), device=DEVICE)
    own = logits[place, token]
    rows, mine = logits[place].double(), own.double()[:, None]
    assert count_larger(logits, own, place).tolist() == (rows > mine).sum(1).tolist()
    mass = relative_mass(logits, own, place).double()
    wanted = (rows - mine).exp().sum(1)
    assert ((mass - wanted).abs() / wanted).max() < MOST_ERROR


def test_a_token_that_no_share_allows_has_infinite_company() -> None:
    logits = torch.tensor([[1.0, -torch.inf, 300.0]], device=DEVICE)
    place = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    mass = relative_mass(logits, logits[0, [0, 2]], place)
    assert mass[0] == torch.inf and mass[1] == 1
    assert count_larger(logits, logits[0, [1, 2]], place).tolist() == [2, 0]


class Trees:
    """Random ones, and what nodes add to their paths' log probabilities."""

    def __init__(self, sizes: list[int], seed: int):
        rng = np.random.default_rng(seed)
        self.sizes = np.array(sizes)
        self.first = np.cumsum(self.sizes) - self.sizes
        self.tree = np.repeat(np.arange(len(sizes)), self.sizes)
        self.parent = np.concatenate(
            [[0, *(rng.integers(0, node) for node in range(1, size))] for size in sizes]
        )
        self.parent_row = self.first[self.tree] + self.parent
        self.depth = np.zeros(len(self.tree), np.int64)
        for row in range(len(self.tree)):
            if row not in self.first:
                self.depth[row] = self.depth[self.parent_row[row]] + 1
        masks = ancestor_masks(self.parent, self.first, self.sizes)
        self.tree_batch = DeviceTreeBatch.of(masks, self.first, self.sizes, DEVICE)
        self.rng = rng

    def best(self, log_prob: np.ndarray, taken: Ints, together: bool) -> Ints:
        """The device's choice."""
        kept = self.tree_batch.best_paths(
            torch.from_numpy(log_prob).to(DEVICE),
            torch.from_numpy(taken).to(DEVICE),
            together,
        )
        return kept.cpu().numpy()


FORESTS = [[1], [2], [17], [66, 1, 9], [9] * 5]


@pytest.mark.parametrize("together", [True, False], ids=["all together", "tree by tree"])
@pytest.mark.parametrize("sizes", FORESTS, ids=str)
@pytest.mark.parametrize("most", [0, 7, 1000])
def test_the_device_keeps_what_the_host_would(
    sizes: list[int], most: int, together: bool
) -> None:
    trees = Trees(sizes, seed=most)
    # Quarters: sums are exact, and equal ones common.
    log_prob = -trees.rng.integers(0, 6, len(trees.tree)).astype(np.float32) / 4
    log_prob[trees.first] = 0
    if len(trees.tree) > 9:
        log_prob[trees.first[0] + 5] = -np.inf
    edges = edges_of(trees.parent_row, trees.depth)
    group = np.zeros_like(trees.tree) if together else trees.tree
    wanted = keep_best_paths(
        log_prob[edges.child], edges, trees.parent_row, trees.depth, group, most
    )
    if together:
        taken = np.arange(min(len(trees.tree), len(sizes) + most))
    else:
        left = np.minimum(trees.sizes, 1 + most)
        taken = np.concatenate(
            [f + np.arange(n) for f, n in zip(trees.first, left, strict=True)]
        )
    found = trees.best(log_prob, taken, together)
    assert found.tolist() == np.flatnonzero(wanted).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_what_is_kept_is_closed_under_parents(seed: int) -> None:
    """Whatever sums are rounded to: nodes that add next to nothing, and far from it."""
    trees = Trees([70, 9], seed)
    log_prob = -(10.0 ** trees.rng.uniform(-12, 2, len(trees.tree))).astype(np.float32)
    log_prob[trees.first] = 0
    for most in range(3, 77, 25):
        kept = trees.best(log_prob, np.arange(2 + most), True)
        assert len(kept) == 2 + most
        assert np.isin(trees.parent_row[kept], kept).all()


@pytest.mark.parametrize("sizes", FORESTS, ids=str)
def test_masks_of_what_is_left(sizes: list[int]) -> None:
    trees = Trees(sizes, seed=7)
    log_prob = -trees.rng.exponential(size=len(trees.tree)).astype(np.float32)
    log_prob[trees.first] = 0
    for most in (3, 70):
        taken = np.arange(min(len(trees.tree), len(sizes) + most))
        kept = trees.best(log_prob, taken, True)
        left = np.bincount(trees.tree[kept], minlength=len(sizes))
        first = np.cumsum(left) - left
        parent = np.searchsorted(kept, trees.parent_row[kept]) - np.repeat(first, left)
        wanted = ancestor_masks(parent, first, left)
        index = torch.from_numpy(kept).to(DEVICE)
        starts = trees.tree_batch.starts(index)
        found = trees.tree_batch.narrowed_masks(index, starts).cpu().numpy().view(np.uint64)
        assert starts.tolist() == [0, *np.cumsum(left)]
        words = wanted.shape[1]
        assert np.array_equal(found[:, :words], wanted) and not found[:, words:].any()
