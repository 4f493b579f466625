"""Early pruning on a GPU: Triton kernels, and a choice that the host need not wait for.

Rule ``path_probability`` keeps as many nodes as the host has said: it knows all shapes that
follow before it knows which nodes they are. The same rule as ``core/pruning.py``'s.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from vllm_propd.core.tree import Ints
from vllm_propd.kernels.transfer import Arrays, Tensors, to_device

TOKENS = 4096
"""How many tokens of the vocabulary a program reads at once."""

NODES = 64
"""How many nodes of a tree a program reads at once: one word of its masks."""


# Rows of all of these begin anywhere, and none is worth a kernel of its own.
@triton.jit(
    do_not_specialize_on_alignment=["logits", "own", "place", "out"],
)
def _over_vocabulary(  # type: ignore[no-untyped-def]
    logits, stride, vocabulary, own, place, out, COUNT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Compares an edge's own logit with its parent's logits; one program for each edge."""
    edge = tl.program_id(0)
    row = logits + tl.load(place + edge) * stride
    mine = tl.load(own + edge).to(tl.float32)
    found = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < vocabulary
        other = tl.load(row + token, mask=inside, other=-float("inf")).to(tl.float32)
        if COUNT:
            found += (other > mine).to(tl.float32)
        else:
            found += tl.where(inside, tl.exp(other - mine), 0.0)
    tl.store(out + edge, tl.sum(found, 0))


def _each_edge(
    logits: torch.Tensor, own: torch.Tensor, place: torch.Tensor, count: bool
) -> torch.Tensor:
    out = torch.empty(len(own), dtype=torch.float32, device=logits.device)
    if len(own):
        _over_vocabulary[(len(own),)](
            logits, logits.stride(0), logits.shape[1], own, place, out,
            COUNT=count, BLOCK=TOKENS,
        )  # fmt: skip
    return out


def count_larger(
    logits: torch.Tensor, own: torch.Tensor, place: torch.Tensor
) -> torch.Tensor:
    """Counts how many of a parent's logits are above its child's: ``[edges]`` float32.

    Args:
        logits: ``[parents, tokens]``, the tokens of a row one after another.
        own: ``[edges]`` the children's logits.
        place: ``[edges]`` int64 their parents, rows of ``logits``.
    """
    return _each_edge(logits, own, place, count=True)


def relative_mass(
    logits: torch.Tensor, own: torch.Tensor, place: torch.Tensor
) -> torch.Tensor:
    """Sums ``exp(logit - own)``: ``[edges]`` float32; arguments as in ``count_larger``."""
    return _each_edge(logits, own, place, count=False)


