"""The first ten minutes on a GPU, as one command; or a rehearsal on a CPU.

``python scripts/gpu_first_run --out first_run.json``

Every item runs in a process of its own, under its own time-out, and the report is written
after each: what fails or hangs costs its item and nothing else. All is over after
``--seconds``: where they run short, the kernels' times are dropped first, then the large
batches of the sizing item. ``--device cpu`` puts CPU engines in the GPU's place, so that
every item can be seen to run and report before there is a GPU.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

# The folder's parent: modules are found whether it is run as a folder or imported.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_first_run.setting import Setting


@dataclass(frozen=True)
class Item:
    """What is found out.

    Attributes:
        name: in the report.
        seconds: it may take; or ``--patience`` times as long.
        function: ``module:function`` of this folder, which is given a ``Setting``.
        interpreted: on a CPU its kernels run in Triton's interpreter.
    """

    name: str
    seconds: float
    function: str
    interpreted: bool = False


ITEMS = (
    Item("imports", 15, "imports:check_imports"),
    Item("kernel tests", 60, "imports:run_kernel_tests"),
    Item("plain eager", 40, "engines:plain_eager"),
    Item("propd eager", 50, "engines:propd_eager"),
    Item("pruned eager", 40, "engines:pruned_eager"),
    Item("plain compiled", 60, "engines:plain_compiled"),
    Item("propd compiled", 120, "engines:propd_compiled"),
    Item("sizing", 90, "speed:dynamic_sizing"),
    Item("profile", 45, "speed:profile_steps"),
    Item("kernel times", 60, "kernel_times:time_kernels", interpreted=True),
)
DROPPED_FIRST = "kernel times"
SHORTENED = "sizing"
SHORTER = 0.5
"""Of its time, that the sizing item has without the large batches."""

KILLED_AFTER_S = 3.0
"""Between asking a process group to end and ending it."""

UNCOUNTED_S = 5.0
"""That the items' time-outs together may be too long: most items are over before theirs. By
default the time-outs are all of the time there is, and starting takes some, too."""

LAST_LINES = 25


@dataclass
class Outcome:
    """What became of an item: ``ok``, ``failed``, ``timed out`` or ``dropped``."""

    name: str
    outcome: str
    seconds: float = 0.0
    found: dict[str, Any] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)


def run_item(item: Item, setting: Setting, limit: float) -> Outcome:
    """An item in a process group of its own, which does not outlive it.

    Args:
        item: which.
        setting: passed on.
        limit: seconds.
    """
    log = setting.folder / f"{item.name}.log"
    command = [sys.executable, str(Path(__file__).parent), "--one", item.name]
    environment = {**os.environ, "PROPD_FIRST_RUN": setting.to_json()}
    began = time.monotonic()
    with log.open("wb") as file:
        child = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            outcome = "ok" if child.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            outcome = "timed out"
        _end_group(child)
    seconds = round(time.monotonic() - began, 1)
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    lines = [] if outcome == "ok" else [line for line in lines if line][-LAST_LINES:]
    return Outcome(item.name, outcome, seconds, setting.found(item.name), lines)


def _end_group(child: subprocess.Popen[bytes]) -> None:
    """Ends whatever a child has left running."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            break
        until = time.monotonic() + KILLED_AFTER_S
        while time.monotonic() < until and _alive(child):
            time.sleep(0.05)
    child.wait()


def _alive(child: subprocess.Popen[bytes]) -> bool:
    child.poll()
    try:
        os.killpg(child.pid, 0)
    except ProcessLookupError:
        return False
    return True


def run_all(
    items: list[Item], setting: Setting, seconds: float, out: Path, console: Console
) -> list[Outcome]:
    """All items, in order; the report is written after each.

    Args:
        items: to run.
        setting: device and what goes with it.
        seconds: for all.
        out: the report, JSON.
        console: for a line before each.
    """
    done: list[Outcome] = []
    end, wanted = time.monotonic() + seconds, {i.name: i.seconds for i in items}
    for item in items:
        left = end - time.monotonic()
        needed = sum(wanted.values()) * setting.patience - UNCOUNTED_S
        if needed > left and DROPPED_FIRST in wanted and len(wanted) > 1:
            needed -= wanted.pop(DROPPED_FIRST) * setting.patience
        if needed > left and item.name == SHORTENED:
            setting.short = True
            wanted[SHORTENED] *= SHORTER
        own = wanted.pop(item.name, None)
        if own is None or left < 1:
            done.append(Outcome(item.name, "dropped"))
        else:
            console.print(f"[bold]{item.name}[/bold] ({left:.0f} s left)")
            done.append(run_item(item, setting, min(own * setting.patience, left)))
        report = {"setting": setting.public(), "items": [asdict(one) for one in done]}
        partly = out.with_suffix(".part")
        partly.write_text(json.dumps(report, indent=1) + "\n")
        partly.replace(out)
    return done


def show(done: list[Outcome], console: Console) -> None:
    """The table at the end."""
    table = Table("item", "outcome", "s", "found")
    colours = {"ok": "green", "failed": "red", "timed out": "red", "dropped": "yellow"}
    for one in done:
        found = ", ".join(
            f"{name}: {value}"
            for name, value in one.found.items()
            if isinstance(value, str | int | float | bool)
        )
        text = found or (one.log[-1] if one.log else "")
        outcome = f"[{colours[one.outcome]}]{one.outcome}[/]"
        table.add_row(one.name, outcome, f"{one.seconds:.0f}", text)
    console.print(table)


def main(
    out: Annotated[Path, typer.Option(help="The report, JSON.")] = Path("first_run.json"),
    device: Annotated[str, typer.Option(help="cuda, or cpu: a rehearsal.")] = "cuda",
    seconds: Annotated[float, typer.Option(min=1, help="For everything.")] = 580.0,
    patience: Annotated[
        float, typer.Option(min=0.01, help="Times each item's time-out.")
    ] = 1.0,
    items: Annotated[str, typer.Option(help="Names, with commas between. All.")] = "",
    model: Annotated[Path, typer.Option(help="With heads in propd/.")] = Path("demo/model"),
    one: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    if one:
        setting = Setting.from_json(os.environ["PROPD_FIRST_RUN"])
        item = next(item for item in ITEMS if item.name == one)
        setting.prepare_process(item.interpreted)
        module, function = item.function.split(":")
        run = getattr(importlib.import_module(f"gpu_first_run.{module}"), function)
        run(setting, setting.notes(one))
        return
    console = Console(width=160)
    known = {item.name: item for item in ITEMS}
    names = [name.strip() for name in items.split(",") if name.strip()] or [*known]
    if unknown := [name for name in names if name not in known]:
        console.print(f"[red]Error:[/red] --items: no {unknown[0]!r}; there are {[*known]}")
        raise typer.Exit(1)
    if device not in ("cuda", "cpu"):
        console.print(f"[red]Error:[/red] --device {device}: cuda or cpu")
        raise typer.Exit(1)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(device, model.resolve(), Path(folder), patience)
        chosen = [known[name] for name in names]
        done = run_all(chosen, setting, seconds, out, console)
    show(done, console)
    console.print(f"{out}")
    raise typer.Exit(int(any(one.outcome in ("failed", "timed out") for one in done)))


if __name__ == "__main__":
    typer.run(main)
