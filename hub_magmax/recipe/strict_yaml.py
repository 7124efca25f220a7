"""YAML read strictly: one document, no aliases, no duplicate keys, bounded depth and size.

Plain YAML takes `no` for false and `2024-01-01` for a date. Here keys are text, there are no dates, and
beside the values the reader returns how they are written, for whoever wants text.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import yaml
from yaml.reader import ReaderError

from hub_magmax.errors import HubMagmaxError, KeyPath, Problem, RecipeError
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
                raise _error(what, event.start_mark)
        # Shared nodes can make a small file explode; a tag can make any value another kind.
        for kind, what in (("anchor", "anchors and aliases"), ("tag", "not valid YAML for a recipe: tags")):
            if getattr(event, kind, None):
                raise _error(
                    f"{what} are not allowed",
                    event.start_mark,
                    hint="Write the value out; put text that starts with such a sign in quotes.",
                )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


#: Line and column, from 1.
Place = tuple[int, int]


class Read(NamedTuple):
    """Values of a YAML text.

    Attributes:
        values: Plain values.
        places: Line and column, from 1, at which each key path starts.
        written: Single values as written, by key path, where YAML does not take them for text.
    """

    values: Any
    places: dict[KeyPath, Place]
    written: dict[KeyPath, str]


#: What to do, by a part of what is wrong in the words of PyYAML.
_HINTS = {
    r"'\t'": "YAML is indented by spaces, and not by tabs.",
    "another document": "A file holds one recipe: remove the line --- and what is not of this one.",
}


def read_yaml(text: str, where: str) -> Read:
    """Return the values in `text`, with their lines and how they are written."""
    read = Read(None, {}, {})
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        _note(node, (), read)
        return read if node is None else read._replace(values=loader.construct_document(node))
    except ReaderError as error:
        raise _in_file(_control_character(text, error), where) from error
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "not valid YAML"
        mark = getattr(error, "problem_mark", None)
        hints = (hint for sign, hint in _HINTS.items() if sign in problem)
        hint = next(hints, "Check the indentation there.")
        found = _error(f"not valid YAML: {problem}", mark, hint=hint)
        raise _in_file(found, where) from error
    except RecipeError as error:
        raise _in_file(error, where) from error
    except RecursionError as error:
        raise _in_file(RecipeError("nested too deeply"), where) from error
    except ValueError as error:  # an integer that YAML recognises and cannot build
        found = RecipeError(f"a value that YAML cannot read: {error}", hint="Put it in quotes.")
        raise _in_file(found, where) from error


def _error(what: str, mark: yaml.Mark | None, *, expected: str = "", hint: str = "") -> RecipeError:
    """Return the error of the text at `mark`; the file is named by `_in_file`."""
    line, column = _place(mark) if mark else (None, None)
    problem = Problem("yaml", what, line=line, column=column, expected=expected, hint=hint)
    return RecipeError(what, expected=expected, hint=hint, problems=(problem,))


def _control_character(text: str, error: ReaderError) -> RecipeError:
    before = text[: error.position].split("\n")
    mark = yaml.Mark("", error.position, len(before) - 1, len(before[-1]), None, 0)
    return _error(
        f"not valid YAML: the control character U+{ord(text[error.position]):04X}",
        mark,
        hint="Delete it: editors may not show it. A file saved as UTF-16 has one in each character.",
    )


def _in_file(error: RecipeError, where: str) -> HubMagmaxError:
    problem = replace(error.problems[0], kind="yaml", file=where)
    return error.with_problem(problem, ", ".join(part for part in (where, problem.place) if part))


def _place(mark: yaml.Mark) -> Place:
    return mark.line + 1, mark.column + 1


def _note(node: yaml.Node | None, path: KeyPath, read: Read) -> None:
    """Check the values below `node`, and note their lines and texts."""
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node)
        if node.value and not node.tag.endswith(":str"):
            read.written[path] = node.value
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*path, _checked_key(key, path, read))
            read.places[inner] = _place(key.start_mark)
            _note(value, inner, read)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            read.places[*path, index] = _place(value.start_mark)
            _note(value, (*path, index), read)


def _checked_key(key: yaml.Node, path: KeyPath, read: Read) -> str:
    if not isinstance(key, yaml.ScalarNode):
        raise _error("a key that is not a name", key.start_mark, expected="key: value")
    _check_scalar(key)
    name: str = key.value
    if (*path, name) in read.places:
        raise _error(
            f"the key {shown(name)} appears twice, first on line {read.places[*path, name][0]}",
            key.start_mark,
            hint="Keep one of them.",
        )
    return name


def _check_scalar(node: yaml.ScalarNode) -> None:
    try:
        node.value.encode()
    except UnicodeEncodeError as error:
        raise _error("text that holds half a character", node.start_mark) from error
    # Hours pass before YAML has built a number of a million digits, and Python does not print one of 5,000.
    if node.tag.endswith((":int", ":float")) and len(node.value) > _MAX_NUMBER_LENGTH:
        raise _error(
            f"a number of {len(node.value):,} characters",
            node.start_mark,
            expected=f"at most {_MAX_NUMBER_LENGTH}",
            hint="Put it in quotes if it is text.",
        )
