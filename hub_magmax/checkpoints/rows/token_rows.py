"""Token rows: checkpoints of different vocabularies as checkpoints of one, their rows matched by token.

Embeddings and heads have a row per token, and fine-tuning with added tokens gives a task rows, and a
numbering, that others lack. Every checkpoint gets the rows of the merged model's vocabulary, in its order.

- A task without a row for a token of the base model gets the base model's: its task vector is zero there.
- A token that the base model lacks has no task vectors. Where checkpoints are merged its row is the same in
  all of them, the mean of its rows in the tasks that count, so that every method returns that mean. Otherwise
  a task keeps its own row, and the others get the plain mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import pairwise

import numpy as np

from hub_magmax.checkpoints.index import MERGEABLE_DTYPES, CheckpointIndex, TensorInfo
from hub_magmax.checkpoints.rows.vocabulary import (
    TOKENIZER_NAME,
    Key,
    OutputRows,
    RowChoice,
    Vocabulary,
    num_rows,
)
from hub_magmax.checkpoints.source import ComputedRows, TensorSource
from hub_magmax.errors import CheckpointError, MismatchError, RecipeError
from hub_magmax.kernels.lazy_imports import Tensor, torch
from hub_magmax.kernels.stored import Stored
from hub_magmax.recipe.tokenizer import MEAN
from hub_magmax.text import shown

#: Where a row is read that is in none of the sources, whose numbers are from 0 on: the mean over all that
#: have it by share, zeros, the mean of all rows, or the plain mean over the tasks that have it.
_MEAN, _ZERO, _PADDING, _EVEN = -1, -2, -3, -4

#: Rows of which a sum is formed at a time.
_BLOCK_ROWS = 4096


def with_token_rows(
    sources: Mapping[str, TensorSource],
    vocabularies: Mapping[str, Vocabulary | None],
    target: str,
    globs: Sequence[str],
    wanted: OutputRows | None = None,
) -> dict[str, TensorSource]:
    """Return the sources with the rows of the merged model, in its order, in all tensors that `globs` match.

    Args:
        sources: `base_model`, then the tasks.
        vocabularies: By source; None for a source without a tokenizer, which uses the base model's.
        target: Source of the merged model's tokenizer.
        globs: Names of tensors with a row per token.
        wanted: Rows of the merged model; by default those of `target`, rows of no token too.

    Raises:
        CheckpointError: If the target or the base model has no tokenizer.
        RecipeError: If a glob matches no tensor of the target.
        MismatchError: If a tensor has no rows of floating point, or if a source has no tokenizer, and another
            number of rows than the base model.
    """
    require_tokenizers(sources, vocabularies, ("base_model", target))
    names = _matched(sources[target], globs)
    for name, source in sources.items():
        _check_rows(source, names, is_target=name == target)
        if vocabularies[name] is None:
            _check_borrowed(source, sources["base_model"], names)
    known = {name: found or vocabularies["base_model"] or {} for name, found in vocabularies.items()}
    family = _Family(sources, known, target, wanted)
    return {name: TokenRows(name, family, names) for name in sources}


def require_tokenizers(
    sources: Mapping[str, TensorSource], vocabularies: Mapping[str, Vocabulary | None], names: Iterable[str]
) -> None:
    """Raise CheckpointError for the first of some sources that has no tokenizer."""
    for name in names:
        if vocabularies[name] is None:
            raise CheckpointError(
                f"there is no {TOKENIZER_NAME}, so the tokens of its rows are not known",
                where=sources[name].label,
                hint="Save its tokenizer there with transformers' `save_pretrained`.",
            )


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
    return tuple(name for name in tensors if any(fnmatchcase(name, glob) for glob in globs))


def _check_rows(source: TensorSource, names: Iterable[str], *, is_target: bool) -> None:
    for name in names:
        info = source.index.tensors.get(name)
        if info and (not info.shape or (is_target and info.dtype not in MERGEABLE_DTYPES)):
            raise MismatchError(
                f"tensor {shown(name)} has no rows of floating point",
                where=source.label,
                hint="Leave it out of token_rows.",
            )


def _check_borrowed(source: TensorSource, base: TensorSource, names: Iterable[str]) -> None:
    for name in names:
        found, expected = source.index.tensors.get(name), base.index.tensors.get(name)
        if found and expected and num_rows(found) != num_rows(expected):
            raise MismatchError(
                f"{num_rows(found)} rows and no {TOKENIZER_NAME}, so their tokens are not known",
                where=f"{source.label}, tensor {shown(name)}",
                expected=f"{num_rows(expected)} rows as in {base.label}, or a tokenizer",
                hint="Save the checkpoint's tokenizer beside it with transformers' `save_pretrained`.",
            )


class _Family:
    """All checkpoints of a merge with their vocabularies, to find and to read the row of a token.

    Args:
        sources: `base_model`, then the tasks.
        vocabularies: By source.
        target: Source whose rows the merged model has, where `wanted` does not say which.
        wanted: Rows of the merged model.
    """

    def __init__(
        self,
        sources: Mapping[str, TensorSource],
        vocabularies: Mapping[str, Vocabulary],
        target: str,
        wanted: OutputRows | None,
    ) -> None:
        self.sources, self._vocabularies, self._target = sources, vocabularies, target
        self._wanted, self._names = wanted, tuple(sources)
        self._places: dict[str, dict[str, np.ndarray]] = {}
        self._choices: dict[str, _Chosen] = {}

    def keys(self, name: str) -> Sequence[Key]:
        """Return what the rows of a tensor of the merged model stand for."""
        return self._keys(self._target, name) if self._wanted is None else self._wanted.keys

    def places(self, name: str) -> Mapping[str, np.ndarray]:
        """Return by source its row for each row of the merged model's tensor; -1 where it has none."""
        if name not in self._places:
            keys = self.keys(name)
            owns = {source: self._rows_of(source, name) for source in self.sources}
            self._places[name] = {
                source: np.array([own.get(key, -1) for key in keys], np.int64) for source, own in owns.items()
            }
        return self._places[name]

    def _rows_of(self, source: str, name: str) -> dict[Key, int]:
        return {key: row for row, key in enumerate(self._keys(source, name))}

    def _keys(self, source: str, name: str) -> list[Key]:
        """Return the token of each row of a tensor, or the row's number."""
        info = self.sources[source].index.tensors.get(name)
        return [self._vocabularies[source].get(row, row) for row in range(num_rows(info) if info else 0)]

    def chosen(self, name: str) -> _Chosen:
        """Return the rows about whose origin the recipe says something."""
        if name not in self._choices:
            found = self._wanted.choices if self._wanted is not None else {}
            rows = self._wanted.tokens if self._wanted is not None else {}
            origins = [self._origin_of(token, choice, name) for token, choice in found.items()]
            self._choices[name] = _Chosen(
                np.array([rows[token] for token in found], np.int64),
                np.array([origin for origin, _ in origins], np.int64),
                np.array([place for _, place in origins], np.int64),
                np.array([choice.is_forced for choice in found.values()], bool),
            )
        return self._choices[name]

    def _origin_of(self, token: str, choice: RowChoice, name: str) -> tuple[int, int]:
        """Return the number of a source, `_ZERO` or `_EVEN`, and which of its rows a token gets."""
        if choice.source is None:
            return (_EVEN if choice.key == MEAN else _ZERO), 0
        row = self._rows_of(choice.source, name).get(choice.key)
        if row is None:
            raise RecipeError(
                f"{shown(name)} of {choice.source} has no row for {shown(str(choice.key))}",
                key=("tokenizer", "tokens", token),
                hint="Take the row of another source, or of another token.",
            )
        return self._names.index(choice.source), row

    def num_known(self, name: str) -> int:
        """Return the number of rows of a tensor before its padding."""
        keys = self.keys(name)
        return next((row for row, key in enumerate(keys) if key is None), len(keys))

    def number_of(self, source: str) -> int:
        """Return the number by which origins name a source."""
        return self._names.index(source)

    def read(self, source: int, name: str, first: int, count: int) -> Tensor:
        """Return neighbouring rows of a source, flat."""
        found = self.sources[self._names[source]]
        info = found.index.tensors[name]
        width = info.num_elements // max(num_rows(info), 1)
        return found.read(name, first * width, (first + count) * width)

    def mean(self, name: str, row: int, shares: Mapping[str, float]) -> Tensor | None:
        """Return the mean of a row of the merged model over the sources that have it; None if none has it.

        Computed in float64, and stored in float32 unless a source holds float64: what sources of different
        dtypes get for one row is one number.
        """
        having = [source for source, places in self.places(name).items() if places[row] >= 0]
        if not having:
            return None
        weights = [shares.get(source, 0.0) for source in having]
        if not math.fsum(weights) > 0:
            weights = [1.0] * len(having)
        rows = [
            self.read(self.number_of(source), name, int(self.places(name)[source][row]), 1)
            for source in having
        ]
        total = math.fsum(weights)
        mean = sum(
            (found.to(torch.float64) * (weight / total) for found, weight in zip(rows, weights, strict=True)),
            start=torch.zeros((), dtype=torch.float64),
        )
        is_double = any(found.dtype == torch.float64 for found in rows)
        return mean if is_double else mean.to(torch.float32)


