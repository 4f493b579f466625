"""What a recording engine hands over, as what is replayed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from vllm_propd.core.drafting.candidates import Candidates
from vllm_propd.simulation.answers import Answer
from vllm_propd.simulation.replay import RecordedText


def texts_of(recording: Iterable[list[dict[str, Any]]]) -> list[RecordedText]:
    """Turns a recording of steps into one text for each sequence.

    Args:
        recording: as an engine's ``take_recording`` gives it, of steps that accepted
            nothing.
    """
    places: dict[str, list[dict[str, Any]]] = {}
    for step in recording:
        for tree in step:
            places.setdefault(tree["request_id"], []).append(tree)
    found = []
    for trees in places.values():
        nodes = min(tree["verified"] for tree in trees)

        def columns(name: str, kind: Any, trees: Any = trees, nodes: int = nodes) -> Any:
            return np.array([tree[name][:nodes] for tree in trees], kind)

        early = len(trees[0]["early_rank"]) > 0
        found.append(
            RecordedText(
                token=columns("token", np.int64),
                parent=columns("parent", np.int64),
                depth=columns("depth", np.int64),
                score=columns("score", np.float32),
                text=np.array([tree["bonus"] for tree in trees], np.int64),
                early_rank=columns("early_rank", np.int64) if early else None,
                early_log_prob=columns("early_log_prob", np.float32) if early else None,
            )
        )
    return found


def answers_of(recorded: Iterable[dict[str, Any]]) -> list[Answer]:
    """Turns what an engine's ``recorded_answers`` gives into answers."""
    found = []
    for one in recorded:
        tokens, begins = np.array(one["tokens"], np.int64), one["begins"]
        kinds = {"tokens": np.int64, "log_probs": np.float32, "next_row": np.int64}
        said = Candidates(
            *(
                np.array([place[name] for place in one["candidates"]], kind)
                for name, kind in kinds.items()
            )
        )
        best, log_share = np.array(one["best"], np.int64), np.array(one["log_share"])
        found.append(
            Answer(
                "any", tokens[:begins], tokens[begins:], best,
                log_share.astype(np.float32), said,
            )
        )  # fmt: skip
    return found
