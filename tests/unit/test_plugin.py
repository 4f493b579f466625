"""What vLLM loads in every process: for which vLLM, and what the documentation says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from vllm_propd import plugin
from vllm_propd.config import REQUEST_METRICS

PAGE = Path(__file__).parents[2] / "docs" / "vllm.md"

REGISTER = """
import sys
from vllm_propd import plugin
print(plugin.installed_vllm())
plugin.register()
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize(
    ("code", "found", "said"),
    [
        ("__version__ = version = '0.33.0'", "0.33.0", "vLLM 0.33.0 is installed"),
        (None, "None", "vLLM of an unknown version is installed"),
    ],
)
def test_the_codes_version_counts_and_not_a_name_tags(
    code: str | None, found: str, said: str, tmp_path: Path
) -> None:
    assert version("vllm").startswith("0.32.")  # what scripts/vllm_metadata installs
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('touched')")
    if code is not None:
        (package / "_version.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-c", REGISTER],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{found}\n"
    assert f"made for vLLM ==0.32.*, but {said}" in done.stderr


def test_the_installed_vllm_is_the_one_it_is_made_for() -> None:
    found = plugin.installed_vllm()
    assert found is not None
    assert plugin.supported_vllm().specifier.contains(found, prereleases=True)


def test_the_documentation_names_every_file_that_patches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    applied: list[Any] = []
    monkeypatch.setattr("vllm_propd.engine.integration.patches.apply", applied.extend)
    monkeypatch.setenv(REQUEST_METRICS, "1")
    plugin.register()
    files = {f"{wrap.__module__.rpartition('.')[2]}.py" for _, _, wrap in applied}
    text = PAGE.read_text()
    listed = re.search(r"asks for it\s\(([^)]*) in `engine/integration/`\)", text)
    assert listed is not None
    assert {*re.findall(r"`(\w+\.py)`", listed[1])} == files
