"""Where a step's time goes, measured inside an engine's worker, for every arm alike."""

from __future__ import annotations

import functools
import resource
import time
from collections import defaultdict
from typing import Any

PARTS = {
    "_prepare_inputs": "prepare",
    "_model_forward": "forward",
    "_sample": "verify",
    "propose_draft_token_ids": "draft",
}
"""vLLM's runner methods, and what the report calls them. ``verify`` is sampling, and with
ProPD also the walk and the commit."""


def install(worker: Any) -> None:
    """Runs in the worker (``collective_rpc``): times each call of the runner's methods."""
    runner = worker.model_runner
    worker.laps = defaultdict(list)

    def timed(part: str, method: Any) -> Any:
        @functools.wraps(method)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                worker.laps[part].append(time.perf_counter() - start)

        return wrapper

    for name, part in PARTS.items():
        setattr(runner, name, timed(part, getattr(runner, name)))


def take(worker: Any) -> dict[str, list[float]]:
    """Runs in the worker: seconds of each call since the last time, by part."""
    laps = dict(worker.laps)
    worker.laps.clear()
    return laps


def peak_rss(worker: Any) -> float:
    """Runs in the worker: the most memory its process has held, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
