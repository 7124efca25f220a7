"""Blocks of a model, which only names of tensors tell: their numbers, stacks and ranges."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, WithJsonSchema

from hub_magmax.text import shown

#: Most blocks of a model; the deepest known ones have some hundreds.
MAX_BLOCKS = 10_000

#: From the first block to before the last.
Range = tuple[int, int]

#: A name's beginning, the first number between dots, and the rest.
_BLOCK = re.compile(r"(?:(.*?)\.)??(0|[1-9][0-9]{0,8})(?:\.(.*))?", re.DOTALL)

_FORM = "should be [first, end], such as [0, 8] for the blocks 0 to 7"
RANGE_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2}


class Block(NamedTuple):
    """Place of a tensor: stack `model.layers`, block 3, rest `mlp.w` of `model.layers.3.mlp.w`."""

    stack: str
    number: int
    rest: str


def block_of(tensor: str) -> Block | None:
    """Return the block of a tensor, by the first number between dots in its name; None without one.

    Of `model.layers.3.mlp.experts.7.w` it is 3 in `model.layers`; of Swin's names, such as
    `encoder.layers.2.blocks.0.norm.weight`, it is the stage.
    """
    found = _BLOCK.fullmatch(tensor)
    return None if found is None else Block(found[1] or "", int(found[2]), found[3] or "")


def depths_of(tensors: Iterable[str]) -> dict[str, int]:
    """Return the number of blocks of each stack, which is the highest number in it and 1."""
    found: dict[str, int] = {}
    for tensor in tensors:
        if (block := block_of(tensor)) is not None:
            found[block.stack] = max(found.get(block.stack, 0), block.number + 1)
    return found


def block_range(value: Any) -> Range:
    """Return blocks as a recipe writes them, `[first, end]`; raise ValueError for what is none."""
    numbers = [*value] if isinstance(value, list | tuple) else []
    if len(numbers) != 2 or any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
        raise ValueError(f"{shown(value, 60)} {_FORM}")
    first, end = numbers
    if not 0 <= first < end <= MAX_BLOCKS:
        what = "is no part of a model" if min(first, end) < 0 or end > MAX_BLOCKS else "has no block"
        raise ValueError(f"{value} {what}; it {_FORM}: the first one counts, and the end does not")
    return first, end


BlockRange = Annotated[Range, BeforeValidator(block_range), WithJsonSchema(RANGE_SCHEMA)]
