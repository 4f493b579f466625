"""An upgrade of vLLM must fail here, at the symbol that changed."""

import ast
import importlib
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import vllm_propd.engine
from vllm_propd.engine.symbols import BEHAVIOURS, SOURCE_ONLY, SYMBOLS
from vllm_propd.engine.symbols.behaviour import RELEASE, Behaviour
from vllm_propd.engine.symbols.check import differences
from vllm_propd.engine.symbols.signatures import parameters
from vllm_propd.engine.symbols.sources import Sources
from vllm_propd.engine.symbols.symbol import EXACT, Symbol


def resolve(path: str) -> Any:
    module, _, name = path.partition(":")
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def required(signature: Mapping[str, inspect.Parameter]) -> set[str]:
    """Parameters that a call has to give."""
    rest = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {
        name
        for name, one in signature.items()
        if one.default is one.empty and one.kind not in rest
    }


@pytest.fixture(scope="module")
def sources() -> Sources:
    """The installed vLLM's."""
    return Sources.at(Path(str(importlib.import_module("vllm").__file__)).parent)


@pytest.mark.parametrize("symbol", SYMBOLS, ids=lambda symbol: symbol.path)
def test_symbol_is_as_recorded(symbol: Symbol) -> None:
    expected, found = symbol.parameters.split(), resolve(symbol.path)
    signature = inspect.signature(found).parameters if callable(found) else {}
    if symbol.use in EXACT:
        assert list(signature) == expected
    else:
        assert set(expected) <= set(signature)
    if symbol.use == "called":
        assert required(signature) <= set(expected)
    source = inspect.getsource(found) if symbol.attributes else ""
    for attribute in symbol.attributes.split():
        assert re.search(rf"\bself\.{attribute}\b.* = |\bself\.{attribute}:", source)


def test_sources_are_as_recorded(sources: Sources) -> None:
    """The same without importing anything; also of what cannot be imported here."""
    assert not differences(sources, (*SYMBOLS, *SOURCE_ONLY, *BEHAVIOURS))


@pytest.mark.parametrize("symbol", SYMBOLS, ids=lambda symbol: symbol.path)
def test_sources_say_what_inspect_says(symbol: Symbol, sources: Sources) -> None:
    definition, found = sources.find(symbol.path), resolve(symbol.path)
    assert definition is not None
    known = parameters(sources, definition)
    if known is None:
        # An enumeration, a value, or a class without a constructor of its own.
        assert not symbol.parameters
        return
    signature = inspect.signature(found).parameters
    names = [one.name for one in known]
    if inspect.isclass(found):  # whose keyword-only fields come last
        assert set(names) == set(signature)
    else:
        assert names == list(signature)
    assert {one.name for one in known if one.required} == required(signature)


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda one: f"{one.path} {one.what}")
def test_behaviour_is_where_it_is_said_to_be(
    behaviour: Behaviour, sources: Sources
) -> None:
    found = sources.find(behaviour.path)
    assert found is not None and found.path == behaviour.path
    root = Path(str(importlib.import_module("vllm").__file__)).parents[1]
    assert (root / behaviour.link.removeprefix(RELEASE)).is_file()
    assert behaviour.what and behaviour.why and behaviour.retired_by


@pytest.mark.parametrize("node", sorted({one.test for one in BEHAVIOURS}))
def test_behaviours_test_is_there(node: str) -> None:
    file, _, name = node.partition("::")
    tree = ast.parse((Path(__file__).parents[2] / file).read_text())
    assert name.startswith("test_")
    assert [one.name for one in tree.body if isinstance(one, ast.FunctionDef)].count(name)


def test_the_pipeline_group_is_where_the_halves_swap_it() -> None:
    from vllm.distributed import parallel_state

    assert "return _PP" in inspect.getsource(parallel_state.get_pp_group)


def test_every_override_is_in_the_ledger() -> None:
    """A method of ours that hides one of vLLM's must be listed."""
    from vllm_propd.engine import cpu_worker, cuda_worker, runner, worker
    from vllm_propd.engine.attention import cpu, cuda

    listed = {s.path.rpartition(".")[2] for s in SYMBOLS if s.use == "overridden"}
    for module in (cpu, cuda, cpu_worker, cuda_worker, runner, worker):
        for name, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ != module.__name__:
                continue
            vllms = [c for c in cls.__mro__ if c.__module__.partition(".")[0] == "vllm"]
            ours = [c for c in cls.__mro__ if c.__module__.startswith("vllm_propd.")]
            for owner, method in ((c, method) for c in ours for method in vars(c)):
                hides = any(hasattr(base, method) for base in vllms)
                if hides and inspect.isfunction(inspect.unwrap(getattr(owner, method))):
                    assert method in listed or method.startswith("__"), f"{name}.{method}"


def test_every_import_is_in_the_ledger() -> None:
    """Functions and classes; what is used of modules and instances has its own entries."""
    listed = {symbol.path.partition(":")[2].partition(".")[0] for symbol in SYMBOLS}
    missing = []
    for file in Path(vllm_propd.engine.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            module = getattr(node, "module", None) or ""
            if not isinstance(node, ast.ImportFrom) or module.partition(".")[0] != "vllm":
                continue
            for name in (alias.name for alias in node.names):
                found = getattr(importlib.import_module(module), name, None)
                if callable(found) and name not in listed:
                    missing.append(f"{file.name}: {module}:{name}")
    assert not missing


def test_vllm_is_imported_by_the_engine_layer_only() -> None:
    package = Path(vllm_propd.engine.__file__).parents[1]
    for file in package.rglob("*.py"):
        if file.parent.name in ("core", "heads", "training") or file.parent == package:
            found = re.findall(r"^(?:from|import) vllm\b.*", file.read_text(), re.M)
            assert not found, f"{file}: {found}"
