"""A kernel that numba keeps on disk is dropped when any code changes that is in it."""

from __future__ import annotations

import ast
from pathlib import Path
from types import ModuleType

import pytest

from vllm_propd.core.compiled import with_parts

PACKAGE = Path(__file__).parents[2] / "vllm_propd"
KERNELS = [file for file in PACKAGE.rglob("*.py") if "@njit" in file.read_text()]


def imports_of(tree: ast.Module) -> dict[str, str]:
    """Returns the file that each name is imported from, by its last part."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            way = node.module.split(".")
            if way[0] == "vllm_propd":
                found |= {one.name: way[-1] for one in node.names}
    return found


def names_in(function: ast.FunctionDef) -> set[str]:
    """Returns the names in a function's body that are not its own."""
    nodes = [node for line in function.body for node in ast.walk(line)]
    read = {node.id for node in nodes if isinstance(node, ast.Name)}
    return read - {argument.arg for argument in function.args.args}


def kernels_of(tree: ast.Module) -> dict[str, tuple[ast.FunctionDef, str]]:
    """Returns a file's kernels, with their decorators' text."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            decorators = " ".join(map(ast.unparse, node.decorator_list))
            if "njit" in decorators:
                found[node.name] = node, decorators
    return found


def parts(name: str, kernels: dict[str, tuple[ast.FunctionDef, str]]) -> set[str]:
    """Returns all names in a kernel, those in kernels of its file that it calls, too."""
    seen: set[str] = set()
    waiting, found = [name], set()
    while waiting:
        at = waiting.pop()
        seen.add(at)
        inside = names_in(kernels[at][0])
        found |= inside
        waiting += (inside & kernels.keys()) - seen
    return found


@pytest.mark.parametrize("file", KERNELS, ids=lambda file: file.stem)
def test_kernels_are_named_after_the_other_files_that_are_in_them(file: Path) -> None:
    tree = ast.parse(file.read_text())
    imports, kernels = imports_of(tree), kernels_of(tree)
    assert kernels
    for name, (_, decorators) in kernels.items():
        if "cache=True" not in decorators:
            continue
        needed = {imports[one] for one in parts(name, kernels) & imports.keys()}
        named = decorators.partition("with_parts(")[2].partition(")")[0]
        given = {one.strip() for one in named.split(",") if one.strip()}
        assert needed <= given, f"{file.name}: {name} lacks {needed - given}"


def test_a_changed_part_is_another_name(tmp_path: Path) -> None:
    names = set()
    for constant in (1, 2):
        module = ModuleType(f"part{constant}")
        module.__file__ = str(tmp_path / f"part{constant}.py")
        Path(module.__file__).write_text(f"CONSTANT = {constant}\n")

        def kernel() -> None: ...

        names.add(with_parts(module)(kernel).__qualname__)
    assert len(names) == 2
