"""Globs over tensors' names, for rules that settle a group at once."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from hub_magmax.text import listed

#: Rules shown at most.
_MOST_RULES = 8


def globs_over(names: Sequence[str], every_name: Collection[str]) -> list[str]:
    """Return globs that match these names and no other ones.

    Names that differ in their numbers share a glob, where it matches nothing else; others stand for
    themselves.
    """
    wanted, globs = set(names), dict[str, None]()
    for name in names:
        if any(fnmatchcase(name, glob) for glob in globs):
            continue
        glob = re.sub(r"\d+", "*", _literal(name))
        matched = {other for other in every_name if fnmatchcase(other, glob)}
        globs[glob if len(matched) > 1 and matched <= wanted else _literal(name)] = None
    return list(globs)


def rules_for(names: Sequence[str], every_name: Collection[str], take: str) -> str:
    """Return the lines of a recipe that take these tensors from one place, and no other ones."""
    globs = globs_over(names, every_name)
    if len(globs) > _MOST_RULES:
        return f"a rule under tensors for each of {listed([json.dumps(glob) for glob in globs], _MOST_RULES)}"
    rules = ", ".join(f"{{match: {json.dumps(glob)}, take: {take}}}" for glob in globs)
    return f"tensors: [{rules}]"


def _literal(name: str) -> str:
    """Return the glob that matches a name alone."""
    return re.sub(r"[\[*?]", r"[\g<0>]", name)
