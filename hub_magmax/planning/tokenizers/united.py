"""A `tokenizer.json` with the tokens of several: added to one, each with the row that the output has for it.

Tokens that a tokenizer was given after training (`added_tokens`) match text as they stand, and stay what they
are. Tokens that a tokenizer learned become part of the model's vocabulary: WordPiece, WordLevel and Unigram
then write text with them. BPE writes text by its merges; those of a tokenizer are taken over where it has all
merges of the first one, in the same order, and more.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from hub_magmax.checkpoints.rows.vocabulary import TOKENIZER_NAME
from hub_magmax.errors import CheckpointError, RecipeError
from hub_magmax.text import listed, shown

#: Below the lowest score of pieces, for those of Unigram that only stand for added tokens.
_BELOW = 10.0


@dataclass(frozen=True)
class Source:
    """A tokenizer among those that are united.

    Attributes:
        name: Of the source.
        values: Of its `tokenizer.json`.
    """

    name: str
    values: Mapping[str, Any]

    @property
    def added(self) -> dict[str, Mapping[str, Any]]:
        """Its added tokens by content."""
        return {str(entry["content"]): entry for entry in self.values.get("added_tokens") or ()}

    @property
    def model(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.values["model"]
        return found

    @property
    def kind(self) -> tuple[str, ...]:
        """How it writes text: the kinds of its model and of what stands before and behind it."""
        parts = (self.model, self.values.get("pre_tokenizer"), self.values.get("decoder"))
        return tuple(str((part or {}).get("type")) for part in parts)

    @property
    def scores(self) -> dict[str, float]:
        """Scores of the pieces of a Unigram model."""
        return {str(piece): float(score) for piece, score in self.model["vocab"]}

    @property
    def merges(self) -> list[Any]:
        """Merges of a BPE model, each as a pair."""
        found = self.model.get("merges") or ()
        return [merge.split(" ", 1) if isinstance(merge, str) else list(merge) for merge in found]


def united(
    first: Source, others: Sequence[Source], tokens: Mapping[str, int]
) -> tuple[dict[str, Any], set[str]]:
    """Return the values of a `tokenizer.json` with all tokens, and those that it never writes text with.

    Args:
        first: The tokenizer that gets the tokens of others.
        others: Those that have more, in order.
        tokens: All tokens of the output, with their rows; the first tokenizer's keep theirs.

    Raises:
        RecipeError: If learned tokens are of tokenizers that write text in different ways.
        CheckpointError: If the tokenizers library does not give a token its row.
    """
    every = {token: entry for other in reversed(others) for token, entry in other.added.items()}
    added, learned = _new(tokens, {*_listed(first)}, every)
    _refuse_other_kinds(first, others, learned)
    merges, entries = _more_merges(first, others, learned), [*first.added.values(), *added]
    for stored in (learned, tokens):  # the library may count on from the learned tokens, all of them are safe
        model = {**_model(first, others, tokens, stored), **_with_merges(first, merges)}
        values = {**first.values, "added_tokens": entries, "model": model}
        if not (wrong := _misplaced(values, tokens)):
            return values, _never_written(first, learned, merges)
    raise CheckpointError(
        f"the tokenizers library gives {listed([*map(shown, wrong)], 3)} another row than the output has",
        where=f"{TOKENIZER_NAME} of {first.name}",
        expected="rows that are counted on from the last token",
        hint="Name the source whose tokenizer the output gets: tokenizer: SOURCE.",
    )


def _new(
    tokens: Mapping[str, int], known: Set[str], every: Mapping[str, Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Return the new tokens: the entries of added ones, and the rows of learned ones."""
    new = {token: row for token, row in tokens.items() if token not in known}
    added = [{**every[token], "id": row} for token, row in new.items() if token in every]
    return added, {token: row for token, row in new.items() if token not in every}


