"""Tokens that configurations name by their rows, where an output has other rows than its configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hub_magmax.checkpoints.config import Path, level_at, levels

#: New rows of tokens by old ones; None for a token that the output lacks.
Moved = Mapping[int, int | None]

#: Keys of configurations that name tokens of texts; those of audio codes and units have rows of their own.
_IDS = re.compile(
    r"(?!(tts_)?code[cb]|t2u_|acoustic_)(\w+_)?token_(ids?|index)|forced_\w+_id|(begin_)?suppress_tokens|"
    r"(bad|force)_words_ids|(lang|task)_to_id"
)

#: Pairs of a place in the output and of the token there.
_PLACED = "forced_decoder_ids"


def moved_ids(config: Mapping[str, Any], ids: Moved, instead: Mapping[str, Any]) -> dict[Path, Any]:
    """Return the values of a configuration that name tokens by rows which are others in the output.

    Args:
        config: That the output gets, with nested ones.
        ids: Rows of its tokens in the output.
        instead: Configuration of the source of the output's tokenizer. Where a value names a token that the
            output lacks, its value is taken, or else the token is left out of a list, or None.
    """
    found: dict[Path, Any] = {}
    gone = frozenset(row for row, new in ids.items() if new is None)
    for path, level in levels(config) if ids else ():
        for key, value in level.items():
            if _IDS.fullmatch(key) or key == _PLACED:
                new = level_at(instead, path).get(key) if _names_any(value, gone) else None
                new = _moved(value, ids, is_placed=key == _PLACED) if new is None else new
                if new != value:
                    found[*path, key] = new
    return found


def _names_any(value: Any, rows: frozenset[int]) -> bool:
    if isinstance(value, Mapping):
        return any(_names_any(one, rows) for one in value.values())
    if isinstance(value, list):
        return any(_names_any(one, rows) for one in value)
    return isinstance(value, int) and value in rows


def _moved(value: Any, ids: Moved, *, is_placed: bool) -> Any:
    """Return a value with the new rows at any depth; of pairs with a place the second entry only."""
    if isinstance(value, Mapping):
        new = {key: _moved(one, ids, is_placed=is_placed) for key, one in value.items()}
        return {key: one for key, one in new.items() if one is not None or value[key] is None}
    if isinstance(value, list):
        is_pair = is_placed and len(value) == 2 and not any(isinstance(one, list) for one in value)
        if is_pair:
            return [value[0], _moved(value[1], ids, is_placed=False)]
        moved = [(_moved(one, ids, is_placed=is_placed), one) for one in value]
        return [new for new, one in moved if new is not None or one is None]
    return ids.get(value, value) if isinstance(value, int) and not isinstance(value, bool) else value
