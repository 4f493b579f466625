"""``vllm-propd train``: data, continuations, training, measurement, files."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import TextColumn
from transformers import AutoConfig, AutoTokenizer

from vllm_propd.heads.calibration import Calibration
from vllm_propd.heads.checkpoint import save_heads
from vllm_propd.heads.export import export_for_vllm
from vllm_propd.training.data.batches import (
    TokenData,
    check_enough,
    load_data,
    prepare,
    save_sequences,
)
from vllm_propd.training.history import History
from vllm_propd.training.loop import Loop
from vllm_propd.training.measure import calibrate, top_accuracy
from vllm_propd.training.model import checkpoint
from vllm_propd.training.model.checkpoint import Progress
from vllm_propd.training.model.target import load_trainee, stored_dtype
from vllm_propd.training.model.trainee import Trainee, check_early_layers
from vllm_propd.training.report import plot, show
from vllm_propd.training.settings import TrainSettings
from vllm_propd.training.workers import train_on_ray

WORK = "training"
"""The folder below the output for what only training needs; it is removed at its end."""

INPUTS, CONTINUATIONS = "inputs.json", "continuations.json"
MEASURED_PROMPTS, NEW_TOKENS = 64, 128
SECONDS_BETWEEN_MEASUREMENTS = 20.0


@dataclass(frozen=True)
class Inputs:
    """What to train on.

    Attributes:
        model: Hugging Face folder or name of the target.
        data: files or folders: text, JSON rows, Parquet.
        held_out: files or folders to measure with; none: a share of ``data``.
        most_tokens: the most tokens of ``data``; what is beyond is not read.
        self_distill: train on what the target writes itself, greedily, on prompts from
            ``data``.
        distill_tokens: about how many tokens the target writes for that.
    """

    model: str
    data: list[Path]
    held_out: list[Path] = field(default_factory=list)
    most_tokens: int = 100_000_000
    self_distill: bool = False
    distill_tokens: int = 1_000_000

    def dump(self) -> str:
        """Returns the inputs as JSON, to be compared with a resumed run's."""
        return json.dumps(vars(self), default=str, indent=1)


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
    console, work = Console(), out / WORK
    _check_out(out, work, resume)
    if resume:
        _check_same_inputs(work, inputs)
    else:
        _prepare(inputs, settings, work)
    data = _training(inputs)
    if num_workers > 1:
        train_on_ray(inputs.model, work, data, settings, num_workers, resume)
    trainee = load_trainee(inputs.model, settings)
    # The workers' heads are in their last checkpoint.
    resume |= num_workers > 1
    loop = Loop(trainee, load_data(work, data), settings, work, resume)
    if num_workers == 1:
        with Bar(*Bar.get_default_columns(), TextColumn("{task.fields[state]}")) as bar:
            held_out = load_data(work, "held_out")
            loop.run(_Reporter(bar, settings, held_out, work, loop.progress))
    calibration = _measure(trainee, work)
    early = trainee.early_tensors()
    vocabulary = len(trainee.output.weight)
    dtype = stored_dtype(inputs.model)
    save_heads(out, trainee.medusa_tensors(), early, vocabulary, dtype)
    calibration.save(out)
    plot(calibration, out / "calibration.png")
    if for_vllm:
        export_for_vllm(out, trainee.output.weight, out / "vllm-medusa")
    shutil.rmtree(work)
    show(calibration, console)
    console.print(f"Heads in {out}: {', '.join(sorted(p.name for p in out.iterdir()))}")
    return calibration


def _training(inputs: Inputs) -> str:
    return "distilled" if inputs.self_distill else "train"


def _check_out(out: Path, work: Path, resume: bool) -> None:
    """Refuses an output that cannot be written, or that would replace unfinished work."""
    unfinished = (work / checkpoint.FILE).exists()
    if resume and not unfinished:
        raise ValueError(f"--resume: {work} holds no checkpoint of an unfinished training")
    if unfinished and not resume:
        raise ValueError(
            f"--out {out} holds an unfinished training: go on with --resume, or remove "
            f"{work}"
        )
    try:
        work.mkdir(parents=True, exist_ok=True)
        probe = work / "writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"--out {out} cannot be written: {error.strerror or error}"
        ) from error


