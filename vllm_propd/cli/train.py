"""``vllm-propd train`` and ``vllm-propd calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_propd.cli.options import errors, quiet_engines, refuse_unused, with_settings
from vllm_propd.training.settings import TrainSettings


@with_settings(TrainSettings)
def train(
    context: typer.Context,
    settings: TrainSettings,
    model: Annotated[str, typer.Argument(help="Hugging Face causal LM to train for.")],
    out: Annotated[Path, typer.Option(help="Folder of the heads.")],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text, JSON rows (`text`, chats, questions), Parquet, or folders of them; "
            "repeat for more. None, with --self-distill: the model asks itself."
        ),
    ] = None,
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
            help="Train on what the target itself writes, with vLLM, after prompts from "
            "--data, or questions of its own: what the heads meet in greedy serving."
        ),
    ] = False,
    distill_tokens: Annotated[
        int, typer.Option(min=1, help="How much it writes.")
    ] = 1_000_000,
    own_share: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Share of questions that the model asks itself, beside those in --data. "
            "Default: none with --data, all without.",
        ),
    ] = None,
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
    quiet_engines()
    if not self_distill:
        of_writing = ("distill_tokens", "own_share")
        refuse_unused(context, of_writing, "without --self-distill", "add that")
    if not data:
        refuse_unused(
            context,
            ["own_share"],
            "without --data, where the model asks all",
            "give --data",
        )
    if not data and not held_out:
        where = "without --data and --held-out"
        refuse_unused(context, ["most_tokens"], where, "give one of them")
    from vllm_propd.training.run import train_heads
    from vllm_propd.training.text import Inputs

    inputs = Inputs(
        model,
        data or [],
        held_out or [],
        most_tokens,
        self_distill,
        distill_tokens,
        own_share,
    )
    train_heads(inputs, out, settings, num_workers, resume, for_vllm)


def calibrate(
    model: Annotated[str, typer.Argument(help="Hugging Face causal LM, the target.")],
    heads: Annotated[
        Path, typer.Argument(help="Folder of its heads, by whomever they were trained.")
    ],
    held_out: Annotated[
        list[Path] | None,
        typer.Option(
            help="Prompts or text to measure with, as `train` takes them. Default: the "
            "model asks itself."
        ),
    ] = None,
    length: Annotated[
        int, typer.Option(min=8, help="Prompts have up to three quarters of it, in tokens.")
    ] = 512,
) -> None:
    """Measure heads, and write calibration.json beside them: what serving begins with."""
    quiet_engines()
    with errors():
        from vllm_propd.training.run import measure_heads

        measure_heads(model, heads, held_out or [], length)
