"""The documentation's tables are what scripts make of the code and of benchmarks."""

import re
import runpy
from pathlib import Path

import pytest
from bench_rows import measured

ROOT = Path(__file__).parents[2]
BENCH = runpy.run_path(str(ROOT / "scripts" / "docs_bench.py"))
TABLES = runpy.run_path(str(ROOT / "scripts" / "docs_tables.py"))


@pytest.mark.parametrize("script", [BENCH, TABLES], ids=["docs_bench.py", "docs_tables.py"])
def test_tables_are_up_to_date(script: dict) -> None:
    for page in script["PAGES"]:
        text = page.read_text()
        assert script["rewritten"](text) == text, f"{page.name}: run scripts/"


def test_every_table_has_a_place_that_is_found() -> None:
    pages = "".join(page.read_text() for page in TABLES["PAGES"])
    names = [name for _, name, _ in TABLES["PLACE"].findall(pages)]
    assert sorted(names) == sorted(TABLES["TABLES"])
    assert len(names) == pages.count("<!-- table")


def test_every_result_is_shown_in_full_and_every_place_is_found() -> None:
    readme, benchmarks = (page.read_text() for page in BENCH["PAGES"])
    for page in (readme, benchmarks):
        places = BENCH["PLACE"].findall(page)
        assert len(places) == page.count("<!-- bench") > 0
        for _, _, name, recipe, _ in places:
            assert re.search(rf"python scripts/docs_bench.py {name} build/\w+$", recipe)
    full = {place[2] for place in BENCH["PLACE"].findall(benchmarks) if not place[1]}
    assert full >= {path.stem for path in BENCH["RESULTS"].glob("*.json")}


def test_a_result_that_is_not_there_says_how_it_is_measured() -> None:
    page = "<!-- bench nothing: make it -->\n<!-- end of bench -->\n"
    assert "Not measured yet: `make it`" in BENCH["rewritten"](page)


def test_a_result_is_recorded_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a benchmark's folder to a file, a picture and two pages."""
    shown = (BENCH["RESULTS"] / "inflated-avx2.json").read_text()
    kept = BENCH["Shown"].model_validate_json(shown)
    kept.speed.measured = "2026-01-02"
    (tmp_path / "results.json").write_text(kept.speed.model_dump_json())
    pages = [tmp_path / "README.md", tmp_path / "benchmarks.md"]
    for page, kind in zip(pages, (" short", ""), strict=True):
        place = f"<!-- bench{kind} new: how -->\n<!-- end of bench -->"
        page.write_text(f"before\n{place}\nafter\n")
    there = {"RESULTS": tmp_path / "kept", "IMAGES": tmp_path, "PAGES": pages}
    for name, value in there.items():
        monkeypatch.setitem(BENCH["main"].__globals__, name, value)
    BENCH["main"]("new", tmp_path)
    assert (tmp_path / "new.png").stat().st_size > 1000
    short, full = (page.read_text() for page in pages)
    propd = kept.speed.row("propd", 1)
    assert propd is not None
    for text in (short, full):
        assert text.startswith("before\n<!-- bench") and text.endswith("bench -->\nafter\n")
        assert f"| `propd` | {BENCH['cell_of'](propd)}" in text
        assert kept.speed.machine.processor in text
        assert "Measured on 2026-01-02." in text
    assert "`static`" in full and "`static`" not in short


@pytest.mark.parametrize(
    ("wall_ratio", "cell"), [(2.0, "2.00x, 3.00"), (None, "1.50x, 3.00")]
)
def test_a_task_without_chunks_is_shown_by_its_fast_steps(
    wall_ratio: float | None, cell: str
) -> None:
    kept = (BENCH["RESULTS"] / "chats-avx512.json").read_text()
    shown = BENCH["Shown"].model_validate_json(kept)
    shown.speed.rows = [
        measured(
            "propd", 1.5, workload=workload, wall_ratio=wall_ratio, batch_size=4,
            kept_per_step=24, work_ratio=1.0, acceptance_by_depth=[0.5], step_ms={},
            identical_to_plain=2, prompts=2,
        )
        for workload in ("batch", "task qa")
    ]  # fmt: skip
    assert BENCH["by_task"](shown)[-1] == f"| 4, `propd` | {cell} |"


@pytest.mark.parametrize(
    ("fields", "column", "cell"),
    [
        # Older: the turns are the chunks.
        ({}, "batch 4, 3 chunks", "1.500x (1.400 to 1.600), 3.00"),
        (
            {"num_chunks": 7, "wall_tokens_per_step": 2.5},
            "batch 4, 7 chunks",
            "1.500x (1.400 to 1.600), 2.50",
        ),
    ],
)
def test_chunks_are_counted_where_there_are_rounds_too(
    fields: dict, column: str, cell: str
) -> None:
    kept = (BENCH["RESULTS"] / "chats-avx512.json").read_text()
    shown = BENCH["Shown"].model_validate_json(kept)
    (row,) = shown.speed.rows = [
        measured(
            "plain", 1.5, workload="batch", wall_ratio_median=1.5, batch_size=4,
            wall_ratio_median_quartiles=(1.4, 1.6), kept_per_step=24, work_ratio=1.0,
            acceptance_by_depth=[0.5], step_ms={}, identical_to_plain=2, prompts=2,
            **fields,
        )
    ]  # fmt: skip
    assert BENCH["columns_of"](shown) == [column]
    assert BENCH["cell_of"](row) == cell


def test_scripts_name_the_targets_that_run_them() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for path in sorted((ROOT / "scripts").glob("*.py")):
        said = re.search(
            r"^    make ([\w-]+) +\(or: python", path.read_text(), re.MULTILINE
        )
        if said is None:
            continue
        recipe = re.search(rf"^{said[1]}:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
        assert recipe is not None and f"scripts/{path.name}" in recipe[1], path.name


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= 8192
