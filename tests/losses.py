"""The losses of a training, as it notes them."""

from __future__ import annotations

import json
from pathlib import Path

from vllm_propd.training.history import FILE


def losses_of(folder: Path) -> list[float]:
    """The loss of each step so far; none, where no step has been noted yet."""
    path = folder / FILE
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["loss"] for line in lines]
