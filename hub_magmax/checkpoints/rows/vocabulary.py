"""Token rows: checkpoints of different vocabularies as checkpoints of one, their rows matched by token.

Embeddings and heads have a row per token, and fine-tuning with added tokens gives a task rows, and a
numbering, that others lack. Every checkpoint gets the rows of the merged model's vocabulary, in its order.

- A task without a row for a token of the base model gets the base model's: its task vector is zero there.
- A token that the base model lacks has no task vectors. Where checkpoints are merged its row is the same in
  all of them, the mean of its rows in the tasks that count, so that every method returns that mean. Otherwise
  a task keeps its own row, and the others get the plain mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from hub_magmax.checkpoints.index import MERGEABLE_DTYPES, CheckpointIndex, TensorInfo
from hub_magmax.checkpoints.source import ComputedRows, TensorSource
from hub_magmax.errors import CheckpointError, MismatchError, RecipeError
from hub_magmax.kernels.stored import Stored
from hub_magmax.text import shown

if TYPE_CHECKING:
    from torch import Tensor

#: The file that knows every token's row.
TOKENIZER_NAME = "tokenizer.json"

#: Tokens by row. Rows that no token uses (padding) have their number as key.
Vocabulary = Mapping[int, str]

#: Where a row is read: in the checkpoint itself, in the base model, or in all that have it, as their mean.
_OWN, _BASE, _MEAN = 0, 1, 2


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
    for name, source in sources.items():
        if vocabularies[name] is None:
            _check_borrowed(source, sources["base_model"], names)
    known = {name: found or vocabularies["base_model"] or {} for name, found in vocabularies.items()}
    family = _Family(sources, known, target)
    return {name: TokenRows(name, family, names) for name in sources}


def with_settled_rows(
    sources: Mapping[str, TensorSource],
    shares_of: Callable[[str], Mapping[str, float]],
    is_merged: Callable[[str], bool],
) -> dict[str, TensorSource]:
    """Return the sources with one row, in all of them, for each token that the base model lacks.

    Args:
        sources: `base_model`, then the tasks, as `with_token_rows` returned them; others are left alone.
        shares_of: Returns for a tensor, by task, how much its rows count, at least 0; where only tasks of 0
            have a token, they count equally.
        is_merged: Says whether a tensor is merged, and not copied from one of the sources.
    """
    return {
        name: source.settled(shares_of, is_merged) if isinstance(source, TokenRows) else source
        for name, source in sources.items()
    }


def _matched(source: TensorSource, globs: Sequence[str]) -> tuple[str, ...]:
    tensors = source.index.tensors
    for position, glob in enumerate(globs):
        if not any(fnmatchcase(name, glob) for name in tensors):
            raise RecipeError(
                f"the glob {glob!r} matches no tensor of {source.label}",
                key=("token_rows", position),
                expected=f"a glob over names such as {min(tensors)!r}",
                hint="A head that is tied to the embedding has its rows; leave its line out.",
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


class _Family:
    """All checkpoints of a merge with their vocabularies, to find and to read the row of a token.

    Args:
        sources: `base_model`, then the tasks.
        vocabularies: By source.
        target: Source of the merged model's vocabulary.
    """

    def __init__(
        self, sources: Mapping[str, TensorSource], vocabularies: Mapping[str, Vocabulary], target: str
    ) -> None:
        self.sources, self._vocabularies, self._target = sources, vocabularies, target
        self._places: dict[str, dict[str, np.ndarray]] = {}

    def num_rows(self, name: str) -> int:
        """Return how many rows a tensor of the merged model has."""
        return self.sources[self._target].index.tensors[name].shape[0]

    def places(self, name: str) -> Mapping[str, np.ndarray]:
        """Return by source its row for each row of the merged model's tensor; -1 where it has none."""
        if name not in self._places:
            keys = self._keys(self._target, name)
            found = {}
            for source in self.sources:
                own = {key: row for row, key in enumerate(self._keys(source, name))}
                found[source] = np.array([own.get(key, -1) for key in keys], np.int64)
            self._places[name] = found
        return self._places[name]

    def _keys(self, source: str, name: str) -> list[str | int]:
        """Return the token of each row of a tensor, or the row's number."""
        info = self.sources[source].index.tensors.get(name)
        return [self._vocabularies[source].get(row, row) for row in range(info.shape[0] if info else 0)]

    def read(self, source: str, name: str, first: int, count: int) -> Tensor:
        """Return neighbouring rows of a source, flat."""
        info = self.sources[source].index.tensors[name]
        width = info.num_elements // max(info.shape[0], 1)
        return self.sources[source].read(name, first * width, (first + count) * width)

    def mean(self, name: str, row: int, shares: Mapping[str, float]) -> Tensor:
        """Return the mean of a row of the merged model over the sources that have it.

        Computed in float64, and stored in float32 unless a source holds float64: what sources of different
        dtypes get for one row is one number.
        """
        import torch

        having = [source for source, places in self.places(name).items() if places[row] >= 0]
        weights = [shares.get(source, 0.0) for source in having]
        if not math.fsum(weights) > 0:
            weights = [1.0] * len(having)
        rows = [self.read(source, name, int(self.places(name)[source][row]), 1) for source in having]
        total = math.fsum(weights)
        mean = sum(
            (found.to(torch.float64) * (weight / total) for found, weight in zip(rows, weights, strict=True)),
            start=torch.zeros((), dtype=torch.float64),
        )
        is_double = any(found.dtype == torch.float64 for found in rows)
        return mean if is_double else mean.to(torch.float32)


