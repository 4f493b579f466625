"""The ledger against another vLLM's sources: what is not as recorded."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from vllm_propd.engine.symbols.behaviour import Behaviour
from vllm_propd.engine.symbols.signatures import attributes, parameters
from vllm_propd.engine.symbols.sources import Definition, Sources
from vllm_propd.engine.symbols.symbol import EXACT, Symbol

Entry = Symbol | Behaviour
Status = Literal["moved", "gone", "changed"]


@dataclass(frozen=True)
class Difference:
    """An entry that is not as recorded.

    Attributes:
        status: ``moved``: the same name is in another module; ``gone``: it is in none;
            ``changed``: its parameters or attributes have changed.
        detail: where the name is now, or what has changed.
    """

    entry: Entry
    status: Status
    detail: str


def differences(sources: Sources, entries: Iterable[Entry]) -> list[Difference]:
    """Returns the entries that are not as recorded, and what has become of them."""
    return [found for entry in entries if (found := difference(sources, entry))]


def difference(sources: Sources, entry: Entry) -> Difference | None:
    """Returns what has become of an entry; None where it is as recorded."""
    found = sources.find(entry.path)
    if found is None:
        places = sources.elsewhere(entry.path)
        return Difference(entry, "moved" if places else "gone", ", ".join(places))
    if isinstance(entry, Symbol):
        changes = "; ".join(_changes(sources, entry, found))
        if changes:
            return Difference(entry, "changed", changes)
    return None


def rewritten(
    old: Sources, new: Sources, behaviours: Iterable[Behaviour]
) -> list[Behaviour]:
    """Returns the behaviours whose code has changed: their tests are to be run first."""
    return [
        behaviour
        for behaviour in behaviours
        if (was := old.find(behaviour.path)) is not None
        and (now := new.find(behaviour.path)) is not None
        and _code(was) != _code(now)
    ]


def _code(definition: Definition) -> str:
    """Dumps a definition's code, without comments and line numbers."""
    return "" if definition.node is None else ast.dump(definition.node)


def _changes(sources: Sources, symbol: Symbol, found: Definition) -> Iterator[str]:
    known = parameters(sources, found) or []
    names, expected = [one.name for one in known], symbol.parameters.split()
    if lost := [name for name in expected if name not in names]:
        yield f"without {' '.join(lost)}"
    new = [
        one.name
        for one in known
        if one.name not in expected
        and (symbol.use in EXACT or (symbol.use == "called" and one.required))
    ]
    if new:
        yield f"new: {' '.join(new)}"
    if symbol.use in EXACT and not lost and not new and names != expected:
        yield f"in another order: {symbol.parameters} -> {' '.join(names)}"
    missing = set(symbol.attributes.split()) - attributes(sources, found)
    if missing:
        yield f"instances without {' '.join(sorted(missing))}"
