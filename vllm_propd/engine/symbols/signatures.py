"""Parameters and attributes as sources have them: what ``inspect`` would say."""

from __future__ import annotations

import ast
from dataclasses import dataclass

from vllm_propd.engine.symbols.sources import (
    Definition,
    Function,
    Sources,
    decorators,
    own_attributes,
    own_names,
)

GENERATED = {"dataclass", "config"}
"""Decorators that make a constructor from a class's fields; ``config`` is vLLM's."""

GENERATING = {"NamedTuple", "Struct", "BaseModel", "BaseSettings"}
"""Base classes that make a constructor from a class's fields."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a function, or of a class's constructor.

    Attributes:
        required: whether calls have to give it.
    """

    name: str
    required: bool


def parameters(sources: Sources, definition: Definition) -> list[Parameter] | None:
    """Returns a function's parameters, or a class's constructor's without ``self``.

    They are not known (None) for values, and for classes whose constructor is not vLLM's.
    """
    node = definition.node
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        if decorators(node) & {"property", "cached_property"}:
            return None
        return _of_function(node, bound="classmethod" in decorators(node))
    if not isinstance(node, ast.ClassDef):
        return None
    for cls in sources.classes(definition):
        assert isinstance(cls.node, ast.ClassDef)
        if "__init__" in own_names(cls.node):
            made = sources.find(f"{cls.module}:{cls.name}.__init__")
            assert made is not None and isinstance(made.node, ast.FunctionDef)
            return _of_function(made.node, bound=True)
        if _generated(sources, cls):
            return _of_fields(sources, cls)
    return None


def attributes(sources: Sources, definition: Definition) -> set[str]:
    """Returns the names that a class's instances have, as far as vLLM's sources say.

    Of a class's decorator those that it gives them.
    """
    if isinstance(definition.node, ast.FunctionDef):
        return set(own_attributes(definition.node))
    if not isinstance(definition.node, ast.ClassDef):
        return set()
    found: set[str] = set()
    for cls in sources.classes(definition):
        assert isinstance(cls.node, ast.ClassDef)
        found |= own_names(cls.node) | own_attributes(cls.node).keys()
    return found


def _of_function(node: Function, bound: bool) -> list[Parameter]:
    """Returns all parameters of a function, in order.

    Args:
        node: the function.
        bound: whether to leave out the first, ``self`` or ``cls``.
    """
    named = [*node.args.posonlyargs, *node.args.args]
    optional = len(node.args.defaults)
    found = [
        Parameter(one.arg, required=place < len(named) - optional)
        for place, one in enumerate(named)
    ]
    if node.args.vararg is not None:
        found.append(Parameter(node.args.vararg.arg, required=False))
    for one, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        found.append(Parameter(one.arg, required=default is None))
    if node.args.kwarg is not None:
        found.append(Parameter(node.args.kwarg.arg, required=False))
    return found[bound:]


def _generated(sources: Sources, definition: Definition) -> bool:
    assert isinstance(definition.node, ast.ClassDef)
    if decorators(definition.node) & GENERATED:
        return True
    return any(
        ast.unparse(base).rpartition(".")[2] in GENERATING
        for cls in sources.classes(definition)
        if isinstance(cls.node, ast.ClassDef)
        for base in cls.node.bases
    )


def _of_fields(sources: Sources, definition: Definition) -> list[Parameter]:
    found: dict[str, Parameter] = {}
    for cls in reversed(sources.classes(definition)):
        assert isinstance(cls.node, ast.ClassDef)
        for statement in cls.node.body:
            match statement:
                case ast.AnnAssign(target=ast.Name(id=name), annotation=kind, value=value):
                    given = _keywords(value)
                    if "ClassVar" in ast.unparse(kind) or given.get("init") == "False":
                        continue
                    required = value is None or (
                        _is_field(value)
                        and not given.keys() & {"default", "default_factory"}
                    )
                    found[name] = Parameter(name, required)
    return list(found.values())


def _is_field(value: ast.expr | None) -> bool:
    """Whether a value describes a field without default (its first argument)."""
    if not isinstance(value, ast.Call) or value.args:
        return False
    return ast.unparse(value.func).rpartition(".")[2] in ("field", "Field")


def _keywords(value: ast.expr | None) -> dict[str, str]:
    if not isinstance(value, ast.Call):
        return {}
    return {k.arg: ast.unparse(k.value) for k in value.keywords if k.arg is not None}
