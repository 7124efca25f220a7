"""YAML read strictly: one document, no aliases, no duplicate keys, bounded depth and size.

Plain YAML takes `no` for false and `2024-01-01` for a date. Here keys are text, there are no dates, and
beside the values the reader returns how they are written, for whoever wants text.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, ClassVar, NamedTuple

import yaml

from hub_magmax.errors import RecipeError
from hub_magmax.recipe.problems import KeyPath
from hub_magmax.text import shown

#: Levels of lists and mappings; recipes need six.
_MAX_DEPTH = 30

#: Values, keys included. With 255 tasks and data for each it takes some ten thousand, and for the labels of
#: the largest data sets twenty thousand more; every thousand cost a tenth of a second.
_MAX_VALUES = 50_000

#: Characters of a number.
_MAX_NUMBER_LENGTH = 100


#: Kinds of values that recipes do not have: these are text.
_NO_KINDS = ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value", "tag:yaml.org,2002:merge")


class _Loader(yaml.SafeLoader):
    """A loader that checks depth, count, tags and anchors of the text before it builds a value."""

    depth = num_values = 0
    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, Any]]]] = {  # type: ignore[misc]  # types-PyYAML calls it an instance variable
        first: [(tag, pattern) for tag, pattern in known if tag not in _NO_KINDS]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        self.num_values += 1
        self.depth += 1  # PyYAML's time grows with the square of the depth
        for too_much, what in (
            (self.depth > _MAX_DEPTH, "nested too deeply"),
            (self.num_values > _MAX_VALUES, f"more than {_MAX_VALUES:,} values, which no recipe has"),
        ):
            if too_much:
                raise RecipeError(what, where=f"line {event.start_mark.line + 1}")
        # Shared nodes can make a small file explode; a tag can make any value another kind.
        for kind, what in (("anchor", "anchors and aliases"), ("tag", "not valid YAML for a recipe: tags")):
            if getattr(event, kind, None):
                raise RecipeError(
                    f"{what} are not allowed",
                    where=f"line {event.start_mark.line + 1}",
                    hint="Write the value out; put text that starts with such a sign in quotes.",
                )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class Read(NamedTuple):
    """Values of a YAML text.

    Attributes:
        values: Plain values.
        lines: The line on which each key path starts.
        written: Single values as written, by key path, where YAML does not take them for text.
    """

    values: Any
    lines: dict[KeyPath, int]
    written: dict[KeyPath, str]


def read_yaml(text: str, where: str) -> Read:
    """Return the values in `text`, with their lines and how they are written."""
    read = Read(None, {}, {})
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        _note(node, (), read)
        return read if node is None else read._replace(values=loader.construct_document(node))
    except RecipeError as error:
        place = f"{where}, {error.where}"
        raise RecipeError(error.what, where=place, expected=error.expected, hint=error.hint) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise RecipeError(
            f"not valid YAML: {problem}", where=place, hint="Check the indentation there."
        ) from error
    except RecursionError as error:
        raise RecipeError("nested too deeply", where=where) from error
    except ValueError as error:  # an integer that YAML recognises and cannot build
        raise RecipeError(
            f"a value that YAML cannot read: {error}", where=where, hint="Put it in quotes."
        ) from error


def _note(node: yaml.Node | None, path: KeyPath, read: Read) -> None:
    """Check the values below `node`, and note their lines and texts."""
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node)
        if node.value and not node.tag.endswith(":str"):
            read.written[path] = node.value
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*path, _checked_key(key, path, read))
            read.lines[inner] = key.start_mark.line + 1
            _note(value, inner, read)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            read.lines[*path, index] = value.start_mark.line + 1
            _note(value, (*path, index), read)


def _checked_key(key: yaml.Node, path: KeyPath, read: Read) -> str:
    line = key.start_mark.line + 1
    if not isinstance(key, yaml.ScalarNode):
        raise RecipeError("a key that is not a name", where=f"line {line}", expected="key: value")
    _check_scalar(key)
    name: str = key.value
    if (*path, name) in read.lines:
        raise RecipeError(
            f"the key {shown(name)} appears twice, first on line {read.lines[*path, name]}",
            where=f"line {line}",
            hint="Keep one of them.",
        )
    return name


def _check_scalar(node: yaml.ScalarNode) -> None:
    where = f"line {node.start_mark.line + 1}"
    try:
        node.value.encode()
    except UnicodeEncodeError as error:
        raise RecipeError("text that holds half a character", where=where) from error
    # Hours pass before YAML has built a number of a million digits, and Python does not print one of 5,000.
    if node.tag.endswith((":int", ":float")) and len(node.value) > _MAX_NUMBER_LENGTH:
        raise RecipeError(
            f"a number of {len(node.value):,} characters",
            where=where,
            expected=f"at most {_MAX_NUMBER_LENGTH}",
            hint="Put it in quotes if it is text.",
        )
