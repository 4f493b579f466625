"""``vllm-propd demo`` and ``watch``: what people look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_propd.cli.options import errors, refuse_unused

PUBLISHED, HEADS = Path("build/smollm2"), Path("demo/smollm2-heads")
"""A chat model from the package index (``make model``), and its heads in the repository."""


def demo(
    context: typer.Context,
    model: Annotated[
        Path | None,
        typer.Option(
            help="A chat model, with --heads; or one that goes on with code, with heads in "
            f"propd/. Default: {PUBLISHED} if it is there, else demo/model."
        ),
    ] = None,
    heads: Annotated[
        Path | None, typer.Option(help=f"Of a chat model. Default: {HEADS}.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("build/demo"),
    prompts: Annotated[
        int, typer.Option(min=1, help="Without a chat: from unseen files.")
    ] = 16,
    max_tokens: Annotated[int, typer.Option(min=2, help="New tokens for each.")] = 128,
    rounds: Annotated[
        int, typer.Option(min=1, help="Without a chat: turns of each arm.")
    ] = 1,
    num_speculative_tokens: Annotated[
        int, typer.Option(help="Without a chat: nodes of a tree of fixed size.")
    ] = 48,
) -> None:
    """Plain vLLM beside ProPD: same text, steps, speed, and a picture of a tree."""
    chat = heads is not None or model is None
    if model is None:
        model = PUBLISHED
        missing = [str(p) for p in (model, HEADS) if not (p / "config.json").exists()]
        if missing and heads is None:
            print(f"Not here: {' and '.join(missing)}. So the small model it is.")
            model, chat = Path("demo/model"), False
    with errors():
        if chat:
            others = ("prompts", "rounds", "num_speculative_tokens")
            remedy = "give --model without --heads"
            refuse_unused(context, others, "in a chat", remedy)
            if not (model / "config.json").exists():
                raise ValueError(
                    f"{model} is no model: give --model, or `make model` for {PUBLISHED}"
                )
            from vllm_propd.demo.chat import run_chat_demo

            run_chat_demo(model, heads or HEADS, out, max_tokens)
            return
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
