"""The training loop, the same for one worker and for many."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from vllm_propd.training.data.batches import Epochs, Starts, TokenData
from vllm_propd.training.model.checkpoint import (
    Progress,
    load_checkpoint,
    save_checkpoint,
)
from vllm_propd.training.model.states import KeptStates, States
from vllm_propd.training.model.trainee import Trainee
from vllm_propd.training.settings import TrainSettings

WARMUP_STEPS = 30

STATES = "states"
"""The file of the target's states, below a training's folder."""

OnStep = Callable[[Progress, Trainee], None]
"""A function that is called after each step, on the first worker."""


def learning_rate(settings: TrainSettings, step: int, done: float) -> float:
    """Returns a step's rate: a warm-up, then a cosine down to 2%; ``done`` is 0 to 1."""
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))
    return settings.learning_rate * cosine * min(1.0, (step + 1) / WARMUP_STEPS)


def check_divides(settings: TrainSettings, workers: int) -> None:
    """Raises ValueError where a batch cannot be cut into equal parts."""
    parts = workers * settings.accumulate
    if settings.batch_size % parts:
        raise ValueError(
            f"--batch-size {settings.batch_size} is not a multiple of --num-workers x "
            f"--accumulate ({parts})"
        )


def _all_workers(value: torch.Tensor) -> torch.Tensor:
    """Returns the mean of a value over the workers."""
    if distributed.is_initialized():
        distributed.all_reduce(value)
        value /= distributed.get_world_size()
    return value


class Loop:
    """Trains a trainee, from its last checkpoint or from the start.

    Every step's windows are decided by the seed and the step's number alone, so that a
    resumed run, or one with more workers, sees the same batches. The target runs on a
    window when it is first met; what it says is kept.

    Args:
        trainee: target and heads, on their device.
        data: token ids to train on.
        settings: how to train.
        folder: folder of the checkpoint.
        resume: go on from the checkpoint there.

    Raises:
        ValueError: the checkpoint is of other settings, or the batch cannot be divided.
    """

    def __init__(
        self,
        trainee: Trainee,
        data: TokenData,
        settings: TrainSettings,
        folder: Path,
        resume: bool,
    ):
        self.trainee, self.data, self.settings = trainee, data, settings
        self.folder = folder
        self.device = trainee.device
        self.parameters = trainee.trained()
        self.windows = data.windows(settings.length)
        self.epochs = Epochs(len(self.windows), settings.batch_size, settings.seed)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.progress = Progress()
        if resume:
            self.progress = load_checkpoint(folder, trainee, self.optimizer, settings)
        # After the checkpoint: with settings that it refuses, states would be dropped.
        self.kept = KeptStates(
            folder / STATES,
            len(self.windows),
            settings.length,
            len(settings.early_layers),
            trainee.output.weight.shape[1],
            int(settings.kept_gib * (1 << 30)),
            f"text {crc32(self.windows.data, crc32(data.tokens.data)):08x}, layers "
            f"{settings.early_layers}",
        )
        self.rank, self.world = 0, 1
        self.model: nn.Module = trainee
        if distributed.is_initialized():
            self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
            self.model = DistributedDataParallel(trainee)
        check_divides(settings, self.world)

    def _states(self, windows: Starts, ids: torch.Tensor) -> States:
        """Returns what the target says of windows; runs it on those that are new."""
        new = self.kept.missing(windows)
        if new.any():
            states = self.trainee.states(ids[torch.from_numpy(new).to(ids.device)])
            self.kept.put(windows[new], states)
            if new.all():
                return states.rounded()
            if self.kept.missing(windows).any():  # there is no room for all
                known = self.kept.get(windows[~new]).to(self.device)
                return states.rounded().beside(known, torch.from_numpy(new))
        return self.kept.get(windows).to(self.device)

    def _step(self, done: float) -> float:
        """Does one optimizer step, and returns the batch's loss."""
        settings, step = self.settings, self.progress.step
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, done)
        whole = self.epochs(step)
        rows, where = self.data.rows(self.windows[whole], settings.length)
        # The gradient is the workers' mean: each gives its part as many times.
        positions = self.trainee.positions(torch.from_numpy(where)) / self.world
        positions = positions.to(self.device)
        total = torch.zeros((), device=self.device)
        parts = settings.accumulate
        mine = np.arange(self.rank, len(whole), self.world)
        for i, part in enumerate(np.array_split(mine, parts)):
            ids = torch.from_numpy(rows[part]).to(self.device)
            learn = torch.from_numpy(where[part]).to(self.device)
            wait = i + 1 < parts and isinstance(self.model, DistributedDataParallel)
            with (
                self.model.no_sync() if wait else nullcontext(),
                self.trainee.autocast(),
            ):
                states = self._states(whole[part], ids)
                seed = settings.seed + step
                loss = self.model(ids, learn, states, seed, positions)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(_all_workers(total))

    def run(self, on_step: OnStep | None = None) -> Progress:
        """Trains to the end; writes checkpoints on the way, and one at the end."""
        progress, settings = self.progress, self.settings
        saved = time.monotonic()
        started = saved - progress.seconds
        while (done := settings.progress(progress.step, progress.seconds)) < 1:
            loss = self._step(done)
            progress.add(loss, self._mean(time.monotonic() - started))
            if self.rank == 0:
                if on_step is not None:
                    on_step(progress, self.trainee)
                if time.monotonic() - saved > settings.save_every:
                    self._save()
                    saved = time.monotonic()
        if self.rank == 0:
            self._save()
        return progress

    def _mean(self, seconds: float) -> float:
        """Returns the workers' mean training time: all must stop at the same step."""
        return float(_all_workers(torch.tensor(seconds, device=self.device)))

    def _save(self) -> None:
        save_checkpoint(
            self.folder, self.trainee, self.optimizer, self.progress, self.settings
        )
