"""``vllm serve MODEL --speculative-config propd`` answers OpenAI requests."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from clusters import free_port
from conftest import MODEL, Ties, engine, greedy, mixed_prompts, run
from typer.testing import CliRunner

from vllm_propd.cli import app
from vllm_propd.watch import parse

pytestmark = pytest.mark.alone

START_SECONDS = 180
LOG: dict[str, Path] = {}
"""Log files of servers, by address."""


@contextmanager
def serving(speculative_config: str, log: Path, *more: str) -> Iterator[str]:
    """A running server's address."""
    port = free_port()
    command = [
        str(Path(sys.executable).parent / "vllm"), "serve", str(MODEL), "--port", str(port),
        "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager",
        "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(1 << 28),
        "--served-model-name", "pycode", "--speculative-config", speculative_config, *more,
    ]  # fmt: skip
    with log.open("w") as output:
        stats = {"VLLM_LOG_STATS_INTERVAL": "2", "VLLM_LOGGING_LEVEL": "INFO"}
        environment = {**os.environ, **stats}
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    address = f"http://127.0.0.1:{port}"
    LOG[address] = log
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """As users start it."""
    with serving("propd", tmp_path_factory.mktemp("serve") / "log") as address:
        yield address


@pytest.fixture(scope="module")
def drafting_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One that drafts whatever it costs."""
    keys = json.dumps({"method": "propd", "sizing": "fixed"})
    with serving(keys, tmp_path_factory.mktemp("serve") / "log") as address:
        yield address


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_chat_completion(server: str) -> None:
    answer = post(
        f"{server}/v1/chat/completions",
        {
            "model": "pycode",
            "messages": [{"role": "user", "content": "def read(self, size):\n    "}],
            "max_tokens": 48,
            "temperature": 0,
        },
    )
    assert answer["choices"][0]["message"]["content"].strip()
    assert answer["usage"]["completion_tokens"] > 1


def test_streamed_completion_equals_the_whole(server: str) -> None:
    body = {
        "model": "pycode",
        "prompt": "class Stack:\n",
        "max_tokens": 40,
        "temperature": 0,
    }
    whole = post(f"{server}/v1/completions", body)["choices"][0]["text"]
    request = urllib.request.Request(
        f"{server}/v1/completions",
        json.dumps({**body, "stream": True}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as stream:
        lines = [line.decode().strip() for line in stream]
    parts = [json.loads(x[6:]) for x in lines if x.startswith("data: {")]
    assert "".join(part["choices"][0]["text"] for part in parts) == whole


def test_metrics_count_drafts(drafting_server: str) -> None:
    body = {"model": "pycode", "prompt": "class Stack:\n", "max_tokens": 40}
    post(f"{drafting_server}/v1/completions", {**body, "temperature": 0})
    with urllib.request.urlopen(f"{drafting_server}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"):
        found = re.search(rf"^vllm:spec_decode_{name}_total\{{.*\}} (\S+)$", text, re.M)
        assert found, name
        assert float(found[1]) > 0
    values = parse(text, 0.0).values
    assert values["propd_tree_nodes"] == values["spec_decode_num_draft_tokens"]
    assert values["propd_kept_nodes"] == values["propd_tree_nodes"]  # nothing prunes


def test_trees_show_in_the_servers_metrics(server: str) -> None:
    for prompt in ("import os\n\ndef ", "class A:\n", "for name in ", "x = [1, 2"):
        body = {"model": "pycode", "prompt": prompt, "max_tokens": 64}
        post(f"{server}/v1/completions", {**body, "temperature": 0, "ignore_eos": True})
    with urllib.request.urlopen(f"{server}/metrics", timeout=10) as answer:
        values = parse(answer.read().decode(), 0.0).values
    assert values["propd_steps"] > 10
    assert values["propd_emitted_tokens"] >= 64
    assert 0 <= values["propd_kept_nodes"] <= values["propd_tree_nodes"]
    assert 0 < values["propd_measured_step_seconds"] < 60
    assert values["propd_estimated_step_seconds"] > 0


def test_watch_shows_a_running_server(server: str) -> None:
    done = CliRunner().invoke(app, ["watch", server, "--interval", "0.2", "--once"])
    assert done.exit_code == 0, done.output
    assert "tree size" in done.output and "tokens per step" in done.output


def test_watch_says_where_nothing_answers() -> None:
    done = CliRunner().invoke(app, ["watch", "http://127.0.0.1:9", "--once"])
    assert done.exit_code == 1
    assert "Error" in done.output


def test_the_periodic_log_has_a_line_of_propds(server: str) -> None:
    body = {"model": "pycode", "prompt": "class A:\n", "max_tokens": 64}
    for _ in range(20):
        post(f"{server}/v1/completions", {**body, "temperature": 0, "ignore_eos": True})
        if "ProPD metrics: Mean tree size" in LOG[server].read_text():
            return
        time.sleep(1)
    pytest.fail(LOG[server].read_text()[-3000:])


@pytest.mark.long
@pytest.mark.parametrize("servers", ["1", "2"])
def test_two_data_parallel_engines(
    servers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ties: Ties
) -> None:
    """Each drafts for its own requests, and counts for itself, whoever is asked."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    keys = json.dumps({"method": "propd", "sizing": "fixed"})
    apart = ["--data-parallel-size", "2", "--api-server-count", servers]
    prompts = [prompt["prompt_token_ids"] for prompt in mixed_prompts(16, seed=82)]
    body = {"model": "pycode", "max_tokens": 32, "temperature": 0}
    body |= {"return_token_ids": True, "ignore_eos": True}
    with (
        serving(keys, tmp_path / "log", *apart) as address,
        ThreadPoolExecutor(8) as pool,
    ):
        ask = partial(post, f"{address}/v1/completions")
        answers = list(pool.map(ask, [{**body, "prompt": ids} for ids in prompts]))
        with urllib.request.urlopen(f"{address}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    with engine() as llm:
        prompts_again = [{"prompt_token_ids": ids} for ids in prompts]
        plain = run(llm, prompts_again, greedy(32, logprobs=2, ignore_eos=True))
    found = [
        SimpleNamespace(token_ids=answer["choices"][0]["token_ids"]) for answer in answers
    ]
    ties.check(plain, found)  # type: ignore[arg-type]
    for name in ("vllm:spec_decode_num_drafts_total", "vllm:propd_steps_total"):
        counts = re.findall(rf'^{name}{{.*engine="(\d)".*}} (\S+)$', text, re.M)
        assert {number for number, count in counts if float(count) > 0} == {"0", "1"}
