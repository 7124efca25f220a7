"""Vocabularies: tokens by row, as tokenizers state them, and those of an output."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from hub_magmax.checkpoints.index import TensorInfo
from hub_magmax.checkpoints.pinning import read_side_file
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.errors import CheckpointError, RecipeError
from hub_magmax.recipe.lockfile import Lock, LockedTokenizer, LockedTokenRow
from hub_magmax.recipe.tokenizer import MEAN, UNION, ZERO
from hub_magmax.text import nearest, shown

#: The file that knows every token's row.
TOKENIZER_NAME = "tokenizer.json"

#: Tokens by row. Rows that no token uses (padding) have their number as key.
Vocabulary = Mapping[int, str]

#: A token; the number of a row that has none; or None for a row of padding.
Key = str | int | None

#: Ends of the names of tensors with a row per token, a pattern.
ROWS_BY_WORD = (
    r"(shared|embed_tokens|wte|word_embeddings?|tok_embeddings|tokens_embed|embed_in|embed_out|lm_head|"
    r"proj_out|output_projection|vocab_projector|token_embedding|(predictions|lm_head|head)\.decoder|"
    r"(backbone|rwkv)\.embeddings)\.weight|(predictions|lm_head)\.(decoder\.)?bias|final_logits_bias"
)


def num_rows(info: TensorInfo) -> int:
    """Return the number of rows of a tensor, which BART's `final_logits_bias` has along its last axis."""
    is_turned = info.name.endswith("final_logits_bias") and info.shape[:1] == (1,)
    return info.shape[-1 if is_turned else 0]


def read_vocabulary(content: bytes, where: str) -> Vocabulary:
    """Return the tokens of a `tokenizer.json`, by row.

    A token that is listed with several rows has the one that the tokenizers library gives it: the last in a
    list of pieces, and that of the model's vocabulary where an added token has another. The others are rows
    of no token.

    Raises:
        CheckpointError: If it is malformed.
    """
    try:
        values = json.loads(content)
        listed = values["model"]["vocab"]
        if isinstance(listed, list):  # Unigram: [token, score]
            learned = {str(entry[0]): row for row, entry in enumerate(listed)}
        else:
            learned = {str(token): int(row) for token, row in listed.items()}
        entries = values.get("added_tokens") or ()
        added = {str(entry["content"]): int(entry["id"]) for entry in entries}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(
            f"not a tokenizer whose tokens can be listed ({type(error).__name__})",
            where=where,
            hint="Save it again with transformers' `save_pretrained`.",
        ) from error
    by_row = {row: token for token, row in learned.items()}
    return by_row | {row: token for token, row in added.items() if token not in learned}


def read_vocabularies(lock: Lock, opened: Mapping[str, TensorSource]) -> dict[str, Vocabulary | None]:
    """Return the vocabularies of a lock's sources, None for one without a tokenizer.

    Args:
        lock: Says what the files were.
        opened: The sources as they are stored.
    """
    locked = lock.every_source
    return {
        name: read_vocabulary(
            read_side_file(source, TOKENIZER_NAME, locked[name]), f"{source.label}, {TOKENIZER_NAME}"
        )
        if TOKENIZER_NAME in source.sizes
        else None
        for name, source in opened.items()
    }


def wanted_rows(
    lock: Lock, vocabularies: Mapping[str, Vocabulary | None], files_from: str
) -> OutputRows | None:
    """Return the rows of a lock's output; None where they are those of the source of its files."""
    found = lock.tokenizer
    return None if found is None or found.source is None else output_rows(found, vocabularies, files_from)


def check_rows(
    wanted: OutputRows | None,
    vocabularies: Mapping[str, Vocabulary | None],
    opened: Mapping[str, TensorSource],
    names: Iterable[str],
) -> None:
    """Raise RecipeError for a token of an output that no model has a row of.

    Args:
        wanted: Rows of the output; None: nothing is checked.
        vocabularies: By source.
        opened: The sources as they are stored.
        names: Of tensors with a row for each token; one that a source lacks is not looked at.
    """
    known = {source: found or vocabularies["base_model"] or {} for source, found in vocabularies.items()}
    for name in names:
        stored = {source: opened[source].index.tensors.get(name) for source in opened}
        sizes = {source: num_rows(info) for source, info in stored.items() if info is not None}
        if wanted is not None and len(sizes) == len(stored):
            _check_rows_of(name, wanted, known, sizes)


def _stored(vocabulary: Vocabulary, size: int) -> Iterator[str]:
    """Yield the tokens that have one of so many rows."""
    return (token for row, token in vocabulary.items() if row < size)


