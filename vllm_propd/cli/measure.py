"""``vllm-propd bench``, ``tune`` and ``simulate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_propd.bench.arms import ARMS
from vllm_propd.cli.options import (
    Dtype,
    PromptSeed,
    PromptText,
    PromptTokens,
    Target,
    allow_stopwatches,
    dtype_of,
    errors,
    given,
    integers,
    refuse_unused,
)


def bench(
    context: typer.Context,
    model: Target,
    heads: Annotated[
        Path | None, typer.Option(help="Medusa heads. Default: MODEL/propd.")
    ] = None,
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            help="Chats and questions (JSON, JSON lines, Parquet), answered to their "
            "natural ends; or text to cut prompts from: files, rows (`text`), folders. "
            "Default: Python's library, unseen."
        ),
    ] = None,
    prompts_each: Annotated[
        int, typer.Option(min=1, help="Of chats: how many of each category.")
    ] = 8,
    longest_chat: Annotated[
        int,
        typer.Option(
            min=1,
            help="Of chats: tokens; longer ones are left out, and those whose answer would "
            "find no positions.",
        ),
    ] = 2048,
    arms: Annotated[
        str,
        typer.Option(
            help=f"Separated by spaces; known: {', '.join(ARMS)}. "
            "Overrides: propd:num_speculative_tokens=16,num_candidates=4."
        ),
    ] = "plain medusa ngram chain static propd",
    batch_sizes: Annotated[str, typer.Option(help="Sequences at a time.")] = "1,4,16",
    max_tokens: Annotated[int, typer.Option(min=2, help="New tokens of each.")] = 128,
    prompt_tokens: PromptTokens = 128,
    workload: Annotated[
        bool,
        typer.Option(
            "--workload",
            help="Also by prompt length, by task (code, prose, tables, of text on this "
            "machine), and on a trace of mixed requests that arrive over time.",
        ),
    ] = False,
    lengths: Annotated[
        str, typer.Option(help="Of --workload: tokens of a prompt.")
    ] = "64,256,512",
    trace_requests: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of --workload's trace. Default: twice the largest batch size."
        ),
    ] = None,
    trace_rate: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Requests per second. Default: what plain vLLM finishes at the largest "
            "batch size.",
        ),
    ] = None,
    rounds: Annotated[
        int,
        typer.Option(
            min=0,
            help="Turns of each arm at each point, with full batches; at least; 0: none, "
            "chunks only.",
        ),
    ] = 3,
    seconds: Annotated[
        float, typer.Option(min=0, help="Minimum seconds per arm and point.")
    ] = 0.0,
    chunks: Annotated[
        int,
        typer.Option(
            min=0,
            help="Of the same prompts for all arms, by whole wall clock; at least; 0: none",
        ),
    ] = 6,
    most_chunks: Annotated[
        int,
        typer.Option(
            min=1,
            help="Stop after this many chunks even if medians are not yet known to 2%.",
        ),
    ] = 12,
    starts: Annotated[
        int,
        typer.Option(
            min=1,
            help="Of all engines, at most: as many times as many chunks. Alike engines "
            "differ; four starts or more end when medians are known.",
        ),
    ] = 1,
    in_turn: Annotated[
        bool,
        typer.Option(
            "--in-turn",
            help="Chunks are a step of each arm in turn, in one process, each of other "
            "prompts: the finest comparison. Leaves out --rounds.",
        ),
    ] = False,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy.")] = 0.0,
    dtype: Dtype = "auto",
    enforce_eager: Annotated[bool, typer.Option(help="Without torch.compile.")] = True,
    seed: PromptSeed = 0,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("bench"),
) -> None:
    """Arms in turns on the same prompts: speed against plain vLLM, steps, equality."""
    allow_stopwatches()
    with errors():
        from vllm_propd.bench.run import run_bench
        from vllm_propd.bench.settings import BenchSettings

        if most_chunks < chunks and given(context, "most_chunks"):
            raise ValueError(
                f"--most-chunks {most_chunks} is below --chunks {chunks}: give a smaller "
                "--chunks, or a larger --most-chunks"
            )
        settings = BenchSettings(
            arms=arms,
            batch_sizes=integers(batch_sizes, "--batch-sizes"),
            max_tokens=max_tokens,
            prompt_tokens=prompt_tokens,
            rounds=rounds,
            seconds=seconds,
            chunks=chunks,
            most_chunks=max(chunks, most_chunks),
            starts=starts,
            in_turn=in_turn,
            temperature=temperature,
            dtype=dtype_of(dtype),
            enforce_eager=enforce_eager,
            seed=seed,
            prompts_each=prompts_each,
            longest_chat=longest_chat,
            workload=workload,
            lengths=integers(lengths, "--lengths"),
            trace_requests=trace_requests,
            trace_rate=trace_rate,
        )
        if not workload:
            of_workload = ("lengths", "trace_requests", "trace_rate")
            refuse_unused(context, of_workload, "without --workload", "add that")
        if not chunks:
            of_chunks = ("most_chunks", "starts")
            refuse_unused(context, of_chunks, "with --chunks 0", "give more of these")
        run_bench(model, heads or model / "propd", prompts or [], out, settings)


def tune(
    model: Target,
    heads: Annotated[
        Path | None, typer.Option(help="With early heads. Default: MODEL/propd.")
    ] = None,
    prompts: PromptText = None,
    layers: Annotated[
        str, typer.Option(help="Early layers to try. Default: all with an early head.")
    ] = "",
    top_k: Annotated[str, typer.Option(help="K of rule top_k.")] = "2,5,10,20,50",
    keep_nodes: Annotated[
        str, typer.Option(help="m of rule path_probability.")
    ] = "4,8,16,24,32",
    least_acceptance: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Of the unpruned trees' tokens per step; less is not chosen."
        ),
    ] = 0.97,
    nodes: Annotated[int, typer.Option(min=2, max=255, help="Of a tree.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 4,
    num_prompts: Annotated[int, typer.Option(min=1, help="Of each turn.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=2, help="New tokens of each.")] = 64,
    prompt_tokens: PromptTokens = 128,
    rounds: Annotated[
        int, typer.Option(min=1, help="Turns of each setting, after a warm-up.")
    ] = 3,
    dtype: Dtype = "auto",
    seed: PromptSeed = 0,
    out: Annotated[Path, typer.Option(help="Preset to write.")] = Path("tuned.yaml"),
) -> None:
    """Early pruning on your prompts: measures layers, rules and K; writes a preset."""
    allow_stopwatches()
    with errors():
        from vllm_propd.bench.settings import BenchSettings
        from vllm_propd.bench.tune import Search, run_tune

        settings = BenchSettings(
            batch_sizes=(batch_size,),
            max_tokens=max_tokens,
            prompt_tokens=prompt_tokens,
            rounds=rounds,
            dtype=dtype_of(dtype),
            seed=seed,
        )
        search = Search(
            layers=integers(layers, "--layers", or_none=True),
            top_k=integers(top_k, "--top-k", or_none=True),
            keep_nodes=integers(keep_nodes, "--keep-nodes", or_none=True),
            nodes=nodes,
            num_prompts=num_prompts,
            least_acceptance=least_acceptance,
        )
        run_tune(model, heads or model / "propd", prompts or [], out, settings, search)


def simulate(
    model: Target,
    heads: Annotated[
        Path | None, typer.Option(help="Of all arms. Default: MODEL/propd.")
    ] = None,
    prompts: PromptText = None,
    arms: Annotated[
        str, typer.Option(help="ProPD's, as `bench` takes them.")
    ] = "chain propd-no-dynamic propd-no-lookup propd-no-heads propd",
    batch_sizes: Annotated[str, typer.Option(help="Sequences at a time.")] = "1,4,16",
    early_layer: Annotated[
        int | None, typer.Option(help="Recorded. Default: the first with an early head.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=2, max=255, help="Of recorded trees.")] = 64,
    num_prompts: Annotated[
        int, typer.Option(min=1, help="Number of prompts to record.")
    ] = 16,
    max_tokens: Annotated[int, typer.Option(min=8, help="New tokens of each.")] = 64,
    prompt_tokens: PromptTokens = 128,
    dtype: Dtype = "auto",
    seed: PromptSeed = 0,
) -> None:
    """Predicts settings from one recording: acceptance, pruning, step times."""
    allow_stopwatches()
    with errors():
        from vllm_propd.bench.settings import BenchSettings
        from vllm_propd.bench.simulate import run_simulate

        settings = BenchSettings(
            arms=arms,
            batch_sizes=integers(batch_sizes, "--batch-sizes"),
            max_tokens=max_tokens,
            prompt_tokens=prompt_tokens,
            dtype=dtype_of(dtype),
            seed=seed,
        )
        folder = heads or model / "propd"
        run_simulate(
            model, folder, prompts or [], early_layer, nodes, num_prompts, settings
        )
