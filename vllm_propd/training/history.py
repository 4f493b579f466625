"""The loss of every step, one JSON line each: ``losses.jsonl``."""

from __future__ import annotations

import json
from pathlib import Path

from vllm_propd.resume import write_whole
from vllm_propd.training.model.checkpoint import Progress

FILE = "losses.jsonl"


class History:
    """Appends to ``losses.jsonl``.

    Args:
        folder: folder of the file.
        step: finished steps; lines of later ones, of a killed run, are dropped.
    """

    def __init__(self, folder: Path, step: int):
        self.path = folder / FILE
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        write_whole(self.path, "".join(f"{line}\n" for line in lines[:step]))

    def add(self, progress: Progress) -> None:
        """Adds a step that has just finished."""
        row = {"step": progress.step, "loss": progress.last, "seconds": progress.seconds}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
