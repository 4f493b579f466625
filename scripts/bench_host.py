"""ProPD's own host time per step: trees, acceptance, commit, without the model.

    make bench-host    (or: python scripts/bench_host.py)

Runs real engines on the demo model, with stopwatches around our hooks and around what
they call of vLLM's and of the heads. What is left is ours, vLLM's sampler included.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams

from vllm_propd.core.sources.lookup import Lookups
from vllm_propd.corpus import held_out_snippets

MODEL = Path(__file__).parents[1] / "demo" / "model"
CASES = ((1, 48, 1.5), (32, 16, 6.0))
"""Batch size, nodes per sequence, and the milliseconds we allow ourselves."""

SIZING_CASES = ((1, 64, 0.5), (64, 64, 3.0))
"""The same of planner and estimators; the nodes are the most of a tree."""

LENGTHS, LOOKUPS = (500, 32_000), 100
"""Tokens of texts that are searched, and how often they are."""

FEWEST_TEXTS = 16
"""One text is a few steps, and these are of several kinds."""

PHASES = {
    "rows, positions, slots": (("_prepare_inputs", +1), ("vllm:_prepare_inputs", -1)),
    "attention metadata": (
        ("_build_attention_metadata", +1),
        ("vllm:_build_attention_metadata", -1),
    ),
    "acceptance and commit": (("_sample", +1),),
    "growing trees": (("propose_draft_token_ids", +1), ("heads", -1)),
}


SIZING = {
    "lookup": (("find", +1), ("trees", +1)),
    "plan": (("looks_up", +1), ("asks_heads", +1), ("plan", +1), ("recall", -1)),
    "grading": (("_learn", +1), ("recall", +1)),
    "node values": (("values", +1),),
    "step costs": (("begin", +1), ("verified", +1), ("end", +1)),
}


def install_stopwatches(worker: Any) -> None:
    """Runs in the worker: times each call of our hooks and of what is not ours."""
    import time

    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from vllm_propd.core.sizing.controller import DynamicTimer
    from vllm_propd.core.sizing.dynamic_drafting import DynamicDrafting

    runner = worker.model_runner
    worker.laps = []

    def timed(name: str, call: Any, new_step: bool = False) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if new_step:
                worker.laps.append((len(runner.input_batch.req_ids), {}))
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                laps = worker.laps[-1][1]
                laps[name] = laps.get(name, 0.0) + time.perf_counter() - start

        return wrapper

    for name in ("_prepare_inputs", "_build_attention_metadata"):
        theirs = getattr(GPUModelRunner, name)
        setattr(GPUModelRunner, name, timed(f"vllm:{name}", theirs))
    for name in ("_build_attention_metadata", "_sample", "propose_draft_token_ids"):
        setattr(runner, name, timed(name, getattr(runner, name)))
    runner._prepare_inputs = timed("_prepare_inputs", runner._prepare_inputs, True)
    drafter, sizing = runner.drafter.trees, runner.sizing
    runner.drafter.candidates = timed("heads", runner.drafter.candidates)
    drafter._learn = timed("_learn", drafter._learn)
    for name in ("find", "trees"):
        setattr(drafter.sources, name, timed(name, getattr(drafter.sources, name)))
    if drafter.prices is not None:
        drafter.prices.values = timed("values", drafter.prices.values)
    if (grader := getattr(sizing, "grader", None)) is not None:  # sizes may be fixed
        grader.grade = timed("recall", grader.grade)
    sizing.begin = timed("begin", sizing.begin)
    for cls, name in (
        (DynamicTimer, "verified"),
        (DynamicDrafting, "looks_up"),
        (DynamicDrafting, "asks_heads"),
        (DynamicDrafting, "plan"),
        (DynamicDrafting, "end"),
    ):
        setattr(cls, name, timed(name, getattr(cls, name)))


def read_stopwatches(worker: Any) -> list[tuple[int, dict[str, float]]]:
    """Runs in the worker: batch size and seconds by name, of each step."""
    return worker.laps


def laps_of(batch: int, nodes: int, propd: dict[str, Any]) -> list[dict[str, float]]:
    """Seconds by name for every step in which the whole batch decodes."""
    llm = LLM(
        str(MODEL), dtype="float32", max_num_seqs=batch, enforce_eager=True,
        kv_cache_memory_bytes=1 << 28, max_num_batched_tokens=4096,
        speculative_config={
            "method": "propd", "num_speculative_tokens": nodes, **propd,
        },
    )  # fmt: skip
    tokenizer = llm.get_tokenizer()
    texts = held_out_snippets(max(batch, FEWEST_TEXTS), seed=41, min_chars=2000)
    prompts = [{"prompt_token_ids": tokenizer(text)["input_ids"][:128]} for text in texts]
    params = SamplingParams(temperature=0.0, max_tokens=128, ignore_eos=True)
    llm.generate(prompts, params, use_tqdm=False)
    llm.collective_rpc(install_stopwatches)
    llm.generate(prompts, params, use_tqdm=False)
    steps = llm.collective_rpc(read_stopwatches)[0]
    llm.llm_engine.engine_core.shutdown()
    return [laps for size, laps in steps[1:] if size == batch]


def table(
    title: str,
    phases: dict[str, tuple[tuple[str, int], ...]],
    cases: tuple[tuple[int, int, float], ...],
    **propd: Any,
) -> Table:
    """Medians over steps: of each phase, and of all together."""
    found = Table("batch x nodes", *phases, "total, ms", "allowed", title=title)
    for batch, nodes, allowed in cases:
        own = defaultdict(list)
        for laps in laps_of(batch, nodes, propd):
            if propd["sizing"] == "dynamic" and "plan" not in laps:
                continue  # drafting pauses
            for phase, terms in phases.items():
                spent = sum(sign * laps.get(name, 0.0) for name, sign in terms)
                own[phase].append(1e3 * spent)
            own["total"].append(sum(own[phase][-1] for phase in phases))
        found.add_row(
            f"{batch} x {nodes}",
            *(f"{statistics.median(own[phase]):.2f}" for phase in phases),
            f"{statistics.median(own['total']):.2f}",
            f"{allowed:.1f}",
        )
    return found


def lookups() -> Table:
    """Medians of looking up alone, in long texts: no engine, since no step is needed."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = "\n".join(held_out_snippets(64, seed=42, min_chars=2000))
    tokens = np.array(tokenizer(text)["input_ids"], np.int32)
    found = Table("texts", *(f"{length:,} tokens" for length in LENGTHS), "allowed",
                  title="looking up in texts, medians, ms")  # fmt: skip
    rng = np.random.default_rng(0)
    for batch, _, allowed in SIZING_CASES:
        ids, rows = [str(row) for row in range(batch)], np.arange(batch)
        cells = []
        for length in LENGTHS:
            # Of the same words in any order: matches are short, and all is searched.
            texts = rng.choice(tokens, (batch, length + LOOKUPS)).astype(np.int32)
            looks, times = Lookups(), []
            for step in range(LOOKUPS):
                began = time.perf_counter()
                looks.find(ids, texts, rows, np.full(batch, length + step))
                looks.worth()
                times.append(1e3 * (time.perf_counter() - began))
            cells.append(f"{statistics.median(times[LOOKUPS // 10 :]):.2f}")
        found.add_row(f"{batch}", *cells, f"{allowed:.1f}")
    return found


def main() -> None:
    show = Console().print
    show(table("host time per step, medians, ms", PHASES, CASES, sizing="fixed"))
    title = "of it, with dynamic sizing, planner and estimators"
    show(table(title, SIZING, SIZING_CASES, sizing="dynamic"))
    title = "the same without heads, with recycled successors"
    show(table(title, SIZING, SIZING_CASES, sizing="dynamic", heads=False, recycling=True))
    show(lookups())


if __name__ == "__main__":
    main()
