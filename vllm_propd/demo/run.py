"""The demonstration: plain vLLM beside ProPD on text the model has not seen."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from vllm import LLM, SamplingParams
from vllm import __version__ as vllm_version

from vllm_propd.demo.picture import draw_tree
from vllm_propd.training.corpus import held_out_snippets

PROMPT_TOKENS = 160
RECORDED_STEPS = 400


@dataclass
class Arm:
    """One way to generate, and what it measured.

    Attributes:
        name: as the table shows it.
        speculative_config: vLLM's, None for plain.
        texts: token ids by prompt, of the last round.
        seconds: wall time of each round.
        steps: decode steps of the last round.
    """

    name: str
    speculative_config: dict[str, Any] | None
    texts: list[list[int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    steps: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Median over the rounds."""
        return sum(map(len, self.texts)) / statistics.median(self.seconds)

    @property
    def tokens_per_step(self) -> float:
        """New tokens by decode step; each prompt's first token comes with its prefill."""
        return (sum(map(len, self.texts)) - len(self.texts)) / self.steps


def _engine(model: Path, arm: Arm) -> LLM:
    return LLM(
        str(model),
        dtype="float32",
        max_num_seqs=4,
        enforce_eager=True,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=1 << 28,
        use_tqdm_on_load=False,
        speculative_config=arm.speculative_config,
    )


def _generate(llm: LLM, arm: Arm, prompt: list[int], params: SamplingParams) -> None:
    """Runs one prompt to its end, counting engine steps."""
    engine = llm.llm_engine
    engine.add_request(f"demo-{len(arm.texts)}", {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        outputs = engine.step()
        arm.steps += bool(outputs)
        for output in outputs:
            if output.finished:
                arm.texts.append(list(output.outputs[0].token_ids))
    arm.steps -= 1  # the prefill


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
        rounds: how often the arms take turns; the first, a warm-up, is not counted.
        num_speculative_tokens: nodes of ProPD's trees.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    propd = {"method": "propd", "num_speculative_tokens": num_speculative_tokens}
    arms = [
        Arm("plain vLLM", None),
        Arm("chain (same heads)", {"method": "propd", "tree": "chain"}),
        Arm(f"ProPD, {num_speculative_tokens} nodes", propd),
    ]
    console = Console()
    with Progress(console=console) as bar:
        task = bar.add_task("starting engines", total=len(arms))
        engines = []
        for arm in arms:
            bar.update(task, description=f"starting {arm.name}")
            engines.append(_engine(model, arm))
            bar.advance(task)
        tokenizer = engines[0].get_tokenizer()
        snippets = held_out_snippets(num_prompts, seed=7, min_chars=4000)
        prompts = [tokenizer(text)["input_ids"][:PROMPT_TOKENS] for text in snippets]
        engines[-1].collective_rpc("start_recording", args=(RECORDED_STEPS,))
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        task = bar.add_task("generating", total=(rounds + 1) * len(arms) * num_prompts)
        for turn in range(rounds + 1):
            for arm, llm in zip(arms, engines, strict=True):
                bar.update(task, description=f"generating: {arm.name}")
                arm.texts, arm.steps, started = [], 0, time.perf_counter()
                for prompt in prompts:
                    _generate(llm, arm, prompt, params)
                    bar.advance(task)
                if turn:
                    arm.seconds.append(time.perf_counter() - started)
                elif arm is arms[-1]:
                    recording = llm.collective_rpc("take_recording")[0]
        for llm in engines:
            llm.llm_engine.engine_core.shutdown()
    result = _result(arms, prompts, model)
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    _draw(recording, prompts, arms[-1], tokenizer, out / "tree.png")
    _show(console, arms, result, out)
    if not result["identical"]:
        raise SystemExit("the texts differ: this is a bug, please report it")


def _result(arms: list[Arm], prompts: list[list[int]], model: Path) -> dict[str, Any]:
    plain = arms[0]
    same = [arm.texts == plain.texts for arm in arms]
    return {
        "model": str(model),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "vllm": vllm_version,
        },
        "prompts": len(prompts),
        "new_tokens": sum(map(len, plain.texts)),
        "identical": all(same),
        "arms": [
            {
                "arm": arm.name,
                "identical_to_plain": equal,
                "tokens_per_step": round(arm.tokens_per_step, 3),
                "tokens_per_s": round(arm.tokens_per_s, 1),
                "ratio_to_plain": round(arm.tokens_per_s / plain.tokens_per_s, 3),
                "seconds": [round(s, 3) for s in arm.seconds],
            }
            for arm, equal in zip(arms, same, strict=True)
        ],
    }


def _draw(
    recording: list[list[dict[str, Any]]],
    prompts: list[list[int]],
    arm: Arm,
    tokenizer: Any,
    out: Path,
) -> None:
    """Draws the first recorded tree among those with the longest accepted path."""
    trees = [tree for step in recording for tree in step]
    tree = max(trees, key=lambda tree: len(tree["accepted"]))
    # Requests ran one at a time and in order: replay them to the tree's place.
    requests = list(dict.fromkeys(tree["request_id"] for tree in trees))
    which = requests.index(tree["request_id"])
    before = 0
    for other in trees:
        if other is tree:
            break
        if other["request_id"] == tree["request_id"]:
            before += len(other["accepted"]) + 1
    text = tokenizer.decode(prompts[which] + arm.texts[which][:before])
    draw_tree(tree, lambda token: tokenizer.decode([token]), text, out)


def _show(console: Console, arms: list[Arm], result: dict[str, Any], out: Path) -> None:
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
    console.print(
        f"A real token tree: {out / 'tree.png'}; the figures: {out / 'result.json'}"
    )