def _model(
    first: Source, others: Sequence[Source], tokens: Mapping[str, int], stored: Mapping[str, int]
) -> dict[str, Any]:
    """Return a model with more tokens in its vocabulary: those of `stored`."""
    model, vocabulary = dict(first.model), first.model["vocab"]
    if isinstance(vocabulary, list):
        model["vocab"] = _pieces(first, others, tokens) if stored else vocabulary
    else:
        more = {token: row for token, row in stored.items() if token not in vocabulary}
        model["vocab"] = {**vocabulary, **more}
    return model


def _listed(source: Source) -> list[str]:
    vocabulary = source.model["vocab"]
    pieces = (entry[0] for entry in vocabulary) if isinstance(vocabulary, list) else vocabulary
    return [*map(str, pieces), *source.added]


def _refuse_other_kinds(first: Source, others: Iterable[Source], learned: Mapping[str, int]) -> None:
    for other in others:
        more = [token for token in _listed(other) if token in learned]
        if more and other.kind != first.kind:
            kinds = [f"{source.name} ({', '.join(source.kind)})" for source in (first, other)]
            raise RecipeError(
                f"the tokenizers of {listed(kinds)} write text in different ways, and {other.name} has "
                f"{len(more):,} learned tokens more, such as {shown(more[0])}",
                key=("tokenizer", "source"),
                hint="Name the source whose tokenizer the output gets, in place of union.",
            )


def _more_merges(first: Source, others: Iterable[Source], learned: Mapping[str, int]) -> list[Any]:
    """Return the merges of new tokens, of tokenizers that have all merges of the first one and more."""
    if first.model.get("type") != "BPE":
        return []
    start, found = first.merges, list[Any]()
    for other in others:
        own = other.merges
        if own[: len(start)] == start:
            found += [merge for merge in own[len(start) :] if merge not in found]
    return [merge for merge in found if "".join(merge) in learned]


def _with_merges(first: Source, merges: Sequence[Any]) -> dict[str, Any]:
    """Return the merges of a model with more of them, as it stores them; nothing where there are no more."""
    stored: list[Any] = [*(first.model.get("merges") or ())]
    are_texts = bool(stored) and isinstance(stored[0], str)
    more = [" ".join(merge) for merge in merges] if are_texts else [*merges]
    return {"merges": [*stored, *more]} if more else {}


def _pieces(first: Source, others: Sequence[Source], tokens: Mapping[str, int]) -> list[list[Any]]:
    """Return the pieces of a Unigram model up to the last token of the output, in the order of rows."""
    pieces: list[list[Any]] = [[str(piece), float(score)] for piece, score in first.model["vocab"]]
    scores = {piece: score for other in reversed(others) for piece, score in other.scores.items()}
    lowest = min(first.scores.values(), default=0.0) - _BELOW
    by_row = {row: token for token, row in tokens.items()}
    for row in range(len(pieces), max(by_row) + 1):
        token = by_row.get(row, f"<row {row}>")
        is_added = any(token in source.added for source in (first, *others))
        pieces.append([token, lowest if is_added else scores.get(token, lowest)])
    return pieces


def _never_written(first: Source, learned: Mapping[str, int], merges: Iterable[Any]) -> set[str]:
    """Return learned tokens that no merge makes."""
    if first.model.get("type") != "BPE":
        return set()
    made = {"".join(merge) for merge in merges}
    return {token for token in learned if token not in made}


def _misplaced(values: Mapping[str, Any], tokens: Mapping[str, int]) -> list[str]:
    """Return the tokens that the library gives another row.

    Raises:
        CheckpointError: If it cannot read the file.
    """
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_str(json.dumps(values))
    except Exception as error:  # the library raises no narrower one
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"the tokenizers library cannot read it with more tokens ({reason})",
            where=TOKENIZER_NAME,
            hint="Save the tokenizers again with transformers' `save_pretrained`, or name one of them: "
            "tokenizer: SOURCE.",
        ) from error
    return [token for token, row in tokens.items() if found.token_to_id(token) != row]
