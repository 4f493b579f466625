"""Takes a benchmark into the documentation: its tables, its picture, what they are made of.

    make bench          # then:
    python scripts/docs_bench.py inflated-avx2 build/bench
    make bench-never    # then:
    python scripts/docs_bench.py never build/never

``benchmarks/results/NAME.json`` keeps the result, without lists of single steps, and how
far others of the same name (``--again``) are from it; ``docs/images/NAME.png`` is its
picture. ``docs/benchmarks.md`` has a table of each name and the README a short one; a name
without a result says what would measure it. A test checks that all of them are what this
script makes of the files.
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
from vllm_propd.bench.results import TASK, Results, Row

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "benchmarks.md"]
RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
PLACE = re.compile(
    r"(<!-- bench( short)? ([\w-]+): ([^\n]*) -->\n).*?(<!-- end of bench -->\n)", re.DOTALL
)
"""Of a table in a page: whether it is a short one, the result's name, what measures it."""

SHORT = (
    "control", "roomy", "medusa", "ngram", "chain",
    "propd-no-lookup", "propd-no-heads", "propd",
)  # fmt: skip
"""Arms of a short table: plain vLLM once more, our peers, and ourselves."""

NO_LISTS: dict[str, list[float]] = {
    "turns": [],
    "chunks": [],
    "step_times": [],
    "measured_step_ms": [],
    "estimated_step_ms": [],
    "tree_sizes": [],
    "accepted_by_rank": [],
    "tokens_by_size": [],
    "reliability": [],
}


class Shown(BaseModel):
    """What is kept of a benchmark.

    Attributes:
        speed: of the model that it is about.
        equality: in float32, where texts must be the same to the last token.
        recorded: the day it was measured, as YYYY-MM-DD; empty where nobody has written it
            down.
        runs: benchmarks, this one counted.
        differences: by how much each ratio differs between them, relatively.
    """

    speed: Results
    equality: Results
    recorded: str = ""
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
            ratios = [row.ratio for row in rows if row is not None]
            found.append(max(ratios) / min(ratios) - 1.0)
    return sorted(found)


def cell_of(row: Row) -> str:
    """A row's ratio, its quartiles if it has some, and tokens per step."""
    quartiles = row.wall_ratio_median_quartiles
    known = f" ({quartiles[0]:.3f} to {quartiles[1]:.3f})" if quartiles else ""
    return f"{row.ratio:.{3 if quartiles else 2}f}x{known}, {row.per_step:.2f}"


def cells_of(shown: Shown, arm: str) -> list[str]:
    """An arm's, at all batch sizes."""
    rows = [shown.speed.row(arm, size) for size in shown.speed.batch_sizes]
    return [cell_of(row) if row else "" for row in rows]


def caption(shown: Shown) -> str:
    """What the figures are of, and when they were measured."""
    day = f" Measured on {shown.recorded}." if shown.recorded else ""
    return f"{shown.speed.caption()}.{day}"


def columns_of(shown: Shown) -> list[str]:
    """Batch sizes, with how many chunks each median is of."""
    found = []
    for size in shown.speed.batch_sizes:
        chunks = ""
        plain = shown.speed.row("plain", size)
        if plain is not None and plain.wall_ratio_median is not None:
            chunks = f", {plain.num_chunks or plain.rounds} chunks"
        found.append(f"batch {size}{chunks}")
    return found


