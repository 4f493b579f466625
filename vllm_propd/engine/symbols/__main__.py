"""``python -m vllm_propd.engine.symbols``: the ledger against other releases of vLLM.

Imports neither vLLM nor torch: it runs where they are not installed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_propd.engine.symbols import BEHAVIOURS, SOURCE_ONLY, SYMBOLS
from vllm_propd.engine.symbols.behaviour import Behaviour
from vllm_propd.engine.symbols.check import Difference, Entry, differences, rewritten
from vllm_propd.engine.symbols.sources import Sources
from vllm_propd.engine.symbols.symbol import Symbol

ENTRIES: tuple[Entry, ...] = (*SYMBOLS, *SOURCE_ONLY, *BEHAVIOURS)


@dataclass(frozen=True)
class Checked:
    """What became of the ledger in one release.

    Attributes:
        version: the release's version.
        different: entries that are not as recorded.
        rewritten: behaviours whose code is another than in the release compared with.
    """

    version: str
    different: list[Difference]
    rewritten: list[Behaviour]


def kind(entry: Entry) -> str:
    """Says how ProPD touches an entry; ``relied on`` where it is a behaviour."""
    return entry.use if isinstance(entry, Symbol) else "relied on"


def sources_at(path: Path | None) -> Sources:
    """Reads vLLM's sources at a path; without a path, the installed ones.

    Raises:
        typer.BadParameter: there is no vLLM.
    """
    if path is None:
        spec = find_spec("vllm")
        if spec is None or not spec.submodule_search_locations:
            raise typer.BadParameter("vLLM is not installed: name a wheel or a folder")
        path = Path(spec.submodule_search_locations[0])
    try:
        return Sources.at(path)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def check(path: Path | None, since: Sources | None) -> Checked:
    """Checks the ledger against one release, and against ``since`` for rewritten code."""
    found = sources_at(path)
    changed = rewritten(since, found, BEHAVIOURS) if since is not None else []
    return Checked(found.version, differences(found, ENTRIES), changed)


def counts(checked: list[Checked]) -> list[list[str]]:
    """Counts the entries of each kind, and what has become of them; a row for each."""
    rows = [["", "entries", *(one.version for one in checked)]]
    for name, number in (Counter(map(kind, ENTRIES)) + Counter(all=len(ENTRIES))).items():
        cells = [
            _count([d for d in one.different if name in ("all", kind(d.entry))])
            for one in checked
        ]
        rows.append([name, str(number), *cells])
    return rows


def _count(found: list[Difference]) -> str:
    kinds = Counter(one.status for one in found)
    return ", ".join(f"{n} {status}" for status, n in kinds.items()) or "as recorded"


def what_differs(found: list[Difference], code: str = "") -> list[list[str]]:
    """Lists the entries that differ, a row for each; the first row is the head.

    Args:
        found: the differences of one version.
        code: what is put around names, such as Markdown's backquote.
    """
    rows = [["what became of it", "symbol", "touched", "what for", "why"]]
    for one in found:
        entry = one.entry
        fate = f"{one.status}: {one.detail}" if one.detail else one.status
        path = f"{code}{entry.path}{code}"
        rows.append([fate, path, kind(entry), entry.what, entry.why])
    return rows


def to_be_run(found: list[Behaviour], code: str = "") -> list[list[str]]:
    """Lists rewritten behaviours and their tests, a row for each; see ``what_differs``."""
    rows = [["rewritten", "what it did", "test"]]
    for one in found:
        test = one.test.removeprefix("tests/")
        rows.append([f"{code}{one.path}{code}", one.what, f"{code}{test}{code}"])
    return rows


def as_table(rows: list[list[str]], title: str | None = None) -> Table:
    """Makes a table for a terminal; the first row is the head."""
    table = Table(*rows[0], title=title, show_lines=title is not None)
    for row in rows[1:]:
        table.add_row(*map(escape, row))
    return table


def as_markdown(rows: list[list[str]]) -> str:
    """Makes a table in Markdown; the first row is the head."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def print_tables(checked: list[Checked]) -> None:
    """Prints what was found as tables for a terminal."""
    console = Console()
    for one in checked:
        if one.different:
            console.print(as_table(what_differs(one.different), f"vLLM {one.version}"))
        if one.rewritten:
            title = f"vLLM {one.version}: tests to run first"
            console.print(as_table(to_be_run(one.rewritten), title))
    console.print(as_table(counts(checked)))


def print_markdown(checked: list[Checked]) -> None:
    """Prints what was found as a page in Markdown."""
    print(as_markdown(counts(checked)))
    for one in checked:
        if one.different or one.rewritten:
            print(f"## vLLM {one.version}\n")
        if one.different:
            print(as_markdown(what_differs(one.different, "`")))
        if one.rewritten:
            print(as_markdown(to_be_run(one.rewritten, "`")))


def main(
    sources: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Wheels, sdists or folders of vLLM. Default: the installed one.",
            show_default=False,
        ),
    ] = None,
    since: Annotated[
        Path | None,
        typer.Option(
            help="Another one: also lists the behaviours whose code has changed since, and "
            "their tests.",
        ),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Tables in Markdown.")
    ] = False,
) -> None:
    """Checks all that ProPD touches in vLLM against its sources, without importing them.

    Exits with 1, if something is not as recorded.
    """
    old = None if since is None else sources_at(since)
    paths: list[Path] | list[None] = sources or [None]
    checked = [check(path, old) for path in paths]
    (print_markdown if markdown else print_tables)(checked)
    raise typer.Exit(any(one.different for one in checked))


if __name__ == "__main__":
    typer.run(main)
