"""The training loop on several workers, by Ray Train: one machine or a cluster."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from vllm_propd.training.data.batches import load_data
from vllm_propd.training.history import History
from vllm_propd.training.loop import Loop
from vllm_propd.training.model.checkpoint import Progress, read_checkpoint
from vllm_propd.training.model.target import load_trainee
from vllm_propd.training.model.trainee import Trainee
from vllm_propd.training.settings import TrainSettings

SECONDS_BETWEEN_LINES = 10.0


def check_ray() -> None:
    """Refuses to train with several workers where Ray Train is not installed.

    Raises:
        ValueError: it is not; the message says what installs it.
    """
    try:
        import ray.train.torch  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "--num-workers above 1 needs Ray Train: pip install 'vllm-propd[ray]'"
        ) from error


def _worker(job: dict[str, Any]) -> None:
    """Trains in one worker; Ray has set up the process group."""
    settings = TrainSettings.model_validate_json(job["settings"])
    folder = Path(job["folder"])
    data = load_data(folder, job["data"])
    trainee = load_trainee(job["model"], settings, data)
    loop = Loop(trainee, data, settings, folder, job["resume"])
    if loop.rank:  # the first worker alone tells
        loop.run()
        return
    history, told = History(folder, loop.progress.step), 0.0

    def on_step(progress: Progress, trainee: Trainee) -> None:
        nonlocal told
        history.add(progress)
        if time.monotonic() - told > SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            done = settings.progress(progress.step, progress.seconds)
            print(f"step {progress.step} loss {progress.loss:.3f} ({done:.0%})", flush=True)

    loop.run(on_step)


def train_on_ray(
    model: str,
    folder: Path,
    data: str,
    settings: TrainSettings,
    num_workers: int,
    resume: bool,
) -> None:
    """Trains with ``num_workers`` workers; their checkpoint is in ``folder`` at the end.

    Args:
        model: the target, which every worker loads.
        folder: folder of data and checkpoint; on a cluster all hosts must share it.
        data: name of the training data in ``folder``.
        settings: how to train; its batch size is that of all workers together.
        num_workers: how many workers; each has a GPU where there are some, else a CPU.
        resume: go on from the folder's checkpoint.

    Raises:
        ValueError: the checkpoint is of other settings.
        ray.train.TrainingFailedError: a worker's error, as Ray reports it.
    """
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    if resume:  # here, in one line: a worker's error would be Ray's
        read_checkpoint(folder, settings, map_location="cpu", mmap=True)
    if not ray.is_initialized():
        ray.init(include_dashboard=False)
    folder = folder.resolve()
    job = {
        "model": str(Path(model).resolve()) if Path(model).exists() else model,
        "folder": str(folder),
        "data": data,
        "settings": settings.model_dump_json(),
        "resume": resume,
    }
    TorchTrainer(
        _worker,
        train_loop_config=job,
        scaling_config=ScalingConfig(
            num_workers=num_workers, use_gpu=torch.cuda.is_available()
        ),
        run_config=RunConfig(storage_path=str(folder / "ray"), name="train"),
    ).fit()
