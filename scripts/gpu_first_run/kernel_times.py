"""The item of kernel times: are they right, how fast, and what would a step cost?

Times are medians; what they could be at best is counted in bytes and operations, over
rates measured on the spot. Data is random, weights too: these are times of shapes, not of a
model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch

from gpu_first_run.setting import Notes, Setting
from vllm_propd.core.pruning import edges_of
from vllm_propd.core.tree import ancestor_masks
from vllm_propd.kernels.pruning_triton import DeviceTreeBatch, count_larger, relative_mass
from vllm_propd.kernels.tree_attention_triton import DeviceTrees, attend_in_step

MOST_ERROR = 5e-3
"""Of a kernel, relative to float64."""

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """A model's: Mistral 7B by default."""

    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head: int = 128
    inner: int = 14336
    layers: int = 32
    vocabulary: int = 32000


@dataclass(frozen=True)
class Plan:
    """What is measured, on which shapes."""

    shape: Shape = Shape()
    nodes: int = 64
    batches: tuple[int, ...] = (1, 8, 32)
    contexts: tuple[int, ...] = (1024, 4096, 8192)
    tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
    vocabularies: tuple[int, ...] = (32_000, 151_936)
    rounds: int = 10


SMOKE = Plan(
    Shape(hidden=64, heads=4, kv_heads=2, head=32, inner=96, layers=2, vocabulary=100),
    nodes=9, batches=(1, 2), contexts=(33,), tokens=(1, 4), vocabularies=(100,), rounds=2,
)  # fmt: skip


def median_us(call: Callable[[], object], rounds: int) -> float:
    """Of one call; on a GPU by its own clock, caches flushed between."""
    if CUDA:
        from triton.testing import do_bench

        return 1e3 * float(do_bench(call, warmup=50, rep=20 * rounds, return_mode="median"))
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return 1e6 * statistics.median(times)


