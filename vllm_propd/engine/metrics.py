"""ProPD's own metrics: from the worker that counts them to the process that shows them.

What vLLM's statistics carry between processes is a closed list. So an engine's first
worker counts in memory-mapped files (prometheus_client's format for several processes),
and a collector in the front end's registry reads them: ``/metrics``, ``LLM.get_metrics``
and the periodic log line show the same numbers. Where there are several API servers they
share vLLM's own folder of such files, and its collector reads ours with the others.
"""

from __future__ import annotations

import atexit
import os
import shutil
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from vllm import envs
from vllm.distributed import get_tensor_model_parallel_rank

from vllm_propd.config import METRIC_PREFIX

if TYPE_CHECKING:  # it brings numba, which plain engines in this process can do without
    from vllm_propd.core.sizing.protocol import StepRecord

COUNTERS = {
    "steps": "Number of engine steps.",
    "sequences": "Number of sequences that put out tokens, summed over steps.",
    "tree_nodes": "Number of tree nodes verified.",
    "kept_nodes": "Number of tree nodes left by early pruning.",
    "emitted_tokens": "Number of tokens put out.",
    "expected_tokens": "Number of tokens that plans expected; without a plan, put out.",
    "measured_step_seconds": "Time of steps without drafting (dynamic sizing), in seconds.",
    "estimated_step_seconds": "The same as estimated before each step, in seconds.",
    "heads_seconds": "Time of asking the heads (dynamic sizing), in seconds.",
    "heads_in_vain_seconds": "Of it, where no sequence put out more than one token.",
}
GAUGES = {"tree_size": "Nodes per sequence in the last step."}
LABELS = ["model_name", "engine"]


SHARED = "PROMETHEUS_MULTIPROC_DIR"
"""The environment variable that names prometheus_client's folder, if processes share one.
vLLM sets it for several API servers, of which each has another ``instance_id``."""


def _folder(vllm_config: Any) -> Path:
    if shared := os.environ.get(SHARED):
        return Path(shared)
    instance = vllm_config.instance_id.partition("_dp")[0]  # Ray's engines add their rank
    return Path(envs.VLLM_RPC_BASE_PATH) / f"vllm-propd-{os.getuid()}-{instance}"


class StepMetrics:
    """Counts steps in an engine's first worker; in other workers it counts nothing."""

    def __init__(self, vllm_config: Any):
        self.vllm_config = vllm_config
        self._files: dict[str, MmapedDict] | None = None
        self._totals = [0.0] * len(COUNTERS)
        self._size: float | None = None

    def count(self, record: StepRecord) -> None:
        """Adds a step's numbers to the metrics."""
        if self._files is None:
            self._files = self._open()
        if not self._files:
            return
        new = (  # in the order of COUNTERS; every step pays for it
            1,
            record.sequences,
            record.nodes,
            record.kept,
            record.emitted,
            record.expected_tokens or record.emitted,
            record.measured_s,
            record.estimated_s,
            record.heads_s,
            record.in_vain_s,
        )
        now, write, totals = time.time(), self._files["counter"].write_value, self._totals
        for i, value in enumerate(new):
            if value:
                totals[i] += value
                write(self._keys[i], totals[i], now)
        size = record.nodes / max(record.sequences, 1)
        if size != self._size:
            self._size = size
            self._files["gauge"].write_value(self._keys[-1], size, now)

    def _open(self) -> dict[str, MmapedDict]:
        folder = _folder(self.vllm_config)
        if get_tensor_model_parallel_rank() or not folder.is_dir():
            return {}
        parallel = self.vllm_config.parallel_config
        labels = [
            str(self.vllm_config.model_config.served_model_name),
            str(parallel.data_parallel_index),
        ]
        self._keys = [
            mmap_key(
                METRIC_PREFIX + name, METRIC_PREFIX + name + suffix, LABELS, labels, text
            )
            for texts, suffix in ((COUNTERS, "_total"), (GAUGES, ""))
            for name, text in texts.items()
        ]
        # Not the names that prometheus_client has for what this process counts itself.
        mine = f"propd{os.getpid()}.db"
        return {
            "counter": MmapedDict(str(folder / f"counter_{mine}")),
            "gauge": MmapedDict(str(folder / f"gauge_mostrecent_{mine}")),
        }


_shown: list[tuple[MultiProcessCollector, Path]] = []
"""The collectors in this process's registry and their folders: the last engine's only, as
with vLLM's own metrics."""


def show_metrics(vllm_config: Any) -> None:
    """Lets this process's Prometheus registry show what an engine's workers count."""
    hide_metrics()
    if os.environ.get(SHARED):
        return
    folder = _folder(vllm_config)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _shown.append((MultiProcessCollector(REGISTRY, str(folder)), folder))


@atexit.register
def hide_metrics() -> None:
    """Takes ProPD's metrics out of this process's registry, and removes their files."""
    while _shown:
        collector, folder = _shown.pop()
        REGISTRY.unregister(collector)
        shutil.rmtree(folder, ignore_errors=True)


def read_totals(vllm_config: Any, engines: Collection[int]) -> dict[str, float]:
    """Returns what engines' workers have counted so far, by names in ``COUNTERS``.

    Args:
        vllm_config: of these engines, which share a folder.
        engines: their numbers, by which data-parallel ones differ.
    """
    totals = dict.fromkeys(COUNTERS, 0.0)
    wanted = {str(number) for number in engines}
    if (folder := _folder(vllm_config)).is_dir():
        for metric in MultiProcessCollector(None, str(folder)).collect():
            name = metric.name.removeprefix(METRIC_PREFIX)
            if name in totals:
                totals[name] = sum(
                    sample.value
                    for sample in metric.samples
                    if sample.labels["engine"] in wanted
                )
    return totals


def cut_depths(logging: Any) -> None:
    """Leaves out of vLLM's log the depths at which nothing has been accepted.

    vLLM logs a position for each speculative token: as many as trees have nodes, though
    trees are never so deep.

    Args:
        logging: vLLM's ``SpecDecodingLogging``.
    """
    counts = logging.accepted_tokens_per_pos_lists
    deepest = max(
        (depth for one in counts for depth, n in enumerate(one, 1) if n), default=1
    )
    logging.accepted_tokens_per_pos_lists = [one[:deepest] for one in counts]


def log_line(now: dict[str, float], before: dict[str, float]) -> str | None:
    """Returns a line about the time between two readings; None where nothing happened."""
    new = {name: total - before.get(name, 0.0) for name, total in now.items()}
    if not new["steps"] or not new["sequences"]:
        return None
    each = 1 / new["sequences"]
    line = (
        f"ProPD metrics: Mean tree size: {each * new['tree_nodes']:.1f} nodes, "
        f"Kept: {each * new['kept_nodes']:.1f} nodes, "
        f"Tokens per step: {each * new['emitted_tokens']:.2f} "
        f"(expected {each * new['expected_tokens']:.2f})"
    )
    if new["measured_step_seconds"]:
        ms = 1e3 / new["steps"]
        line += (
            f", Step time: {ms * new['measured_step_seconds']:.1f} ms "
            f"(estimated {ms * new['estimated_step_seconds']:.1f} ms)"
        )
    return line
