"""Tokens that configurations name by their rows, where an output has other rows than its configuration."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from hub_magmax.checkpoints.config import Path, is_count, level_at, levels

#: New rows of tokens by old ones; None for a token that the output lacks.
Moved = Mapping[int, int | None]

#: Keys of configurations that name tokens of texts; those of audio codes and units have rows of their own.
_IDS = re.compile(
    r"(?!(tts_)?code[cb]|t2u_|acoustic_)(\w+_)?token_(ids?|index)|forced_\w+_id|(begin_)?suppress_tokens|"
    r"(bad|force)_words_ids|(lang|task)_to_id"
)


def moved_ids(config: Mapping[str, Any], ids: Moved, instead: Mapping[str, Any]) -> dict[Path, Any]:
    """Return the values of a configuration that name tokens by rows which are others in the output.

    Args:
        config: That the output gets, with nested ones.
        ids: Rows of its tokens in the output.
        instead: Configuration of the source of the output's tokenizer. Where a value names a token that the
            output lacks, its value is taken, or else the token is left out of a list, or None.
    """
    found: dict[Path, Any] = {}
    for path, level in levels(config) if ids else ():
        for key, value in level.items():
            new = _followed(key, value, ids, level_at(instead, path))
            if new != value:
                found[*path, key] = new
    return found


def _followed(key: str, value: Any, ids: Moved, instead: Mapping[str, Any]) -> Any:
    """Return the value of a key with the new rows; as it is where it names no tokens."""
    change = _CHANGES.get(key, _changed if _IDS.fullmatch(key) else None)
    if change is None:
        return value
    kept = change(value, {row: row if new is not None else None for row, new in ids.items()})
    theirs = instead.get(key) if kept != value else None
    return change(value, ids) if theirs is None else theirs


def _changed(value: Any, ids: Moved) -> Any:
    """Return a value with the new rows at any depth, without those of tokens that are gone."""
    if isinstance(value, Mapping):
        return {key: new for key, one in value.items() if (new := _changed(one, ids)) is not None}
    if isinstance(value, list):
        return [new for one in value if (new := _changed(one, ids)) is not None]
    return ids.get(value, value) if is_count(value) else value


def _changed_pairs(value: Any, ids: Moved) -> Any:
    """Return pairs of a place in the text and a token with the new rows."""
    pairs = value if isinstance(value, list) else []
    is_of_pairs = bool(pairs) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)
    return [[place, _changed(row, ids)] for place, row in pairs] if is_of_pairs else value


#: Keys whose values have a form of their own.
_CHANGES: Mapping[str, Callable[[Any, Moved], Any]] = {"forced_decoder_ids": _changed_pairs}
