"""What a batch job makes of the rows that are written, and what ends it at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from vllm_propd.batch import run
from vllm_propd.batch.rows import ANSWERS
from vllm_propd.batch.run import ANSWERED, ROWS, run_batch
from vllm_propd.batch.settings import BatchJob


def answered_job(folder: Path, numbers: list[int], **fields: Any) -> BatchJob:
    """A job of three rows that are all answered; these are written, in two files."""
    prompts = folder / "p.jsonl"
    prompts.write_text('{"text": "a"}\n' * 3)
    job = BatchJob(model="m", prompts=[prompts], out=folder / "out", **fields)
    for name in (ANSWERED, ROWS):
        (job.out / name).mkdir(parents=True)
    done = pyarrow.table({"row": [0, 1, 2]})
    parquet.write_table(done, job.out / ANSWERED / "a.parquet")
    text, error = "a" * (1 << 20), "it has no prompt"  # an answer as long as Arrow's block
    rows = [
        {"row": n, "text": text, "num_prompt_tokens": 2, "num_tokens": 4, "num_drafts": 2,
         "num_accepted_tokens": 1} if n else {"row": n, "error": error}
        for n in numbers
    ]  # fmt: skip
    for at, part in enumerate((rows[:1], rows[1:])):
        table = pyarrow.Table.from_pylist(part, schema=ANSWERS)
        if job.format == "parquet":
            parquet.write_table(table, job.out / ROWS / f"{at}.parquet")
        else:
            lines = [json.dumps(row) + "\n" for row in table.to_pylist()]
            (job.out / ROWS / f"{at}.json").write_text("".join(lines))
    return job


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_are_summed_up_however_long_they_are(tmp_path: Path, kind: str) -> None:
    found = run_batch(answered_job(tmp_path, [2, 0, 1], format=kind))
    assert (found.rows, found.new_rows, found.errors) == (3, 0, 1)
    assert (found.prompt_tokens, found.tokens) == (4, 8)
    assert found.acceptance_length == 1.5


@pytest.mark.parametrize(
    ("numbers", "missing", "others"),
    [([0, 1], 1, 0), ([0, 1, 2, 2], 0, 1), ([0, 1, 7], 1, 1), ([], 3, 0)],
)
def test_rows_that_are_not_there_once_are_counted(
    tmp_path: Path, numbers: list[int], missing: int, others: int
) -> None:
    message = f"of 3 rows {missing} are missing, and {others} are there twice"
    with pytest.raises(ValueError, match=message):
        run_batch(answered_job(tmp_path, numbers))


def test_a_tokenizer_that_cannot_be_loaded_ends_the_job_before_engines_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_answer", lambda job: pytest.fail("engines start"))
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"text": "a"}\n')
    job = BatchJob(model=str(tmp_path), prompts=[prompts], out=tmp_path / "out")
    with pytest.raises(ValueError, match=rf"the tokenizer of {tmp_path} cannot be loaded"):
        run_batch(job)