def _check_rows_of(
    name: str,
    wanted: OutputRows,
    known: Mapping[str, Vocabulary],
    sizes: Mapping[str, int],
) -> None:
    stored = {token for source in known for token in _stored(known[source], sizes[source])}
    stored |= wanted.choices.keys()
    lost = [token for token in wanted.tokens if token not in stored]
    if lost:
        source = next(source for source, found in known.items() if lost[0] in found.values())
        raise RecipeError(
            f"no model has a row of the token {shown(lost[0])}: {shown(name)} of {source} has "
            f"{sizes[source]:,} rows, and its tokenizer more tokens",
            key=("tokenizer",),
            expected="a row for each token",
            hint="Resize the model's embeddings (`resize_token_embeddings`) and save it, or say the row: "
            f"tokenizer.tokens: {{{shown(lost[0])}: {{take: zero}}}}.",
        )


@dataclass(frozen=True)
class RowChoice:
    """Row that a token gets: for sources that lack it, or for all.

    Attributes:
        source: Whose row it is; None for zeros, and for the mean of the tasks that have the token.
        key: Which one of its rows; `zero` or `mean` without a source.
        is_forced: Whether a source that has a row of its own gets it, too.
    """

    source: str | None
    key: Key
    is_forced: bool


@dataclass(frozen=True)
class OutputRows:
    """Rows that tensors of tokens have in an output.

    Attributes:
        keys: Of the rows, in order.
        choices: By token, where the recipe says whose row it gets.
    """

    keys: tuple[Key, ...]
    choices: Mapping[str, RowChoice] = field(default_factory=dict, hash=False)

    @property
    def tokens(self) -> dict[str, int]:
        """The tokens, with their rows."""
        return {key: row for row, key in enumerate(self.keys) if isinstance(key, str)}


def output_rows(
    tokenizer: LockedTokenizer, vocabularies: Mapping[str, Vocabulary | None], files_from: str
) -> OutputRows:
    """Return the rows of an output: those of one source's tokens, or of the tokens of all, and padding.

    The tokens of all are those of the source of the output's files, in its rows, and then those that
    the base model and the tasks have more, in this order and each by row. Rows of no token after the last one
    are left out.

    Args:
        tokenizer: Of the lock.
        vocabularies: By source, `base_model` and the tasks.
        files_from: Source of the output's files.

    Raises:
        RecipeError: If the recipe says something of a token that is not there.
    """
    first = files_from if tokenizer.source in (None, UNION) else tokenizer.source
    known = vocabularies[first] or {}
    keys: list[Key] = [known.get(row, row) for row in range(max(known, default=-1) + 1)]
    if tokenizer.source == UNION:
        keys += _added(keys, [found for name, found in vocabularies.items() if name != first and found])
    choices = dict(_choices(tokenizer, frozenset(keys), vocabularies))
    multiple = tokenizer.pad_to_multiple_of or 1
    return OutputRows((*keys, *[None] * (-len(keys) % multiple)), choices)


def _added(keys: Iterable[Key], others: Iterable[Vocabulary]) -> list[Key]:
    """Return the tokens that are not among keys, in order."""
    known = {*keys}
    new = dict.fromkeys(token for found in others for _, token in sorted(found.items()) if token not in known)
    return [*new]


def _choices(
    tokenizer: LockedTokenizer, keys: frozenset[Key], vocabularies: Mapping[str, Vocabulary | None]
) -> Iterator[tuple[str, RowChoice]]:
    for token, row in tokenizer.tokens.items():
        if token not in keys:
            tokens = [key for key in keys if isinstance(key, str)]
            raise RecipeError(
                f"the tokenizer of the output has no token {shown(token)}",
                key=("tokenizer", "tokens", token),
                hint=nearest(token, tokens) or "Write it as tokenizer.json does, such as 'Ġthe'.",
            )
        if row.take in (ZERO, MEAN):
            yield token, RowChoice(None, row.take, row.force)
        else:
            known = vocabularies[row.take] or vocabularies["base_model"] or {}
            yield token, RowChoice(row.take, _key_of(token, row, known), row.force)


def _key_of(token: str, row: LockedTokenRow, known: Vocabulary) -> Key:
    """Return which row of a source a token gets, given the source's vocabulary."""
    if row.token_id is not None:
        return known.get(row.token_id, row.token_id)
    wanted = token if row.token is None else row.token
    if wanted not in known.values():
        raise RecipeError(
            f"{row.take} has no token {shown(wanted)}",
            key=("tokenizer", "tokens", token),
            hint=nearest(wanted, [*known.values()]) or "Name another token of it: token: TOKEN.",
        )
    return wanted
