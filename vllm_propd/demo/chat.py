"""The demonstration on a published chat model: the same answers, side by side."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from vllm import SamplingParams

from vllm_propd.bench.arms import Arm
from vllm_propd.bench.engines import close_engines, start_engines
from vllm_propd.bench.results import installed_versions, this_machine
from vllm_propd.chats import render
from vllm_propd.demo.picture import draw_longest
from vllm_propd.demo.race import Answer, race
from vllm_propd.heads.checkpoint import load_heads
from vllm_propd.outputs import check_writable

QUESTIONS = (
    "Write a Python function that returns the n-th Fibonacci number, and explain it.",
    "What is the difference between weather and climate?",
    "Rewrite this politely: I want my money back now, your shop is terrible.",
    "A train goes 60 miles in 40 minutes. How many miles does it go in two hours?",
)
"""What is asked, beside each other's answers."""

WARM_UP = "Tell me a story about a lighthouse."
"""What is asked before, of which a tree is drawn: what drafts from what the target has said
would know an answer that has been given."""

LONGEST = 2048
"""Tokens of a question with its answer; fewer where the model knows fewer places."""


def run_chat_demo(model: Path, heads: Path, out: Path, max_tokens: int) -> None:
    """Asks plain vLLM and ProPD the same questions; writes result and picture.

    Args:
        model: folder of a chat model.
        heads: folder of its heads.
        out: gets ``result.json`` and ``tree.png``.
        max_tokens: the most new tokens of an answer.

    Raises:
        ValueError: the heads are not there, or cannot be read.
        OSError: ``out`` cannot be written.
        SystemExit: the answers differ.
    """
    check_writable(out, f"--out {out}")
    load_heads(heads, shapes_only=True)  # else plain vLLM would start first
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    arms = [
        Arm("plain vLLM", None),
        Arm("ProPD", {"method": "propd", "model": str(heads)}),
    ]
    console = Console()
    console.print(f"{model.name} in float32, greedy, plain vLLM beside ProPD ({heads})")
    config = json.loads((model / "config.json").read_text())
    options = {
        "model": str(model),
        "dtype": "float32",
        "max_num_seqs": 4,
        "max_model_len": min(LONGEST, config.get("max_position_embeddings", LONGEST)),
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 1 << 29,
        "use_tqdm_on_load": False,
    }
    with Progress(console=console) as bar:
        engines = start_engines(arms, options, bar)
        tokenizer = engines[0].engine.llm.get_tokenizer()
        questions = [(text, _ids(tokenizer, text)) for text in QUESTIONS]
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        asked = _ids(tokenizer, WARM_UP)
        task = bar.add_task("warming up", total=len(engines))
        *others, ours = engines
        for engine in others:
            engine.run([asked], params)
            bar.advance(task)
        turn, recording = ours.record([asked], params)
        bar.advance(task)
    has_tree = draw_longest(recording, [asked], turn.texts, tokenizer, out / "tree.png")
    answers = race(engines, questions, tokenizer, params, console)
    close_engines(engines)
    result = _result(model, arms, answers)
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    _show(console, result, out, has_tree)
    if not result["identical"]:
        raise SystemExit("the answers differ: this is a bug, please report it")


def _ids(tokenizer: Any, text: str) -> list[int]:
    asked = render([{"role": "user", "content": text}], tokenizer, asks=True)
    ids: list[int] = tokenizer(asked, add_special_tokens=False)["input_ids"]
    return ids


def _result(model: Path, arms: list[Arm], answers: list[list[Answer]]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    plain = [of_question[0] for of_question in answers]
    for number, arm in enumerate(arms):
        mine = [of_question[number] for of_question in answers]
        tokens, seconds = sum(len(a.ids) for a in mine), sum(a.seconds for a in mine)
        steps = sum(answer.steps for answer in mine)
        rows.append(
            {
                "arm": arm.name,
                "identical_to_plain": [a.ids for a in mine] == [a.ids for a in plain],
                "tokens": tokens,
                "seconds": round(seconds, 3),
                "tokens_per_s": round(tokens / seconds, 1),
                "tokens_per_step": round((tokens - len(mine)) / max(steps, 1), 3),
            }
        )
    for row in rows:
        row["ratio_to_plain"] = round(row["tokens_per_s"] / rows[0]["tokens_per_s"], 3)
    return {
        "model": str(model),
        "machine": this_machine().model_dump(),
        "versions": installed_versions(),
        "questions": list(QUESTIONS),
        "identical": all(row["identical_to_plain"] for row in rows),
        "arms": rows,
    }


def _show(console: Console, result: dict[str, Any], out: Path, has_tree: bool) -> None:
    title = f"{len(QUESTIONS)} questions, one at a time, whole wall clock"
    table = Table(
        "", "same text", "tokens", "tokens per step", "tokens/s", "against plain",
        title=title,
    )  # fmt: skip
    for row in result["arms"]:
        table.add_row(
            row["arm"],
            "yes" if row["identical_to_plain"] else "NO",
            str(row["tokens"]),
            f"{row['tokens_per_step']:.2f}",
            f"{row['tokens_per_s']:.1f}",
            f"{row['ratio_to_plain']:.2f}x",
        )
    console.print(table)
    if has_tree:
        console.print(f"A real token tree: {out / 'tree.png'}")
    console.print(f"The figures: {out / 'result.json'}")
