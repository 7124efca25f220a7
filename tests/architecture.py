"""Measurements of source code by its syntax: imports and circles, parameters, complexity, private names."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Import:
    """One name that an import brings into a module.

    Attributes:
        module: The module that is imported, or that the name is taken from.
        name: What is taken from it; empty for the module itself.
        local: What it is called in the importing module.
    """

    module: str
    name: str
    local: str


@dataclass(frozen=True)
class Module:
    """A file of Python.

    Attributes:
        file: Relative to the root of the repository, with `/`.
        name: As it is imported.
    """

    file: str
    name: str
    text: str

    @cached_property
    def nodes(self) -> tuple[ast.AST, ...]:
        return tuple(ast.walk(ast.parse(self.text)))

    @property
    def num_lines(self) -> int:
        return len(self.text.splitlines())

    @cached_property
    def functions(self) -> Mapping[str, Function]:
        """Functions and methods by their qualified names; the last of equal names."""
        return dict(_functions(self.nodes[0], ""))

    @cached_property
    def comments(self) -> frozenset[int]:
        """Lines with a comment for people."""
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        return frozenset(
            token.start[0]
            for token in tokens
            if token.type == tokenize.COMMENT and not token.string.startswith(("# noqa", "# type:"))
        )


def modules(root: Path, packages: Collection[str]) -> dict[str, Module]:
    """Return the modules of `packages` by name."""
    found = {}
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = Module(path.relative_to(root).as_posix(), name, path.read_text(encoding="utf-8"))
    return found


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    for child in ast.iter_child_nodes(node):
        inner = prefix
        if isinstance(child, Function | ast.ClassDef):
            inner = f"{prefix}{child.name}."
            if isinstance(child, Function):
                yield inner[:-1], child
        yield from _functions(child, inner)


# Imports: those for types and those inside functions are counted like all others.


def imports(module: Module, names: Collection[str]) -> Iterator[Import]:
    """Yield what a module imports of the modules `names`."""
    for node in module.nodes:
        if isinstance(node, ast.Import):
            yield from (Import(a.name, "", a.asname or a.name) for a in node.names if a.name in names)
        elif isinstance(node, ast.ImportFrom):
            origin = _origin(module, node)
            for alias in node.names:
                local = alias.asname or alias.name
                if f"{origin}.{alias.name}" in names:
                    yield Import(f"{origin}.{alias.name}", "", local)
                elif origin in names:
                    yield Import(origin, alias.name, local)


def _origin(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parents = module.name.split(".")
    levels = node.level - module.file.endswith("/__init__.py")
    return ".".join([*parents[: len(parents) - levels], *([node.module] if node.module else [])])


def graph(found: Mapping[str, Module]) -> dict[str, list[str]]:
    """Return which modules each module imports; a package's `__init__` counts where it is named itself."""
    return {name: sorted({one.module for one in imports(found[name], found)}) for name in found}


def of_parts(edges: Mapping[str, Collection[str]], package: str) -> dict[str, list[str]]:
    """Return which direct parts of `package`, sub-packages and modules, import which others."""

    def part(name: str) -> str:
        return ".".join(name.split(".")[:2])

    found: dict[str, set[str]] = {}
    for name in edges:
        if name.startswith(f"{package}."):
            others = {part(other) for other in edges[name] if other.startswith(f"{package}.")}
            found.setdefault(part(name), set()).update(others - {part(name)})
    return {name: sorted(others) for name, others in found.items()}


def circles(edges: Mapping[str, Collection[str]]) -> list[list[str]]:
    """Return circles of imports, each from a module to itself; none only where there is none.

    Of each module in turn it is the shortest one among those modules that come later in the alphabet.
    """
    left, found = dict(edges), []
    for start in sorted(edges):
        if path := _way_back(left, start):
            found.append(path)
        del left[start]
    return found


def _way_back(edges: Mapping[str, Collection[str]], start: str) -> list[str]:
    ways, seen = [[start]], set()
    for way in ways:  # which grows meanwhile: the shortest come first
        for name in edges[way[-1]]:
            if name == start:
                return [*way, start]
            if name in edges and name not in seen:
                seen.add(name)
                ways.append([*way, name])
    return []


