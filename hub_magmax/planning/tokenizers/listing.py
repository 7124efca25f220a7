"""Added tokens in the configurations of a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

#: Keys with lists of special tokens that have no role.
_EXTRA = ("additional_special_tokens", "extra_special_tokens")

#: Added tokens, as tokenizer.json has them.
Entries = Sequence[Mapping[str, Any]]


def more_config(own: dict[str, Any], others: Sequence[Mapping[str, Any]], entries: Entries) -> dict[str, Any]:
    """Return a tokenizer_config.json with added tokens; `more_special` says what the arguments are."""
    if isinstance(own.get("added_tokens_decoder"), dict):
        more = {str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in entries}
        own = {**own, "added_tokens_decoder": {**own["added_tokens_decoder"], **more}}
    return more_special(own, others, entries)


def more_special(
    own: dict[str, Any], others: Sequence[Mapping[str, Any]], entries: Entries
) -> dict[str, Any]:
    """Return a configuration that lists the special tokens without a role that others list more.

    Args:
        own: The configuration.
        others: Those of other tokenizers, in order.
        entries: The added tokens that it gets.
    """
    new = {entry["content"] for entry in entries}
    for key in _EXTRA:
        more = [token for config in others for token in _listed(config.get(key)) if token in new]
        known: list[Any] = own[key] if isinstance(own.get(key), list) else []
        missing = [token for token in dict.fromkeys(more) if token not in _listed(known)]
        own = {**own, key: [*known, *missing]} if missing else own
    return own


def _listed(value: Any) -> list[str]:
    return [*_texts(value)] if isinstance(value, list) else []


def _texts(values: list[Any]) -> Iterator[str]:
    for one in values:
        yield str(one.get("content") if isinstance(one, dict) else one)
