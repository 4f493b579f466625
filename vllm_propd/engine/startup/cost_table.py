"""The start-up cost table: what steps of some sizes take on this machine.

A few forward passes without context, timed once per model and machine and kept under
vLLM's cache. The short ones are timed again at every start: a table of a bad minute would
keep some sizes from ever being tried. What passes leave out, attention over context and the
host's work, is learned while serving (``core/sizing/step_cost.py``).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from hashlib import blake2b
from importlib.metadata import version
from math import inf
from pathlib import Path
from statistics import median
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from pydantic import BaseModel
from torch.backends.cpu import get_cpu_capability
from tqdm import tqdm
from vllm import envs
from vllm.config import SchedulerConfig
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_propd.config import ProPDConfig
from vllm_propd.core.sizing.controller import Agreed, DynamicSizing
from vllm_propd.core.sizing.step_cost import StepCost
from vllm_propd.heads.checkpoint import EARLY_FILE, WEIGHT_FILES

logger = init_logger("vllm.propd.costs")

TOKENS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Tokens of the timed steps; beyond the last, costs are taken to go on along a line."""

SHORT = 48
"""The most tokens of a short step; the times of short steps decide most plans."""

REPEATS, OFTEN = 2, 6
"""How often long steps are timed, and how often those of up to ``SHORT`` tokens."""

LONG_S, LONG = 1.0, 3.0
"""The longest step that is timed: one of more than LONG_S seconds and LONG times as many as
the shortest. So a slow machine starts in seconds, too."""

OUTDONE = 0.8
"""A kept table is measured anew where short steps take less than so much of its times."""

ENOUGH_S = 20.0
"""No round of timing begins later than so many seconds after the first."""

Works = dict[tuple[str, int], Callable[[], object]]
"""What is timed: functions by the field of ``CostTable`` and the size."""


class CostTable(BaseModel):
    """The times that were measured: seconds of steps by tokens, of drafting by sequences.

    ``draft_s`` is missing where there are no heads.

    ``lower_s`` (early head included) and ``upper_s`` are seconds of a step's two halves,
    where the model is split.
    """

    tokens: list[int]
    step_s: list[float]
    sequences: list[int]
    draft_s: list[float] | None = None
    lower_s: list[float] | None = None
    upper_s: list[float] | None = None

    def __str__(self) -> str:
        """Says what the shortest step takes, and asking the heads for one sequence."""
        said = f"a step of one token takes {1e3 * self.step_s[0]:.1f} ms"
        if self.draft_s is None:
            return said
        share = self.draft_s[0] / self.step_s[0]
        return f"{said}, asking the heads {1e3 * self.draft_s[0]:.2f} ms ({share:.1%})"

    def least(self, others: CostTable) -> CostTable:
        """Returns the faster of each time: whatever else a machine did has only added.

        Args:
            others: times measured again, perhaps of the first of these steps only.
        """
        if len(others.tokens) > len(self.tokens):  # these broke off early
            return others.least(self)
        again = others.model_dump()
        return self.model_copy(
            update={
                name: [min(both) for both in zip(times, again[name], strict=False)]
                + times[len(again[name]) :]
                for name, times in self.model_dump(exclude_none=True).items()
                if name not in ("tokens", "sequences")
            }
        )

    def is_outdone(self, others: CostTable) -> bool:
        """Whether these times are of a bad moment, by those of the first steps again.

        Then the times of long steps are, too, which are not taken again; beside short ones
        that are mended, trees of their sizes would look dear for ever.
        """
        pairs = zip(others.step_s, self.step_s, strict=False)
        return median(again / before for again, before in pairs) < OUTDONE

    def step_cost(self) -> StepCost:
        """Returns an estimator of step times that starts from this table."""
        halves = None
        if self.lower_s is not None and self.upper_s is not None:
            halves = np.array(self.lower_s), np.array(self.upper_s)
        return StepCost(np.array(self.tokens), np.array(self.step_s), halves)

    def draft_cost(self) -> StepCost | None:
        """Returns an estimator of drafting times that starts from this table."""
        if self.draft_s is None:
            return None
        return StepCost(np.array(self.sequences), np.array(self.draft_s))


def most_nodes(config: ProPDConfig, scheduler: SchedulerConfig) -> tuple[int, int]:
    """Returns the most nodes of a tree, and the most tokens of a step, in an engine.

    The scheduler cuts lists of drafts where it would cut prompts: at the threshold of long
    prefills, the root counted.
    """
    nodes, threshold = config.num_speculative_tokens, scheduler.long_prefill_token_threshold
    if threshold > 0:
        nodes = min(nodes, threshold - 1)
    scheduled = scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
    return nodes, min(scheduled, scheduler.max_num_batched_tokens)


def dynamic_sizing(runner: Any, nodes: int, budget: int) -> DynamicSizing:
    """Makes a worker's sizing from a table measured now, and a cached one if there is.

    Args:
        runner: the worker's model runner, loaded.
        nodes, budget: see ``most_nodes``.
    """
    path = _cache_file(runner)
    known = _cached(path)
    began = time.monotonic()
    table = measure(runner, again=known is not None)
    if known is not None and known.is_outdone(table):
        known, table = None, measure(runner)
    seconds = time.monotonic() - began
    if known is not None:
        table = known.least(table)
    logger.info("Timed steps and drafts in %.1f s: %s", seconds, table)
    if path is not None:
        _keep(path, table)
    return DynamicSizing(
        table.step_cost(),
        table.draft_cost(),
        nodes,
        budget,
        pruning=runner.propd.plans_pruning,
        promised=runner.drafter.promised,
        captured=runner.cudagraph_batch_sizes,
        agree=_first_ranks,
    )


