"""The prompts of a job, numbered: what a job that was killed goes on by.

A row is kept as the line that it was, and read where it is answered: a line that is no
prompt is then one row with an error, and no dead job.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import blake2b, file_digest
from itertools import islice
from pathlib import Path
from typing import TextIO

import pyarrow
from pyarrow import parquet

SCHEMA = pyarrow.schema(
    [("row", pyarrow.int64()), ("place", pyarrow.string()), ("line", pyarrow.string())]
)

GROUP_ROWS = 10_000
"""Rows of a group of the file: so many are in memory at a time."""

JSON, PARQUET = (".jsonl", ".json", ".ndjson"), (".parquet",)


def number_prompts(files: list[Path], out: Path) -> int:
    """Writes the rows of all files into one, numbered.

    Args:
        files: JSON lines or Parquet, or folders of them.
        out: a Parquet file of ``SCHEMA``: each row's number, where it came from, and the
            row itself as JSON.

    Returns:
        How many rows there are.

    Raises:
        ValueError: a file is of another kind, cannot be read or has rows that are not
            lines, or there is no row.
    """
    count, began = 0, out.with_suffix(".began")
    out.parent.mkdir(parents=True, exist_ok=True)
    with parquet.ParquetWriter(began, SCHEMA) as writer:
        lines_of_all = _lines(files)
        while group := list(islice(lines_of_all, GROUP_ROWS)):
            columns = [range(count, count + len(group)), *zip(*group, strict=True)]
            writer.write_table(pyarrow.table(columns, schema=SCHEMA))
            count += len(group)
    if not count:
        raise ValueError(f"no prompts in {', '.join(map(str, files))}")
    began.replace(out)  # whole, or not there
    return count


def digest(files: list[Path]) -> str:
    """Returns what tells other contents of the same files, 16 hexadecimal digits.

    Raises:
        ValueError: a file is not there.
    """
    found = blake2b(digest_size=8)
    try:
        for path in _files(files):
            with path.open("rb") as file:
                found.update(file_digest(file, blake2b).digest())
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from error
    return found.hexdigest()


def _lines(files: list[Path]) -> Iterator[tuple[str, str]]:
    for file in _files(files):
        try:
            if file.suffix in PARQUET:
                for at, row in enumerate(_records(file), 1):
                    yield f"{file.name}:{at}", json.dumps(row, default=str)
            else:
                _check_lines(file)
                with _opened(file) as text:
                    for at, line in enumerate(text, 1):
                        if line.strip():
                            yield f"{file.name}:{at}", line.strip()
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error


def _opened(file: Path) -> TextIO:
    return file.open(encoding="utf-8-sig", errors="replace")


def _check_lines(file: Path) -> None:
    """Refuses JSON whose rows are not lines: each line would be a row with an error."""
    with _opened(file) as text:
        first = next((line.strip() for line in text if line.strip()), "")
    if first.startswith("["):
        what, rows = "an array", ".[]"
    elif first == "{":
        what, rows = "a row that goes over several lines", "."
    else:
        return
    raise ValueError(
        f"{file} begins with {what}: prompts are read from JSON lines, one row each, as "
        f"`jq -c '{rows}' {file}` writes them"
    )


def _records(file: Path) -> Iterator[dict[str, object]]:
    with parquet.ParquetFile(file) as found:
        for batch in found.iter_batches():
            yield from batch.to_pylist()


def _files(given: list[Path]) -> Iterator[Path]:
    for path in given:
        if path.is_dir():
            yield from sorted(p for p in path.iterdir() if p.suffix in (*JSON, *PARQUET))
        elif path.suffix in (*JSON, *PARQUET):
            yield path
        else:
            kinds = ", ".join((*JSON, *PARQUET))
            raise ValueError(f"{path}: prompts are read from {kinds}, one row for each")
