"""Token rows: checkpoints of different vocabularies as checkpoints of one, their rows matched by token.

Embeddings and heads have a row per token, and fine-tuning with added tokens gives a task rows, and a
numbering, that others lack. Every checkpoint gets the rows of the merged model's vocabulary, in its order.
A checkpoint without a row for a token gets the mean of the token's rows in the checkpoints that have one, so
it does not move the average of that row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hub_magmax.checkpoints.index import MERGEABLE_DTYPES, CheckpointIndex, TensorInfo
from hub_magmax.checkpoints.source import DerivedSource, TensorFile, TensorSource
from hub_magmax.errors import CheckpointError, MismatchError, RecipeError
from hub_magmax.kernels.dtypes import torch_dtype
from hub_magmax.kernels.stored import Stored
from hub_magmax.text import shown

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

#: The file that knows every token's row.
TOKENIZER_NAME = "tokenizer.json"

#: Tokens by row. Rows that no token uses (padding) have their number as key.
Vocabulary = Mapping[int, str]


def read_vocabulary(content: bytes, where: str) -> Vocabulary:
    """Return the tokens of a `tokenizer.json`, by row.

    Raises:
        CheckpointError: If it is malformed.
    """
    try:
        values = json.loads(content)
        listed = values["model"]["vocab"]
        if isinstance(listed, list):  # Unigram: [token, score]
            tokens = {row: str(entry[0]) for row, entry in enumerate(listed)}
        else:
            tokens = {int(row): str(token) for token, row in listed.items()}
        added = {int(entry["id"]): str(entry["content"]) for entry in values.get("added_tokens") or ()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(
            f"not a tokenizer whose tokens can be listed ({type(error).__name__})",
            where=where,
            hint="Save it again with transformers' `save_pretrained`.",
        ) from error
    return tokens | added


def with_token_rows(
    sources: Mapping[str, TensorSource],
    vocabularies: Mapping[str, Vocabulary | None],
    target: str,
    globs: Sequence[str],
) -> dict[str, TensorSource]:
    """Return the sources with the rows that `target` has, in its order, in all tensors that `globs` match.

    Args:
        sources: `base_model`, then the tasks.
        vocabularies: By source; None for a source without a tokenizer, which uses the base model's.
        target: Source of the merged model's tokenizer.
        globs: Names of tensors with a row per token.

    Raises:
        CheckpointError: If the target or the base model has no tokenizer.
        RecipeError: If a glob matches no tensor of the target.
        MismatchError: If a source has no tokenizer, and another number of rows than the base model.
    """
    for name in ("base_model", target):
        if vocabularies[name] is None:
            raise CheckpointError(
                f"there is no {TOKENIZER_NAME}, so the tokens of its rows are not known",
                where=sources[name].label,
                hint="Save its tokenizer there with transformers' `save_pretrained`.",
            )
    names = _matched(sources[target], globs)
    known = {name: found or vocabularies["base_model"] or {} for name, found in vocabularies.items()}
    family = {name: _Rows(source, known[name]) for name, source in sources.items()}
    for name, source in sources.items():
        if vocabularies[name] is None:
            _check_borrowed(source, sources["base_model"], names)
    return {name: TokenRows(family[name], family[target], tuple(family.values()), names) for name in sources}


def _matched(source: TensorSource, globs: Sequence[str]) -> tuple[str, ...]:
    tensors = source.index.tensors
    for position, glob in enumerate(globs):
        if not any(fnmatchcase(name, glob) for name in tensors):
            raise RecipeError(
                f"the glob {glob!r} matches no tensor of {source.label}",
                where=f"recipe, token_rows.{position}",
                expected=f"a glob over names such as {min(tensors)!r}",
            )
    found = tuple(name for name in tensors if any(fnmatchcase(name, glob) for glob in globs))
    for name in found:
        if not tensors[name].shape or tensors[name].dtype not in MERGEABLE_DTYPES:
            raise MismatchError(
                f"tensor {shown(name)} has no rows of floating point",
                where=source.label,
                hint="Leave it out of token_rows.",
            )
    return found


def _check_borrowed(source: TensorSource, base: TensorSource, names: Iterable[str]) -> None:
    for name in names:
        found, expected = source.index.tensors.get(name), base.index.tensors.get(name)
        if found and expected and found.shape[:1] != expected.shape[:1]:
            raise MismatchError(
                f"{found.shape[0]} rows and no {TOKENIZER_NAME}, so their tokens are not known",
                where=f"{source.label}, tensor {shown(name)}",
                expected=f"{expected.shape[0]} rows as in {base.label}, or a tokenizer",
                hint="Save the checkpoint's tokenizer beside it with transformers' `save_pretrained`.",
            )


@dataclass(frozen=True)
class _Rows:
    """A source with its vocabulary, to find the row of a token."""

    source: TensorSource
    vocabulary: Vocabulary

    def keys(self, name: str) -> list[str | int]:
        """Return the token of each row of a tensor, or the row's number."""
        return [self.vocabulary.get(row, row) for row in range(self.source.index.tensors[name].shape[0])]

    def places(self, name: str, keys: Sequence[str | int]) -> list[int | None]:
        """Return the rows of these tokens; None for a token without a row."""
        if name not in self.source.index.tensors:
            return [None] * len(keys)
        own = {key: row for row, key in enumerate(self.keys(name))}
        return [own.get(key) for key in keys]

    def read(self, name: str, first: int, count: int) -> Tensor:
        """Return neighbouring rows, flat."""
        info = self.source.index.tensors[name]
        width = info.num_elements // max(info.shape[0], 1)
        return self.source.read(name, first * width, (first + count) * width)