@dataclass(frozen=True)
class _Chosen:
    """Rows of the merged model about whose origin the recipe says something.

    Attributes:
        rows: Their numbers.
        origins: The numbers of the sources that they are read of, `_ZERO` or `_EVEN`.
        places: Their rows there.
        forced: Whether a source that has a row of its own gets it, too.
    """

    rows: np.ndarray
    origins: np.ndarray
    places: np.ndarray
    forced: np.ndarray


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
        self._paddings: dict[str, Tensor] = {}

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
        before, after = num_rows(info), len(self._family.keys(info.name))
        stop = info.start_byte + after * (info.num_bytes // max(before, 1))
        is_turned = before != info.shape[0]
        shape = (1, after) if is_turned else (after, *info.shape[1:])
        return TensorInfo(info.name, info.dtype, shape, info.file, info.start_byte, stop)

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
        info = self.index.tensors[name]
        width = info.num_elements // num_rows(info)
        first, last = start // width, -(-stop // width)
        origins, places = (values[first:last] for values in self._origin(name))
        pieces = [
            self._piece(name, int(origins[begin]), int(places[begin]), first + begin, end - begin)
            for begin, end in _runs(origins, places)
        ]
        return torch.cat(pieces)[start - first * width : stop - first * width]

    def _piece(self, name: str, origin: int, place: int, row: int, count: int) -> Tensor:
        """Return neighbouring rows of one origin, flat."""
        info = self.index.tensors[name]
        if origin >= 0:
            return self._family.read(origin, name, place, count)
        if origin == _PADDING:
            return self._padding(name)
        shares = self._shares_of(name) if origin == _MEAN else dict.fromkeys([*self._family.sources][1:], 1.0)
        found = None if origin == _ZERO else self._family.mean(name, row, shares)
        return torch.zeros(info.num_elements // num_rows(info)) if found is None else found

    def _padding(self, name: str) -> Tensor:
        """Return the mean of all rows that are no padding, in float32 unless they are float64."""
        if name not in self._paddings:
            info, known = self.index.tensors[name], self._family.num_known(name)
            width = info.num_elements // num_rows(info)
            total, is_double = torch.zeros(width, dtype=torch.float64), False
            for first in range(0, known, _BLOCK_ROWS):
                stop = min(first + _BLOCK_ROWS, known)
                found = self._rows(name, first * width, stop * width)
                is_double = found.dtype == torch.float64
                total += found.to(torch.float64).reshape(-1, width).sum(0)
            mean = total / max(known, 1)
            self._paddings[name] = mean if is_double else mean.to(torch.float32)
        return self._paddings[name]

    def _origin(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return where each row of a tensor is read (a source's number, or a code), and its number there."""
        if name not in self._origins:
            family, places = self._family, self._family.places(name)
            own, base, chosen = places[self._own], places["base_model"], family.chosen(name)
            known = base >= 0
            known[chosen.rows] = True  # as if the base model had it
            has_own = (own >= 0) & (known | (not self._is_settled(name)))
            origins = np.where(has_own, family.number_of(self._own), np.where(base >= 0, 0, _MEAN))
            rows = np.where(has_own, own, base)
            taken = chosen.forced | (own[chosen.rows] < 0)
            origins[chosen.rows[taken]] = chosen.origins[taken]
            rows[chosen.rows[taken]] = chosen.places[taken]
            origins[family.num_known(name) :] = _PADDING
            self._origins[name] = origins, rows
        return self._origins[name]


def _runs(origins: np.ndarray, places: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield the bounds of rows that lie together in one checkpoint; others are alone."""
    apart = (origins[1:] != origins[:-1]) | (places[1:] != places[:-1] + 1) | (origins[1:] < 0)
    bounds = [0, *(np.flatnonzero(apart) + 1).tolist(), len(origins)]
    return pairwise(bounds)
