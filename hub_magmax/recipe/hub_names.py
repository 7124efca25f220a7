"""Names of repositories and revisions on the Hub, checked by its rules and those of git without a request."""

from __future__ import annotations

import re

from hub_magmax.text import shown

#: A part of a repository's name: of an organisation or user, or of the repository itself.
_PART = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")

_NOT_IN_REVISIONS = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//")

#: Longer names are refused by the Hub's storage.
_MAX_REVISION_LENGTH = 250


def repository_problem(name: str) -> str:
    """Return why a text cannot be a repository's id (`org/model`), as a clause; empty where it can."""
    parts = name.split("/")
    if not 1 <= len(parts) <= 2 or not all(map(_PART.fullmatch, parts)):
        return (
            f"{shown(name)} is no repository id: org/model, each of up to 96 letters, digits, -, _ and ., "
            "with none of - and . first or last"
        )
    if "--" in name or ".." in name or name.endswith(".git"):
        return f"{shown(name)} is no repository id: the Hub takes no --, no .. and no .git at the end"
    return ""


def revision_problem(name: str) -> str:
    """Return why a text cannot be a branch, tag, commit or pull request, as a clause; empty where it can."""
    parts = name.split("/")
    odd = any(part.startswith((".", "-")) or part.endswith((".", ".lock")) or not part for part in parts)
    if odd or name == "@" or len(name) > _MAX_REVISION_LENGTH or _NOT_IN_REVISIONS.search(name):
        rules = r"has no spaces, none of ~^:?*[\ and no .., and begins and ends with a letter, digit or _"
        return f"{shown(name)} is no revision: a branch, tag, commit or refs/pr/N {rules}"
    return ""
