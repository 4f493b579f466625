"""An upgrade of vLLM must fail here, at the symbol that changed."""

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import vllm_propd.engine
from vllm_propd.engine.symbols import SYMBOLS
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


def test_the_pipeline_group_is_where_the_halves_swap_it() -> None:
    from vllm.distributed import parallel_state

    assert "return _PP" in inspect.getsource(parallel_state.get_pp_group)


def test_every_override_is_in_the_ledger() -> None:
    """A method of ours that hides one of vLLM's must be listed."""
    from vllm_propd.engine import attention, runner, worker

    listed = {s.path.rpartition(".")[2] for s in SYMBOLS if s.use == "overridden"}
    for module in (attention, runner, worker):
        for name, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ != module.__name__:
                continue
            for method in vars(cls):
                hides = any(hasattr(base, method) for base in cls.__bases__)
                if hides and inspect.isfunction(inspect.unwrap(getattr(cls, method))):
                    assert method in listed or method.startswith("__"), f"{name}.{method}"


def test_vllm_is_imported_by_the_engine_layer_only() -> None:
    package = Path(vllm_propd.engine.__file__).parents[1]
    for file in package.rglob("*.py"):
        if file.parent.name in ("core", "heads", "training") or file.parent == package:
            found = re.findall(r"^(?:from|import) vllm\b.*", file.read_text(), re.M)
            assert not found, f"{file}: {found}"