def rates(plan: Plan) -> Row:
    """Bytes copied and products done per second, as this machine does them."""
    size = 1 << (29 if CUDA else 20)
    source = torch.empty(size, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    copy_us = median_us(lambda: target.copy_(source), plan.rounds)
    side = 8192 if CUDA else 128
    left, right = (torch.randn(side, side, device=DEVICE).bfloat16() for _ in range(2))
    product_us = median_us(lambda: left @ right, plan.rounds)
    return {
        "bytes_per_s": 2 * size / copy_us * 1e6,
        "flops_per_s": 2 * side**3 / product_us * 1e6,
    }


def flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's FlashAttention, ``[batch, heads, rows, head]``, with its log-sum-exp."""
    ops = torch.ops.aten
    if CUDA:
        out, lse, *_ = ops._scaled_dot_product_flash_attention(query, key, value)
    else:
        out, lse = ops._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    return out, lse


def random_trees(batch: int, nodes: int) -> tuple[np.ndarray, ...]:
    """Parents, first rows and sizes of random trees of ``nodes`` nodes and a root."""
    rng = np.random.default_rng(0)
    tree = [0, *(int(rng.integers(0, node)) for node in range(1, nodes + 1))]
    sizes = np.full(batch, nodes + 1)
    return np.tile(tree, batch), np.cumsum(sizes) - sizes, sizes


@dataclass
class TreeAttention:
    """One layer's attention of a batch of trees, on random data.

    Keys and values are laid out densely and once for each query head, as PyTorch's
    FlashAttention wants them: both arms read the same.
    """

    shape: Shape
    batch: int
    context: int
    nodes: int

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        shape, rows = self.shape, self.nodes + 1
        group = shape.heads // shape.kv_heads

        def noise(heads: int, length: int) -> torch.Tensor:
            values = torch.randn(self.batch, length, heads, shape.head, device=DEVICE)
            return values.bfloat16()

        self.query = noise(shape.heads, rows)
        self.own = noise(shape.kv_heads, rows), noise(shape.kv_heads, rows)
        cached = [noise(shape.kv_heads, self.context) for _ in range(2)]
        for cache, own in zip(cached, self.own, strict=True):
            cache[:, -1] = own[:, 0]  # the root's
        self.cached = [
            x.repeat_interleave(group, 2).transpose(1, 2).contiguous() for x in cached
        ]
        both = [torch.cat(pair, 1) for pair in zip(cached, self.own, strict=True)]
        self.all = [
            x.repeat_interleave(group, 2).transpose(1, 2).contiguous() for x in both
        ]
        parents, first, sizes = random_trees(self.batch, self.nodes)
        self.masks = ancestor_masks(parents, first, sizes)
        self.trees = DeviceTrees.of(self.masks, first, sizes, group, DEVICE)
        self.out = torch.empty(
            self.batch * rows, shape.heads, shape.head, device=DEVICE, dtype=torch.bfloat16
        )

    def prefix(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of all rows; as the second part reads it."""
        out, lse = flash(self.query.transpose(1, 2), *self.cached)
        heads = self.shape.heads
        return out.transpose(1, 2).flatten(0, 1), lse.transpose(0, 1).reshape(heads, -1)

    def step(self, prefix: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        """The part inside the step."""
        query, key, value = (x.flatten(0, 1) for x in (self.query, *self.own))
        scale = self.shape.head**-0.5
        attend_in_step(query, key, value, prefix, lse, self.trees, self.out, scale)
        return self.out

    def whole(self) -> torch.Tensor:
        """Both parts."""
        return self.step(*self.prefix())

    def chain(self) -> object:
        """As many tokens of plain sequences; unmasked, which costs hardly more."""
        return flash(self.query.transpose(1, 2), *self.all)

    def error(self) -> float:
        """Of both parts together, relative to float64."""
        found = self.whole().double().view_as(self.query)
        rows = self.nodes + 1
        bits = self.masks[:, :, None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)
        seen = torch.from_numpy(bits.reshape(len(bits), -1)[:rows, :rows].astype(bool))
        seen[:, 0] = False
        prefix = torch.ones(rows, self.context, dtype=torch.bool)
        mask = torch.cat([prefix, seen], 1).to(DEVICE)
        key, value = (x.double() for x in self.all)
        scores = self.query.transpose(1, 2).double() @ key.mT * self.shape.head**-0.5
        wanted = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value
        wanted = wanted.transpose(1, 2)
        return float((found - wanted).norm() / wanted.norm())


def attention_rows(plan: Plan, rate: Row) -> Iterator[Row]:
    """Right, and how long, against as many tokens of plain sequences."""
    cases = list(product(plan.batches, plan.contexts))
    for batch, context in cases:
        one = TreeAttention(plan.shape, batch, context, plan.nodes)
        prefix = one.prefix()
        both = sum(x.nbytes for x in (*one.cached, *one.own, one.query, one.out))
        products = 4 * one.query.numel() * (context + plan.nodes + 1)
        whole, inside, chain = (
            median_us(call, plan.rounds)
            for call in (
                one.whole,
                partial(one.step, *prefix),
                one.chain,
            )
        )
        bound = max(both / rate["bytes_per_s"], products / rate["flops_per_s"])
        yield {
            "batch": batch,
            "context": context,
            "tree_us": whole,
            "of_it_in_step_us": inside,
            "chain_us": chain,
            "ratio": whole / chain,
            "at_best_us": 1e6 * bound,
            "error": one.error(),
        }


def pruning_rows(plan: Plan) -> Iterator[Row]:
    """The early head's output layer, both rules' kernels, the choice, what is left."""
    cases = list(product(plan.batches, plan.vocabularies))
    for batch, vocabulary in cases:
        parents, first, sizes = random_trees(batch, plan.nodes)
        rows = len(parents)
        parent_row = np.repeat(first, sizes) + parents
        depth = (np.arange(rows) != np.repeat(first, sizes)).astype(np.int64)
        edges = edges_of(parent_row, depth)
        place = torch.from_numpy(edges.place).to(DEVICE)
        token = torch.randint(vocabulary, (len(place),), device=DEVICE)
        masks = ancestor_masks(parents, first, sizes)
        tree_batch = DeviceTreeBatch.of(masks, first, sizes, DEVICE)
        hidden = torch.randn(rows, plan.shape.hidden, device=DEVICE).bfloat16()
        states = hidden[torch.from_numpy(edges.parents).to(DEVICE)]
        output = torch.randn(vocabulary, plan.shape.hidden, device=DEVICE).bfloat16()
        logits = states @ output.T
        asked = (logits, logits[place, token], place)
        log_prob = torch.zeros(rows, device=DEVICE)
        log_prob[torch.from_numpy(edges.child).to(DEVICE)] = -relative_mass(*asked).log()
        half = torch.arange(batch + batch * plan.nodes // 2, device=DEVICE)
        choose = partial(tree_batch.best_paths, log_prob, half, True)
        kept = choose()

        def narrow(
            tree_batch: DeviceTreeBatch = tree_batch, kept: torch.Tensor = kept
        ) -> torch.Tensor:
            return tree_batch.narrowed_masks(kept, tree_batch.starts(kept))

        ways: dict[str, Callable[[], object]] = {
            "output_layer_us": partial(torch.matmul, states, output.T),
            "count_us": partial(count_larger, *asked),
            "mass_us": partial(relative_mass, *asked),
            "choice_us": choose,
            "masks_us": narrow,
            "gather_us": partial(hidden.index_select, 0, kept),
        }
        times = {name: median_us(way, plan.rounds) for name, way in ways.items()}
        more = logits.double()[place] - asked[1].double()[:, None]
        error = (relative_mass(*asked) / more.exp().sum(1) - 1).abs().max()
        if count_larger(*asked).tolist() != (more > 0).sum(1).tolist():
            error = torch.tensor(torch.inf)
        yield {"batch": batch, "vocabulary": vocabulary, **times, "error": float(error)}


def noted(notes: Notes, name: str, rows: Iterator[Row]) -> list[Row]:
    """All rows, each noted as it comes: time may be over before the last."""
    found: list[Row] = []
    for row in rows:
        found.append(row)
        notes[name] = found
    return found


def time_kernels(setting: Setting, notes: Notes) -> None:
    """A step of 7B shapes; tree attention and early pruning against what is known."""
    from gpu_first_run.step_curve import cost_curve

    plan = Plan() if setting.on_gpu else SMOKE
    notes["plan"] = asdict(plan)
    rate = rates(plan)
    notes.update({name: f"{value:.3g}" for name, value in rate.items()})
    noted(notes, "a step of 7B shapes", cost_curve(plan, rate))
    found = {"attention": attention_rows(plan, rate), "pruning": pruning_rows(plan)}
    for name, rows in found.items():
        own = noted(notes, name, rows)
        notes[f"error, {name}"] = worst = max(row["error"] for row in own)
        if worst > MOST_ERROR:
            raise SystemExit(f"the kernels of {name} are off by {worst:.2g}")
        if name == "attention":
            ratios = ", ".join(f"{row['ratio']:.2f}" for row in own)
            notes["tree attention over FlashAttention of as many tokens"] = ratios
