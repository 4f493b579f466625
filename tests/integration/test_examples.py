"""The scripts in ``examples/`` run as a user runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import MODEL
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[2]
PROMPTS = ["class Stack:\n", "def main():\n"]
TOKENS = 32


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """The prompts with what plain greedy decoding makes of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    target = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        plain = target.generate(**ids, do_sample=False, max_new_tokens=TOKENS)
        found.append(tokenizer.decode(plain[0]))
    torch.set_num_threads(threads)
    return found


def output_of(script: str, *arguments: str) -> str:
    command = [sys.executable, f"examples/{script}", "demo/model", *arguments]
    # Products this small lose more to waking threads than they gain.
    few = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "0"}
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", **few}
    done = subprocess.run(
        [*command, "--max-tokens", str(TOKENS)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_offline(texts: list[str]) -> None:
    said = output_of("offline.py", *PROMPTS, "--eager")
    assert all(text in said for text in texts)
    found = re.search(r"([\d.]+) tokens per step", said)
    assert found is not None and 1 <= float(found[1]) <= TOKENS


@pytest.mark.parametrize("options", [[], ["--prune", "--top-k", "5", "--dynamic"]])
def test_reference(options: list[str], texts: list[str]) -> None:
    said = output_of("reference_decode.py", PROMPTS[0], *options)
    assert said.startswith(texts[0])
    assert "tokens per step" in said and "accepted" in said
    assert "The same text as plain greedy decoding." in said