def _check_same_inputs(work: Path, inputs: Inputs) -> None:
    then, now = json.loads((work / INPUTS).read_text()), json.loads(inputs.dump())
    if changed := [key for key in now if then.get(key) != now[key]]:
        what = ", ".join(f"{key} {then.get(key)} -> {now[key]}" for key in changed)
        raise ValueError(f"--resume: the training began with other inputs ({what})")


def _prepare(inputs: Inputs, settings: TrainSettings, work: Path) -> None:
    """Reads the data, and lets the target write what it is trained and measured on."""
    from vllm_propd.engine.target_text import check_trainable, greedy_continuations

    check_trainable(inputs.model)
    config = AutoConfig.from_pretrained(inputs.model).get_text_config()
    check_early_layers(settings.early_layers, config.num_hidden_layers)
    tokenizer = AutoTokenizer.from_pretrained(inputs.model)
    train, held_out = prepare(
        inputs.data,
        inputs.held_out,
        tokenizer,
        config.vocab_size,
        work,
        inputs.most_tokens,
    )
    check_enough(train, held_out, settings.length)
    longest = settings.length * 3 // 4
    prompts = held_out.prompts(MEASURED_PROMPTS, longest, settings.seed)
    new = [NEW_TOKENS] * len(prompts)
    texts = greedy_continuations(inputs.model, prompts, new, "held-out text")
    if inputs.self_distill:
        # About as many prompts as it takes: their mean length is half of the longest.
        count = max(1, inputs.distill_tokens // (settings.length - longest // 2))
        asked = train.prompts(count, longest, settings.seed)
        new = [settings.length - len(prompt) for prompt in asked]
        written = greedy_continuations(inputs.model, asked, new, "training text")
        rows = [prompt + text for prompt, text in zip(asked, written, strict=True)]
        distilled = save_sequences(work, "distilled", rows)
        check_enough(distilled, held_out, settings.length)
    (work / CONTINUATIONS).write_text(json.dumps({"prompts": prompts, "texts": texts}))
    (work / INPUTS).write_text(inputs.dump())


def _measure(trainee: Trainee, work: Path) -> Calibration:
    spoken = json.loads((work / CONTINUATIONS).read_text())
    with Bar() as bar, trainee.autocast():
        task = bar.add_task("measuring", total=len(spoken["prompts"]))
        return calibrate(
            trainee, spoken["prompts"], spoken["texts"], lambda: bar.advance(task)
        )


class _Reporter:
    """Shows progress: the loss, and now and then the heads' accuracy on held-out text."""

    def __init__(
        self,
        bar: Bar,
        settings: TrainSettings,
        held_out: TokenData,
        work: Path,
        start: Progress,
    ):
        self.bar, self.settings = bar, settings
        self.task = bar.add_task("heads", total=1.0, state="")
        self.history = History(work, start.step)
        self.measured, self.accuracy = start.seconds, ""
        rows = held_out.batch(settings.batch_size, settings.length, (settings.seed, 0))
        self.ids = torch.from_numpy(np.ascontiguousarray(rows))

    def __call__(self, progress: Progress, trainee: Trainee) -> None:
        self.history.add(progress)
        if progress.seconds - self.measured > SECONDS_BETWEEN_MEASUREMENTS:
            self.measured = progress.seconds
            with trainee.autocast():
                found = top_accuracy(trainee, self.ids.to(trainee.device))
            shares = " ".join(f"{top1:.0%}/{top10:.0%}" for top1, top10 in found)
            self.accuracy = f", held-out top-1/top-10 by head: {shares}"
        done = self.settings.progress(progress.step, progress.seconds)
        state = f"step {progress.step} loss {progress.loss:.3f}{self.accuracy}"
        self.bar.update(self.task, completed=done, state=state)
