"""``vllm serve MODEL --speculative-config propd`` answers OpenAI requests."""

import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import MODEL

START_SECONDS = 180


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running server's address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [
        str(Path(sys.executable).parent / "vllm"), "serve", str(MODEL), "--port", str(port),
        "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager",
        "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(1 << 28),
        "--served-model-name", "pycode", "--speculative-config", "propd",
    ]  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
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


def test_metrics_count_drafts(server: str) -> None:
    text = urllib.request.urlopen(f"{server}/metrics", timeout=30).read().decode()
    for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"):
        found = re.search(rf"^vllm:spec_decode_{name}_total\{{.*\}} (\S+)$", text, re.M)
        assert found, name
        assert float(found[1]) > 0
