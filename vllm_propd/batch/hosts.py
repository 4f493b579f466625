"""The hosts of a Ray cluster, and how engines on CPUs share them."""

from __future__ import annotations

import os
import socket
from collections import Counter
from math import ceil
from typing import Any


def shared_cores(engines: int, workers: int = 1) -> dict[str, str]:
    """Returns the environment by which engines that are on one host share its cores.

    vLLM would bind each of them to all. Ray spreads engines evenly over the hosts of the
    cluster that this process has joined; all engines have one environment, so that the
    host with the fewest cores decides.

    Args:
        engines: how many there are, on all hosts; one alone is bound by vLLM.
        workers: processes of each engine.
    """
    if engines == 1:
        return {}
    import ray

    cores = _cores(ray.nodes())
    threads = min(cores) // (ceil(engines / len(cores)) * workers)
    return {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(max(1, threads)),
    }


def _cores(nodes: list[dict[str, Any]]) -> list[int]:
    """Returns the cores of each host: Ray's CPUs, of which the nodes of a host have part.

    This host may have told Ray of more than it has, as a job does that starts a cluster.
    """
    found: Counter[str] = Counter()
    for node in nodes:
        if node["Alive"] and (cpus := node["Resources"].get("CPU")):
            found[node["NodeManagerHostname"]] += int(cpus)
    here, own = socket.gethostname(), os.cpu_count() or 1
    if here in found:
        found[here] = min(found[here], own)
    return [*found.values()] or [own]  # a cluster whose hosts are yet to come
