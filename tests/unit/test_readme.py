"""The README's tables are what scripts make of the config class and of a benchmark."""

import runpy
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.parametrize("name", ["readme_table.py", "readme_bench.py"])
def test_table_is_up_to_date(name: str) -> None:
    script = runpy.run_path(str(SCRIPTS / name))
    readme = script["README"].read_text()
    assert script["START"] in readme and script["END"] in readme
    assert script["rewritten"](readme) == readme, f"run scripts/{name}"
