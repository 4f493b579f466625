"""What training time gives: heads of several trainings on the same text.

    python scripts/bench_training.py build/smollm2 build/smollm2-heads --minutes 10,30,120
    python scripts/bench_training.py build/smollm2 build/smollm2-heads --minutes 10 \\
        --variants "exact:sampled_tokens=0 half:text=0.5"

A variant is other settings; ``text`` is the share of the text that it learns from. The
target asks and answers itself, once; then each training begins anew, with a schedule of
its own length. What the target says of its text is computed in the first and kept for the
others, so the first one has fewer steps. ``OUT/MINUTES`` and ``OUT/VARIANT-MINUTES`` have
the heads, and ``OUT/table.md`` a line for each; a run that was killed goes on with what is
missing.
"""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
import yaml

from vllm_propd.cli.options import errors
from vllm_propd.heads.calibration import Calibration
from vllm_propd.resume import alone_in, changes, write_whole
from vllm_propd.training.data.batches import Epochs, Starts, load_data
from vllm_propd.training.loop import Loop
from vllm_propd.training.model import checkpoint
from vllm_propd.training.model.target import load_trainee
from vllm_propd.training.run import run_with_bar, save_trained
from vllm_propd.training.settings import TrainSettings
from vllm_propd.training.text import Inputs, training_data, write_inputs

SHOWN = (1, 4, 8, 16, 32, 64)
"""Nodes of the trees in the table."""

FIGURES = "training.json"
PAGE = Path(__file__).parents[1] / "docs" / "training.md"


def line(minutes: str, figures: dict[str, float], found: Calibration) -> str:
    """A training's line in the table."""
    tops = [
        f"{found.cumulative(head)[0]:.1%} / {found.cumulative(head)[9]:.1%}"
        for head in range(len(found.rank_accuracy))
    ]
    walked = [f"{found.tokens_per_step[nodes]:.2f}" for nodes in SHOWN]
    cells = [minutes, f"{figures['tokens']:,.0f}", f"{figures['speed']:,.0f}"]
    return f"| {' | '.join([*cells, *tops, *walked])} |"


def trained(out: Path) -> list[Path]:
    """Returns the folders of all trainings that have ended, shortest first."""
    return sorted((found.parent for found in out.glob(f"*/{FIGURES}")), key=_order)


def beside_variants(folders: list[Path]) -> list[Path]:
    """Returns variants, and what was trained as long without one."""
    minutes = {f.name.rpartition("-")[2] for f in folders if "-" in f.name}
    return [folder for folder in folders if folder.name.rpartition("-")[2] in minutes]


def table(folders: list[Path]) -> str:
    """Returns a table of trainings."""
    lines: list[str] = []
    for folder in folders:
        found = Calibration.model_validate_json((folder / "calibration.json").read_text())
        if not lines:
            heads = [f"head {k + 1}" for k in range(len(found.rank_accuracy))]
            columns = ["minutes", "tokens read", "tokens/s", *heads]
            columns += ["1 node", *(f"{nodes} nodes" for nodes in SHOWN[1:])]
            lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        figures = json.loads((folder / FIGURES).read_text())
        lines.append(line(folder.name, figures, found))
    return "\n".join(lines) + "\n"


def _order(folder: Path) -> tuple[float, str]:
    """By minutes, and then by variant."""
    variant, _, minutes = folder.name.rpartition("-")
    return float(minutes), variant


def parse_variants(text: str) -> dict[str, dict[str, object]]:
    """Names with other settings, as in ``exact:sampled_tokens=0``; first, none."""
    found: dict[str, dict[str, object]] = {"": {}}
    for variant in text.split():
        name, _, settings = variant.partition(":")
        pairs = (one.partition("=") for one in re.split(r",(?![^[]*])", settings))
        found[f"{name}-"] = {key: yaml.safe_load(value) for key, _, value in pairs}
    return found


class PartOf(Epochs):
    """A share of the windows only, drawn once, so that what is kept of them serves all."""

    def __init__(self, windows: int, share: float, settings: TrainSettings):
        drawn = np.random.default_rng(settings.seed).permutation(windows)
        self.drawn = drawn[: max(1, round(windows * share))]
        super().__init__(len(self.drawn), settings.batch_size, settings.seed)

    def __call__(self, step: int) -> Starts:
        return self.drawn[super().__call__(step)]


