"""Writes the documentation's tables that the code decides: settings, metrics, refusals.

    python scripts/docs_tables.py

A test checks that the pages are what this script writes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from vllm_propd.config import METRIC_PREFIX, ProPDConfig
from vllm_propd.training.settings import TrainSettings

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
ENGINE = ROOT / "vllm_propd" / "engine"
PLACE = re.compile(
    r"(<!-- table ([\w-]+): [^\n]*-->\n).*?(<!-- end of table -->\n)", re.DOTALL
)
"""Of a table in a page, and its name."""


def type_name(field: FieldInfo) -> str:
    """A field's type as a reader wants it."""
    return named(field.annotation)


def named(kind: Any) -> str:
    """A type's name, or what it allows."""
    if get_origin(kind) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(kind))
    if get_origin(kind) is tuple:
        return ", ".join("..." if one is ... else named(one) for one in get_args(kind))
    if kinds := [arg for arg in get_args(kind) if arg is not type(None)]:
        return " or ".join(map(named, kinds))
    return getattr(kind, "__name__", str(kind))


def rows_of(model: type[BaseModel], shown: Callable[[str], str]) -> Iterator[str]:
    """The fields of a class of settings; ``shown`` says how a key is written."""
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in model.model_fields.items():
        value = field.default
        if isinstance(value, tuple):
            value = ",".join(map(str, value))
        default = "" if value is None else f"`{value}`"
        if isinstance(value, bool):
            default = default.lower()
        yield f"| `{shown(name)}` | {type_name(field)} | {default} | {field.description} |"


def settings() -> Iterator[str]:
    """The keys of ``--speculative-config``."""
    yield from rows_of(ProPDConfig, str)
    yield (
        "| `config` | str | | A YAML file of these keys (see `configs/`); keys given "
        "beside it win. |"
    )


def training() -> Iterator[str]:
    """The options of ``vllm-propd train`` that say how to train."""
    yield from rows_of(TrainSettings, lambda name: "--" + name.replace("_", "-"))


def constants(path: Path) -> dict[str, Any]:
    """A module's names with literal values, read without importing it (and vLLM)."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return found


def metrics() -> Iterator[str]:
    """What ``/metrics`` has of ProPD."""
    names = constants(ENGINE / "metrics.py")
    yield "| metric | kind | meaning |"
    yield "|---|---|---|"
    for kind, suffix, group in (("gauge", "", "GAUGES"), ("counter", "_total", "COUNTERS")):
        for name, text in names[group].items():
            yield f"| `{METRIC_PREFIX}{name}{suffix}` | {kind} | {text} |"


def text_of(node: ast.expr, names: dict[str, Any]) -> str:
    """A literal's or an f-string's text; what is known at run time only is an ellipsis."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    assert isinstance(node, ast.JoinedStr)
    parts = []
    for part in node.values:
        if isinstance(part, ast.FormattedValue):
            name = part.value.id if isinstance(part.value, ast.Name) else ""
            parts.append(str(names.get(name, "…")))
        else:
            parts.append(text_of(part, names))
    return "".join(parts)


def refusals() -> Iterator[str]:
    """What stops an engine at its start: the reasons of the support matrix."""
    path = ENGINE / "integration" / "support_matrix.py"
    names, tree = constants(path), ast.parse(path.read_text())
    yield "| refused at start-up | instead | where |"
    yield "|---|---|---|"
    for function in tree.body:
        if not isinstance(function, ast.FunctionDef):
            continue
        only_cuda = function.name == "_unsupported_on_cuda"
        if not (only_cuda or function.name == "unsupported_features"):
            continue
        (reasons,) = (node for node in ast.walk(function) if isinstance(node, ast.Dict))
        for key, condition in zip(reasons.keys, reasons.values, strict=True):
            assert key is not None
            asked = {n.id for n in ast.walk(condition) if isinstance(n, ast.Name)}
            devices = [d for d in ("CPU", "CUDA") if f"on_{d.lower()}" in asked]
            where = (
                "CUDA" if only_cuda else devices[0] if len(devices) == 1 else "everywhere"
            )
            reason, _, remedy = text_of(key, names).partition("; ")
            yield f"| {reason} | {remedy} | {where} |"


TABLES: dict[str, Callable[[], Iterator[str]]] = {
    "settings": settings,
    "training": training,
    "metrics": metrics,
    "refusals": refusals,
}


def rewritten(page: str) -> str:
    """A page's text with the tables as they should be."""

    def filled(place: re.Match[str]) -> str:
        start, name, end = place.groups()
        return start + "\n".join(TABLES[name]()) + "\n" + end

    return PLACE.sub(filled, page)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rewritten(page.read_text()))
