"""What is known of a folder of heads: ``calibration.json``, which training writes.

Serving starts from it (paper section 3.3: ``p_k^i``, the probability that head i's
candidate of rank k is the truth).
"""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_propd.config import ProPDConfig
from vllm_propd.heads.checkpoint import HeadsError
from vllm_propd.resume import write_whole

FILE = "calibration.json"
TREE_SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 128)
EARLY_RANKS = (1, 5, 10, 20, 50)
BINS = 16
"""Bins of log probability (``core.drafting.reliability``)."""


class Calibration(BaseModel):
    """Heads measured on the target's own greedy continuations of held-out text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    positions: int = Field(gt=0, description="Positions measured.")
    rank_accuracy: list[list[float]] = Field(
        min_length=1,
        description="p_k: per head, how often its candidate of rank k is the truth.",
    )
    early_recall: dict[int, dict[int, float]] = Field(
        description="Per early layer and K: how often its top K hold the next token."
    )
    tokens_per_step: dict[int, float] = Field(
        min_length=1,
        description="Per tree size: tokens a step, the bonus included, counted by walking.",
    )

    reliability: list[list[list[float]]] | None = Field(
        default=None,
        description="Three tables by head and by what it said (bins of log probability): "
        "candidates, the sum of their log probabilities, and how many were right.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len({len(row) for row in self.rank_accuracy}) > 1 or not self.rank_accuracy[0]:
            raise ValueError("rank_accuracy needs as many ranks of every head")
        if self.reliability is not None:
            found = {len(table) for table in self.reliability}
            bins = {len(row) for table in self.reliability for row in table}
            if found != {len(self.rank_accuracy)} or bins != {BINS}:
                raise ValueError(f"reliability needs {BINS} bins of every head")
        return self

    def sureness(self) -> npt.NDArray[np.float64] | None:
        """Returns ``reliability`` as ``[3, heads, bins]`` float64; None: not measured."""
        return None if self.reliability is None else np.array(self.reliability)

    def cumulative(self, head: int) -> list[float]:
        """Returns P_k of head ``head`` (from 0): how often its first k hold the truth."""
        return list(accumulate(self.rank_accuracy[head]))

    def rank_values(self, ranks: int) -> npt.NDArray[np.float32]:
        """Returns ``[heads, ranks]`` float32 log of p_k, as log probabilities for growth.

        They never rise along the ranks (measured by chance they may), and are never -inf.

        Raises:
            HeadsError: fewer ranks were measured.
        """
        measured = len(self.rank_accuracy[0])
        if ranks > measured:
            raise HeadsError(
                f"node_values 'rank_accuracy' with num_candidates {ranks}: {FILE} knows "
                f"{measured} ranks; lower num_candidates"
            )
        shares = np.array(self.rank_accuracy, np.float32)[:, :ranks]
        floor = 1 / (2 * self.positions)  # seen less than once
        return np.log(np.minimum.accumulate(np.maximum(shares, floor), axis=1))

    def expected_tokens(self, nodes: int) -> float:
        """Returns the tokens per step of a tree size, on a line between measured sizes."""
        sizes = sorted(self.tokens_per_step)
        measured = [self.tokens_per_step[size] for size in sizes]
        sizes, measured = [0, *sizes], [1.0, *measured]  # without a tree: plain decoding
        return float(np.interp(nodes, sizes, measured))

    def save(self, folder: Path) -> None:
        """Writes ``calibration.json`` beside the heads."""
        write_whole(folder / FILE, self.model_dump_json(indent=1) + "\n")


def load_calibration(folder: Path, num_heads: int) -> Calibration | None:
    """Loads the calibration beside the heads in ``folder``; None where there is none.

    Raises:
        HeadsError: it cannot be read, or belongs to other heads.
    """
    path = folder / FILE
    if not path.exists():
        return None
    remedy = "remove it, or train the heads again"
    try:
        found = Calibration.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what: object = error
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".lstrip(": ")
        raise HeadsError(f"cannot use {path}: {what}; {remedy}") from error
    if len(found.rank_accuracy) != num_heads:
        raise HeadsError(
            f"cannot use {path}: it describes {len(found.rank_accuracy)} heads, the folder "
            f"has {num_heads}; {remedy}"
        )
    return found


def calibration_for(
    config: ProPDConfig, folder: Path, num_heads: int
) -> Calibration | None:
    """Loads the calibration beside the heads; None where there is none and none is needed.

    Raises:
        HeadsError: the config needs it and it is not there, or it does not suit.
    """
    found = load_calibration(folder, num_heads)
    if config.node_values == "rank_accuracy":
        if found is None:
            raise HeadsError(
                f"node_values 'rank_accuracy' needs {folder / FILE}, which `vllm-propd "
                "train` writes; train the heads, or use 'head_probability'"
            )
        found.rank_values(config.ranks)
    return found
