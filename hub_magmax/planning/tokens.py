"""Tokens that tasks' tokenizers have and the base model's lacks, and the other way round."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

from hub_magmax.checkpoints.pinning import read_side_file
from hub_magmax.checkpoints.rows.vocabulary import TOKENIZER_NAME, Vocabulary, read_vocabulary
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.errors import CheckpointError, LockError, SourceError
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.tokenizer import UNION
from hub_magmax.text import listed, shown

#: Larger tokenizers are not read for a notice; the largest known ones have some 35 MB.
_MAX_BYTES = 50_000_000

#: Tokens that are named.
_MOST_SHOWN = 5


@dataclass(frozen=True)
class TokenChange:
    """Tokens of one task's tokenizer that differ from the base model's.

    Attributes:
        task: Its name.
        added: Tokens that the base model lacks, by row.
        lacking: Tokens of the base model that the task lacks, by row.
        are_kept: Whether the merged model's tokenizer has all of those that are added.
    """

    task: str
    added: tuple[str, ...]
    lacking: tuple[str, ...]
    are_kept: bool


def token_changes(recipe: Recipe, lock: Lock, stored: Mapping[str, TensorSource]) -> tuple[TokenChange, ...]:
    """Return the tasks whose tokenizer has other tokens than the base model's.

    A tokenizer is read only if its file is another one.

    Args:
        recipe, lock: Of the merge.
        stored: The sources as they are stored, open, by name.
    """
    files = {name: source.side_files.get(TOKENIZER_NAME) for name, source in lock.sources.items()}
    others = _with_another(files)
    if not others:
        return ()
    first = {file: name for name, file in reversed(files.items())}
    read = cache(lambda file: _read(stored, lock, first[file]))
    base = read(files["base_model"])
    kept = _kept_tokens(recipe, lock, files, read)
    changes = [_change(name, read(files[name]), base, kept) for name in others]
    return tuple(change for change in changes if change.added or change.lacking)


def _kept_tokens(
    recipe: Recipe,
    lock: Lock,
    files: Mapping[str, str | None],
    read: Callable[[str | None], Vocabulary | None],
) -> set[str]:
    """Return the tokens of the output."""
    source = (lock.tokenizer.source if lock.tokenizer else None) or recipe.output.files_from
    kept = [*files.values()] if source == UNION else [files[source] or files["base_model"]]
    return {token for file in kept if file for token in (read(file) or {}).values()}


def _with_another(files: Mapping[str, str | None]) -> list[str]:
    """Return the sources whose tokenizer is another file than the base model's; none where that has none."""
    base = files["base_model"]
    return [name for name, file in files.items() if file not in (None, base)] if base else []


def _change(name: str, own: Vocabulary | None, base: Vocabulary | None, tokens: Set[str]) -> TokenChange:
    """Return what differs, given the output's tokens; nothing where a tokenizer could not be read."""
    if own is None or base is None:
        return TokenChange(name, (), (), True)
    added, lacking = _beyond(own, base), _beyond(base, own)
    return TokenChange(name, added, lacking, {*added} <= tokens)


def _beyond(one: Vocabulary, other: Vocabulary) -> tuple[str, ...]:
    """Return the tokens of a vocabulary that another one lacks, by row."""
    known = frozenset(other.values())
    return tuple(token for _, token in sorted(one.items()) if token not in known)


def _read(stored: Mapping[str, TensorSource], lock: Lock, name: str) -> Vocabulary | None:
    source = stored[name]
    if (source.size_of(TOKENIZER_NAME) or 0) > _MAX_BYTES:
        return None
    with suppress(CheckpointError, SourceError, LockError):  # who needs it says more
        return read_vocabulary(read_side_file(source, TOKENIZER_NAME, lock.sources[name]), source.label)
    return None


def token_notices(changes: tuple[TokenChange, ...], recipe: Recipe) -> Iterator[str]:
    """Yield what differs in the tokens, by name, and what becomes of them."""
    for change in changes:
        if change.added:
            added = f"{change.task} has {_named(change.added)} that the base model lacks"
            yield f"{added}; {_fate(change, recipe)}"
        if change.lacking:
            yield f"{change.task} lacks {_named(change.lacking)} of the base model"


def _named(tokens: tuple[str, ...]) -> str:
    names = listed([shown(token, 40) for token in tokens], _MOST_SHOWN)
    return f"{len(tokens):,} token{'s' if len(tokens) > 1 else ''} ({names})"


def _fate(change: TokenChange, recipe: Recipe) -> str:
    if not change.are_kept:
        return (
            "the merged model does not have them (tokenizer: union keeps those of all, "
            f"tokenizer: {change.task} those of {change.task})"
        )
    if recipe.matches_tokens:
        return "the merged model has them, each row the mean of the tasks that have it"
    return "they are in the merged model's tokenizer"
