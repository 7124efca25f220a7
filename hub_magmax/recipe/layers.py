"""Stack of layers in a recipe: which blocks of which checkpoints are the blocks of the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from hub_magmax.recipe.blocks import RANGE_SCHEMA, Range, block_range
from hub_magmax.recipe.lockfile import LockedSlice
from hub_magmax.recipe.values import MAX_PLACE_LENGTH, Spec


def _ranges(value: Any) -> Range | dict[str, Range]:
    if not isinstance(value, Mapping):
        return block_range(value)
    if not value:
        raise ValueError("{} names no source; write {base_model: [0, 8], TASK: [4, 12]}, or [0, 8] for all")
    return {str(name): block_range(numbers) for name, numbers in value.items()}


class LayerSlice(Spec):
    """Blocks of the output that follow each other, as many as each range holds.

    With `take` they are copied from that source; without it, they are merged, of every source the blocks that
    `blocks` says. `of` is the beginning of the blocks' names, where a model has several stacks of blocks.
    """

    take: Annotated[str, Field(min_length=1)] | None = None
    blocks: Annotated[
        Range | dict[str, Range],
        BeforeValidator(_ranges),
        WithJsonSchema({"anyOf": [RANGE_SCHEMA, {"type": "object", "additionalProperties": RANGE_SCHEMA}]}),
    ]
    of: Annotated[str, Field(min_length=1, max_length=MAX_PLACE_LENGTH)] | None = None

    def locked(self, sources: Sequence[str]) -> LockedSlice:
        """Return the slice as a lock stores it: a range for each source that counts.

        Args:
            sources: `base_model` and the tasks.
        """
        blocks = self.blocks
        if not isinstance(blocks, dict):
            blocks = dict.fromkeys([self.take] if self.take else sources, blocks)
        return LockedSlice(self.take, {name: blocks[name] for name in sources if name in blocks}, self.of)
