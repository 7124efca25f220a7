"""Page of a fleet: one HTML file, without scripts and without network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hub_magmax.fleet.checks import now
from hub_magmax.fleet.status import Status
from hub_magmax.fleet.status_table import (
    canary_in_words,
    check_in_words,
    guards_in_words,
    method_in_words,
    origin_in_words,
    preference_in_words,
    state,
    summary,
)
from hub_magmax.text import spelled_out, without_secrets

TEMPLATE_NAME = "status.html.jinja"

#: Commits by hand whose titles are shown.
_MAX_TITLES = 10


def render_page(found: Sequence[Status], title: str) -> str:
    """Return the page; all that others wrote is shown as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("hub_magmax.fleet", "")
    template = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = template.get_template(TEMPLATE_NAME).render(
        title=spelled_out(title),
        summary=summary(found),
        time=now()[:16].replace("T", " ") + " UTC",
        has_sites=any(status.site for status in found),
        rows=[_row(status) for status in found],
    )
    return without_secrets(page)


def _row(status: Status) -> dict[str, Any]:
    needs_look = status.problems or status.behind or status.by_hand or status.not_as_asked
    return {
        "model": spelled_out(status.model),
        "site": spelled_out(status.site),
        "commit": status.commit,
        "updated": status.updated,
        "kind": "faulty" if status.is_faulty else "look" if needs_look else "good",
        "state": state(status),
        "details": [spelled_out(line) for line in _details(status)],
        "verify": check_in_words(status.verified, status),
        "canary": canary_in_words(status),
        "guard": guards_in_words(status),
        "method": method_in_words(status),
        "preference": preference_in_words(status),
        "origins": [f"{spelled_out(origin.role)}: {origin_in_words(origin)}" for origin in status.origins],
        "version": status.version,
    }


def _details(status: Status) -> Iterator[str]:
    """Yield all that is worth a look, one fact each."""
    yield from status.problems
    yield from (f"{path} is not as merged" for path in status.changed)
    yield from (f"{key} is not as the recipe asks now" for key in status.not_as_asked)
    for origin in status.behind:
        count = "history was rewritten" if origin.num_behind is None else f"{origin.num_behind} behind"
        yield f"{origin.role}: {origin.name} is at {origin.head[:7]} since {origin.since[:10]}, {count}"
    yield from (f"commit by hand: {title}" for title in status.by_hand[:_MAX_TITLES])
