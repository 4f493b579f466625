"""What a frozen target says of its tokens: all that heads need to learn from it."""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_propd.resume import write_whole

logger = logging.getLogger("vllm.propd.training")

ROOM = 0.9
"""The share of the disk's free room that states may take."""

RESERVE = 1 << 30
"""Free bytes of the disk that are left for others, checkpoints among them."""

BEST = 8
"""The target's best tokens that are kept of each position.

In text that a target has written itself, greedily, they hold nearly all of its probability;
what is beyond them is not learnt from."""


@dataclass
class States:
    """A frozen target's states and best tokens at ``[rows, length]`` positions.

    Attributes:
        last: ``[rows, length, hidden]``, what its output layer reads.
        early: ``[layers, rows, length, hidden]``, the residual stream after each early
            layer.
        best: ``[rows, length, BEST]`` int32, its most probable next tokens, best first.
        log_probs: ``[rows, length, BEST]``, their log probabilities.
    """

    last: torch.Tensor
    early: torch.Tensor
    best: torch.Tensor
    log_probs: torch.Tensor

    def to(self, device: torch.device) -> States:
        """Returns the same states on a device."""
        return States(*(one.to(device) for one in vars(self).values()))

    def rounded(self) -> States:
        """Returns the states as they are kept, so that it makes no difference whether."""
        kept = (torch.bfloat16, torch.bfloat16, torch.int32, torch.float16)
        both = zip(vars(self).values(), kept, strict=True)
        return States(*(one.to(dtype) for one, dtype in both))

    def beside(self, others: States, mine: torch.Tensor) -> States:
        """Returns these rows and others' as one batch.

        Args:
            others: states of the other rows.
            mine: ``[rows]`` bool, which rows of the batch are these.
        """
        order = torch.cat([mine.nonzero()[:, 0], (~mine).nonzero()[:, 0]]).argsort()
        joined = {}
        for name, one in vars(self).items():
            rows = 1 if name == "early" else 0
            both = torch.cat([one, getattr(others, name)], rows)
            joined[name] = both.index_select(rows, order.to(both.device))
        return States(**joined)


class KeptStates:
    """States of windows on disk, each computed once, in bfloat16.

    A resumed training finds them again, and workers on one disk share them. After a crash
    of the machine, not of the process, they may be marked and yet not there.

    Args:
        path: the file; made if it is not there, beside one that says what is in it.
        windows, length: how many windows there are, and their tokens.
        layers, hidden: early layers, and the target's hidden size.
        most_bytes: windows beyond so many bytes are not kept, nor beyond what the disk has
            room for. A resumed training may give another number.
        kind: what the states are of; a file of another kind is computed anew.
    """

    def __init__(
        self,
        path: Path,
        windows: int,
        length: int,
        layers: int,
        hidden: int,
        most_bytes: int,
        kind: str = "",
    ):
        kind = f"{length} x {1 + layers} x {hidden}: {kind}"
        each = length * ((1 + layers) * hidden * 2 + BEST * (4 + 2))
        with path.with_suffix(".lock").open("w") as lock:  # workers begin together
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.windows = _begin(path, kind, min(windows, most_bytes // each), each)
        self._folder, self._each, self._told = path.parent, each, False
        rows = (self.windows, length)
        self._done = _mapped(path.with_suffix(".done"), np.uint8, (self.windows,))
        self._states = _mapped(path, np.int16, (*rows, 1 + layers, hidden))
        self._best = _mapped(path.with_suffix(".best"), np.int32, (*rows, BEST))
        self._probs = _mapped(path.with_suffix(".probs"), np.float16, (*rows, BEST))

    def missing(self, windows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Says which of these windows have to be computed."""
        beyond = windows >= self.windows
        if not self.windows:
            return beyond
        known: npt.NDArray[np.bool_] = self._done[np.minimum(windows, self.windows - 1)] > 0
        return beyond | ~known

    def get(self, windows: npt.NDArray[np.int64]) -> States:
        """Returns the states of windows that are kept, on the CPU."""
        states = torch.from_numpy(self._states[windows]).view(torch.bfloat16)
        return States(
            states[:, :, 0],
            states[:, :, 1:].permute(2, 0, 1, 3),
            torch.from_numpy(self._best[windows]),
            torch.from_numpy(self._probs[windows]),
        )

    def put(self, windows: npt.NDArray[np.int64], states: States) -> None:
        """Keeps the states of windows, as far as there is room.

        Where the disk is nearly full it keeps none: writing to a mapped file that the disk
        has no room for would end the process (SIGBUS).
        """
        fits = windows < self.windows
        if not fits.any():
            return
        free = shutil.disk_usage(self._folder).free
        if free < fits.sum() * self._each + RESERVE:
            if not self._told:
                logger.warning("%s is full: no more of the target's states", self._folder)
            self._told = True
            return
        rows, mine = windows[fits], torch.from_numpy(fits)
        both = torch.cat([states.last[None], states.early]).permute(1, 2, 0, 3)
        bits = both.to("cpu", torch.bfloat16)[mine].contiguous().view(torch.int16)
        self._states[rows] = bits.numpy()
        self._best[rows] = states.best.cpu()[mine].numpy()
        self._probs[rows] = states.log_probs.cpu()[mine].numpy()
        self._done[rows] = 1


def _begin(path: Path, kind: str, windows: int, each: int) -> int:
    """Drops states of another kind, and returns how many windows there is room for.

    Args:
        path: the file.
        kind: what its states are to be of.
        windows: how many are wanted.
        each: bytes of one.
    """
    about = path.with_suffix(".json")
    then: dict[str, Any] = {"kind": None}
    if about.exists():
        then = json.loads(about.read_text())
    there = int(then["windows"]) if then["kind"] == kind else 0
    if not there:
        for suffix in (".done", ".best", ".probs", path.suffix):
            path.with_suffix(suffix).unlink(missing_ok=True)
    room = there + int(ROOM * shutil.disk_usage(path.parent).free) // each
    if windows > room:
        wanted, windows = windows, room
        logger.warning(
            "%s has room for the target's states of %d of %d windows: the others' are "
            "computed in every pass",
            path.parent,
            windows,
            wanted,
        )
    write_whole(about, json.dumps({"kind": kind, "windows": windows}))
    return windows


def _mapped(path: Path, dtype: Any, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Maps a file of this shape; what is new in it takes room as it is written."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if not size:
        return np.empty(shape, dtype)
    with path.open("ab") as file:
        if file.tell() != size:
            file.truncate(size)
    return np.memmap(path, dtype, "r+", shape=shape)