def train(
    inputs: Inputs, settings: TrainSettings, text: float, work: Path, out: Path
) -> None:
    """One training on a share of the text, resumed where it was killed."""
    whose = work / "whose.txt"  # trainings share a folder, and one checkpoint
    if not whose.exists() or whose.read_text() != out.name:
        (work / checkpoint.FILE).unlink(missing_ok=True)
        whose.write_text(out.name)
    data = load_data(work, training_data(inputs))
    trainee = load_trainee(inputs.model, settings, data)
    loop = Loop(trainee, data, settings, work, resume=(work / checkpoint.FILE).exists())
    if text < 1:
        loop.epochs = PartOf(len(loop.windows), text, settings)
    run_with_bar(loop, work)
    save_trained(trainee, inputs.model, work, out, for_vllm=False)
    tokens = loop.progress.step * settings.tokens_per_step
    figures = {
        "tokens": tokens,
        "speed": tokens / loop.progress.seconds,
        "loss": loop.progress.loss,
        "settings": decided(settings, text),
    }
    write_whole(out / FIGURES, json.dumps(figures) + "\n")
    (work / checkpoint.FILE).unlink()


def decided(settings: TrainSettings, text: float) -> dict[str, object]:
    """What decides a training's figures, beside the minutes in its name."""
    fields = settings.model_dump(mode="json", exclude=checkpoint.MAY_DIFFER)
    return fields | {"text": text}


def has_ended(folder: Path, settings: TrainSettings, text: float) -> bool:
    """Whether a training has ended; one with other settings is refused.

    Trainings from before settings were noted are taken as they are.
    """
    if not (folder / FIGURES).exists():
        return False
    now = decided(settings, text)
    then = json.loads((folder / FIGURES).read_text()).get("settings", now)
    if what := changes(then, now):
        raise ValueError(
            f"{folder} was trained with other settings ({what}); give those, or remove it"
        )
    return True


def write(place: str, lines: str) -> None:
    """Writes a table to its place on the page."""
    here = re.compile(rf"(<!-- {place}: [^\n]*-->\n).*?(<!-- end of {place} -->\n)", re.S)
    if lines.strip():  # what has not been trained now stays as it was
        PAGE.write_text(here.sub(lambda m: m[1] + lines + m[2], PAGE.read_text()))


def main(
    model: Annotated[str, typer.Argument(help="Folder or hub name of the target.")],
    out: Annotated[Path, typer.Argument(help="Folder of all heads.")],
    minutes: Annotated[str, typer.Option(help="Of each training.")] = "10,30",
    recipe: Annotated[
        Path | None, typer.Option(help="YAML file of training settings.")
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="As `train` takes it. Default: own questions.")
    ] = None,
    held_out: Annotated[
        list[Path] | None, typer.Option(help="As `train` takes it.")
    ] = None,
    own_share: Annotated[float | None, typer.Option(help="As `train` takes it.")] = None,
    variants: Annotated[
        str, typer.Option(help="Trained beside, with other settings, by name.")
    ] = "",
    docs: Annotated[
        bool, typer.Option(help="Write the table into the documentation.")
    ] = False,
    distill_tokens: Annotated[
        int, typer.Option(help="How much the target writes.")
    ] = 400_000,
) -> None:
    """Train heads for so many minutes each, and print what they know."""
    chosen = yaml.safe_load(recipe.read_text()) if recipe else {}
    inputs = Inputs(
        model,
        data or [],
        held_out or [],
        self_distill=True,
        distill_tokens=distill_tokens,
        own_share=own_share,
    )
    work = out / "training"
    work.mkdir(parents=True, exist_ok=True)
    with errors(), alone_in(work, f"OUT {out}"):
        write_inputs(inputs, TrainSettings(**chosen), work)
        for each, (name, others) in product(
            minutes.split(","), parse_variants(variants).items()
        ):
            folder = out / f"{name}{each}"
            fields = {**chosen, **others, "minutes": float(each)}
            text = fields.pop("text", 1.0)
            settings = TrainSettings(**fields)
            if not has_ended(folder, settings, text):
                train(inputs, settings, text, work, folder)
                lines = table(trained(out))
                (out / "table.md").write_text(lines)
                print(lines)
    if docs:
        folders = trained(out)
        write("trained", table([f for f in folders if "-" not in f.name]))
        write("variants", table(beside_variants(folders)))


if __name__ == "__main__":
    typer.run(main)
