"""``vllm-propd train``: data, continuations, training, measurement, files."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import TextColumn

from vllm_propd.heads.calibration import FILE, Calibration
from vllm_propd.heads.checkpoint import save_heads
from vllm_propd.heads.export import export_for_vllm
from vllm_propd.outputs import check_writable
from vllm_propd.resume import alone_in
from vllm_propd.training.data.batches import load_data
from vllm_propd.training.history import History
from vllm_propd.training.loop import Loop, check_divides
from vllm_propd.training.measure import calibrate, top_accuracy
from vllm_propd.training.model import checkpoint
from vllm_propd.training.model.checkpoint import Progress
from vllm_propd.training.model.states import States
from vllm_propd.training.model.target import (
    check_trained,
    heads_dtype,
    load_trained,
    load_trainee,
)
from vllm_propd.training.model.trainee import Trainee
from vllm_propd.training.report import plot, show
from vllm_propd.training.settings import TrainSettings
from vllm_propd.training.text import (
    CONTINUATIONS,
    INPUTS,
    MEASURED,
    SPOKEN,
    Inputs,
    training_data,
    write_held_out,
    write_inputs,
)
from vllm_propd.training.workers import check_ray, train_on_ray

WORK = "training"
"""The folder below the output for what only training needs; it is removed at its end."""

PICTURE, FOR_VLLM = "calibration.png", "vllm-medusa"

SECONDS_BETWEEN_MEASUREMENTS = 20.0


def train_heads(
    inputs: Inputs,
    out: Path,
    settings: TrainSettings,
    num_workers: int = 1,
    resume: bool = False,
    for_vllm: bool = True,
) -> Calibration:
    """Trains heads, measures them and writes all there is to know.

    Args:
        inputs: target and data.
        out: the heads' folder; the target's own ``propd/`` is where serving looks.
        settings: what to train, and how.
        num_workers: how many workers train; above 1 by Ray Train.
        resume: go on from ``out``'s unfinished training.
        for_vllm: also write the Medusa heads as vLLM's own ``medusa`` reads them.

    Raises:
        ValueError: settings, data or model are impossible (DataError for the data).
        OSError: ``out`` cannot be written.
    """
    work = out / WORK
    check_divides(settings, num_workers)
    if num_workers > 1:
        check_ray()
    _check_out(inputs.model, out, work, resume)
    with alone_in(work, f"--out {out}"):
        return _train(inputs, out, settings, num_workers, for_vllm)


def _train(
    inputs: Inputs, out: Path, settings: TrainSettings, num_workers: int, for_vllm: bool
) -> Calibration:
    console, work = Console(), out / WORK
    write_inputs(inputs, settings, work)
    data = training_data(inputs)
    begun = (work / checkpoint.FILE).exists()
    if num_workers > 1:
        train_on_ray(inputs.model, work, data, settings, num_workers, begun)
        begun = True  # the workers' heads are in their last checkpoint
    tokens = load_data(work, data)
    trainee = load_trainee(inputs.model, settings, tokens)
    loop = Loop(trainee, tokens, settings, work, begun)
    if num_workers == 1:
        run_with_bar(loop, work)
    calibration = save_trained(trainee, inputs.model, work, out, for_vllm)
    shutil.rmtree(work, ignore_errors=True)  # NFS keeps the lock's file while it is open
    show(calibration, console)
    console.print(f"Heads in {out}: {', '.join(sorted(p.name for p in out.iterdir()))}")
    return calibration


def run_with_bar(loop: Loop, work: Path) -> None:
    """Trains to the end, and shows how far it is.

    Args:
        loop: the training.
        work: folder of what ``write_inputs`` has written.
    """
    columns = (*Bar.get_default_columns(), TextColumn("{task.fields[state]}"))
    with Bar(*columns) as bar:
        loop.run(_Reporter(bar, loop.settings, work, loop.progress))


def save_trained(
    trainee: Trainee, model: str, work: Path, out: Path, for_vllm: bool
) -> Calibration:
    """Measures trained heads, and writes them with what is known of them.

    Args:
        trainee: target and heads.
        model: the target's folder or name.
        work: folder of what ``write_inputs`` has written.
        out: the heads' folder.
        for_vllm: also write the Medusa heads as vLLM's own ``medusa`` reads them.
    """
    spoken = json.loads((work / CONTINUATIONS).read_text())
    calibration = _measure(trainee, *(spoken[name] for name in SPOKEN))
    vocabulary = len(trainee.output.weight)
    save_heads(
        out,
        trainee.medusa_tensors(),
        trainee.early_tensors(),
        vocabulary,
        heads_dtype(model),
    )
    save_calibration(calibration, out)
    shutil.rmtree(out / FOR_VLLM, ignore_errors=True)  # of the heads before
    if for_vllm:
        export_for_vllm(out, trainee.output.weight, out / FOR_VLLM)
    return calibration


def save_calibration(calibration: Calibration, heads: Path) -> None:
    """Writes what is known of heads beside them, for serving and for people."""
    calibration.save(heads)
    plot(calibration, heads / PICTURE)


def _check_out(model: str, out: Path, work: Path, resume: bool) -> None:
    """Refuses an output that cannot be written, or that would replace unfinished work."""
    if not Path(model).exists() and Path(model) in out.parents:
        raise ValueError(
            f"--out {out} would make a folder {model}, which is then the model instead of "
            f"the hub's: give another, such as {Path(model).name}-propd"
        )
    unfinished = (work / INPUTS).exists()
    if resume and not unfinished:
        raise ValueError(f"--resume: {work} holds no unfinished training")
    if unfinished and not resume:
        raise ValueError(
            f"--out {out} holds an unfinished training: go on with --resume, or remove "
            f"{work}"
        )
    check_writable(work, f"--out {out}")


def measure_heads(
    model: str, heads: Path, held_out: list[Path], length: int
) -> Calibration:
    """Measures heads that were trained before, and writes their calibration anew.

    Args:
        model: the target's folder or name.
        heads: the heads' folder.
        held_out: files or folders of prompts or text; none: the target asks itself.
        length: most tokens of a prompt are three quarters of it.

    Raises:
        ValueError: heads, model or files do not suit (HeadsError, DataError).
        OSError: ``heads`` cannot be written.
    """
    console = Console()
    check_trained(model, heads)  # first: what does not fit is told at once
    check_writable(heads, f"HEADS {heads}")
    with TemporaryDirectory() as work:
        settings = TrainSettings(length=length)
        spoken = write_held_out(model, held_out, settings, Path(work))
    # After the engine has ended: a GPU may have no room for a large target twice.
    calibration = _measure(load_trained(model, heads), *spoken)
    save_calibration(calibration, heads)
    show(calibration, console)
    console.print(f"Written: {heads / FILE}, {heads / PICTURE}")
    return calibration


def _measure(
    trainee: Trainee, prompts: list[list[int]], texts: list[list[int]]
) -> Calibration:
    with Bar() as bar, trainee.autocast():
        task = bar.add_task("measuring", total=len(prompts))
        return calibrate(trainee, prompts, texts, lambda: bar.advance(task))


class _Reporter:
    """Shows progress: the loss, and now and then the heads' accuracy on held-out text."""

    def __init__(self, bar: Bar, settings: TrainSettings, work: Path, start: Progress):
        self.bar, self.settings, self.start = bar, settings, start.step
        self.task = bar.add_task("heads", total=1.0, state="")
        self.history, self.began = History(work, start.step), time.monotonic()
        self.measured, self.accuracy = start.seconds, ""
        held_out = load_data(work, MEASURED)
        windows = held_out.windows(settings.length)[: settings.batch_size]
        self.rows = held_out.rows(windows, settings.length)
        self.states: States | None = None

    def _held_out(self, trainee: Trainee) -> tuple[torch.Tensor, torch.Tensor, States]:
        """Returns held-out text and what the target says of it, which is asked once."""
        ids, learn = (torch.from_numpy(one).to(trainee.device) for one in self.rows)
        if self.states is None:
            self.states = trainee.states(ids)
        return ids, learn, self.states

    def __call__(self, progress: Progress, trainee: Trainee) -> None:
        self.history.add(progress)
        if progress.seconds - self.measured > SECONDS_BETWEEN_MEASUREMENTS:
            self.measured = progress.seconds
            with trainee.autocast():
                found = top_accuracy(trainee, *self._held_out(trainee))
            shares = " ".join(f"{top1:.0%}/{top10:.0%}" for top1, top10 in found)
            self.accuracy = f", held-out top-1/top-10 by head: {shares}"
        done = self.settings.progress(progress.step, progress.seconds)
        tokens = (progress.step - self.start) * self.settings.tokens_per_step
        speed = tokens / (time.monotonic() - self.began)
        state = f"{speed:,.0f} tokens/s, step {progress.step}, loss {progress.loss:.3f}"
        self.bar.update(self.task, completed=done, state=state + self.accuracy)
