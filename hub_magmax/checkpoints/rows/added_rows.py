"""Rows that adapters add to a vocabulary: embedding and head saved whole after tokens were added.

The base model's rows come first, as `resize_token_embeddings` keeps them, and the added ones follow. All
checkpoints get as many rows; those that lack them do not count in the added ones (`vocabulary`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from glob import escape

from hub_magmax.checkpoints.adapters.config import config_of, parse_config, resize_first
from hub_magmax.checkpoints.config import counts_at, stated_config
from hub_magmax.checkpoints.index import CheckpointIndex
from hub_magmax.checkpoints.pinning import read_small_file
from hub_magmax.checkpoints.rows.token_rows import with_token_rows
from hub_magmax.checkpoints.rows.vocabulary import TOKENIZER_NAME, num_rows, read_vocabulary
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.errors import MismatchError
from hub_magmax.text import listed, shown

#: Parts of the names of tensors with a row per token.
_PER_TOKEN = re.compile(r"embed|wte|shared|head|decoder|predictions|output|proj_out|lm_|final_logits")


def find_added_rows(
    base: TensorSource,
    index: CheckpointIndex,
    adapters: Mapping[str, TensorSource],
    whole: Mapping[str, Mapping[str, tuple[int, ...]]],
) -> dict[str, dict[str, int]]:
    """Return the rows of tensors that adapters hold whole, with more rows than tokens of the base model.

    Args:
        base: The base model; its config.json states the number of its tokens.
        index: Its tensors, tied ones under all of their names.
        adapters: By task.
        whole: By task, the shapes of tensors that an adapter holds whole, by the base model's names.

    Raises:
        MismatchError: If an adapter adds rows to some tensors of tokens only, or if two add rows that are not
            known to be of the same tokens.
    """
    sizes, found = {*counts_at(stated_config(base), "vocab_size").values()}, dict[str, dict[str, int]]()
    for task, shapes in whole.items():
        rows = _resized(index, shapes, sizes)
        if rows:
            _refuse_partial(adapters[task], index, rows, sizes)
            found[task] = rows
    _refuse_unknown({task: adapters[task] for task in found}, found, min(sizes, default=0))
    return found


def _resized(
    index: CheckpointIndex, shapes: Mapping[str, tuple[int, ...]], sizes: set[int]
) -> dict[str, int]:
    """Return the tensors with a row per token that have more rows than the base model's, and their rows."""
    found = {}
    for name, (rows, *width) in shapes.items():
        info = index.tensors.get(name)
        if info and info.shape[0] in sizes and info.shape[1:] == (*width,) and rows > info.shape[0]:
            found[name] = rows
    return found


def _refuse_partial(
    adapter: TensorSource, index: CheckpointIndex, rows: Mapping[str, int], sizes: set[int]
) -> None:
    name, count = next(iter(rows.items()))
    lacking = [
        other
        for other in index.tensors.keys() - rows.keys()
        if _PER_TOKEN.search(other) and index.tensors[other].shape and num_rows(index.tensors[other]) in sizes
    ]
    if lacking or len({*rows.values()}) > 1:
        others = listed([*map(shown, sorted(lacking) or list(rows)[1:])], 3)
        raise MismatchError(
            f"{shown(name)} has {count} rows, {count - index.tensors[name].shape[0]} for added tokens, and "
            f"{others} {'have' if len(lacking) > 1 else 'has'} not",
            where=adapter.label,
            expected="embedding and head resized alike, and both in the adapter",
            hint=resize_first(count, _model_class_of(adapter)),
        )


def _refuse_unknown(
    adapters: Mapping[str, TensorSource], rows: Mapping[str, Mapping[str, int]], start: int
) -> None:
    """Raise MismatchError unless rows that several adapters add are of the same tokens."""
    first, *others = adapters or [""]
    for other in others:
        count = min(*rows[first].values(), *rows[other].values())
        one, two = (_tokens(adapters[task], start, count) for task in (first, other))
        if one is None or two is None or one != two:
            why = "are other tokens in each" if one and two else "may be other tokens in each"
            raise MismatchError(
                f"{first} and {other} both add rows to the vocabulary, and rows {start} to {count - 1} {why}",
                where=adapters[other].label,
                expected=f"the same tokens, as each adapter's {TOKENIZER_NAME} tells",
                hint="Save each adapter's tokenizer beside it if the tokens are the same. If they are not: "
                + resize_first(max(rows[other].values()), _model_class_of(adapters[other])),
            )


def _model_class_of(adapter: TensorSource) -> str:
    return parse_config(config_of(adapter), adapter.label).model_class


def _tokens(adapter: TensorSource, start: int, stop: int) -> list[str | None] | None:
    """Return the tokens of rows from `start` to before `stop`, None where there is no tokenizer."""
    if TOKENIZER_NAME not in adapter.sizes:
        return None
    where = f"{adapter.label}, {TOKENIZER_NAME}"
    found = read_vocabulary(read_small_file(adapter, TOKENIZER_NAME), where)
    return [found.get(row) for row in range(start, stop)]


def with_added_rows(
    sources: Mapping[str, TensorSource], added: Mapping[str, Mapping[str, int] | None]
) -> dict[str, TensorSource]:
    """Return the sources, all with the rows that adapters add.

    Args:
        sources: `base_model`, then the tasks, adapters as checkpoints.
        added: By task, the rows of tensors with added ones.
    """
    rows = {task: found for task, found in added.items() if found}
    if not rows:
        return dict(sources)
    target = max(rows, key=lambda task: max(rows[task].values()))
    held = [name for name in rows[target] if name in sources[target].index.tensors]
    return with_token_rows(sources, {name: {} for name in sources}, target, [*map(escape, held)])
