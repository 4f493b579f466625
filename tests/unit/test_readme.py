"""The README's table of settings is the config class's."""

import runpy
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "readme_table.py"


def test_settings_table_is_up_to_date() -> None:
    script = runpy.run_path(str(SCRIPT))
    readme = script["README"].read_text()
    assert script["START"] in readme
    assert script["rewritten"](readme) == readme, "run scripts/readme_table.py"
