"""Takes a benchmark into the README: its table, its figures, and what they are made of.

    make bench && mv build/bench build/again && make bench
    python scripts/readme_bench.py build/bench --again build/again

``demo/bench.json`` keeps the first result, without the lists of single steps, and how far
others are from it. A test checks that the README's table is what this script makes of it.
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


def differences(runs: list[Results]) -> list[float]:
    """Of each ratio to plain vLLM, the largest over the smallest; smallest first."""
    found = []
    for one in runs[0].by_batch:
        if one.arm != "plain":
            rows = [run.row(one.arm, one.batch_size) for run in runs]
            ratios = [row.ratio_to_plain for row in rows if row is not None]
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
            f"Over {shown.runs} runs these ratios differ by {found[-1]:.0%} at most, "
            f"half of them by less than {median(found):.0%}.",
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
    again: Annotated[
        list[Path] | None, typer.Option(help="Where it has once more; repeatable.")
    ] = None,
) -> None:
    """Write demo/bench.json, its pictures, and the README's table."""
    runs, equality = list(map(read, (out, *(again or ())))), read(out / "float32")
    shown = Shown(
        speed=short(runs[0]),
        equality=short(equality),
        runs=len(runs),
        differences=differences(runs) if again else [],
    )
    KEPT.write_text(shown.model_dump_json(indent=1) + "\n")
    plots.speed(shown.speed, DEMO / "bench.png")
    shutil.copy(out / "sizing.png", DEMO)
    README.write_text(rewritten(README.read_text()))


if __name__ == "__main__":
    typer.run(main)
