"""What a planner would see: a decoder's whole step, by tokens, with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from gpu_first_run.kernel_times import CUDA, DEVICE, Plan, Row, Shape, flash, median_us


class Step:
    """A decoder's whole step with random weights: norms, projections, attention, logits."""

    def __init__(self, shape: Shape, context: int):
        self.shape = shape
        width, group = shape.heads * shape.head, shape.heads // shape.kv_heads
        sizes = {
            "qkv": (shape.hidden, width + 2 * shape.kv_heads * shape.head),
            "out": (width, shape.hidden),
            "up": (shape.hidden, 2 * shape.inner),
            "down": (shape.inner, shape.hidden),
        }

        def weight(size: tuple[int, int]) -> torch.Tensor:
            return torch.randn(size, device=DEVICE, dtype=torch.bfloat16) * 0.02

        self.stack = [
            {name: weight(size) for name, size in sizes.items()}
            for _ in range(shape.layers)
        ]
        self.output = weight((shape.hidden, shape.vocabulary))
        cache = (1, shape.kv_heads, context, shape.head)
        self.cache = [
            torch.randn(cache, device=DEVICE).bfloat16().repeat_interleave(group, 1)
            for _ in range(2)
        ]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[tokens, hidden]`` of one sequence to ``[tokens, vocabulary]``."""
        shape, norm = self.shape, torch.nn.functional.rms_norm
        width = shape.heads * shape.head
        for layer in self.stack:
            qkv = norm(hidden, (shape.hidden,)) @ layer["qkv"]
            query = qkv[:, :width].view(1, -1, shape.heads, shape.head).transpose(1, 2)
            out, _ = flash(query, *self.cache)
            hidden = hidden + out.transpose(1, 2).reshape(len(hidden), -1) @ layer["out"]
            gate, up = (norm(hidden, (shape.hidden,)) @ layer["up"]).chunk(2, -1)
            hidden = hidden + (torch.nn.functional.silu(gate) * up) @ layer["down"]
        return norm(hidden, (shape.hidden,)) @ self.output


@torch.inference_mode()
def cost_curve(plan: Plan, rate: Row) -> Iterator[Row]:
    """What the planner would see: milliseconds of a step by tokens, as a CUDA graph."""
    step = Step(plan.shape, plan.contexts[0])
    weights = sum(w.nbytes for layer in step.stack for w in layer.values())
    weights += step.output.nbytes
    for tokens in plan.tokens:
        hidden = torch.randn(tokens, plan.shape.hidden, device=DEVICE).bfloat16()
        call: Callable[[], object] = partial(step.forward, hidden)
        call()
        if CUDA:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step.forward(hidden)
            call = graph.replay
        bound = max(weights / rate["bytes_per_s"], weights * tokens / rate["flops_per_s"])
        ms = median_us(call, plan.rounds) / 1e3
        yield {"tokens": tokens, "step_ms": ms, "at_best_ms": 1e3 * bound}
