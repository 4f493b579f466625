"""Takes a benchmark into the README: its table, its figures, and what they are made of.

    make bench && mv build/bench build/again && make bench
    python scripts/readme_bench.py build/bench --again build/again

``demo/bench.json`` keeps both results, without the lists of single steps. A test checks
that the README's table is what this script makes of it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from pydantic import BaseModel

from vllm_propd.bench import plots
from vllm_propd.bench.results import Results, Row

ROOT = Path(__file__).parents[1]
README, DEMO = ROOT / "README.md", ROOT / "demo"
KEPT = DEMO / "bench.json"
START, END = "<!-- bench: scripts/readme_bench.py -->\n", "<!-- end of bench -->\n"

NO_LISTS: dict[str, list[float]] = {
    "turns": [],
    "measured_step_ms": [],
    "estimated_step_ms": [],
    "tree_sizes": [],
    "accepted_by_rank": [],
    "tokens_by_size": [],
    "reliability": [],
}


class Shown(BaseModel):
    """What the README's table is made of.

    Attributes:
        speed: on the inflated model.
        equality: in float32, where texts must be the same to the last token.
        differences: by how much the ratios of a second run were others, relatively.
    """

    speed: Results
    equality: Results
    differences: list[float] = []


def short(results: Results) -> Results:
    """Without lists of steps, and without paths."""

    def without(row: Row) -> Row:
        config = row.config and {k: v for k, v in row.config.items() if k != "model"}
        return row.model_copy(update={**NO_LISTS, "config": config})

    return results.model_copy(update={"rows": [without(row) for row in results.rows]})


def differences(speed: Results, again: Results) -> list[float]:
    """Of the ratios to plain vLLM, smallest first."""
    found = []
    for row in speed.by_batch:
        other = again.row(row.arm, row.batch_size)
        if other is not None and row.arm != "plain":
            ratios = row.ratio_to_plain, other.ratio_to_plain
            found.append(max(ratios) / min(ratios) - 1.0)
    return sorted(found)


def table(shown: Shown) -> str:
    """Markdown: a row for each arm."""
    speed = shown.speed
    columns = [f"batch {size}" for size in speed.batch_sizes]
    lines = [
        f"Tokens/s against plain vLLM, and tokens per step. {speed.caption()}:",
        "",
        f"| arm | {' | '.join(columns)} | same text, float32 |",
        "|---|" + "---|" * (len(columns) + 1),
    ]
    for arm in speed.arms:
        rows = [speed.row(arm, size) for size in speed.batch_sizes]
        cells = [
            f"{row.ratio_to_plain:.2f}x, {row.tokens_per_step:.2f}" for row in rows if row
        ]
        equal = [row for row in shown.equality.by_batch if row.arm == arm]
        same = sum(row.identical_to_plain for row in equal)
        of = sum(row.prompts for row in equal)
        lines.append(f"| `{arm}` | {' | '.join(cells)} | {same} of {of} |")
    if found := shown.differences:
        lines += [
            "",
            f"A second run's ratios lie within {found[-1]:.0%} of these, half of them "
            f"within {median(found):.0%}.",
        ]
    return "\n".join(lines) + "\n"


def rewritten(readme: str) -> str:
    """The README's text with the table of what is kept."""
    shown = Shown.model_validate_json(KEPT.read_text())
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    return before + START + table(shown) + END + after


def read(folder: Path) -> Results:
    """What a benchmark has written."""
    return Results.model_validate_json((folder / "results.json").read_text())


def main(
    out: Annotated[Path, typer.Argument(help="Where `make bench` has written.")],
    again: Annotated[Path | None, typer.Option(help="Where it has, once more.")] = None,
) -> None:
    """Write demo/bench.json, its pictures, and the README's table."""
    speed, equality = read(out), read(out / "float32")
    shown = Shown(
        speed=short(speed),
        equality=short(equality),
        differences=differences(speed, read(again)) if again else [],
    )
    KEPT.write_text(shown.model_dump_json(indent=1) + "\n")
    plots.speed(shown.speed, DEMO / "bench.png")
    shutil.copy(out / "sizing.png", DEMO)
    README.write_text(rewritten(README.read_text()))


if __name__ == "__main__":
    typer.run(main)
