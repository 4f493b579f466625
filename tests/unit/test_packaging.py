"""What is imported is declared, and serving imports nothing that only tools need."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import vllm_propd
from vllm_propd import command

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
PACKAGE = "vllm_propd"
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / PACKAGE).rglob("*.py")
}
"""Our modules' files, by name."""

FOLDERS = ("scripts", "tests", "examples")
OWN = {path.stem for folder in FOLDERS for path in (ROOT / folder).rglob("*")}
"""Names by which scripts and tests import each other."""

DISTRIBUTIONS = packages_distributions()


def names(requirements: list[str]) -> set[str]:
    """Of distributions."""
    return {canonicalize_name(Requirement(line).name) for line in requirements}


SERVING = names([*PROJECT["dependencies"], *EXTRAS["cpu"], *EXTRAS["cuda"]])
EVERYTHING = SERVING | names([*EXTRAS["tools"], *EXTRAS["ray"]])


def imported(path: Path) -> Iterator[str]:
    """Modules that a file imports, wherever in it, and the names it takes from them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def undeclared(path: Path, declared: set[str]) -> set[str]:
    """What a file imports and no declared distribution provides."""
    tops = {name.partition(".")[0] for name in imported(path)}
    foreign = tops - set(sys.stdlib_module_names) - OWN - {PACKAGE}
    return {
        top
        for top in foreign
        if not {canonicalize_name(name) for name in DISTRIBUTIONS.get(top, [])} & declared
    }


def serving_modules() -> set[str]:
    """Ours that a serving process may load: from the entry points on, also by their names
    in strings, which vLLM resolves.
    """
    points = PROJECT["entry-points"]["vllm.general_plugins"].values()
    found, waiting = set(), [point.partition(":")[0] for point in points]
    while waiting:
        module = waiting.pop()
        if module not in SOURCES:
            module = module.rpartition(".")[0]  # a name in a module
        if module not in SOURCES or module in found:
            continue
        found.add(module)
        waiting += imported(SOURCES[module])
        waiting += re.findall(rf'"({PACKAGE}\.[\w.]+)"', SOURCES[module].read_text())
    return found


@pytest.mark.parametrize("module", SOURCES)
def test_what_a_module_imports_is_declared(module: str) -> None:
    assert not undeclared(SOURCES[module], EVERYTHING)


@pytest.mark.parametrize("module", sorted(serving_modules()))
def test_serving_needs_no_extra(module: str) -> None:
    assert not undeclared(SOURCES[module], SERVING)


def test_serving_is_workers_and_backends_of_both_devices() -> None:
    workers = {f"{PACKAGE}.engine.{device}_worker" for device in ("cpu", "cuda")}
    backends = {f"{PACKAGE}.engine.{name}" for name in ("attention.cpu", "attention.cuda")}
    assert workers | backends <= serving_modules()
    assert not {f"{PACKAGE}.cli", f"{PACKAGE}.bench.run"} & serving_modules()


@pytest.mark.parametrize("name", ["dependencies", "tools"])
def test_what_is_declared_is_imported(name: str) -> None:
    lines = PROJECT["dependencies"] if name == "dependencies" else EXTRAS[name]
    modules = serving_modules() if name == "dependencies" else set(SOURCES)
    tops = {top.partition(".")[0] for m in modules for top in imported(SOURCES[m])}
    used = {canonicalize_name(one) for top in tops for one in DISTRIBUTIONS.get(top, [])}
    assert names(lines) <= used


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_scripts_and_tests_import_is_declared(folder: str) -> None:
    declared = EVERYTHING | names(PYPROJECT["dependency-groups"]["dev"])
    missing = {
        f"{path.name}: {name}"
        for path in (ROOT / folder).rglob("*.py")
        for name in undeclared(path, declared)
    }
    assert not missing


def test_the_lock_holds_what_is_declared() -> None:
    locked = names((ROOT / "requirements.lock").read_text().splitlines())
    declared = EVERYTHING | names(PYPROJECT["dependency-groups"]["dev"])
    # make installs these two apart; `vllm` is the CUDA build.
    assert declared - locked == {"torch", "vllm", "vllm-propd"}


def test_versions_agree() -> None:
    version = vllm_propd.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_command_names_the_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert command.EXTRA in EXTRAS
    lines = ["numpy", 'nowhere-to-be-had; extra == "tools"', 'also-not; extra == "ray"']
    monkeypatch.setattr(command, "requires", lambda name: lines)
    assert command.missing() == ["nowhere-to-be-had"]
    with pytest.raises(SystemExit, match=r'pip install "vllm-propd\[tools\]"'):
        command.main()
