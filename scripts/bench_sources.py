"""What each source without heads is worth on real answers, by size of the tree.

    python scripts/bench_sources.py build/smollm2 build/prompts/human_eval.jsonl

Plain vLLM answers once, greedily, and says what it thought likely at each place; the rest
is a replay (`simulation.source_replay`), without an engine and within seconds. Tokens per
step only: what a node costs is a machine's matter (`vllm-propd bench`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoTokenizer
from vllm import LLM, SamplingParams

from vllm_propd.bench.settings import BenchSettings
from vllm_propd.bench.workloads.chats import ByTask, chat_prompts
from vllm_propd.core.sources.combined import Sources
from vllm_propd.core.sources.successors import RANKS
from vllm_propd.simulation.answers import Answer
from vllm_propd.simulation.source_replay import replay

SOURCES = {
    "lookup": (True, False, False),
    "shared": (True, True, False),
    "recycling": (False, False, True),
    "lookup, recycling": (True, False, True),
    "shared, recycling": (True, True, True),
}
"""By name: whether a text is searched, whether others' are remembered, and whether
successors are recycled."""


def answers_of(model: Path, by_task: ByTask, max_tokens: int) -> Iterator[Answer]:
    """Plain vLLM's answers, tasks in turn."""
    asked = [(task, ids) for task, prompts in by_task.items() for ids in prompts]
    longest = max(len(ids) for _, ids in asked) + max_tokens
    llm = LLM(
        str(model), dtype="float32", enforce_eager=True, max_model_len=longest,
        kv_cache_memory_bytes=1 << 30, max_logprobs=RANKS,
    )  # fmt: skip
    params = SamplingParams(
        temperature=0.0, max_tokens=max_tokens, logprobs=RANKS, detokenize=False
    )
    prompts = [{"prompt_token_ids": ids} for _, ids in asked]
    for (task, ids), output in zip(asked, llm.generate(prompts, params), strict=True):
        said = output.outputs[0]
        assert said.logprobs is not None
        # The sampled token stands first, and again at its rank where that is lower.
        best = [
            sorted(((p.logprob, -t) for t, p in place.items()), reverse=True)[:RANKS]
            for place in said.logprobs
        ]
        tokens = np.array([[-t for _, t in place] for place in best])
        log_probs = np.array([[p for p, _ in place] for place in best], np.float32)
        yield Answer(task, np.array(ids), np.array(said.token_ids), tokens, log_probs)


def main(
    model: Annotated[Path, typer.Argument(help="Folder of the target.")],
    prompts: Annotated[list[Path], typer.Argument(help="Files of chats or questions.")],
    nodes: Annotated[str, typer.Option(help="Nodes of the trees.")] = "1,2,4,8,16,32",
    prompts_each: Annotated[int, typer.Option(help="Prompts of each task.")] = 16,
    max_tokens: Annotated[int, typer.Option(help="Of each answer.")] = 160,
) -> None:
    """Answer, replay, and print tokens per step by source."""
    settings = BenchSettings(prompts_each=prompts_each, longest_chat=1024)
    by_task, _ = chat_prompts(prompts, AutoTokenizer.from_pretrained(model), settings)
    answers = list(answers_of(model, by_task, max_tokens))
    vocabulary = AutoConfig.from_pretrained(model).get_text_config().vocab_size
    title = f"tokens per step, {len(answers)} answers of {model.name}"
    table = Table("source", "nodes", "all", "promised", *by_task, title=title)
    for name, kinds in SOURCES.items():
        for size in map(int, nodes.split(",")):
            found = replay(answers, size, Sources(vocabulary, *kinds))
            promised = 1.0 + found.expected / found.steps.total()
            whole = [found.tokens_per_step(), promised]
            each = [found.tokens_per_step(task) for task in by_task]
            table.add_row(name, str(size), *(f"{x:.2f}" for x in [*whole, *each]))
    Console(width=160).print(table)


if __name__ == "__main__":
    typer.run(main)
