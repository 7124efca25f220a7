"""Template of the card, and its cells: numbers, intervals and links as Markdown, foreign text as code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

from hub_magmax.evaluation.intervals import Difference
from hub_magmax.evaluation.scores import Score
from hub_magmax.evaluation.tails import ExampleLoss
from hub_magmax.recipe.lockfile import LockedSource
from hub_magmax.reporting.front_matter import hub_id
from hub_magmax.reporting.score_formats import Unit
from hub_magmax.text import Markdown, code, fenced, format_bytes, listed, verbatim, weight_in_words

TEMPLATE_NAME = "model_card.md.jinja"

#: Names in a list within a sentence.
_MAX_NAMES = 6


@cache
def environment(unit: Unit) -> Any:
    """Return the Jinja environment of the card: its templates, and filters that write scores in `unit`.

    It is kept: compiling the template takes .1 s, as long as a hundred cards.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # Not HTML: in place of autoescaping, `_shown` makes every value inert that is not `Markdown`.
    found = Environment(  # noqa: S701
        loader=PackageLoader("hub_magmax.reporting", ""),
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "bytes": lambda count: Markdown(format_bytes(count)),
        "count": lambda number: Markdown(f"{number:,}"),
        "fenced": fenced,
        "verbatim": verbatim,
        "markdown": Markdown,
        "names": lambda names: Markdown(listed([code(name) for name in names], _MAX_NAMES)),
        "number": _number,
        "weight": lambda value: None if value is None else Markdown(weight_in_words(value)),
        "pairs": _pairs,
        "plain": _plain,
        "words": lambda name: code(str(name).replace("_", " ")),
        "mean": lambda value: Markdown(unit.value(value)),
        "difference": partial(_difference, unit),
        "shortened": _shortened,
        "score": partial(_score, unit),
        "source": source_link,
        "level": lambda level: Markdown(f"{level:.2f}".removeprefix("0")),
        "tail": partial(_tail, unit),
        "flips": _flips,
        "worst": _worst,
    }
    return found


def _shown(value: Any) -> str:
    """Return the text of `value` on the card: foreign text as code, a missing value as a dash."""
    if isinstance(value, Markdown):
        return value
    if value is None:
        return "—"
    return str(value) if isinstance(value, int) else code(str(value))


def _shortened(digest: str | None) -> Markdown | None:
    """Return a commit or a digest by as many digits as tell it from others."""
    if digest is None:
        return None
    kind, colon, digits = str(digest).rpartition(":")
    return code(kind + colon + digits[:12] if re.fullmatch("[0-9a-f]{40,}", digits) else str(digest))


def _number(value: float | None) -> Markdown | None:
    return None if value is None else Markdown(f"{value:.4g}")


def _plain(value: Any) -> Markdown:
    """Return a number, an interval, or either of them by name."""
    if isinstance(value, Mapping):
        return Markdown(", ".join(f"{code(str(name))} {_plain(item)}" for name, item in value.items()))
    if isinstance(value, list | tuple):
        return Markdown(" to ".join(_plain(item) for item in value))
    if type(value) in (int, float):
        return Markdown(f"{value:,}" if isinstance(value, int) else f"{value:.4g}")
    return Markdown(_shown(value))


def _pairs(values: Mapping[str, Any]) -> Markdown:
    """Return "name value, name value": counts with separators, everything else as `_shown` has it.

    Mappings among the values are pairs in brackets.
    """

    def told(value: Any) -> str:
        if isinstance(value, Mapping):
            return f"({_pairs(value)})"
        return f"{value:,}" if type(value) is int else _shown(value)

    return Markdown(", ".join(f"{code(name)} {told(value)}" for name, value in values.items()))


def _difference(unit: Unit, mean: float | None, found: Difference | None) -> Markdown | None:
    """Return a difference of two scores, with its interval where there is one."""
    if mean is None:
        return None
    if found is not None and found.is_identical:
        return Markdown(f"{unit.change(mean)} (identical {'answers' if unit.is_share else 'scores'})")
    interval = f" [{unit.change(found.low)}, {unit.change(found.high)}]" if found else ""
    return Markdown(unit.change(mean) + interval)


def _score(unit: Unit, score: Score | None) -> Markdown | None:
    """Return a score and its interval."""
    if score is None:
        return None
    return Markdown(f"{unit.value(score.value)} [{unit.value(score.low)}, {unit.value(score.high)}]")


def _tail(unit: Unit, found: ExampleLoss, level: float) -> Markdown | None:
    """Return the CVaR of a per-example loss with its interval."""
    tail = found.tail(level)
    if tail is None:
        return None
    shown = Unit(is_share=True) if found.in_probability else unit
    return Markdown(f"{shown.value(tail.value)} [{shown.value(tail.low)}, {shown.value(tail.high)}]")


def _flips(found: ExampleLoss) -> Markdown | None:
    """Return how many right answers became wrong, of how many, and their share with its interval."""
    if found.flip_rate is None or found.flip_interval is None:
        return None
    rate, low, high = (f"{100 * share:.1f}" for share in (found.flip_rate, *found.flip_interval))
    return Markdown(f"{found.flipped:,} of {found.right_before:,}: {rate} % [{low}, {high}]")


def _worst(found: ExampleLoss) -> Markdown | None:
    """Return the worst examples by their number in the data, with the results of both models."""
    named = (f"{one.index} ({one.before:.3g} → {one.after:.3g})" for one in found.worst)
    return Markdown(", ".join(named)) or None


def source_link(source: LockedSource) -> Markdown:
    """Return a source's commit, linked where it is on the Hub."""
    from huggingface_hub import constants

    if not source.commit:
        return Markdown("—")
    repo_id = hub_id(source)
    if repo_id is None or not re.fullmatch(r"[0-9a-f]{40}", source.commit):
        return code(source.commit)
    link = f"{constants.ENDPOINT}/{repo_id}/tree/{source.commit}"
    return Markdown(f"[`{source.commit[:12]}`]({link})")
