"""An upgrade of vLLM must fail here, at the symbol that changed."""

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import vllm_propd.engine
from vllm_propd.engine.symbols import SOURCE_ONLY, SYMBOLS
from vllm_propd.engine.symbols.symbol import Symbol


def resolve(path: str) -> Any:
    module, _, name = path.partition(":")
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("symbol", SYMBOLS, ids=lambda symbol: symbol.path)
def test_symbol_is_as_recorded(symbol: Symbol) -> None:
    expected = symbol.parameters.split()
    parameters = list(inspect.signature(resolve(symbol.path)).parameters)
    if symbol.use in ("patched", "overridden"):
        assert parameters == expected
    else:
        assert set(expected) <= set(parameters)
    source = inspect.getsource(resolve(symbol.path)) if symbol.attributes else ""
    for attribute in symbol.attributes.split():
        assert re.search(rf"\bself\.{attribute}\b.* = |\bself\.{attribute}:", source)


@pytest.mark.parametrize("symbol", SOURCE_ONLY, ids=lambda symbol: symbol.path)
def test_source_is_as_recorded(symbol: Symbol) -> None:
    module, _, name = symbol.path.partition(":")
    package, *inner = module.split(".")
    folder = Path(str(importlib.import_module(package).__file__)).parent
    tree = ast.parse(folder.joinpath(*inner).with_suffix(".py").read_text())
    (function,) = (
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == name
    )
    parameters = {argument.arg for argument in function.args.args}
    assert set(symbol.parameters.split()) <= parameters


def test_the_pipeline_group_is_where_the_halves_swap_it() -> None:
    from vllm.distributed import parallel_state

    assert "return _PP" in inspect.getsource(parallel_state.get_pp_group)


def test_every_override_is_in_the_ledger() -> None:
    """A method of ours that hides one of vLLM's must be listed."""
    from vllm_propd.engine import (
        attention,
        cpu_worker,
        cuda_attention,
        cuda_worker,
        runner,
        worker,
    )

    listed = {s.path.rpartition(".")[2] for s in SYMBOLS if s.use == "overridden"}
    for module in (attention, cpu_worker, cuda_attention, cuda_worker, runner, worker):
        for name, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ != module.__name__:
                continue
            vllms = [c for c in cls.__mro__ if c.__module__.partition(".")[0] == "vllm"]
            for method in vars(cls):
                hides = any(hasattr(base, method) for base in vllms)
                if hides and inspect.isfunction(inspect.unwrap(getattr(cls, method))):
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
