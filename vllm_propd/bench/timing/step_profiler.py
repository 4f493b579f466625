"""Where a step's time goes, measured inside an engine's worker, for every arm alike."""

from __future__ import annotations

import functools
import resource
import time
from dataclasses import asdict, dataclass
from typing import Any

FIRST = "prepare"
"""The part that a step begins with."""

PARTS = {
    "_prepare_inputs": FIRST,
    "_model_forward": "forward",
    "_pruned_forward.halves.run_lower": "lower half",
    "_pruned_forward.judge.keep": "prune",
    "_pruned_forward.halves.run_upper": "upper half",
    "_sample": "verify",
    "propose_draft_token_ids": "draft",
}
"""The runner's methods that are timed, and what the report calls them.

Those of ``_pruned_forward`` are parts of a forward pass whose trees are pruned. ``verify``
is sampling, and with ProPD also the walk and the commit."""

SPLIT = "split"
"""The name of what a forward in two halves takes beside its ``PARTS``."""

Laps = dict[str, float]
"""The seconds of each part of one step, by the part's name."""


@dataclass
class Work:
    """How much work trees made, before and after early pruning.

    Attributes:
        trees: trees of all steps.
        rows, kept: tree rows, roots included, before and after pruning.
        layers, early_layer: layers of the model, and the one after which it is cut.
    """

    trees: int = 0
    rows: int = 0
    kept: int = 0
    layers: int = 0
    early_layer: int = 0

    def __iadd__(self, other: Work) -> Work:
        """Adds a turn that ran after this one."""
        self.trees, self.rows = self.trees + other.trees, self.rows + other.rows
        self.kept = self.kept + other.kept
        if other.trees:
            self.layers, self.early_layer = other.layers, other.early_layer
        return self

    @property
    def ratio(self) -> float:
        """The node-layers that were run, divided by those of the unpruned trees."""
        if not self.rows:
            return 1.0
        above = self.layers - self.early_layer
        return (self.rows * self.early_layer + self.kept * above) / (
            self.rows * self.layers
        )


def install(worker: Any) -> None:
    """Runs in the worker (``collective_rpc``): times the runner's methods, by step.

    A part inside another one, as the halves are inside the forward, is not counted in it,
    and what is left is called ``SPLIT``: whole forwards are not to be mixed with it.
    It has to run again after ``use_settings``, which replaces some of what is timed.
    """
    runner = worker.model_runner
    worker.laps, worker.ended, worker.work = [], [], Work()
    worker.inside = 0.0

    def timed(part: str, method: Any) -> Any:
        method = getattr(method, "untimed", method)

        @functools.wraps(method)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if part == FIRST:
                worker.laps.append({})
                worker.ended.append(0.0)
            before, worker.inside = worker.inside, 0.0
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                now = time.perf_counter()
                spent = now - start
                own = SPLIT if worker.inside else part
                if worker.laps:  # else it is of no step: settings are changed
                    laps = worker.laps[-1]
                    laps[own] = laps.get(own, 0.0) + spent - worker.inside
                    worker.ended[-1] = now
                worker.inside = before + spent

        wrapper.untimed = method  # type: ignore[attr-defined]
        return wrapper

    pruned_forward = getattr(runner, "_pruned_forward", None)
    for path, part in PARTS.items():
        *names, method = path.split(".")
        if names and pruned_forward is None:
            continue
        owner = functools.reduce(getattr, names, runner)
        setattr(owner, method, timed(part, getattr(owner, method)))
    if pruned_forward is not None:
        _count_rows(worker, pruned_forward)


def _count_rows(worker: Any, pruned_forward: Any) -> None:
    run = getattr(pruned_forward.run, "uncounted", pruned_forward.run)
    cut = pruned_forward.judge.config.early_layer

    def counted(step: Any, *args: Any, **kwargs: Any) -> Any:
        hidden_states, left = run(step, *args, **kwargs)
        layers = pruned_forward.halves.num_layers
        rows, kept = len(step.rows), len(left.rows)
        worker.work += Work(len(step.sizes), rows, kept, layers, cut)
        return hidden_states, left

    counted.uncounted = run  # type: ignore[attr-defined]
    pruned_forward.run = counted


def take(worker: Any) -> tuple[list[tuple[float, Laps]], dict[str, int]]:
    """Runs in the worker: returns the steps since the last call, and their work.

    Each step comes with the time when it ended, by a clock that all processes share
    (``time.perf_counter``). All is in plain types, which travel between processes.
    """
    steps = list(zip(worker.ended, worker.laps, strict=True))
    work = asdict(worker.work)
    worker.laps, worker.ended, worker.work = [], [], Work()
    return steps, work


def peak_rss(worker: Any) -> float:
    """Runs in the worker: returns the most memory that its process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
