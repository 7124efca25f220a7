"""Table of a fleet, for terminals and for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hub_magmax.evaluation.tables import Cell, Shown, Table
from hub_magmax.fleet.checks import Check
from hub_magmax.fleet.status import Origin, Status
from hub_magmax.text import at_most, cut_names, listed, number_of, spelled_out, weight_in_words

#: Characters of a model's name in a terminal.
_NAME_LENGTH = 36

#: Tasks and files that are shown of many.
_FEW = 3

#: Columns that are left out where no model has a value.
_OPTIONAL = ("site", "guard", "verify", "canary")


def as_table(found: Sequence[Status]) -> Table:
    """Return a row for each model; below, what they were merged from, and what could not be looked at."""
    origins = {text: str(number) for number, text in enumerate(_distinct_origins(found), 1)}
    names = cut_names([spelled_out(status.model) for status in found], at_most(_NAME_LENGTH))
    rows = [_row(status, name, origins) for status, name in zip(found, names, strict=True)]
    head = _columns(rows)
    notes = [f"{number}: merged from {text}" for text, number in origins.items()]
    notes += [_of_model(s.model, spelled_out(problem)) for s in found for problem in s.problems]
    return Table(head, tuple(tuple(row[name] for name in head) for row in rows), tuple(notes))


def _of_model(model: str, problem: str) -> str:
    """Return a problem with the model's name before it, which most problems begin with by themselves."""
    return problem if problem.startswith((f"{model}:", f"{model}@", f"{model},")) else f"{model}: {problem}"


def _columns(rows: Sequence[dict[str, Cell]]) -> tuple[str, ...]:
    """Return the columns that are shown: those of which there always are, and others that have a value."""
    return tuple(name for name in rows[0] if name not in _OPTIONAL or any(row[name] for row in rows))


def summary(found: Sequence[Status]) -> str:
    """Return in a sentence how many models there are, and what is worth a look."""
    counts = {
        "faulty": sum(status.is_faulty for status in found),
        "behind": sum(bool(status.behind) for status in found),
        "not as their recipes ask": sum(bool(status.not_as_asked) for status in found),
        "with commits by hand": sum(bool(status.by_hand) for status in found),
        "not looked at": sum(bool(status.problems) for status in found),
    }
    told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return f"{number_of(len(found), 'model')}: {told or 'all as merged, none behind its sources'}"


def state(status: Status) -> str:
    """Return what became of a model since it was merged, in words."""
    parts = [_unknown(status)] if status.problem else []
    for what, names in (("as merged", status.changed), ("as the recipe asks now", status.not_as_asked)):
        if names:
            parts.append(f"not {what}: {listed([spelled_out(name) for name in names], _FEW)}")
    if status.by_hand:
        parts.append(f"{number_of(len(status.by_hand), 'commit')} by hand")
    if status.behind:
        since = min(origin.since for origin in status.behind)[:10]
        parts.append(f"behind {listed([origin.role for origin in status.behind], _FEW)} since {since}")
    return "; ".join(parts) or "as merged"


def _unknown(status: Status) -> str:
    return "not wholly looked at" if status.version else "not looked at"


def check_in_words(check: Check | None, status: Status) -> str:
    """Return result and day of a check, and whether it was of an earlier revision; empty without one."""
    if check is None:
        return ""
    earlier = "" if check.commit == status.commit else ", earlier"
    return f"{check.result} {check.time[:10]}{earlier}"


def canary_in_words(status: Status) -> str:
    """Return the last canary; where this machine noted none, what the tag on the Hub says."""
    by_tag = {"head": "passed (tag)", "earlier": "passed (tag), earlier", "": ""}
    return check_in_words(status.canary, status) or by_tag[status.tag]


def preference_in_words(status: Status) -> str:
    """Return the weight of each task, or that all are equal; empty where they are not known."""
    weights = status.preference
    if len(weights) > 1 and len({*weights.values()}) == 1:
        return f"equal, {len(weights)} tasks"
    return ", ".join(_weighted(task, weight) for task, weight in weights.items())


def _shortly(status: Status) -> str:
    """Return the same without tasks of weight 0, and with the heaviest of many tasks only."""
    if len({*status.preference.values()}) == 1:
        return preference_in_words(status)
    heaviest = sorted(filter(status.preference.get, status.preference), key=lambda t: -status.preference[t])
    named = [_weighted(task, status.preference[task]) for task in heaviest]
    return ", ".join(named) if len(named) <= _FEW else f"{named[0]} and {len(named) - 1} more"


def _weighted(task: str, weight: float) -> str:
    return f"{spelled_out(task)} {weight_in_words(weight, 2)}"


def method_in_words(status: Status) -> str:
    """Return the method with its scaling; empty where it is not known."""
    return f"{status.method['name']} {status.method['scaling']:g}" if status.method else ""


def guards_in_words(status: Status) -> str:
    """Return how far the model is above its base model on each guard."""
    return ", ".join(f"{spelled_out(name)} {value:+.3f}" for name, value in status.guard.items())


def origin_in_words(origin: Origin) -> str:
    """Return a checkpoint with the commit that is pinned."""
    pinned = f" at {origin.commit[:7]}" if origin.commit else ""
    return f"{spelled_out(origin.name)}{pinned}"


def origins_in_words(status: Status, most: int) -> str:
    """Return all that a model was merged from, and by which version; empty where it is not known."""
    if not status.origins:
        return ""
    texts = [f"{spelled_out(origin.role)} {origin_in_words(origin)}" for origin in status.origins]
    return f"{listed(texts, most)}, by hub_magmax {status.version}"


def _distinct_origins(found: Sequence[Status]) -> Iterator[str]:
    yield from dict.fromkeys(filter(None, (origins_in_words(status, 255) for status in found)))


def _row(status: Status, name: str, origins: dict[str, str]) -> dict[str, Cell]:
    merged_from = origins_in_words(status, 255)
    preference = preference_in_words(status)
    return {
        "model": Shown(status.model, name),
        "site": status.site or None,
        "method": method_in_words(status) or None,
        "preference": Shown(preference, _shortly(status)) if preference else None,
        "from": Shown(merged_from, origins[merged_from]) if merged_from else None,
        "verify": check_in_words(status.verified, status) or None,
        "canary": canary_in_words(status) or None,
        "guard": guards_in_words(status) or None,
        "state": state(status),
    }