def short_table(shown: Shown) -> list[str]:
    """Of the arms that a newcomer asks for."""
    columns = columns_of(shown)
    lines = [f"| arm | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for arm in SHORT:
        if arm in shown.speed.arms:
            lines.append(f"| `{arm}` | {' | '.join(cells_of(shown, arm))} |")
    return [caption(shown), "", *lines]


def table(shown: Shown, name: str) -> list[str]:
    """Of all arms, with the picture and how many texts were the same."""
    columns = columns_of(shown)
    lines = [
        f"![Speed and tokens per step by batch size and arm](images/{name}.png)",
        "",
        f"Tokens/s against plain vLLM, and tokens per step. {caption(shown)}",
        "",
        f"| arm | {' | '.join(columns)} | same text, float32 |",
        "|---|" + "---|" * (len(columns) + 1),
    ]
    for arm in shown.speed.arms:
        equal = [row for row in shown.equality.by_batch if row.arm == arm]
        same = sum(row.identical_to_plain for row in equal)
        of = sum(row.prompts for row in equal)
        lines.append(f"| `{arm}` | {' | '.join(cells_of(shown, arm))} | {same} of {of} |")
    lines += by_task(shown)
    if found := shown.differences:
        lines += [
            "",
            f"Over {shown.runs} runs these ratios differ by {found[-1]:.0%} at most, "
            f"half of them by less than {median(found):.0%}.",
        ]
    return lines


def task_cell(row: Row) -> str:
    """A task's ratio, and tokens per step.

    A task has few chunks, and a median of few says little: all tokens over all seconds of
    the task's chunks. Without chunks it is the ratio of fast steps, as in the table above.
    """
    ratio = row.ratio_to_plain if row.wall_ratio is None else row.wall_ratio
    return f"{ratio:.2f}x, {row.per_step:.2f}"


def by_task(shown: Shown) -> list[str]:
    """Each arm's ratio on every kind of text, by batch size; see ``task_cell``."""
    rows = {
        (row.batch_size, row.arm, row.workload): row
        for row in shown.speed.rows
        if row.workload.startswith(TASK)
    }
    tasks = list(dict.fromkeys(task for _, _, task in rows))
    if not tasks:
        return []
    names = [task.removeprefix(TASK).replace("_", " ") for task in tasks]
    lines = ["", f"| batch, arm | {' | '.join(names)} |", "|---|" + "---|" * len(tasks)]
    for size in shown.speed.batch_sizes:
        for arm in shown.speed.arms:
            found = [rows.get((size, arm, task)) for task in tasks]
            if arm != "plain" and any(found):
                cells = [task_cell(row) if row else "" for row in found]
                lines.append(f"| {size}, `{arm}` | {' | '.join(cells)} |")
    return lines


def rewritten(page: str) -> str:
    """A page's text with the tables of what is kept."""

    def filled(place: re.Match[str]) -> str:
        start, is_short, name, recipe, end = place.groups()
        kept = RESULTS / f"{name}.json"
        if not kept.exists():
            return f"{start}Not measured yet: `{recipe}`\n{end}"
        shown = Shown.model_validate_json(kept.read_text())
        lines = short_table(shown) if is_short else table(shown, name)
        return start + "\n".join(lines) + "\n" + end

    return PLACE.sub(filled, page)


def read(folder: Path) -> Results:
    """What a benchmark has written."""
    return Results.model_validate_json((folder / "results.json").read_text())


def main(
    name: Annotated[str, typer.Argument(help="Of the result: `never`, `inflated-avx2`.")],
    out: Annotated[Path, typer.Argument(help="Where the benchmark has written.")],
    again: Annotated[
        list[Path] | None, typer.Option(help="Where it has once more; repeatable.")
    ] = None,
    sizes: Annotated[
        Path | None, typer.Option(help="Where `make bench-sizes` has drawn sizing.png.")
    ] = None,
) -> None:
    """Write benchmarks/results/NAME.json, its picture, and the tables of all pages."""
    runs = list(map(read, (out, *(again or ()))))
    is_float32 = runs[0].dtype == "float32"  # and has shown itself that texts are the same
    equality = runs[0] if is_float32 else read(out / "float32")
    shown = Shown(
        speed=short(runs[0]),
        equality=short(equality),
        recorded=runs[0].measured,
        runs=len(runs),
        differences=differences(runs) if again else [],
    )
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(shown.model_dump_json(indent=1) + "\n")
    plots.speed(shown.speed, IMAGES / f"{name}.png")
    if sizes is not None:
        shutil.copy(sizes / "sizing.png", IMAGES)
    for page in PAGES:
        page.write_text(rewritten(page.read_text()))


if __name__ == "__main__":
    typer.run(main)