# Functions.


def num_parameters(function: Function) -> int:
    """Return how many parameters a function has, besides `self` and `cls`."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    bound = bool(named) and named[0].arg in ("self", "cls")
    return len(named) - bound + (given.vararg is not None) + (given.kwarg is not None)


def is_decorated(module: Module, name: str, decorators: Collection[str]) -> bool:
    """Say whether a function, or one around it, has one of the decorators, with arguments or without."""
    parts = name.split(".")
    around = (module.functions.get(".".join(parts[:end])) for end in range(1, len(parts) + 1))
    return any(
        ast.unparse(decorator).partition("(")[0].rpartition(".")[2] in decorators
        for function in around
        if function is not None
        for decorator in function.decorator_list
    )


def has_reason(module: Module, function: Function) -> bool:
    """Say whether there is a comment on the line of `def`, or on the line before it or its decorators."""
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    return bool(module.comments & {function.lineno, function.lineno - 1, first - 1})


def complexity(function: Function) -> int:
    """Return the cyclomatic complexity: 1, and 1 for each decision; a function inside counts for itself.

    Decisions are `if`, `elif`, conditional expressions, loops and their `else`, `except` and the `else`
    of a `try`, loops and conditions of comprehensions, `and`, `or`, `assert`, `lambda`, and each `case` but
    one.
    """
    return 1 + sum(map(_decisions, function.body))


def _decisions(node: ast.AST) -> int:
    found = 0
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return 0
        case ast.If() | ast.IfExp() | ast.Assert() | ast.Lambda():
            found = 1
        case ast.For() | ast.AsyncFor() | ast.While():
            found = 1 + bool(node.orelse)
        case ast.Try() | ast.TryStar():
            found = len(node.handlers) + bool(node.orelse)
        case ast.BoolOp():
            found = len(node.values) - 1
        case ast.comprehension():
            found = 1 + len(node.ifs)
        case ast.Match():
            found = len(node.cases) - 1
    return found + sum(map(_decisions, ast.iter_child_nodes(node)))


def own_nodes(function: Function) -> Iterator[ast.AST]:
    """Yield the nodes of a function without those of functions inside it."""
    waiting: list[ast.AST] = list(function.body)
    for node in waiting:  # which grows meanwhile
        if not isinstance(node, Function):
            yield node
            waiting += ast.iter_child_nodes(node)


# Private names: one underscore, not two.


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names_used(module: Module, names: Collection[str]) -> set[str]:
    """Return the private names of other modules that a module imports, or reads from them."""
    others = [one for one in imports(module, names) if one.module != module.name]
    whole = {one.local: one.module for one in others if not one.name}
    return {f"{one.module}.{one.name}" for one in others if is_private(one.name)} | {
        f"{whole[ast.unparse(node.value)]}.{node.attr}"
        for node in module.nodes
        if isinstance(node, ast.Attribute) and is_private(node.attr) and ast.unparse(node.value) in whole
    }


def private_names_patched(module: Module, names: Collection[str]) -> set[str]:
    """Return the private names that a module replaces, by `monkeypatch` or `setattr`."""
    home = {one.local: f"{one.module}.{one.name}".rstrip(".") for one in imports(module, names)}
    calls = (node for node in module.nodes if isinstance(node, ast.Call) and node.args)
    patched = {_patched(call, home) for call in calls if _called(call) in _PATCHES}
    return {name for name in patched if is_private(name.rpartition(".")[2])}


_PATCHES = ("setattr", "delattr", "__setattr__", "patch", "object")


def _called(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _patched(call: ast.Call, home: Mapping[str, str]) -> str:
    """Return the whole name of what a call replaces: written as one text, or as an owner and a text."""
    match call.args:
        case [ast.Constant(value=str(path)), *_]:
            return path
        case [owner, ast.Constant(value=str(name)), *_]:
            text = ast.unparse(owner)
            return f"{home.get(text, text)}.{name}"
    return ""