@triton.jit(
    do_not_specialize=["words"],
    do_not_specialize_on_alignment=["values", "out", "masks", "first", "sizes", "tree"],
)
def _over_path(  # type: ignore[no-untyped-def]
    values, out, masks, first, sizes, tree, words, BLOCK: tl.constexpr
):  # fmt: skip
    """Sums the values of a row's ancestors and its own; one program for each row.

    A node's sum has its parent's terms, in the same places, and one more: where no value is
    above 0, it is never above its parent's sum, however sums are rounded.
    """
    row = tl.program_id(0)
    mine = tl.load(tree + row)
    base, size = tl.load(first + mine), tl.load(sizes + mine)
    found = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        node = start + tl.arange(0, BLOCK)
        here = node < size
        word = tl.load(masks + row * words + node // 64, mask=here, other=0)
        seen = ((word >> (node % 64)) & 1) != 0
        value = tl.load(values + base + node, mask=here, other=0.0)
        found += tl.where(seen, value, 0.0)
    tl.store(out + row, tl.sum(found, 0))


@triton.jit(
    do_not_specialize=["words"],
    do_not_specialize_on_alignment=[
        "masks",
        "out",
        "kept",
        "starts",
        "first",
        "tree",
    ],
)
def _narrow(  # type: ignore[no-untyped-def]
    masks, out, kept, starts, first, tree, words, BLOCK: tl.constexpr
):  # fmt: skip
    """Moves a kept row's ancestor bits to their new numbers; one program for each row."""
    row = tl.program_id(0)
    old = tl.load(kept + row)
    mine = tl.load(tree + old)
    begin, base = tl.load(starts + mine), tl.load(first + mine)
    size = tl.load(starts + mine + 1) - begin
    for word in range(words):
        bit = tl.arange(0, BLOCK)
        here = word * BLOCK + bit < size
        node = tl.load(kept + begin + word * BLOCK + bit, mask=here, other=0) - base
        node = tl.where(here, node, 0)
        bits = tl.load(masks + old * words + node // 64)
        seen = here & (((bits >> (node % 64)) & 1) != 0)
        packed = tl.sum(tl.where(seen, tl.full([BLOCK], 1, tl.int64) << bit, 0), 0)
        tl.store(out + row * words + word, packed)


@dataclass(frozen=True)
class DeviceTreeBatch:
    """A step's trees on the device, as pruning reads them.

    Attributes:
        masks: ``[rows, words]`` int64, the bits of ``core.tree.ancestor_masks``.
        first, sizes: ``[trees]`` int64 each tree's root row and rows.
        tree: ``[rows]`` int64 each row's tree.
    """

    masks: torch.Tensor
    first: torch.Tensor
    sizes: torch.Tensor
    tree: torch.Tensor

    @classmethod
    def of(
        cls, masks: npt.NDArray[np.uint64], first: Ints, sizes: Ints, device: torch.device
    ) -> DeviceTreeBatch:
        """Sends trees to the device, by one copy."""
        return cls.at(to_device(cls.arrays(masks, first, sizes), device))

    @classmethod
    def at(cls, here: Tensors) -> DeviceTreeBatch:
        """Wraps trees whose ``arrays`` have been sent, maybe with others."""
        return cls(**{field.name: here[field.name] for field in fields(cls)})

    @staticmethod
    def arrays(masks: npt.NDArray[np.uint64], first: Ints, sizes: Ints) -> Arrays:
        """Returns the fields as host arrays, to be sent to the device."""
        tree = np.repeat(np.arange(len(sizes)), sizes)
        return {
            "masks": masks.view(np.int64),
            "first": first,
            "sizes": sizes,
            "tree": tree,
        }

    def along_paths(self, values: torch.Tensor) -> torch.Tensor:
        """Sums the values of each row's ancestors and its own: ``[rows]`` float32."""
        out = torch.empty_like(values)
        _over_path[(len(values),)](
            values, out, self.masks, self.first, self.sizes, self.tree,
            self.masks.shape[1], BLOCK=NODES,
        )  # fmt: skip
        return out

    def best_paths(
        self, log_prob: torch.Tensor, taken: torch.Tensor, together: bool
    ) -> torch.Tensor:
        """Returns the rows that ``core.pruning.keep_best_paths`` keeps, without waiting.

        Args:
            log_prob: ``[rows]`` float32 what each node adds to its path's log probability,
                never above 0; roots 0.
            taken: ``[kept]`` int64 which places go on, where rows stand from the best to
                the worst; a root is better than any node. All the trees', or tree by tree.
            together: whether the nodes of all trees compete with each other.

        Returns:
            ``[kept]`` int64 rows, ascending.
        """
        path = self.along_paths(log_prob).clamp(min=torch.finfo(torch.float32).min)
        path = path.index_fill_(0, self.first, torch.inf)
        order = path.sort(descending=True, stable=True).indices
        if not together:
            order = order[self.tree[order].sort(stable=True).indices]
        return order[taken].sort().values

    def starts(self, kept: torch.Tensor) -> torch.Tensor:
        """Returns ``[trees + 1]`` int64 where each tree's rows begin among ``kept``."""
        ends = torch.searchsorted(kept, self.first + self.sizes)
        return torch.nn.functional.pad(ends, (1, 0))

    def narrowed_masks(self, kept: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """Returns ``[kept, words]`` int64 masks of the kept rows, with their new numbers.

        Each kept row's parent has to be kept, too.
        """
        out = torch.empty_like(self.masks[: len(kept)])
        _narrow[(len(kept),)](
            self.masks, out, kept, starts, self.first, self.tree,
            self.masks.shape[1], BLOCK=NODES,
        )  # fmt: skip
        return out
