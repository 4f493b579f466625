"""Training's own checkpoint: what a killed run goes on from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_propd.resume import changes
from vllm_propd.training.model.trainee import Trainee
from vllm_propd.training.settings import TrainSettings

FILE = "checkpoint.pt"
SMOOTHING = 0.95

MAY_DIFFER = {"save_every", "steps", "minutes", "kept_gib"}
"""Settings that a resumed run may change."""


@dataclass
class Progress:
    """How far a training is.

    Attributes:
        step: finished steps.
        seconds: training time spent.
        loss: the smoothed loss.
        last: the last step's loss.
    """

    step: int = 0
    seconds: float = 0.0
    loss: float = float("nan")
    last: float = float("nan")

    def add(self, loss: float, seconds: float) -> None:
        """Counts a finished step."""
        kept = SMOOTHING if self.step else 0.0
        self.loss = kept * self.loss + (1 - kept) * loss if kept else loss
        self.step, self.seconds, self.last = self.step + 1, seconds, loss


def save_checkpoint(
    folder: Path,
    trainee: Trainee,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    settings: TrainSettings,
) -> None:
    """Writes a checkpoint: the old one or the new one is whole, at every moment."""
    state = {
        "settings": settings.model_dump_json(),
        "progress": vars(progress),
        "heads": trainee.state(),
        "optimizer": optimizer.state_dict(),
    }
    partial = folder / f"{FILE}.partial"
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / FILE)


def read_checkpoint(
    folder: Path, settings: TrainSettings, **options: Any
) -> dict[str, Any] | None:
    """Reads the folder's checkpoint; None where there is none.

    Args:
        folder: folder of the checkpoint.
        settings: of the training that is to go on from it.
        options: of ``torch.load``.

    Raises:
        ValueError: the checkpoint was made with other settings.
    """
    path = folder / FILE
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, weights_only=True, **options)
    then = TrainSettings.model_validate_json(state["settings"]).model_dump()
    if what := changes(then, settings.model_dump(exclude=MAY_DIFFER)):
        raise ValueError(
            f"--resume: {path} was made with other settings ({what}); use the same, or "
            f"remove {folder} to train anew"
        )
    return state


def load_checkpoint(
    folder: Path,
    trainee: Trainee,
    optimizer: torch.optim.Optimizer,
    settings: TrainSettings,
) -> Progress:
    """Goes on from the folder's checkpoint; from the start where there is none.

    Raises:
        ValueError: the checkpoint was made with other settings.
    """
    state = read_checkpoint(folder, settings, map_location=trainee.device)
    if state is None:
        return Progress()
    trainee.load_state_dict(state["heads"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    return Progress(**state["progress"])
