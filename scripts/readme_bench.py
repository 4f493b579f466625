"""Takes a benchmark into the README: its table, its figures, and what they are made of.

    make bench && mv build/bench build/again && make bench && make bench-sizes
    python scripts/readme_bench.py avx2 build/bench --again build/again --sizes build/sizes

``demo/bench-avx2.json`` keeps the first result, without the lists of single steps, and how
far others are from it. The README has a table for each kind of machine that was measured,
and a test checks that they are what this script makes of these files.
"""

from __future__ import annotations

import re
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
START, END = "<!-- bench", "<!-- end of bench -->\n"
PLACE = re.compile(rf"({START} (\w+): [^\n]*\n).*?({END})", re.DOTALL)
"""Of a table in the README, and the machine's name in it."""

NO_LISTS: dict[str, list[float]] = {
    "turns": [],
    "chunks": [],
    "steps": [],
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
        runs: benchmarks, this one counted.
        differences: by how much each ratio differs between them, relatively.
    """

    speed: Results
    equality: Results
    runs: int = 1
    differences: list[float] = []


def short(results: Results) -> Results:
    """Without lists of steps, and without paths."""

    def without(row: Row) -> Row:
        config = row.config and {k: v for k, v in row.config.items() if k != "model"}
        return row.model_copy(update={**NO_LISTS, "config": config})

    return results.model_copy(update={"rows": [without(row) for row in results.rows]})


def ratio_of(row: Row) -> float:
    """By whole wall clock, the median of chunks; of fast steps, where there were none."""
    return row.ratio_to_plain if row.wall_ratio_median is None else row.wall_ratio_median


def differences(runs: list[Results]) -> list[float]:
    """Of each ratio to plain vLLM, the largest over the smallest; smallest first."""
    found = []
    for one in runs[0].by_batch:
        if one.arm != "plain":
            rows = [run.row(one.arm, one.batch_size) for run in runs]
            ratios = [ratio_of(row) for row in rows if row is not None]
            found.append(max(ratios) / min(ratios) - 1.0)
    return sorted(found)


def cell_of(row: Row) -> str:
    """A row's ratio, its quartiles if it has some, and tokens per step."""
    quartiles = row.wall_ratio_median_quartiles
    known = f" ({quartiles[0]:.3f} to {quartiles[1]:.3f})" if quartiles else ""
    return f"{ratio_of(row):.{3 if quartiles else 2}f}x{known}, {row.tokens_per_step:.2f}"


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
        cells = [cell_of(row) for row in rows if row]
        equal = [row for row in shown.equality.by_batch if row.arm == arm]
        same = sum(row.identical_to_plain for row in equal)
        of = sum(row.prompts for row in equal)
        lines.append(f"| `{arm}` | {' | '.join(cells)} | {same} of {of} |")
    if found := shown.differences:
        lines += [
            "",
            f"Over {shown.runs} runs these ratios differ by {found[-1]:.0%} at most, "
            f"half of them by less than {median(found):.0%}.",
        ]
    return "\n".join(lines) + "\n"


def kept(name: str) -> Path:
    """Where the result of a kind of machine is."""
    return DEMO / f"bench-{name}.json"


def rewritten(readme: str) -> str:
    """The README's text with the tables of what is kept."""

    def filled(place: re.Match[str]) -> str:
        start, name, end = place.groups()
        return start + table(Shown.model_validate_json(kept(name).read_text())) + end

    return PLACE.sub(filled, readme)


def read(folder: Path) -> Results:
    """What a benchmark has written."""
    return Results.model_validate_json((folder / "results.json").read_text())


def main(
    name: Annotated[str, typer.Argument(help="Of this kind of machine, in the README.")],
    out: Annotated[Path, typer.Argument(help="Where `make bench` has written.")],
    again: Annotated[
        list[Path] | None, typer.Option(help="Where it has once more; repeatable.")
    ] = None,
    sizes: Annotated[
        Path | None, typer.Option(help="Where `make bench-sizes` has drawn sizing.png.")
    ] = None,
) -> None:
    """Write demo/bench-NAME.json, its pictures, and the README's table."""
    runs = list(map(read, (out, *(again or ()))))
    is_float32 = runs[0].dtype == "float32"  # and has shown itself that texts are the same
    equality = runs[0] if is_float32 else read(out / "float32")
    shown = Shown(
        speed=short(runs[0]),
        equality=short(equality),
        runs=len(runs),
        differences=differences(runs) if again else [],
    )
    kept(name).write_text(shown.model_dump_json(indent=1) + "\n")
    plots.speed(shown.speed, kept(name).with_suffix(".png"))
    if sizes is not None:
        shutil.copy(sizes / "sizing.png", DEMO)
    README.write_text(rewritten(README.read_text()))


if __name__ == "__main__":
    typer.run(main)
