"""Another vLLM's sources, read without importing them: which name is bound where.

Names are followed as Python would follow them: through imports, aliases and base classes,
within vLLM. What comes from other packages is known by name only.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path, PurePosixPath

from vllm_propd.engine.symbols.files import PACKAGE, read

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Definition:
    """What a name stands for.

    Attributes:
        module: the module that defines it; for another package's, the one imported from.
        name: its qualified name; empty for a module.
        node: the statement that defines it; None for what is not vLLM's.
    """

    module: str
    name: str
    node: ast.AST | None = field(compare=False)

    @property
    def path(self) -> str:
        """The definition's place, as ``module:qualified.name``."""
        return f"{self.module}:{self.name}"


@dataclass(frozen=True)
class _Imported:
    """A name that stands for another module's, or for a module where ``name`` is empty."""

    module: str
    name: str


_Binding = Function | ast.ClassDef | ast.Assign | ast.AnnAssign | _Imported


class Sources:
    """The modules of one vLLM.

    Args:
        files: each file's text, by its path from ``vllm/`` on.
    """

    def __init__(self, files: dict[str, str]):
        self.texts: dict[str, str] = {}
        self._packages: set[str] = set()
        for path, text in files.items():
            *folders, file = PurePosixPath(path).with_suffix("").parts
            if file == "__init__":
                self._packages.add(".".join(folders))
            else:
                folders.append(file)
            self.texts[".".join(folders)] = text
        self.tree = cache(self._tree)
        self._bound = cache(self._bindings)

    @classmethod
    def at(cls, path: Path) -> Sources:
        """Reads a wheel, an sdist, or a folder that is or holds vLLM's package.

        Raises:
            ValueError: there is no vLLM there.
        """
        files = read(path)
        if f"{PACKAGE}/__init__.py" not in files:
            raise ValueError(
                f"{path} has no package {PACKAGE!r}: name a wheel (.whl), an sdist "
                "(.tar.gz), or a folder with vLLM in it"
            )
        return cls(files)

    @cached_property
    def version(self) -> str:
        """The version that the build wrote down; ``unknown`` in a checkout."""
        text = self.texts.get(f"{PACKAGE}._version", "")
        found = re.search(r"""^__version__ = .*['"](.+)['"]""", text, re.M)
        return found[1] if found else "unknown"

    def find(self, path: str) -> Definition | None:
        """Finds what ``module:qualified.name`` stands for; None: there is no such name."""
        module, _, name = path.partition(":")
        found: Definition | None = Definition(module, "", self.tree(module))
        for part in name.split("."):
            found = self._member(found, part) if found is not None else None
        return found

    def elsewhere(self, path: str) -> list[str]:
        """Returns paths (``module:qualified.name``) of the same name in other modules."""
        module, _, name = path.partition(":")
        head = name.partition(".")[0]
        defines = re.compile(rf"^\s*(class|def|async def) {head}\b|^\s*{head}\s*[:=]", re.M)
        return [
            f"{other}:{name}"
            for other, text in self.texts.items()
            if other != module
            and defines.search(text)
            and (found := self.find(f"{other}:{head}")) is not None
            and found.module == other
            and self.find(f"{other}:{name}") is not None
        ]

    def classes(
        self, definition: Definition, below: tuple[Definition, ...] = ()
    ) -> list[Definition]:
        """Returns a class and its bases, in the order in which names are looked up.

        Args:
            definition: the class.
            below: classes that inherit from it; they are not taken for its bases.
        """
        assert isinstance(definition.node, ast.ClassDef)
        order, below = [definition], (*below, definition)
        for expression in definition.node.bases:
            base = self.named(expression, definition.module)
            if base is None or not isinstance(base.node, ast.ClassDef) or base in below:
                continue
            order += self.classes(base, below)
        return list(dict.fromkeys(reversed(order)))[::-1]

    def named(self, expression: ast.expr | None, module: str) -> Definition | None:
        """Finds what a name, dotted or with a subscript, stands for in a module."""
        match expression:
            case ast.Name(id=name):
                return self._in_module(module, name)
            case ast.Attribute(value=value, attr=name):
                owner = self.named(value, module)
                return None if owner is None else self._member(owner, name)
            case ast.Subscript(value=value):
                return self.named(value, module)
        return None

    def _member(self, owner: Definition, name: str) -> Definition | None:
        if not owner.name:
            return self._in_module(owner.module, name)
        if not isinstance(owner.node, ast.ClassDef):
            return None
        classes = self.classes(owner)
        for cls in classes:
            assert isinstance(cls.node, ast.ClassDef)
            for binding in self._bound(cls.node).get(name, ()):
                return self._bound_to(binding, cls.module, f"{cls.name}.{name}", cls)
        for cls in classes:
            if (node := own_attributes(cls.node).get(name)) is not None:
                return Definition(cls.module, f"{cls.name}.{name}", node)
        return None

    def _in_module(
        self, module: str, name: str, passed: frozenset[tuple[str, str]] = frozenset()
    ) -> Definition | None:
        if (module, name) in passed:
            return None
        passed |= {(module, name)}
        tree = self.tree(module)
        bound = self._bound(tree) if tree is not None else {}
        for binding in bound.get(name, ()):
            found = self._bound_to(binding, module, name, None, passed)
            if found is not None:
                return found
        if (inner := self.tree(f"{module}.{name}")) is not None:
            return Definition(f"{module}.{name}", "", inner)
        for star in bound.get("*", ()):
            assert isinstance(star, _Imported)
            source = self._absolute(star.module, module)
            if (found := self._in_module(source, name, passed)) is not None:
                return found
        return None

    def _bound_to(
        self,
        binding: _Binding,
        module: str,
        name: str,
        owner: Definition | None,
        passed: frozenset[tuple[str, str]] = frozenset(),
    ) -> Definition | None:
        if isinstance(binding, _Imported):
            source = self._absolute(binding.module, module)
            if source.partition(".")[0] != PACKAGE:
                return Definition(source, binding.name, None)
            if not binding.name:
                return Definition(source, "", self.tree(source))
            return self._in_module(source, binding.name, passed)
        alias = None
        if isinstance(binding, ast.Assign | ast.AnnAssign):
            alias = self._alias(binding.value, module, name, owner, passed)
        return alias or Definition(module, name, binding)

    def _alias(
        self,
        other: ast.expr | None,
        module: str,
        name: str,
        owner: Definition | None,
        passed: frozenset[tuple[str, str]],
    ) -> Definition | None:
        """Finds what ``name = other`` stands for, where ``other`` is a name, too."""
        if not isinstance(other, ast.Name):
            return self.named(other, module) if isinstance(other, ast.Attribute) else None
        found = None
        if owner is not None and other.id != name.rpartition(".")[2]:
            found = self._member(owner, other.id)
        return found or self._in_module(module, other.id, passed)

    def _absolute(self, module: str, importer: str) -> str:
        """Returns a module's full name; ``importer`` spells it with leading dots."""
        name = module.lstrip(".")
        level = len(module) - len(name)
        if not level:
            return name
        parts = importer.split(".")
        above = parts[: len(parts) - level + (importer in self._packages)]
        return ".".join([*above, name] if name else above)

    def _tree(self, module: str) -> ast.Module | None:
        text = self.texts.get(module)
        return None if text is None else ast.parse(text)

    def _bindings(self, scope: ast.Module | ast.ClassDef) -> dict[str, list[_Binding]]:
        """Returns what each name is bound to: definitions first, the later of two first."""
        bound: dict[str, list[_Binding]] = {}
        for name, binding in _bindings_of(scope.body):
            bound.setdefault(name, []).insert(0, binding)
        for bindings in bound.values():
            bindings.sort(key=_rank)
        return bound


