"""Addresses of what a push made: the model's page, its commit, or a pull request."""

from __future__ import annotations


def places_of(url: str, revision: str | None = None) -> dict[str, str]:
    """Return addresses by what is there, from that of a commit or a pull request.

    The model comes first, on a branch if that is named. A pull request is the only place: the model is as it
    was until that is merged.
    """
    before, _, request = url.partition("/discussions/")
    if request:
        return {"pull request": url}
    branch = f"/tree/{revision}" if revision else ""
    return {"model": f"{before.partition('/commit/')[0]}{branch}", "commit": url}


def told(url: str, revision: str | None = None) -> str:
    """Return a line for each address."""
    return "\n".join(f"{what} {place}" for what, place in places_of(url, revision).items())
