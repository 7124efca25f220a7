"""Facts about checkpoints that decide what a configuration means: blocks, names, dtypes, tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from hub_magmax.recipe.importing.references import Place

#: dtypes of tensors that are merged.
FLOATING = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class ModelFacts:
    """Facts about one checkpoint, from its headers and small files.

    Attributes:
        dtypes: Of its tensors by name, as safetensors writes them.
        rows: Of tensors with two dimensions or more, by name.
        num_blocks: As its configuration says.
        tokens: Row of every token; empty where there is no tokenizer that can be read.
        is_adapter: Whether it is a LoRA adapter.
        rank: Of an adapter, where all its layers have the same.
        is_rank_stabilised: Whether an adapter's factor is that of rank-stabilised LoRA.
        adapter_base: The base model that an adapter names.
    """

    dtypes: Mapping[str, str]
    rows: Mapping[str, int] = field(default_factory=dict)
    num_blocks: int | None = None
    tokens: Mapping[str, int] = field(default_factory=dict)
    is_adapter: bool = False
    rank: int | None = None
    is_rank_stabilised: bool = False
    adapter_base: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors that are merged: all others are copied."""
        return tuple(name for name, dtype in self.dtypes.items() if dtype in FLOATING)


class Models(Protocol):
    """Looks checkpoints up."""

    def facts(self, place: Place) -> ModelFacts | None:
        """Return facts about a checkpoint; None where it cannot be read now."""

    def written(self, place: Place) -> str:
        """Return the name of a checkpoint as the recipe has it."""
