"""``vllm-propd demo`` and ``watch``: what people look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_propd.cli.options import errors


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


def watch(
    url: Annotated[
        str, typer.Argument(help="Of a server that runs ProPD.")
    ] = "http://localhost:8000",
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds.")] = 1.0,
    once: Annotated[bool, typer.Option(help="Print one interval, and end.")] = False,
) -> None:
    """A running server's trees, live: sizes, tokens per step, step times."""
    with errors():
        from vllm_propd.watch import watch as watch_server

        watch_server(url, interval, once)
