"""``vllm-propd bench``: arms take turns on the same prompts, on the same machine."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from safetensors import safe_open
from vllm import SamplingParams

from vllm_propd.bench.arms import Heads, most_nodes, parse_arms
from vllm_propd.bench.report import show, write_report
from vllm_propd.bench.results import Results, Row, installed_versions, this_machine
from vllm_propd.bench.turn import ArmEngine, Turn, ratio_to, start_engines
from vllm_propd.heads.checkpoint import load_heads
from vllm_propd.heads.export import export_for_vllm

FEWEST_PROMPTS = 2
"""Of a turn: one text alone says little about acceptance."""


@dataclass(frozen=True)
class BenchSettings:
    """What to measure.

    Attributes:
        arms: as ``parse_arms`` takes them.
        batch_sizes: sequences generated together.
        max_tokens: new tokens of each, always as many.
        prompt_tokens: of each prompt.
        rounds: turns of each arm at each batch size, after one warm-up.
        temperature: 0: greedy.
        dtype: of weights and activations.
        enforce_eager: without torch.compile.
        seed: of the prompts, and of sampled requests.
    """

    arms: str = "plain medusa ngram chain static propd"
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    max_tokens: int = 128
    prompt_tokens: int = 128
    rounds: int = 3
    temperature: float = 0.0
    dtype: str = "bfloat16"
    enforce_eager: bool = True
    seed: int = 0


def run_bench(
    model: Path, heads: Path, prompts: list[Path], out: Path, settings: BenchSettings
) -> Results:
    """Measures all arms and writes ``results.json`` and ``report.html`` into ``out``.

    Args:
        model: folder of the target.
        heads: in ProPD's format.
        prompts: files whose text is cut into prompts; none: held-out files of Python's
            library.
        out: made if it is not there.
        settings: what to measure.

    Raises:
        ValueError: unknown arms, unusable heads, too little text.
    """
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = load_heads(heads)
        for_vllm = Path(scratch) / "medusa"
        export_for_vllm(heads, output_layer(model), for_vllm)
        arms = parse_arms(settings.arms, Heads(heads, for_vllm, checkpoint.num_heads))
        most = max(*settings.batch_sizes, FEWEST_PROMPTS)
        ids = cut_prompts(model, prompts, most, settings)
        with Progress(console=console) as bar:
            options = engine_options(model, settings, most_nodes(arms))
            engines = start_engines(arms, options, bar, timed=True)
            results = _results(model, settings)
            params = SamplingParams(
                temperature=settings.temperature,
                max_tokens=settings.max_tokens,
                ignore_eos=True,
                detokenize=False,
            )
            turns = len(settings.batch_sizes) * (settings.rounds + 1) * len(arms)
            task = bar.add_task("measuring", total=turns)
            for batch_size in settings.batch_sizes:
                found: dict[str, list[Turn]] = {arm.name: [] for arm in arms}
                prompts_now = ids[: max(batch_size, FEWEST_PROMPTS)]
                for _ in range(settings.rounds + 1):
                    for engine in engines:
                        name = engine.arm.name
                        bar.update(task, description=f"batch {batch_size}: {name}")
                        turn = engine.run_all(prompts_now, batch_size, params)
                        found[name].append(turn)
                        bar.advance(task)
                # The first turn of each warms it up, and is not counted.
                results.rows += _rows(found, batch_size, engines, settings)
        for engine in engines:
            engine.close()
    (out / "results.json").write_text(results.model_dump_json(indent=1) + "\n")
    write_report(results, out)
    show(results, console)
    console.print(f"{out / 'results.json'}, {out / 'report.html'}")
    return results


def output_layer(model: Path) -> Any:
    """The target's output layer (its embedding, where they are tied)."""
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for name in ("lm_head.weight", "model.embed_tokens.weight"):
                if name in names:
                    return file.get_tensor(name)
    raise ValueError(f"{model} holds no safetensors with an output layer")