class TokenRows(DerivedSource):
    """A checkpoint with the rows of another one's vocabulary in some tensors; a `TensorSource`.

    Args:
        own: The checkpoint.
        target: The checkpoint with the merged model's vocabulary.
        family: All checkpoints of the merge, for rows of tokens that this one lacks.
        names: The tensors.
    """

    def __init__(self, own: _Rows, target: _Rows, family: tuple[_Rows, ...], names: tuple[str, ...]) -> None:
        super().__init__(own.source)
        self._own, self._target, self._family = own, target, family
        self._names = tuple(name for name in names if name in own.source.index.tensors)
        self._places: tuple[str, dict[int, list[int | None]]] = ("", {})

    @cached_property
    def index(self) -> CheckpointIndex:
        index = self.source.index
        changed = {name: self._reshaped(index.tensors[name]) for name in self._names}
        return CheckpointIndex(index.label, index.shards, {**index.tensors, **changed})

    def _reshaped(self, info: TensorInfo) -> TensorInfo:
        num_rows = self._target.source.index.tensors[info.name].shape[0]
        row_bytes = info.num_bytes // max(info.shape[0], 1)
        stop = info.start_byte + num_rows * row_bytes
        return TensorInfo(
            info.name, info.dtype, (num_rows, *info.shape[1:]), info.file, info.start_byte, stop
        )

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return the elements `[start, stop)` of a tensor, flat."""
        if name not in self._names or stop == start:
            return self.source.read(name, start, stop)
        return self._rows(name, start, stop)

    def read_stored(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> Stored:
        """Return the same elements in their stored form."""
        if name not in self._names or stop == start:
            return self.source.read_stored(name, start, stop, out)
        found = Stored.of(self._rows(name, start, stop))
        if out is None:
            return found
        out[:] = found.bits
        return Stored(out, found.dtype)

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        import torch

        info = self.index.tensors[name]
        width = info.num_elements // info.shape[0]
        first, last = start // width, -(-stop // width)
        places = self._places_of(name)
        pieces = []
        for row, count in _runs(places[id(self._own)], first, last):
            place = places[id(self._own)][row]
            pieces.append(self._mean(name, row) if place is None else self._own.read(name, place, count))
        return torch.cat(pieces)[start - first * width : stop - first * width]

    def _places_of(self, name: str) -> dict[int, list[int | None]]:
        """Return the rows of the target's tokens in each checkpoint; those of the last tensor are kept."""
        held, places = self._places
        if held != name:
            keys = self._target.keys(name)
            places = {id(rows): rows.places(name, keys) for rows in self._family}
            self._places = name, places
        return places

    def _mean(self, name: str, row: int) -> Tensor:
        """Return the mean of a token's rows in the checkpoints that have it, in this one's dtype."""
        import torch

        places = self._places_of(name)
        found: list[Any] = []
        for rows in self._family:
            place = places[id(rows)][row]
            if place is not None:
                found.append(rows.read(name, place, 1).to(torch.float64))
        return torch.stack(found).mean(0).to(torch_dtype(self.index.tensors[name].dtype))

    def expect(self, names: Iterable[str], budget_bytes: int, *, in_part: bool = False) -> None:
        # Rows come in any order, so they are not fetched ahead.
        read = [name for name in names if name not in self._names]
        self.source.expect(read, budget_bytes, in_part=in_part)

    def release(self, name: str, stop: int) -> None:
        if name not in self._names:
            self.source.release(name, stop)

    def tensor_file(self, name: str) -> TensorFile | None:
        return None if name in self._names else self.source.tensor_file(name)


def _runs(places: Sequence[int | None], first: int, last: int) -> Iterator[tuple[int, int]]:
    """Yield the rows in `[first, last)` as (row, count); rows that lie together make one run."""
    row = first
    while row < last:
        place, count = places[row], 1
        if place is not None:
            while row + count < last and places[row + count] == place + count:
                count += 1
        yield row, count
        row += count
