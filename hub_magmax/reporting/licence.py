"""Licence of a merged model, derived from the licences of its sources.

A merged model is made from every source at once, so the terms of all of them meet in it. What
can be said without a lawyer is said, and everything else becomes `other` with a warning.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hub_magmax.text import listed

_HUB_IDS = """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m
    bigscience-bloom-rail-1.0 bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear
    bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
    cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0
    cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
    creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2
    fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research
    intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3  llama4
    lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++  osl-3.0 other
    pddl postgresql unknown unlicense wtfpl zlib
"""

#: The ids that the Hub accepts under `license`.
HUB_LICENSES = frozenset(_HUB_IDS.split())

#: Licences that allow any use and any licence on what is made from the work, ordered by what
#: they ask in return, least first. Licences that are missing here never count as permissive.
PERMISSIVE = (
    *("wtfpl", "unlicense", "cc0-1.0", "pddl"),  # nothing
    *("zlib", "bsl-1.0", "isc", "mit", "postgresql", "ncsa", "bsd-2-clause"),  # the notice kept in copies
    *("bsd-3-clause", "bsd", "bsd-3-clause-clear"),  # and no endorsement in the authors' name
    *("cdla-permissive-1.0", "cdla-permissive-2.0", "odc-by"),  # credit
    *("cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0"),  # and changes indicated
    *("ecl-2.0", "apache-2.0"),  # and NOTICE files kept, and patent terms
)

#: Longest `license_name` that is still one a person can read.
_MAX_NAME = 80

#: Ids by which a card says that it does not say.
_UNSTATED = (None, "", "unknown")


@dataclass(frozen=True)
class License:
    """A licence, and the reason for it in words.

    Attributes:
        id: One of `HUB_LICENSES`.
        name: What the licence is called where `id` is `other`, else None.
        explanation: The reasoning, in Markdown; safe to show whatever the sources state.
    """

    id: str
    name: str | None
    explanation: str


def is_stated(text: str | None) -> bool:
    """Say whether a source's card states a licence."""
    return _normalised(text) is not None


def combined_license(licenses: Sequence[str | None], override: str | None = None) -> License:
    """Return the licence of a model merged from sources under `licenses`.

    Args:
        licenses: What each source states, None where it states nothing; at least one.
        override: What the recipe sets instead, if anything.
    """
    stated = tuple(dict.fromkeys(_normalised(text) for text in licenses))
    combined = _combine(stated)
    if override is None or not override.strip():
        return combined
    chosen = _license(_slug(override))
    agrees = (chosen.id, chosen.name) == (combined.id, combined.name)
    doubt = (
        f" **Warning:** without this setting it would be `{combined.name or combined.id}`; whether the terms "
        "of every source allow another licence is for the publisher to know."
    )
    return License(
        chosen.id,
        chosen.name,
        f"The recipe sets `{_slug(override)}`. That is the statement of whoever publishes the model, not a "
        f"conclusion from its sources. {_statement(stated)}{'' if agrees else doubt}{_derivatives(stated)}",
    )


def _combine(stated: tuple[str | None, ...]) -> License:
    first = stated[0]
    if len(stated) == 1 and first is not None and first != "other":
        license_ = _license(_slug(first))
        terms = "Its terms, including any on naming, attribution and use, apply to the merged model."
        return License(
            license_.id, license_.name, f"Every source states `{_slug(first)}`. {terms}{_derivatives(stated)}"
        )
    if all(text in PERMISSIVE for text in stated):
        strictest = max((text for text in stated if text), key=PERMISSIVE.index)
        return License(
            strictest,
            None,
            f"{_statement(stated)} All of them are permissive: the merged model is under the one that "
            f"asks most, `{strictest}`, and the copyright and attribution notices of every source have "
            "to be kept.",
        )
    return License(
        "other",
        _joined_name(stated),
        f"**Warning:** {_statement(stated)} These do not combine into one known licence, so the terms of "
        "every source apply at the same time. Nothing here lifts a restriction that any of them makes, such "
        "as non-commercial use, share-alike or an acceptable-use policy, and a source that states no licence "
        f"gives no permission. Clear this with the owners of the sources before use.{_derivatives(stated)}",
    )


def _derivatives(stated: Iterable[str | None]) -> str:
    forbids = [text for text in stated if text and re.search(r"-nd\b", text)]
    if not forbids:
        return ""
    return f" **Warning:** {_quoted(forbids)} forbids sharing adapted material, which a merged model may be."


def _statement(stated: Sequence[str | None]) -> str:
    named = [text for text in stated if text]
    parts = [f"the sources state {_quoted(named)}"] if named else []
    parts += ["at least one source states no licence"] if None in stated else []
    text = ", and ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _quoted(names: Iterable[str]) -> str:
    return listed([f"`{_slug(name)}`" for name in names])


def _joined_name(stated: Iterable[str | None]) -> str:
    name = "-and-".join(_slug(text) if text else "unstated" for text in stated)
    return name if len(name) <= _MAX_NAME and name != "other" else "terms-of-the-sources"


def _license(slug: str) -> License:
    return License(slug, None, "") if slug in HUB_LICENSES else License("other", slug, "")


def _normalised(text: str | None) -> str | None:
    lowered = text.strip().lower() if text else None
    return None if lowered in _UNSTATED else lowered


def _slug(text: str) -> str:
    """Return `text` as an id: lower case ASCII letters, digits, `.`, `+` and `-`."""
    return re.sub(r"[^a-z0-9.+]+", "-", text.strip().lower())[:_MAX_NAME].strip("-") or "unnamed"