def cut_prompts(
    model: Path, files: list[Path], count: int, settings: BenchSettings
) -> list[list[int]]:
    """``count`` prompts of ``prompt_tokens`` tokens from text.

    Raises:
        ValueError: there is too little.
    """
    from transformers import AutoTokenizer

    from vllm_propd.training.corpus import held_out_snippets, read_text

    tokenizer = AutoTokenizer.from_pretrained(model)
    length = settings.prompt_tokens
    if not files:
        texts = held_out_snippets(count, seed=settings.seed, min_chars=8 * length)
        return [tokenizer(text)["input_ids"][:length] for text in texts]
    ids = [i for file in files for i in tokenizer(read_text(file))["input_ids"]]
    if len(ids) < count * length:
        raise ValueError(
            f"--prompts: {len(ids):,} tokens; {count} prompts of {length} need more"
        )
    starts = np.random.default_rng(settings.seed).permutation(len(ids) // length)[:count]
    return [ids[start * length : (start + 1) * length] for start in starts.tolist()]


def engine_options(model: Path, settings: BenchSettings, nodes: int) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` that all arms share.

    Args:
        model: folder of the target.
        settings: what to measure.
        nodes: of the largest tree.
    """
    most = max(settings.batch_sizes)
    return {
        "model": str(model),
        "dtype": settings.dtype,
        "max_model_len": settings.prompt_tokens + settings.max_tokens + 64,
        "max_num_seqs": most,
        # Trees take at most half of it: room for all of them whole.
        "max_num_batched_tokens": max(2048, 2 * most * (nodes + 1)),
        "enforce_eager": settings.enforce_eager,
        # The same prompts come round after round: a cache would skip their prefill.
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 1 << 30,
        "use_tqdm_on_load": False,
        "disable_log_stats": False,
    }


def _results(model: Path, settings: BenchSettings) -> Results:
    config = json.loads((model / "config.json").read_text())
    parameters = 0
    for path in model.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                parameters += int(np.prod(file.get_slice(name).get_shape()))
    return Results(
        model=model.name,
        parameters=parameters,
        inflated="inflated" in config,
        dtype=settings.dtype,
        max_tokens=settings.max_tokens,
        rounds=settings.rounds,
        temperature=settings.temperature,
        machine=this_machine(),
        versions=installed_versions(),
    )


def _steps(records: list[dict[str, Any]]) -> dict[str, list[float]]:
    """A row's lists of steps, where times were estimated."""
    timed = [record for record in records if record["measured_s"]]
    return {
        "measured_step_ms": [round(1e3 * r["measured_s"], 3) for r in timed],
        "estimated_step_ms": [round(1e3 * r["estimated_s"], 3) for r in timed],
        "tree_sizes": [round(r["nodes"] / max(r["sequences"], 1), 3) for r in timed],
    }


def _rows(
    found: dict[str, list[Turn]],
    batch_size: int,
    engines: list[ArmEngine],
    settings: BenchSettings,
) -> list[Row]:
    plain = found["plain"][1:]
    rows = []
    for engine in engines:
        turns = found[engine.arm.name][1:]
        speeds = [turn.tokens_per_s for turn in turns]
        last, texts = turns[-1], plain[-1].texts
        same = sum(a == b for a, b in zip(last.texts, texts, strict=True))
        rows.append(
            Row(
                arm=engine.arm.name,
                batch_size=batch_size,
                tokens_per_s=median(speeds),
                tokens_per_s_min=min(speeds),
                tokens_per_s_max=max(speeds),
                ratio_to_plain=ratio_to(turns, plain),
                tokens_per_step=median(turn.tokens_per_step for turn in turns),
                drafted_per_step=last.drafted / max(last.drafts, 1),
                kept_per_step=last.kept_per_step,
                work_ratio=last.work.ratio,
                step_ms={part: round(ms, 3) for part, ms in last.step_ms().items()},
                host_ms_per_step=round(last.host_ms(), 3),
                **_steps(last.records),
                peak_rss_mib=round(engine.peak_rss_mib()),
                acceptance_by_depth=[n / last.drafts for n in last.accepted_at if n],
                identical_to_plain=same,
                prompts=len(texts),
                config=engine.arm.speculative_config,
                seed=settings.seed,
            )
        )
    return rows
