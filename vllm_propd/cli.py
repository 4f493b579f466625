"""The command ``vllm-propd``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from vllm_propd.training.settings import TrainSettings

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """ProPD for vLLM: token trees from Medusa heads, verified losslessly."""


# What measuring commands have in common.
Target = Annotated[Path, typer.Argument(help="Folder of the target.")]
PromptText = Annotated[
    list[Path] | None,
    typer.Option(help="Text to cut prompts from. Default: Python's own library."),
]
PromptTokens = Annotated[int, typer.Option(min=1, help="Of each prompt.")]
PromptSeed = Annotated[int, typer.Option(help="Of the choice of prompts.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="bfloat16, float32, or auto: bfloat16, but float32 on CPUs without AVX-512, "
        "where vLLM has no kernels for bfloat16."
    ),
]


@app.command()
def demo(
    model: Annotated[Path, typer.Option(help="Target with heads in propd/.")] = Path(
        "demo/model"
    ),
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("demo"),
    prompts: Annotated[int, typer.Option(help="Prompts from unseen files.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=2, help="New tokens for each.")] = 128,
    rounds: Annotated[int, typer.Option(help="Turns each arm takes.")] = 3,
    num_speculative_tokens: Annotated[int, typer.Option(help="Nodes of a tree.")] = 48,
) -> None:
    """Plain vLLM beside ProPD: same text, steps, speed, and a picture of a tree."""
    from vllm_propd.demo.run import run_demo

    run_demo(model, out, prompts, max_tokens, rounds, num_speculative_tokens)


def _setting(name: str) -> Any:
    """The option of a field of ``TrainSettings``, with the field's description."""
    return typer.Option(help=TrainSettings.model_fields[name].description)


DEFAULTS = TrainSettings()


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="Hugging Face causal LM to train for.")],
    data: Annotated[
        list[Path],
        typer.Option(
            help="Text, JSON rows (`text`, or chats in `messages` or `conversations`), "
            "Parquet, or folders of them; repeat for more."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the heads.")],
    held_out: Annotated[
        list[Path] | None,
        typer.Option(help="The same, to measure with. Default: a share of --data."),
    ] = None,
    most_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of --data; what is beyond is not read.")
    ] = 100_000_000,
    self_distill: Annotated[
        bool,
        typer.Option(
            help="Train on what the target itself writes, with vLLM, on prompts from "
            "--data: what the heads meet in greedy serving."
        ),
    ] = False,
    distill_tokens: Annotated[
        int, typer.Option(min=1, help="How much it writes.")
    ] = 1_000_000,
    num_heads: Annotated[int, _setting("num_heads")] = DEFAULTS.num_heads,
    num_layers: Annotated[int, _setting("num_layers")] = DEFAULTS.num_layers,
    output_layer: Annotated[str, _setting("output_layer")] = DEFAULTS.output_layer,
    early_layers: Annotated[str, _setting("early_layers")] = "1,2,3",
    early_rank: Annotated[int, _setting("early_rank")] = DEFAULTS.early_rank,
    minutes: Annotated[
        float | None, typer.Option(help="Training time; 10 where --steps is not given.")
    ] = None,
    steps: Annotated[int | None, _setting("steps")] = None,
    batch_size: Annotated[int, _setting("batch_size")] = DEFAULTS.batch_size,
    accumulate: Annotated[int, _setting("accumulate")] = DEFAULTS.accumulate,
    length: Annotated[int, _setting("length")] = DEFAULTS.length,
    labels: Annotated[str, _setting("labels")] = DEFAULTS.labels,
    learning_rate: Annotated[float, _setting("learning_rate")] = DEFAULTS.learning_rate,
    precision: Annotated[str, _setting("precision")] = DEFAULTS.precision,
    save_every: Annotated[float, _setting("save_every")] = DEFAULTS.save_every,
    seed: Annotated[int, _setting("seed")] = DEFAULTS.seed,
    num_workers: Annotated[
        int, typer.Option(min=1, help="Workers; more than one by Ray Train.")
    ] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from --out's unfinished training.")
    ] = False,
    for_vllm: Annotated[
        bool, typer.Option(help="Also write the heads as vLLM's own `medusa` reads them.")
    ] = True,
) -> None:
    """Train Medusa heads and early heads on a frozen target."""
    with _errors():
        settings = TrainSettings.model_validate(
            {
                "num_heads": num_heads,
                "num_layers": num_layers,
                "output_layer": output_layer,
                "early_layers": [part for part in early_layers.split(",") if part],
                "early_rank": early_rank,
                "minutes": minutes,
                "steps": steps,
                "batch_size": batch_size,
                "accumulate": accumulate,
                "length": length,
                "labels": labels,
                "learning_rate": learning_rate,
                "precision": precision,
                "save_every": save_every,
                "seed": seed,
            }
        )
        from vllm_propd.training.run import Inputs, train_heads

        inputs = Inputs(
            model, data, held_out or [], most_tokens, self_distill, distill_tokens
        )
        train_heads(inputs, out, settings, num_workers, resume, for_vllm)


