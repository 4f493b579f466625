"""A job's prompts, numbered: every row of every file, in order, whatever it holds."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from vllm_propd.batch import prompts
from vllm_propd.batch.prompts import number_prompts


def numbered(files: list[Path], out: Path) -> list[tuple[int, str, str]]:
    count = number_prompts(files, out)
    found = parquet.read_table(out).to_pylist()
    assert len(found) == count
    return [(row["row"], row["place"], row["line"]) for row in found]


def test_rows_of_all_files_are_numbered_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "GROUP_ROWS", 2)
    (tmp_path / "a.jsonl").write_text('{"text": "1"}\n\n  {"text": "2"}  \nno json\n')
    rows = [{"question": "3?", "n": 7}, {"question": "4?", "n": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "z.ndjson").write_text('{"text": "6"}')
    (folder / "y.json").write_text('{"text": "5"}\n')
    (folder / "notes.txt").write_text("no prompts")
    found = numbered(
        [tmp_path / "a.jsonl", tmp_path / "b.parquet", folder],
        tmp_path / "out" / "p.parquet",
    )
    assert [row for row, _, _ in found] == list(range(7))
    places = ["a.jsonl:1", "a.jsonl:3", "a.jsonl:4", "b.parquet:1", "b.parquet:2"]
    assert [place for _, place, _ in found] == [*places, "y.json:1", "z.ndjson:1"]
    assert [line for _, _, line in found[:3]] == [
        '{"text": "1"}',
        '{"text": "2"}',
        "no json",
    ]
    assert [json.loads(line) for _, _, line in found[3:5]] == rows


@pytest.mark.parametrize(
    ("name", "indent", "rows", "message"),
    [
        ("a.json", 1, [{"text": "1"}], r"begins with an array: .*`jq -c '\.\[\]' .*json`"),
        ("a.jsonl", None, [{"text": "1"}], "begins with an array"),
        ("a.json", 1, {"text": "1"}, r"a row that goes over several lines: .*`jq -c '\.' "),
    ],
    ids=["array", "array in a line", "row over lines"],
)
def test_json_whose_rows_are_no_lines_is_refused(
    tmp_path: Path, name: str, indent: int | None, rows: object, message: str
) -> None:
    (tmp_path / name).write_text("\n" + json.dumps(rows, indent=indent))
    for given in (tmp_path / name, tmp_path):
        with pytest.raises(ValueError, match=message):
            number_prompts([given], tmp_path / "out.parquet")
        assert not (tmp_path / "out.parquet").exists()


def test_what_is_no_file_of_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.parquet").write_text("no table")
    (tmp_path / "c.jsonl").write_text("\n\n")
    out = tmp_path / "out.parquet"
    for name, message in (
        ("a.txt", "prompts are read from .jsonl"),
        ("b.parquet", "cannot be read"),
        ("c.jsonl", "no prompts in"),
        ("d.jsonl", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            number_prompts([tmp_path / name], out)
        assert not out.exists()
