"""The demonstration: plain vLLM beside ProPD on text the model has not seen."""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from vllm import SamplingParams

from vllm_propd.bench.arms import Arm
from vllm_propd.bench.engines import ArmEngine, close_engines, start_engines
from vllm_propd.bench.results import installed_versions, this_machine
from vllm_propd.bench.timing.turn import Turn
from vllm_propd.bench.timing.turns import Turns, in_turns, turns_in
from vllm_propd.corpus import held_out_snippets
from vllm_propd.demo.picture import draw_longest
from vllm_propd.outputs import check_writable

PROMPT_TOKENS = 160

OTHERS = 3
"""Prompts beside those that are measured: what drafts from what the target has said would
know these. All but the last warm up; that one's tree is drawn."""


def _options(model: Path) -> dict[str, Any]:
    return {
        "model": str(model),
        "dtype": "float32",
        "max_num_seqs": 4,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 1 << 28,
        "use_tqdm_on_load": False,
    }


def run_demo(
    model: Path,
    out: Path,
    num_prompts: int,
    max_tokens: int,
    rounds: int,
    num_speculative_tokens: int,
) -> None:
    """Generates with every arm in turn, prints a table, writes result and picture.

    Args:
        model: the target, with heads in ``propd/``.
        out: gets ``result.json`` and ``tree.png``.
        num_prompts, max_tokens: the work; prompts run one at a time.
        rounds: how often the arms take turns, with the same prompts.
        num_speculative_tokens: nodes of ProPD's trees.

    Raises:
        OSError: ``out`` cannot be written.
        SystemExit: the texts differ.
    """
    check_writable(out, f"--out {out}")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    fixed = {"method": "propd", "sizing": "fixed"}
    propd = {**fixed, "num_speculative_tokens": num_speculative_tokens}
    arms = [
        Arm("plain vLLM", None),
        Arm("chain (same heads)", {**fixed, "tree": "chain"}),
        Arm("ProPD", {"method": "propd"}),
        Arm("ProPD, heads only", {"method": "propd", "lookup": False}),
        Arm(f"ProPD, always {num_speculative_tokens} nodes", propd),
    ]
    console = Console()
    turns: Turns[Turn] = Turns(plain=arms[0].name)
    with Progress(console=console) as bar:
        engines = start_engines(arms, _options(model), bar)
        tokenizer = engines[0].engine.llm.get_tokenizer()
        snippets = held_out_snippets(num_prompts + OTHERS, seed=7, min_chars=4000)
        ids = [tokenizer(text)["input_ids"][:PROMPT_TOKENS] for text in snippets]
        prompts, (*warm_up, drawn) = ids[:num_prompts], ids[num_prompts:]
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        total = len(arms) * len(warm_up) + turns_in(len(arms), rounds) * num_prompts + 1
        task = bar.add_task("generating", total=total)

        def turn_of(engine: ArmEngine, prompts: list[list[int]]) -> Turn:
            bar.update(task, description=f"generating: {engine.arm.name}")
            turn = Turn()
            for prompt in prompts:
                turn += engine.run([prompt], params)
                bar.advance(task)
            return turn

        for engine in engines:
            turn_of(engine, warm_up)
        for engine in in_turns(engines, lambda e: turns.share(e.arm.name, rounds) < 1):
            turns.add(engine.arm.name, turn_of(engine, prompts))
        recorded, recording = engines[-1].record([drawn], params)
        bar.advance(task)
        close_engines(engines)
    result = _result([arm.name for arm in arms], turns, model)
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    has_tree = draw_longest(recording, [drawn], recorded.texts, tokenizer, out / "tree.png")
    _show(console, result, out, has_tree)
    if not result["identical"]:
        raise SystemExit("the texts differ: this is a bug, please report it")


def _result(arms: list[str], turns: Turns[Turn], model: Path) -> dict[str, Any]:
    texts = turns.plain[-1].texts
    rows = []
    for name in arms:
        found = turns.of(name)
        rows.append(
            {
                "arm": name,
                "identical_to_plain": turns.same_texts(name) == len(texts),
                "tokens_per_step": round(found[-1].tokens_per_step, 3),
                "tokens_per_s": round(median(turn.tokens_per_s for turn in found), 1),
                "ratio_to_plain": round(turns.ratio(name), 3),
                "seconds": [round(turn.seconds, 3) for turn in found],
            }
        )
    return {
        "model": str(model),
        "machine": this_machine().model_dump(),
        "versions": installed_versions(),
        "prompts": len(texts),
        "new_tokens": sum(map(len, texts)),
        "identical": all(row["identical_to_plain"] for row in rows),
        "arms": rows,
    }


def _show(console: Console, result: dict[str, Any], out: Path, has_tree: bool) -> None:
    table = Table(
        "", "same text", "tokens per step", "tokens/s", "against plain",
        title=f"{result['prompts']} prompts from unseen files, one at a time, "
        f"{result['new_tokens']} new tokens, float32, greedy",
    )  # fmt: skip
    for row in result["arms"]:
        table.add_row(
            row["arm"],
            "yes" if row["identical_to_plain"] else "NO",
            f"{row['tokens_per_step']:.2f}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['ratio_to_plain']:.2f}x",
        )
    console.print(table)
    if has_tree:
        console.print(f"A real token tree: {out / 'tree.png'}")
    console.print(f"The figures: {out / 'result.json'}")
