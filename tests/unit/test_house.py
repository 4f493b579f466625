"""The house: which room may know which, and how much stands in one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "vllm_propd"
FLOORS = (
    ("config", "fast_dtype", "corpus", "chats", "progress", "resume", "outputs"),
    ("core",),
    ("kernels",),
    ("heads",),
    ("simulation",),
    ("engine",),
    ("training",),
    ("batch", "bench", "watch"),
    ("demo",),
    ("cli",),
    ("command", "plugin"),
)
"""From below: who stands on a floor knows those below it, and its own room."""

MOST_LINES, MOST_FILES = 350, 12
WITHOUT_VLLM = (
    "config", "corpus", "chats", "progress", "resume", "outputs",
    "core", "kernels", "heads", "simulation", "training",
    "batch",
)  # fmt: skip


def floor_of(room: str) -> int:
    found = [i for i, rooms in enumerate(FLOORS) if room in rooms]
    assert found, f"{room} is on no floor"
    return found[0]


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[str]:
    """Modules that a file imports anywhere, in functions and for types, too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if file.parent != PACKAGE]
FILES += [file for file in sorted(PACKAGE.glob("*.py")) if file.name != "__init__.py"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_run_one_way(file: Path) -> None:
    own = room_of(file)
    for name in imports(file):
        parts = name.split(".")
        if parts[0] == "vllm" and own in WITHOUT_VLLM:
            raise AssertionError(f"{own} knows vLLM: {name}")
        if parts[0] != "vllm_propd" or parts[1:2] in ([], ["__version__"], [own]):
            continue
        assert floor_of(parts[1]) < floor_of(own), f"{own} knows {name}"


def test_core_has_no_device_code() -> None:
    for file in (PACKAGE / "core").rglob("*.py"):
        found = {name.partition(".")[0] for name in imports(file)}
        assert not found & {"triton", "vllm", "transformers"}, file


def test_no_file_and_no_room_is_too_large() -> None:
    for file in PACKAGE.rglob("*.py"):
        assert len(file.read_text().splitlines()) <= MOST_LINES, file
    for room in [PACKAGE, *(f for f in PACKAGE.rglob("*") if f.is_dir())]:
        assert len(list(room.glob("*.py"))) <= MOST_FILES, room


def test_no_two_test_files_have_one_name() -> None:
    """Pytest imports them by their names alone."""
    names = [file.name for file in PACKAGE.parent.glob("tests/**/test_*.py")]
    assert len(names) == len({*names})
