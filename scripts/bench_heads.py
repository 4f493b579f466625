"""What heads give at equal trees, on what the target writes greedily and sampled.

    python scripts/bench_heads.py build/smollm2 HEADS OTHERS --held-out spec_bench_dev.jsonl

The target answers the same held-out prompts at each temperature, once; all heads are then
walked along these answers. A sampled token is accepted where it is in the tree, so a walk
along sampled text takes as many steps as serving does, and no draws of its own. A chain has
the first choice of each head.
"""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from vllm_propd.cli.options import errors
from vllm_propd.training.data.writing import Ids
from vllm_propd.training.measure import CANDIDATES, calibrate
from vllm_propd.training.model.target import check_trained, load_trained
from vllm_propd.training.model.trainee import Trainee
from vllm_propd.training.settings import TrainSettings
from vllm_propd.training.text import write_held_out

SHOWN = (4, 8, 16, 32, 64)
"""Nodes of the trees in the table."""


def line(name: str, temperature: float, trainee: Trainee, spoken: tuple[Ids, Ids]) -> str:
    """The table's line of some heads, at one temperature."""
    with trainee.autocast():
        trees, chains = (
            calibrate(trainee, *spoken, candidates=count) for count in (CANDIDATES, 1)
        )
    first = trees.cumulative(0)
    walked = [chains.tokens_per_step[max(SHOWN)]]
    walked += [trees.tokens_per_step[nodes] for nodes in SHOWN]
    cells = [name, f"{temperature:g}", f"{first[0]:.1%} / {first[9]:.1%}"]
    return f"| {' | '.join([*cells, *(f'{one:.2f}' for one in walked)])} |"


def main(
    model: Annotated[str, typer.Argument(help="Folder or hub name of the target.")],
    heads: Annotated[list[Path], typer.Argument(help="Folders of heads.")],
    held_out: Annotated[
        list[Path] | None,
        typer.Option(help="Prompts to measure with. Default: the model asks itself."),
    ] = None,
    temperatures: Annotated[str, typer.Option(help="Of the target's answers.")] = "0,1",
    length: Annotated[
        int, typer.Option(min=8, help="Prompts have up to three quarters of it, in tokens.")
    ] = 512,
) -> None:
    """Print what heads know and what trees of theirs give."""
    with errors():
        for one in heads:
            check_trained(model, one)
        sizes = " | ".join(f"{nodes} nodes" for nodes in SHOWN)
        columns = f"| heads | temperature | head 1, top-1 / top-10 | chain | {sizes} |"
        spoken, lines = {}, []
        for temperature in map(float, temperatures.split(",")):
            with TemporaryDirectory() as work:
                settings = TrainSettings(length=length)
                spoken[temperature] = write_held_out(
                    model, held_out or [], settings, Path(work), temperature
                )
        for one in heads:
            trainee = load_trained(model, one)
            for temperature, texts in spoken.items():
                shown = line(one.name, temperature, trainee, texts)
                print(shown)
                lines.append((temperature, shown))
        lines.sort(key=itemgetter(0))
        table = [columns, "|---" * (4 + len(SHOWN)) + "|", *(shown for _, shown in lines)]
        print("\n" + "\n".join(table))


if __name__ == "__main__":
    typer.run(main)
