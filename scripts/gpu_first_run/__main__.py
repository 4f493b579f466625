"""The first ten minutes on a GPU, as one command; or a rehearsal on a CPU.

``python scripts/gpu_first_run --out first_run.json``

Every item runs in a process of its own, under its own time-out, and the report is written
after each: what fails or hangs costs its item, and those that need it, which are skipped.
All is over after ``--seconds``: where they run short, the kernels' times are dropped first,
then the large batches of the sizing item. All output is in one log beside the report. What
items leave to others stays in ``--work``, so that one may run again alone. ``--device cpu``
puts CPU engines in the GPU's place, so that every item can be seen to run and report before
there is a GPU.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

# The folder's parent: modules are found whether it is run as a folder or imported.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_first_run.child import LIMIT, ends_in_order
from gpu_first_run.setting import ROOT, Setting


@dataclass(frozen=True)
class Item:
    """What is found out.

    Attributes:
        name: in the report.
        seconds: it should take, guessed; or ``--patience`` times as long. Where time runs
            short, these tell what must go.
        function: ``module:function`` of this folder, which is given a ``Setting``.
        needs: items without which it is hopeless: where one of them has failed, it is
            skipped.
        interpreted: on a CPU its kernels run in Triton's interpreter.
    """

    name: str
    seconds: float
    function: str
    needs: tuple[str, ...] = ()
    interpreted: bool = False


ENGINES = ("imports", "plain eager")
"""Where these fail, no engine starts."""

ITEMS = (
    Item("imports", 15, "imports:check_imports"),
    Item("kernel tests", 40, "imports:run_kernel_tests"),
    Item("plain eager", 30, "engines:plain_eager", ("imports",)),
    Item("propd eager", 40, "engines:propd_eager", ENGINES),
    Item("pruned eager", 35, "engines:pruned_eager", ENGINES),
    Item("plain compiled", 50, "engines:plain_compiled", ENGINES),
    Item("propd compiled", 90, "engines:propd_compiled", ENGINES),
    Item("sizing", 70, "speed:dynamic_sizing", ENGINES),
    Item("profile", 40, "speed:profile_steps", ENGINES),
    Item("kernel times", 40, "kernel_times:time_kernels", interpreted=True),
)
DROPPED_FIRST = "kernel times"
SHORTENED = "sizing"
SHORTER = 0.5
"""Of its time, that the sizing item has without the large batches."""

TIMES_EXPECTED = 3.0
"""An item's time-out, in what it should take: a first run compiles everything, and what is
left of the time guards the others."""

KILLED_AFTER_S = 5.0
"""Between asking a process group to end and ending it."""

UNCOUNTED_S = 5.0
"""That the items together may be too long. By default they are expected to take all of the
time there is, and starting takes some, too."""

HOPELESS = ("failed", "skipped")
"""What became of items whose followers are skipped. One that was slow may yet have shown
that engines start."""

LAST_LINES = 120
"""Of a failed item's output, in the report: a traceback through vLLM is as long."""


@dataclass
class Outcome:
    """An item's end: ``ok``, ``failed``, ``timed out``, ``dropped`` or ``skipped``."""

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
    log = setting.log or setting.folder / f"{item.name}.log"
    setting.forget(item.name)
    command = [sys.executable, str(Path(__file__).parent), "--one", item.name]
    environment = {**os.environ, "PROPD_FIRST_RUN": setting.to_json(), LIMIT: str(limit)}
    # One copy of ours for all, also for the tests: what numba compiles is kept beside it.
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    # Typer's boxes cut a traceback's lines.
    environment |= {"TYPER_STANDARD_TRACEBACK": "1", "PYTHONUNBUFFERED": "1"}
    began = time.monotonic()
    with log.open("ab") as file:
        if setting.log is not None:
            file.write(f"\n======== {item.name}\n".encode())
            file.flush()
        start = file.tell()
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
    text = log.read_bytes()[start:].decode(errors="replace")
    lines = text.replace("\r", "\n").splitlines()
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
        lacks = [x for x in done if x.name in item.needs and x.outcome in HOPELESS]
        if lacks:
            reason = f"needs {lacks[0].name}, which was {lacks[0].outcome}"
            done.append(Outcome(item.name, "skipped", log=[reason]))
        elif own is None or left < 1:
            done.append(Outcome(item.name, "dropped"))
        else:
            console.print(f"[bold]{item.name}[/bold] ({left:.0f} s left)")
            limit = min(own * setting.patience * TIMES_EXPECTED, left)
            done.append(run_item(item, setting, limit))
        report = {"setting": setting.public(), "items": [asdict(one) for one in done]}
        partly = out.with_suffix(".part")
        partly.write_text(json.dumps(report, indent=1) + "\n")
        partly.replace(out)
    return done


def show(done: list[Outcome], console: Console) -> None:
    """The table at the end."""
    table = Table("item", "outcome", "s", "found")
    colours = {"dropped": "yellow", "skipped": "yellow"}
    colours |= {"ok": "green", "failed": "red", "timed out": "red"}
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
    work: Annotated[
        Path, typer.Option(help="What items leave to each other, also to later runs.")
    ] = ROOT / "build" / "gpu_first_run",
    device: Annotated[str, typer.Option(help="cuda, or cpu: a rehearsal.")] = "cuda",
    seconds: Annotated[float, typer.Option(min=1, help="For everything.")] = 450.0,
    patience: Annotated[
        float, typer.Option(min=0.01, help="Times what each item should take.")
    ] = 1.0,
    items: Annotated[str, typer.Option(help="Names, with commas between. All.")] = "",
    model: Annotated[Path, typer.Option(help="With heads in propd/.")] = Path("demo/model"),
    one: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    if one:
        setting = Setting.from_json(os.environ["PROPD_FIRST_RUN"])
        item = next(item for item in ITEMS if item.name == one)
        ends_in_order(float(os.environ[LIMIT]))
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
    work.mkdir(parents=True, exist_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    log = out.with_suffix(".log")
    log.unlink(missing_ok=True)
    setting = Setting(device, model.resolve(), work.resolve(), patience, log=log.resolve())
    done = run_all([known[name] for name in names], setting, seconds, out, console)
    show(done, console)
    console.print(f"{out}, {log}")
    raise typer.Exit(int(any(one.outcome in ("failed", "timed out") for one in done)))


if __name__ == "__main__":
    typer.run(main)
