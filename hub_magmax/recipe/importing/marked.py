"""Values of YAML texts with their lines, read as other tools read them: aliases, merge keys, YAML 1.1."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from hub_magmax.errors import KeyPath, Problem, RecipeError

#: Values of a document. Aliases repeat some, so that a small file can hold any number.
_MAX_VALUES = 20_000

#: Levels of lists and mappings.
_MAX_DEPTH = 30

#: Characters of a value that is looked at as a number.
_MAX_NUMBER_LENGTH = 100


@dataclass(frozen=True)
class Marked:
    """A value and its place.

    Attributes:
        value: Of a scalar, as YAML 1.1 takes it; None of a list and of a mapping.
        line, column: From 1, of the key in a mapping, of the item in a list.
        path: Keys and numbers that lead to it.
        entries: Of a mapping, by key.
        items: Of a list.
        repeated: Of a mapping, keys that stand in it before, and are read over.
    """

    value: Any
    line: int
    column: int
    path: KeyPath
    entries: Mapping[str, Marked] | None = None
    items: tuple[Marked, ...] | None = None
    repeated: tuple[Marked, ...] = ()

    @property
    def is_mapping(self) -> bool:
        return self.entries is not None

    @property
    def is_list(self) -> bool:
        return self.items is not None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is written: null."""
        return self.value is None and not self.is_mapping and not self.is_list

    def get(self, key: str) -> Marked | None:
        """Return what stands at a key; None where nothing does, or null."""
        found = (self.entries or {}).get(key)
        return None if found is None or found.is_empty else found

    def plain(self) -> Any:
        """Return the value without places."""
        if self.entries is not None:
            return {key: entry.plain() for key, entry in self.entries.items()}
        if self.items is not None:
            return [item.plain() for item in self.items]
        return self.value

    def without(self, path: KeyPath) -> Marked:
        """Return the same values without the one that a path leads to."""
        if not path:
            return self
        first, rest = path[0], path[1:]
        if self.entries is not None:
            entries = dict(self.entries)
            if first in entries:
                entries[str(first)] = entries[str(first)].without(rest)
                if not rest:
                    del entries[str(first)]
            return Marked(self.value, self.line, self.column, self.path, entries, repeated=self.repeated)
        if self.items is not None:
            items = [
                item.without(rest) if number == first else item
                for number, item in enumerate(self.items)
                if rest or number != first
            ]
            return Marked(self.value, self.line, self.column, self.path, items=tuple(items))
        return self

    def at(self, path: KeyPath) -> Marked | None:
        """Return the value that a path leads to; None where it leads nowhere."""
        if not path:
            return self
        first, rest = path[0], path[1:]
        if self.items is not None:
            is_there = isinstance(first, int) and first < len(self.items)
            return self.items[int(first)].at(rest) if is_there else None
        inner = (self.entries or {}).get(str(first))
        return None if inner is None else inner.at(rest)

    def replaced(self, texts: Mapping[str, str]) -> Marked:
        """Return the same values with other texts in place of names of models."""
        if self.entries is not None:
            entries = {
                key: replace(one, value=texts[one.value])
                if key in ("model", "base_model") and one.value in texts
                else one.replaced(texts)
                for key, one in self.entries.items()
            }
            return replace(self, entries=entries)
        if self.items is not None:
            return replace(self, items=tuple(item.replaced(texts) for item in self.items))
        return self


def read_documents(text: str, where: str) -> list[Marked]:
    """Return the documents of a YAML text; JSON is YAML too.

    Raises:
        RecipeError: If it is no YAML, or holds too much.
    """
    reader = _Reader()
    try:
        return [reader.marked(node, (), node) for node in yaml.compose_all(text, Loader=yaml.SafeLoader)]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = f"not valid YAML: {getattr(error, 'problem', None) or error}"
        line, column = (mark.line + 1, mark.column + 1) if mark else (None, None)
        problem = Problem("yaml", what, file=where, line=line, column=column)
        place = ", ".join(part for part in (where, problem.place) if part)
        raise RecipeError(what, where=place, problems=(problem,)) from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"not valid YAML: {error}", where=where) from error


@dataclass
class _Reader:
    """Turns nodes of PyYAML into marked values."""

    _count: int = 0
    _loader: Any = field(default_factory=lambda: yaml.SafeLoader(""))

    def marked(self, node: yaml.Node, path: KeyPath, place: yaml.Node) -> Marked:
        self._count += 1
        if self._count > _MAX_VALUES:
            raise ValueError(f"more than {_MAX_VALUES:,} values")
        if len(path) > _MAX_DEPTH:
            raise ValueError("nested too deeply")
        line, column = place.start_mark.line + 1, place.start_mark.column + 1
        if isinstance(node, yaml.MappingNode):
            entries, repeated = self._entries(node, path)
            return Marked(None, line, column, path, entries, repeated=tuple(repeated))
        if isinstance(node, yaml.SequenceNode):
            items = tuple(self.marked(item, (*path, n), item) for n, item in enumerate(node.value))
            return Marked(None, line, column, path, items=items)
        return Marked(self._scalar(node), line, column, path)

    def _entries(self, node: yaml.MappingNode, path: KeyPath) -> tuple[dict[str, Marked], list[Marked]]:
        """Return the entries of a mapping, merge keys included; of a key twice the last one counts."""
        entries: dict[str, Marked] = {}
        repeated, own = [], {id(key) for key, _ in node.value}
        written: set[str] = set()
        for key, value in self._pairs(node):
            name = str(key.value) if isinstance(key, yaml.ScalarNode) else "?"
            if name in written:
                repeated.append(entries[name])
            if id(key) in own:  # what `<<` brings is there to be replaced
                written.add(name)
            entries[name] = self.marked(value, (*path, name), key)
        return entries, repeated

    def _pairs(self, node: yaml.MappingNode) -> Iterator[tuple[yaml.Node, yaml.Node]]:
        """Yield keys and values: first those that `<<` brings, which the mapping's own ones replace."""
        own = []
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                brought = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for other in reversed(brought):
                    if isinstance(other, yaml.MappingNode):
                        yield from self._pairs(other)
            else:
                own.append((key, value))
        yield from own

    def _scalar(self, node: yaml.Node) -> Any:
        if len(node.value) > _MAX_NUMBER_LENGTH or node.tag.endswith((":str", ":timestamp")):
            return node.value
        try:
            return self._loader.construct_object(node)
        except (yaml.YAMLError, ValueError):
            return node.value
