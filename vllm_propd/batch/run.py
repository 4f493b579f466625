"""``vllm-propd batch``: a job on Ray Data's own vLLM stage.

Ray Data reads, spreads, retries and writes; its checkpoint says which rows are answered, so
that a job that was killed goes on with the others.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pyarrow import dataset, parquet

from vllm_propd.batch.prompts import number_prompts
from vllm_propd.batch.rows import answers, prepare
from vllm_propd.batch.settings import BatchJob
from vllm_propd.batch.tokenizer import load_tokenizer
from vllm_propd.resume import alone_in, changes, write_whole

JOB, PROMPTS, ANSWERED, ROWS = "job.json", "prompts.parquet", "answered", "rows"
"""Files and folders of a job: what it is, its rows, their checkpoint, and the answers."""

SUMMED = ("num_prompt_tokens", "num_tokens", "num_drafts", "num_accepted_tokens")
"""Columns of answers of which the summary tells the sums."""


@dataclass(frozen=True)
class Summary:
    """What a job has done, over all the times that it was begun.

    Attributes:
        rows: rows that are answered.
        errors: those of them that have an error.
        prompt_tokens, tokens: tokens of the prompts, and of the answers.
        acceptance_length: tokens per verified step, the bonus token included.
        seconds: of this time, the start of the engines included.
        new_rows: rows that were answered this time.
    """

    rows: int
    errors: int
    prompt_tokens: int
    tokens: int
    acceptance_length: float | None
    seconds: float
    new_rows: int


def run_batch(job: BatchJob) -> Summary:
    """Answers all rows that are not answered yet.

    Args:
        job: what to answer, and how.

    Raises:
        ValueError: the folder is another job's, or another process is at work there;
            prompts cannot be read, the tokenizer cannot be loaded, Ray is not installed, or
            what is written is not each row once.
    """
    began = time.monotonic()
    job.out.mkdir(parents=True, exist_ok=True)
    with alone_in(job.out, f"--out {job.out}"):
        wanted = _begin(job)
        before = answered(job.out)
        if before < wanted:
            load_tokenizer(job.tokenizer)  # or an error here, before engines start
            _answer(job)
        found = _found(job, wanted)
    drafts, accepted = found["num_drafts"], found["num_accepted_tokens"]
    return Summary(
        rows=wanted,
        errors=found["errors"],
        prompt_tokens=found["num_prompt_tokens"],
        tokens=found["num_tokens"],
        acceptance_length=1.0 + accepted / drafts if drafts else None,
        seconds=time.monotonic() - began,
        new_rows=wanted - before,
    )


def _begin(job: BatchJob) -> int:
    """Numbers the prompts, or finds them numbered; returns how many there are."""
    path, prompts = job.out / JOB, job.out / PROMPTS
    if path.exists():
        then, now = json.loads(path.read_text()), job.decides()
        if what := changes(then, now):
            raise ValueError(
                f"--out {job.out} holds another job ({what}): give it a folder of its own"
            )
    else:
        number_prompts(job.prompts, prompts)
        write_whole(path, json.dumps(job.decides(), indent=1) + "\n")
    return int(dataset.dataset(prompts).count_rows())


def _answer(job: BatchJob) -> None:
    try:
        import ray
        from ray.data import DataContext
        from ray.data.checkpoint import CheckpointConfig
        from ray.data.llm import build_processor, vLLMEngineProcessorConfig
    except ImportError as error:
        raise ValueError(
            f"batch jobs need Ray: pip install 'vllm-propd[ray]' ({error})"
        ) from error
    _connect(job)
    on_cpu = not ray.cluster_resources().get("GPU")
    out = job.out.resolve()
    DataContext.get_current().checkpoint_config = CheckpointConfig(
        "row", str(out / ANSWERED), delete_checkpoint_on_success=False
    )
    config = vLLMEngineProcessorConfig(
        model_source=job.target,
        engine_kwargs=job.engine(),
        concurrency=(job.engines, job.engines),
        batch_size=job.rows_at_once,
        # Else Ray asks for a GPU for each of an engine's workers.
        placement_group_config={"bundle_per_worker": {"CPU": 1}} if on_cpu else None,
        runtime_env={"env_vars": job.engine_env(on_cpu)},
        should_continue_on_error=True,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )
    answering = build_processor(
        config,
        preprocess=partial(prepare, source=job.tokenizer, sampling=job.sampling),
    )
    # What a block holds is answered, written and checkpointed as one.
    prompts = ray.data.read_parquet(str(out / PROMPTS)).repartition(
        target_num_rows_per_block=job.rows_at_once
    )
    rows = answering(prompts).map_batches(answers, batch_format="pyarrow")
    write = rows.write_json if job.format == "jsonl" else rows.write_parquet
    write(str(out / ROWS))


def _connect(job: BatchJob) -> None:
    """Joins a cluster, or starts one on this machine."""
    import ray

    if ray.is_initialized():
        return
    if job.address is not None:
        ray.init(address=job.address)
        return
    # An engine holds one of Ray's CPUs: reading and writing need some beside.
    cpus = (os.cpu_count() or 1) + job.engines * job.tensor_parallel_size
    # "local": a cluster of somebody else on this machine is joined by its address only.
    ray.init(address="local", num_cpus=cpus, include_dashboard=False)


def answered(out: Path) -> int:
    """Counts the rows of a job's checkpoint; what is pending there is answered again."""
    files = (out / ANSWERED).glob("*.parquet")
    done = [str(path) for path in files if not path.stem.endswith(".pending")]
    return int(dataset.dataset(done).count_rows()) if done else 0


def _found(job: BatchJob, wanted: int) -> Counter[str]:
    """Sums up the rows that are written: ``SUMMED``, and ``errors``.

    Raises:
        ValueError: the rows are not 0 to ``wanted - 1``, each once.
    """
    found: Counter[str] = Counter()
    seen, others = bytearray(wanted), 0
    for row in _written(job):
        if (number := row["row"]) >= wanted or seen[number]:
            others += 1
            continue
        seen[number] = True
        found["errors"] += row["error"] is not None
        for name in SUMMED:
            found[name] += row[name] or 0
    if (missing := seen.count(False)) or others:
        raise ValueError(
            f"{job.out / ROWS}: of {wanted} rows {missing} are missing, and {others} are "
            "there twice or are another job's: give the job a folder of its own"
        )
    return found


def _written(job: BatchJob) -> Iterator[dict[str, Any]]:
    """Yields the rows that are written, a file or a line in memory at a time."""
    columns = ["row", "error", *SUMMED]
    if job.format == "parquet":
        for path in (job.out / ROWS).glob("*.parquet"):
            yield from parquet.read_table(path, columns=columns).to_pylist()
        return
    # Not by Arrow, whose blocks cut long answers, and whose one thread waits for itself.
    for path in (job.out / ROWS).glob("*.json"):
        with path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)


def save(summary: Summary, out: Path) -> dict[str, Any]:
    """Writes ``summary.json``, and returns what is in it."""
    told = asdict(summary)
    write_whole(out / "summary.json", json.dumps(told, indent=1) + "\n")
    return told
