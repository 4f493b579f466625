"""A batch job through two engines on a Ray cluster of two nodes, beside one plain vLLM.

    make bench-batch    (or: python scripts/bench_batch.py build/batch)

Both nodes are this machine, and its cores are shared among the engines. Every greedy text
is compared with plain vLLM's. A second job loses a node, with its engine, once half of the
rows are answered, and is given another one, as a cluster's manager would.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import psutil
import typer
from ray.cluster_utils import Cluster
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vllm_propd.batch.run import ROWS, answered
from vllm_propd.corpus import held_out_snippets

MODEL = Path(__file__).parents[1] / "demo" / "model"
ENGINE = {
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_seqs": 32,
    "kv_cache_memory_bytes": 1 << 28,
}
CHARACTERS = 400
"""Of each prompt."""

NEAR_TIE = 1e-4
"""Two tokens whose logarithms of probability are no further apart may swap places."""

CPUS = 3
"""Ray's CPUs of each node: an engine holds one; reading and writing need some beside."""

ROWS_AT_ONCE = 32
"""Rows of a block: a job of fewer than four is over before a node is lost half-way."""

MADE = "made-by-bench-batch"
"""The file in a folder of results that says that it may be replaced."""

COUNTS = ("rows", "twice", "failed", "equal", "near-tie", "other")
"""What is counted of a job's rows; see ``compare``."""


@dataclass(frozen=True)
class PlainText:
    """What plain vLLM answers: tokens, and how sure it was of each, in nats."""

    tokens: list[int]
    sure: list[float]


def plain(prompts: list[str], tokens: int) -> tuple[list[PlainText], float]:
    """Returns plain vLLM's greedy texts, and the seconds that one engine took for them."""
    from vllm import LLM, SamplingParams

    llm = LLM(str(MODEL), **ENGINE)
    params, texts = SamplingParams(temperature=0.0, max_tokens=tokens), []
    began = time.perf_counter()
    llm.generate(prompts, params)
    seconds = time.perf_counter() - began
    params.logprobs = 2  # once more, with what near-ties are known by: no time counts
    for out in llm.generate(prompts, params):
        one = out.outputs[0]
        tops = [sorted(p.logprob for p in at.values())[-2:] for at in one.logprobs or ()]
        texts.append(PlainText(list(one.token_ids), [top[-1] - top[0] for top in tops]))
    llm.llm_engine.engine_core.shutdown()
    return texts, seconds


def has_engine(node: Any) -> bool:
    """Whether an engine runs on a node of a ``Cluster``."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    for worker in raylet.children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # idle ones end at any time
            if "vLLMEngineStage" in " ".join(worker.cmdline()):
                return True
    return False


def job(rows: Path, out: Path, tokens: int, lose_a_node: bool, count: int) -> float | None:
    """Answers rows by two engines on two nodes.

    Returns:
        Rows per second, from the first that were seen written, which are not counted, to
        the last; None where all were seen at once.

    Raises:
        RuntimeError: the command failed, with its log in the message; or no engine was
            lost though one was to be.
    """
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": CPUS})
    cluster.add_node(num_cpus=CPUS)
    cluster.wait_for_nodes()
    call = [
        sys.executable, "-m", "vllm_propd.cli", "batch", str(MODEL), str(rows),
        "--temperature", "0", "--max-tokens", str(tokens), "--out", str(out),
        "--engine-kwargs", json.dumps(ENGINE), "--rows-at-once", str(ROWS_AT_ONCE),
        "--engines", "2", "--address", cluster.address,
    ]  # fmt: skip
    log, seen = out.with_suffix(".log"), [(0, 0.0)]
    try:
        with log.open("w") as file, Progress() as bar:
            running = subprocess.Popen(call, stdout=file, stderr=file)
            task = bar.add_task(out.name, total=count)
            while running.poll() is None:
                if (done := answered(out)) > seen[-1][0]:
                    seen.append((done, time.perf_counter()))
                bar.update(task, completed=done)
                if lose_a_node and count // 2 <= done < count:
                    node = next(iter(cluster.worker_nodes))
                    if not has_engine(node):
                        raise RuntimeError("the node that is to be lost has no engine")
                    cluster.remove_node(node, allow_graceful=False)
                    cluster.add_node(num_cpus=CPUS)
                    lose_a_node = False
                time.sleep(0.5)
    finally:
        cluster.shutdown()
    if running.returncode:
        raise RuntimeError(f"the job failed:\n{log.read_text()[-3000:]}")
    if lose_a_node:
        raise RuntimeError("the job was over before a node was lost: give more --prompts")
    (before, first), (after, last) = seen[min(1, len(seen) - 1)], seen[-1]
    return (after - before) / (last - first) if after > before else None


def compare(out: Path, expected: list[PlainText]) -> Counter[str]:
    """Counts rows: there, twice, failed, equal to plain vLLM's, other at a near-tie."""
    found: Counter[str] = Counter()
    seen: set[int] = set()
    for path in (out / ROWS).glob("*.json"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            found["rows"] += 1
            found["twice"] += row["row"] in seen
            seen.add(row["row"])
            found["tokens"] += row["num_tokens"] or 0
            found["failed"] += row["error"] is not None
            found[_likeness(row["token_ids"] or [], expected[row["row"]])] += 1
    return found


def _likeness(tokens: list[int], expected: PlainText) -> str:
    if tokens == expected.tokens:
        return "equal"
    pairs = zip(tokens, expected.tokens, strict=False)
    at = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    return "near-tie" if at is not None and expected.sure[at] < NEAR_TIE else "other"


def make_empty(out: Path) -> None:
    """Makes a folder of results, or empties that of an earlier run.

    Raises:
        SystemExit: there is something in it, and it is not an earlier run's.
    """
    if out.exists() and not (out / MADE).exists() and (out.is_file() or any(out.iterdir())):
        raise SystemExit(
            f"{out} holds what this script has not written: give another OUT, or remove it"
        )
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MADE).touch()


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the results.")],
    prompts: Annotated[
        int, typer.Option(min=4 * ROWS_AT_ONCE, help="Rows of each job.")
    ] = 2000,
    max_tokens: Annotated[int, typer.Option(min=2, help="Of each row.")] = 32,
) -> None:
    """Answer the same prompts by plain vLLM, by two engines, by two of which one dies."""
    make_empty(out)
    texts = [text[:CHARACTERS] for text in held_out_snippets(prompts)]
    rows = out / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    expected, seconds = plain(texts, max_tokens)
    tokens = sum(len(one.tokens) for one in expected)
    table = Table("job", *COUNTS, "tokens/s")
    table.add_row("plain vLLM", str(len(texts)), *["-"] * 5, f"{tokens / seconds:.0f}")
    wrong = 0
    for name, lost in (("two engines", False), ("one of two dies", True)):
        folder = out / name.replace(" ", "-")
        speed = job(rows, folder, max_tokens, lost, len(texts))
        found = compare(folder, expected)
        wrong += abs(len(texts) - found["rows"]) + found["twice"] + found["other"]
        shown = [str(found[count]) for count in COUNTS]
        each = found["tokens"] / found["rows"]
        table.add_row(name, *shown, "-" if speed is None else f"{speed * each:.0f}")
    Console(width=100).print(table)
    raise typer.Exit(code=bool(wrong))


if __name__ == "__main__":
    typer.run(main)
