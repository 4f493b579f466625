"""Clusters and endpoints on this machine, and the engines that tests have there."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from ray.cluster_utils import Cluster

ENGINE = {
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 1 << 27,
}


@contextmanager
def cluster_of(nodes: int, cpus: int) -> Iterator[Cluster]:
    """A cluster of some hosts with so many of Ray's CPUs each, all of them this machine."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus})
    for _ in range(nodes - 1):
        cluster.add_node(num_cpus=cpus)
    cluster.wait_for_nodes()
    try:
        yield cluster
    finally:
        cluster.shutdown()


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
