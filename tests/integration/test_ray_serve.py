"""`examples/ray_serve.py`: two engines behind one endpoint, and one of them is killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from clusters import ENGINE, cluster_of, free_port
from conftest import MODEL, engine, greedy, mixed_prompts, run
from ray.cluster_utils import Cluster

pytestmark = [pytest.mark.alone, pytest.mark.long]

SCRIPT = Path(__file__).parents[2] / "examples" / "ray_serve.py"
REQUESTS, TOKENS, AT_ONCE, START_SECONDS = 500, 12, 16, 600


@contextmanager
def serving(log: Path, **engine_kwargs: object) -> Iterator[tuple[str, Cluster]]:
    """The endpoint of two replicas, and their two nodes, both of them this machine."""
    port = free_port()
    with cluster_of(2, cpus=8) as cluster, log.open("w") as output:
        options = ["--replicas", "2", "--port", str(port), "--address", cluster.address]
        options += ["--engine-kwargs", json.dumps({**ENGINE, **engine_kwargs})]
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(MODEL), *options],
            stdout=output, stderr=output,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + START_SECONDS
            while "is ready at" not in log.read_text():
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}", cluster
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def complete(address: str, ids: list[int]) -> str | None:
    """What the endpoint makes of a prompt; nothing where it answers with an error."""
    body = {"model": "target", "prompt": ids, "max_tokens": TOKENS, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            text: str = json.load(answer)["choices"][0]["text"]
            return text
    except urllib.error.HTTPError:
        return None


def drafts(cluster: Cluster) -> dict[str, float]:
    """By replica, how many drafts Ray's metrics pages tell of."""
    found = {}
    for node in cluster.list_all_nodes():
        page = f"http://{node.node_ip_address}:{node.metrics_export_port}/metrics"
        with urllib.request.urlopen(page, timeout=10) as answer:
            text = answer.read().decode()
        name = "ray_vllm_spec_decode_num_drafts_total"
        for labels, count in re.findall(rf"^{name}{{(.*)}} (\S+)$", text, re.M):
            found[re.findall(r'ReplicaId="(\w+)"', labels)[0]] = float(count)
    return found


def replicas() -> list[psutil.Process]:
    """The processes of the replicas that hold engines."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if "ServeReplica" in line and "LLMServer" in line:
            found.append(process)
    return found


@pytest.mark.parametrize("config", ["propd", None], ids=["propd", "plain"])
def test_all_answers_are_plain_vllms_though_a_replica_dies(
    config: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = mixed_prompts(REQUESTS, seed=81)
    with engine() as llm:
        expected = [out.text for out in run(llm, prompts, greedy(TOKENS))]
    with (
        serving(tmp_path / "log", speculative_config=config) as (address, cluster),
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        found = list(pool.map(lambda one: complete(address, one), ids))
        assert found == expected
        assert len(replicas()) == 2
        deadline = time.monotonic() + (60 if config else 0)  # Ray exports now and then
        while time.monotonic() < deadline and len(drafts(cluster)) < 2:
            time.sleep(1)
        assert sum(count > 0 for count in drafts(cluster).values()) == (2 if config else 0)
        again = [pool.submit(complete, address, one) for one in ids]
        while sum(one.done() for one in again) < REQUESTS // 4:
            time.sleep(0.05)
        os.kill(replicas()[0].pid, signal.SIGKILL)
        found = [one.result() for one in again]
    errors = sum(one is None for one in found)
    with capsys.disabled():
        print(f"\n{config or 'plain'}: {errors} errors of {REQUESTS} as a replica died")
    # What was in flight there, and nothing wrong.
    assert errors <= 2 * AT_ONCE
    for text, wanted in zip(found, expected, strict=True):
        assert text in (None, wanted)