@app.command()
def bench(
    model: Target,
    heads: Annotated[
        Path | None, typer.Option(help="Medusa heads. Default: MODEL/propd.")
    ] = None,
    prompts: Annotated[
        list[Path] | None,
        typer.Option(help="Text to cut prompts from. Default: Python's library, unseen."),
    ] = None,
    arms: Annotated[
        str,
        typer.Option(
            help="Separated by spaces; known: plain, medusa, ngram, suffix, chain, static, "
            "propd. Overrides: propd:num_speculative_tokens=16,num_candidates=4."
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
        int, typer.Option(min=3, help="Turns of each arm at each point; at least.")
    ] = 3,
    seconds: Annotated[
        float, typer.Option(min=0, help="That each arm runs at each point; at least.")
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
            min=1, help="Where the medians are not known to 2% (quartiles) before."
        ),
    ] = 12,
    starts: Annotated[
        int,
        typer.Option(
            min=1,
            help="Of all engines: as many times as many chunks. Alike engines differ.",
        ),
    ] = 1,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy.")] = 0.0,
    dtype: Dtype = "auto",
    enforce_eager: Annotated[bool, typer.Option(help="Without torch.compile.")] = True,
    seed: PromptSeed = 0,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("bench"),
) -> None:
    """Arms in turns on the same prompts: speed against plain vLLM, steps, equality."""
    _allow_stopwatches()
    with _errors():
        from vllm_propd.bench.run import run_bench
        from vllm_propd.bench.settings import BenchSettings

        settings = BenchSettings(
            arms=arms,
            batch_sizes=_integers(batch_sizes),
            max_tokens=max_tokens,
            prompt_tokens=prompt_tokens,
            rounds=rounds,
            seconds=seconds,
            chunks=chunks,
            most_chunks=max(chunks, most_chunks),
            starts=starts,
            temperature=temperature,
            dtype=_dtype(dtype),
            enforce_eager=enforce_eager,
            seed=seed,
            workload=workload,
            lengths=_integers(lengths),
            trace_requests=trace_requests,
            trace_rate=trace_rate,
        )
        run_bench(model, heads or model / "propd", prompts or [], out, settings)


@app.command()
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
    _allow_stopwatches()
    with _errors():
        from vllm_propd.bench.settings import BenchSettings
        from vllm_propd.bench.tune import Search, run_tune

        settings = BenchSettings(
            batch_sizes=(batch_size,),
            max_tokens=max_tokens,
            prompt_tokens=prompt_tokens,
            rounds=rounds,
            dtype=_dtype(dtype),
            seed=seed,
        )
        search = Search(
            layers=_integers(layers),
            top_k=_integers(top_k),
            keep_nodes=_integers(keep_nodes),
            nodes=nodes,
            num_prompts=num_prompts,
            least_acceptance=least_acceptance,
        )
        run_tune(model, heads or model / "propd", prompts or [], out, settings, search)


@app.command()
def simulate(
    model: Target,
    heads: Annotated[
        Path | None, typer.Option(help="Of all arms. Default: MODEL/propd.")
    ] = None,
    prompts: PromptText = None,
    arms: Annotated[
        str, typer.Option(help="ProPD's, as `bench` takes them.")
    ] = "chain propd-no-dynamic propd-no-prune propd",
    batch_sizes: Annotated[str, typer.Option(help="Sequences at a time.")] = "1,4,16",
    early_layer: Annotated[
        int | None, typer.Option(help="Recorded. Default: the first with an early head.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=2, max=255, help="Of recorded trees.")] = 64,
    num_prompts: Annotated[int, typer.Option(min=1, help="Recorded.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=8, help="New tokens of each.")] = 64,
    prompt_tokens: PromptTokens = 128,
    dtype: Dtype = "auto",
    seed: PromptSeed = 0,
) -> None:
    """Predicts settings from one recording: acceptance, pruning, step times."""
    _allow_stopwatches()
    with _errors():
        from vllm_propd.bench.settings import BenchSettings
        from vllm_propd.bench.simulate import run_simulate

        settings = BenchSettings(
            arms=arms,
            batch_sizes=_integers(batch_sizes),
            max_tokens=max_tokens,
            prompt_tokens=prompt_tokens,
            dtype=_dtype(dtype),
            seed=seed,
        )
        folder = heads or model / "propd"
        run_simulate(
            model, folder, prompts or [], early_layer, nodes, num_prompts, settings
        )


@app.command()
def watch(
    url: Annotated[
        str, typer.Argument(help="Of a server that runs ProPD.")
    ] = "http://localhost:8000",
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds.")] = 1.0,
    once: Annotated[bool, typer.Option(help="Print one interval, and end.")] = False,
) -> None:
    """A running server's trees, live: sizes, tokens per step, step times."""
    with _errors():
        from vllm_propd.watch import watch as watch_server

        watch_server(url, interval, once)


def _integers(text: str) -> tuple[int, ...]:
    """Of an option like ``1,4,16``; in order, each once."""
    try:
        return tuple(sorted({int(part) for part in text.split(",") if part}))
    except ValueError as error:
        raise ValueError(f"'{text}': whole numbers with commas between them") from error


def _dtype(text: str) -> str:
    """Of option ``--dtype``."""
    from vllm.platforms import current_platform

    from vllm_propd.fast_dtype import fast_dtype

    return fast_dtype(current_platform.device_type) if text == "auto" else text


def _allow_stopwatches() -> None:
    """They go into the workers as functions; and the engines are to be quiet."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")


@contextmanager
def _errors() -> Iterator[None]:
    """What a user got wrong is one line, not a traceback."""
    try:
        yield
    except ValidationError as error:
        problems = []
        for item in error.errors():
            option = "--" + str(item["loc"][0]).replace("_", "-") if item["loc"] else ""
            problems.append(f"{option} {item['msg'].removeprefix('Value error, ')}".strip())
        raise _failure("; ".join(problems)) from error
    except (ValueError, OSError) as error:
        raise _failure(str(error)) from error


def _failure(message: str) -> typer.Exit:
    Console(stderr=True).print(f"[red]Error:[/red] {escape(message)}", highlight=False)
    return typer.Exit(1)


if __name__ == "__main__":
    app()