def _first_ranks(said: Agreed) -> Agreed:
    """Returns what the first tensor-parallel rank, whose plan counts, says.

    Sizes travel in the scheduled lists; what is agreed on has no place there.
    """
    group = get_tp_group()
    if group.world_size == 1:
        return said
    agreed: Agreed = group.broadcast_object(said)
    return agreed


@torch.inference_mode()
def measure(runner: Any, again: bool = False) -> CostTable:
    """Times steps and drafts; every tensor-parallel rank does the same ones.

    Args:
        runner: the worker's model runner, loaded.
        again: time only steps of up to ``SHORT`` tokens, once each.
    """
    most = min(runner.max_num_tokens, SHORT if again else TOKENS[-1])
    tokens = [n for n in TOKENS if n < most] + [most]
    sequences = sorted({1, max(2, runner.max_num_reqs)})
    split = runner._pruned_forward

    def logits(hidden_states: torch.Tensor) -> None:
        runner.model.compute_logits(hidden_states)

    def whole(count: int) -> None:
        logits(runner._dummy_run(count)[0][:count])

    def finished(upper: Callable[[], torch.Tensor]) -> None:
        logits(upper())

    group, finish = get_tp_group(), runner._sync_device
    works: Works = {}
    for count in sequences if runner.propd.heads else ():
        runner.drafter.ask(count)  # prepares this shape
        works["draft_s", count] = partial(runner.drafter.ask, count)
    shortest = inf
    for count in tokens:
        works["step_s", count] = step = partial(whole, count)
        if split is not None:
            lower, upper = split.dummy_run(count)
            works["lower_s", count] = lower
            works["upper_s", count] = partial(finished, upper)
        # The first time prepares the shape.
        seconds = min(_seconds(step, finish) for _ in range(2))
        shortest = min(shortest, seconds)
        if group.broadcast_object(seconds > max(LONG_S, LONG * shortest)):
            break
    timed = [size for name, size in works if name == "step_s"]
    if timed != tokens:
        logger.info("Steps of over %d tokens are too long to be timed", timed[-1])
    times = _timed(works, finish, group, often=1 if again else OFTEN)
    found: dict[str, list[float]] = {}
    for (name, _), seconds in times.items():
        found.setdefault(name, []).append(seconds)
    return CostTable(tokens=timed, sequences=sequences, **found)


def _timed(
    works: Works, finish: Callable[[], None], group: Any, often: int = OFTEN
) -> dict[tuple[str, int], float]:
    """Returns the least seconds of each work, over several rounds through all of them.

    In rounds a slow moment of the machine does not fall on one work. The least is taken
    because whatever else the machine does only adds; what it always does is learned while
    serving.

    Args:
        works: what to time, prepared.
        finish: waits for the device.
        group: the tensor-parallel ranks, which all run as many rounds.
        often: how many rounds, where there is time for them.
    """
    rounds = [
        [work for work in works if turn < REPEATS or work[1] <= SHORT]
        for turn in range(often)
    ]
    least = dict.fromkeys(works, inf)
    began = time.perf_counter()
    quiet = group.rank_in_group != 0
    with tqdm(
        total=sum(map(len, rounds)), desc="ProPD: timing steps", disable=quiet
    ) as bar:
        for turn in rounds:
            for work in turn:
                least[work] = min(least[work], _seconds(works[work], finish))
                bar.update()
            if group.broadcast_object(time.perf_counter() - began > ENOUGH_S):
                break
    return least


def _seconds(work: Callable[[], object], finish: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    finish()
    return time.perf_counter() - began


def _cache_file(runner: Any) -> Path | None:
    """Returns where this model's table on this machine is kept; None with several ranks.

    Ranks time collectives together: one must not read what another has to measure.
    """
    config = runner.vllm_config
    if config.parallel_config.world_size > 1:
        return None
    threads = torch.get_num_threads()
    device = current_platform.get_device_name()
    if current_platform.is_cpu():  # hosts of several kinds may share the folder
        device += f"-{get_cpu_capability()}"
    name = f"{config.compute_hash()}-{version('vllm-propd')}-{threads}-threads-"
    name += re.sub(r"\W+", "-", device)
    name += f"-{_heads(runner.propd)}"
    if runner._pruned_forward is not None:
        name += f"-layer-{runner.propd.early_layer}"
    return Path(envs.VLLM_CACHE_ROOT) / "propd" / "costs" / f"{name}.json"


def _heads(config: ProPDConfig) -> str:
    """Returns a word for the heads' files: heads that are trained anew have another."""
    if not config.heads:
        return "no-heads"
    assert config.model is not None
    files = [Path(config.model) / name for name in (*WEIGHT_FILES, EARLY_FILE)]
    stats = [(one.name, one.stat()) for one in files if one.is_file()]
    known = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return f"heads-{blake2b(repr(known).encode(), digest_size=8).hexdigest()}"


def _keep(path: Path, table: CostTable) -> None:
    """Writes the table whole: engines of a host start together, and share the folder.

    Where that cannot be, it warns: the next start times anew.
    """
    began = path.with_suffix(f".{uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        began.write_text(table.model_dump_json() + "\n")
        began.replace(path)
    except OSError as error:
        with suppress(OSError):  # what a full disk has left of it
            began.unlink()
        logger.warning_once(
            "ProPD: step costs cannot be kept in %s (%s), so each start times all of them: "
            "set VLLM_CACHE_ROOT to a folder that can be written",
            path.parent,
            error.strerror,
        )


def _cached(path: Path | None) -> CostTable | None:
    if path is None:
        return None
    try:
        found = CostTable.model_validate_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # also of text that is none
        logger.warning("%s is of no use (%s): timing anew", path, error)
        return None
    logger.info("Step costs from %s", path)
    return found
