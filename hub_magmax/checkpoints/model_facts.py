"""Facts about checkpoints that configurations of other tools depend on, from headers and small files."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hub_magmax.checkpoints.config import stated_config, values_of
from hub_magmax.checkpoints.index import ADAPTER_CONFIG_NAME, is_adapter
from hub_magmax.checkpoints.locations import locate
from hub_magmax.checkpoints.rows.vocabulary import TOKENIZER_NAME, read_vocabulary
from hub_magmax.checkpoints.source import FileSource
from hub_magmax.errors import HubMagmaxError
from hub_magmax.recipe.importing.model_facts import ModelFacts
from hub_magmax.recipe.importing.references import Place
from hub_magmax.recipe.model_names import is_folder, relative_path

LOG = logging.getLogger(__name__)

#: Keys of configurations that count blocks.
_BLOCKS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

#: Configurations of the language model within that of a larger one.
_NESTED = ("text_config", "llm_config", "language_config")


@dataclass
class CheckpointFacts:
    """Looks checkpoints up, each once.

    Attributes:
        folder: Where relative paths of the configuration start.
        recipe_folder: Where those of the recipe do.
        unread: Why a checkpoint could not be read, by its name.
    """

    folder: Path
    recipe_folder: Path
    unread: dict[str, str] = field(default_factory=dict)
    _known: dict[Place, ModelFacts | None] = field(default_factory=dict)

    def facts(self, place: Place) -> ModelFacts | None:
        """Return facts about a checkpoint; None where it cannot be read now."""
        if place not in self._known:
            try:
                self._known[place] = self._looked_up(place)
            except HubMagmaxError as error:
                error.take_from_hints("; relative paths start at the recipe's own folder")  # not here
                self.unread[place.written] = str(error)
                LOG.debug("%s: %s", place.written, error)
                self._known[place] = None
        return self._known[place]

    def written(self, place: Place) -> str:
        """Return the name of a checkpoint as the recipe has it: paths start at the recipe's folder."""
        path = self.folder / place.path
        if place.revision or not is_folder(path):
            return place.written
        return relative_path(str(path.absolute()), self.recipe_folder)

    def _looked_up(self, place: Place) -> ModelFacts:
        with closing(locate(place.written, self.folder).pinned().open()) as source:
            index = source.index
            adapter = _adapter_values(source) if is_adapter(index) else {}
            return ModelFacts(
                {name: info.dtype for name, info in index.tensors.items()},
                {name: info.shape[0] for name, info in index.tensors.items() if len(info.shape) > 1},
                _num_blocks(stated_config(source)),
                _tokens(source),
                bool(adapter),
                None if adapter.get("rank_pattern") else _whole(adapter.get("r")),
                bool(adapter.get("use_rslora")),
                str(adapter.get("base_model_name_or_path") or ""),
            )


def _num_blocks(config: Mapping[str, Any]) -> int | None:
    nested = (config.get(key) for key in _NESTED)
    every = [config, *(values for values in nested if isinstance(values, dict))]
    found = (values[key] for values in every for key in _BLOCKS if isinstance(values.get(key), int))
    return next(found, None)


def _adapter_values(source: FileSource) -> Mapping[str, Any]:
    size = source.size_of(ADAPTER_CONFIG_NAME)
    return values_of(source.read_bytes(ADAPTER_CONFIG_NAME, 0, size) if size else None)


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _tokens(source: FileSource) -> Mapping[str, int]:
    """Return the row of every token; none where the tokenizer cannot be read."""
    size = source.size_of(TOKENIZER_NAME)
    if size is None:
        return {}
    found = read_vocabulary(source.read_bytes(TOKENIZER_NAME, 0, size), f"{source.label}, {TOKENIZER_NAME}")
    return {token: row for row, token in found.items()}