def own_attributes(node: ast.AST | None) -> dict[str, ast.AST]:
    """Returns names that a class's methods assign to (``self.name``), and statements."""
    found: dict[str, ast.AST] = {}
    for statement in ast.walk(node) if node is not None else ():
        for target in _targets(statement):
            match target:
                case ast.Attribute(value=ast.Name(id="self"), attr=name):
                    found.setdefault(name, statement)
    return found


def own_names(node: ast.ClassDef) -> set[str]:
    """Returns the names that a class's own body binds."""
    return {name for name, _ in _bindings_of(node.body)}


def _rank(binding: _Binding) -> int:
    """Ranks a binding: definitions come before imports, imports before values.

    So what is imported for type checkers only stands for what is found at run time.
    """
    if isinstance(binding, Function):
        return 3 if "overload" in decorators(binding) else 0
    if isinstance(binding, ast.ClassDef):
        return 0
    return 1 if isinstance(binding, _Imported) else 2


def decorators(node: Function | ast.ClassDef) -> set[str]:
    """Returns the last names of what decorates a definition."""
    names = set()
    for decorator in node.decorator_list:
        called = decorator.func if isinstance(decorator, ast.Call) else decorator
        names.add(ast.unparse(called).rpartition(".")[2])
    return names


def _bindings_of(body: Iterable[ast.stmt]) -> Iterator[tuple[str, _Binding]]:
    for statement in body:
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield statement.name, statement
            case ast.Assign() | ast.AnnAssign():
                for target in _targets(statement):
                    if isinstance(target, ast.Name):
                        yield target.id, statement
            case ast.Import():
                for alias in statement.names:
                    first = alias.name.partition(".")[0]
                    yield (
                        alias.asname or first,
                        _Imported(alias.name if alias.asname else first, ""),
                    )
            case ast.ImportFrom():
                source = "." * statement.level + (statement.module or "")
                for alias in statement.names:
                    yield alias.asname or alias.name, _Imported(source, alias.name)
            case ast.If() | ast.For() | ast.While() | ast.With() | ast.Try():
                yield from _bindings_of(_inner(statement))


def _inner(statement: ast.stmt) -> Iterator[ast.stmt]:
    for name in ("body", "handlers", "orelse", "finalbody"):
        for inner in getattr(statement, name, ()):
            if isinstance(inner, ast.ExceptHandler):
                yield from inner.body
            else:
                yield inner


def _targets(statement: ast.AST) -> Iterator[ast.expr]:
    """Yields what a statement assigns to, tuples taken apart."""
    waiting: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        waiting += statement.targets
    elif isinstance(statement, ast.AnnAssign):
        waiting.append(statement.target)
    while waiting:
        target = waiting.pop()
        if isinstance(target, ast.Tuple | ast.List):
            waiting += target.elts
        else:
            yield target
