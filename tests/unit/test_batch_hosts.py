"""How many cores each engine gets, on the hosts of a cluster."""

from __future__ import annotations

import os
import socket
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_propd.batch.hosts import shared_cores


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What Ray says of its nodes."""
    nodes: list[dict[str, Any]] = []
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(nodes=lambda: nodes))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    return nodes


def node(host: str, cpus: float, alive: bool = True) -> dict[str, Any]:
    resources = {"CPU": cpus} if cpus else {}
    return {"NodeManagerHostname": host, "Resources": resources, "Alive": alive}


def threads(engines: int, workers: int = 1) -> int:
    return int(shared_cores(engines, workers)["OMP_NUM_THREADS"])


def test_engines_share_the_cores_of_their_own_host(hosts: list[dict[str, Any]]) -> None:
    hosts += [node("a", 64.0), node("b", 64.0), node("gone", 2.0, alive=False)]
    hosts.append(node("head", 0.0))  # on which no engine runs
    assert shared_cores(2)["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert (threads(2), threads(3), threads(4), threads(999)) == (64, 32, 32, 1)
    assert (threads(2, workers=2), threads(4, workers=4)) == (32, 8)
    hosts.append(node("c", 16.0))
    assert (threads(2), threads(3), threads(4)) == (16, 16, 8)


def test_an_engine_alone_is_bound_by_vllm(hosts: list[dict[str, Any]]) -> None:
    hosts.append(node("a", 64.0))
    assert shared_cores(1) == {} == shared_cores(1, workers=2)


def test_this_host_has_no_more_cores_than_it_has(hosts: list[dict[str, Any]]) -> None:
    """Nodes of a cluster may be one host, and Ray may be told of any number of CPUs."""
    assert threads(2) == 4  # no host is there yet
    hosts += [node("here", 3.0), node("here", 3.0)]
    assert threads(2) == 3
    hosts.append(node("here", 30.0))
    assert threads(2) == 4
