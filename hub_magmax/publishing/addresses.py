"""Addresses of what a push made: the model's page, its commit, or a pull request."""

from __future__ import annotations

from typing import Any

from hub_magmax.publishing.commits import Published


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


def pushed(published: Published, revision: str | None = None) -> str:
    """Return what a push did, with a line for each address."""
    did = "published" if published.is_new else "nothing was pushed, the Hub holds this very merge:"
    return f"{did} {told(published.url, revision)}"


def pushed_values(published: Published, revision: str | None = None) -> dict[str, Any]:
    """Return the same for programs."""
    places = places_of(published.url, revision)
    return {"commit": published.commit, "url": published.url, "places": places, "is_new": published.is_new}
