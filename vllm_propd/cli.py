"""The command ``vllm-propd``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """ProPD for vLLM: token trees from Medusa heads, verified losslessly."""


@app.command()
def demo(
    model: Annotated[Path, typer.Option(help="Target with heads in propd/.")] = Path(
        "demo/model"
    ),
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("demo"),
    prompts: Annotated[int, typer.Option(help="Prompts from unseen files.")] = 8,
    max_tokens: Annotated[int, typer.Option(help="New tokens for each.")] = 128,
    rounds: Annotated[int, typer.Option(help="Turns each arm takes.")] = 3,
    num_speculative_tokens: Annotated[int, typer.Option(help="Nodes of a tree.")] = 48,
) -> None:
    """Plain vLLM beside ProPD: same text, steps, speed, and a picture of a tree."""
    from vllm_propd.demo.run import run_demo

    run_demo(model, out, prompts, max_tokens, rounds, num_speculative_tokens)


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="Hugging Face causal LM to train for.")],
    data: Annotated[
        list[Path], typer.Option(help="Text files or folders; repeat for more.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the heads.")],
    num_heads: Annotated[int, typer.Option(help="Medusa heads.")] = 4,
    num_layers: Annotated[int, typer.Option(help="Residual blocks of a head.")] = 2,
    minutes: Annotated[float, typer.Option(help="Training time.")] = 10.0,
    length: Annotated[int, typer.Option(help="Tokens of a training sequence.")] = 256,
    early_layers: Annotated[
        str, typer.Option(help="Layers with an early head, e.g. 1,2,3.")
    ] = "1,2,3",
    seed: Annotated[int, typer.Option(help="Seed of the batches.")] = 0,
) -> None:
    """Train Medusa heads and early heads on a frozen target."""
    from vllm_propd.training.loop import TrainSettings, train_heads

    layers = tuple(int(layer) for layer in early_layers.split(",") if layer)
    settings = TrainSettings(
        num_heads=num_heads,
        num_layers=num_layers,
        early_layers=layers,
        minutes=minutes,
        length=length,
        seed=seed,
    )
    train_heads(model, data, out, settings)


if __name__ == "__main__":
    app()
