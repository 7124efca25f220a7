"""Authorship of commits: those of this program, told from those of people."""

from __future__ import annotations

import re

#: Last line of the texts of this program's commits.
OURS = "Committed by hub_magmax."

#: Titles of commits of earlier versions, which had no such line; a merged pull request has its number.
_TITLES = re.compile(r"((Add|Update) merged model|Roll back to [0-9a-f]{12})( \(#\d+\))?")


def signed_text(text: str) -> str:
    """Return the text of a commit, below its title, with the line that says whose it is."""
    return "\n\n".join(filter(None, [text, OURS]))


def is_ours(title: str, message: str) -> bool:
    """Say whether a commit with this title, and this text below it, was made by this program."""
    return OURS in message or _TITLES.fullmatch(title) is not None