class TokenRows(ComputedRows):
    """A checkpoint with the rows of another one's vocabulary in some tensors; a `TensorSource`.

    Args:
        own: Name of the checkpoint.
        family: All checkpoints of the merge, for rows of tokens that this one lacks.
        names: The tensors.
        shares_of: Returns for a tensor by task how much its row counts for a token that the base model lacks.
        is_settled: Says for which tensors shares are used.
    """

    def __init__(
        self,
        own: str,
        family: _Family,
        names: tuple[str, ...],
        shares_of: Callable[[str], Mapping[str, float]] = lambda name: {},
        is_settled: Callable[[str], bool] = lambda name: False,
    ) -> None:
        super().__init__(family.sources[own], names)
        self._own, self._family, self._all_names = own, family, names
        self._shares_of, self._is_settled = shares_of, is_settled
        self._origins: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def settled(
        self, shares_of: Callable[[str], Mapping[str, float]], is_merged: Callable[[str], bool]
    ) -> TokenRows:
        """Return the same checkpoint with the rows that `with_settled_rows` describes."""
        return TokenRows(self._own, self._family, self._all_names, shares_of, is_merged)

    @cached_property
    def index(self) -> CheckpointIndex:
        index = self.source.index
        changed = {name: self._reshaped(index.tensors[name]) for name in self._names}
        return CheckpointIndex(index.label, index.shards, {**index.tensors, **changed})

    def _reshaped(self, info: TensorInfo) -> TensorInfo:
        num_rows = self._family.num_rows(info.name)
        row_bytes = info.num_bytes // max(info.shape[0], 1)
        stop = info.start_byte + num_rows * row_bytes
        return TensorInfo(
            info.name, info.dtype, (num_rows, *info.shape[1:]), info.file, info.start_byte, stop
        )

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return the elements `[start, stop)` of a tensor, flat; wider than stored where means need it."""
        if name not in self._names or stop == start:
            return self.source.read(name, start, stop)
        return self._rows(name, start, stop)

    def read_stored(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> Stored:
        """Return the same elements in their stored form."""
        if name not in self._names or stop == start:
            return self.source.read_stored(name, start, stop, out)
        found = Stored.of(self._rows(name, start, stop))
        if out is None or found.dtype != self.index.tensors[name].dtype:
            return found
        out[:] = found.bits
        return Stored(out, found.dtype)

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        import torch

        info = self.index.tensors[name]
        width = info.num_elements // info.shape[0]
        first, last, shares = start // width, -(-stop // width), self._shares_of(name)
        origins, places = (values[first:last] for values in self._origin(name))
        pieces = [
            self._family.mean(name, first + begin, shares)
            if origins[begin] == _MEAN
            else self._family.read(
                self._own if origins[begin] == _OWN else "base_model", name, int(places[begin]), end - begin
            )
            for begin, end in _runs(origins, places)
        ]
        return torch.cat(pieces)[start - first * width : stop - first * width]

    def _origin(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return where each row of a tensor is read (`_OWN`, `_BASE` or `_MEAN`), and its number there."""
        if name not in self._origins:
            own, base = (self._family.places(name)[source] for source in (self._own, "base_model"))
            has_own = (own >= 0) & ((base >= 0) | (not self._is_settled(name)))
            origins = np.where(has_own, _OWN, np.where(base >= 0, _BASE, _MEAN))
            self._origins[name] = origins, np.where(has_own, own, base)
        return self._origins[name]


def _runs(origins: np.ndarray, places: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield the bounds of rows that lie together in one checkpoint; means are alone."""
    apart = (origins[1:] != origins[:-1]) | (places[1:] != places[:-1] + 1) | (origins[1:] == _MEAN)
    bounds = [0, *(np.flatnonzero(apart) + 1).tolist(), len(origins)]
    return pairwise(bounds)
