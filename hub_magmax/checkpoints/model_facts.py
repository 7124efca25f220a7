"""Configurations of other tools where they lie, and the facts about checkpoints that they depend on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from hub_magmax.checkpoints.config import stated_config, values_of
from hub_magmax.checkpoints.index import ADAPTER_CONFIG_NAME, is_adapter
from hub_magmax.checkpoints.locations import locate
from hub_magmax.checkpoints.opening import open_model
from hub_magmax.checkpoints.pinning import read_small_file
from hub_magmax.checkpoints.rows.vocabulary import TOKENIZER_NAME, read_vocabulary
from hub_magmax.checkpoints.source import FileSource
from hub_magmax.errors import HubMagmaxError, SourceError
from hub_magmax.recipe.foreign import STANDARD_INPUT
from hub_magmax.recipe.importing.mergekit_files import CONFIG_NAME, EXPERTS_NAME, text_of_card
from hub_magmax.recipe.importing.model_facts import ModelFacts
from hub_magmax.recipe.importing.references import Place
from hub_magmax.recipe.loading import MAX_RECIPE_BYTES, RecipeText, read_text, text_of
from hub_magmax.recipe.model_names import is_folder, near_sibling, relative_path

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


#: The card of a model.
_CARD = "README.md"


def read_foreign(source: str, stdin: IO[bytes]) -> RecipeText:
    """Return the configuration in a file, or of a merged model: its own file, or what its card shows.

    Args:
        source: A file, a folder, or a repository, with `@revision` if need be; `-` for `stdin`.
        stdin: Standard input.

    Raises:
        SourceError: If there is none.
        RecipeError: If a card shows none, or several.
    """
    if source == "-":
        return text_of(stdin, STANDARD_INPUT, Path())
    path = Path(source)
    if path.is_dir() or not (path.exists() or path.suffix in (".yml", ".yaml", ".json", ".md")):
        with closing(open_model(source, None)) as model:
            return _of_model(model, path if path.is_dir() else Path())
    if not path.exists():
        raise SourceError("there is no such file", where=source, hint=near_sibling(source, path, files=True))
    found = read_text(path)
    if path.suffix == ".md":
        return RecipeText(text_of_card(found.text, found.name), found.name, found.folder)
    return found


def _of_model(model: FileSource, folder: Path) -> RecipeText:
    for name in (CONFIG_NAME, EXPERTS_NAME, _CARD):
        size = model.size_of(name)
        if size is None:
            continue
        where = f"{model.label}/{name}"
        if size > MAX_RECIPE_BYTES:
            raise SourceError(f"larger than {MAX_RECIPE_BYTES:,} bytes", where=where)
        text = read_small_file(model, name).decode("utf-8", errors="replace")
        return RecipeText(text_of_card(text, where) if name == _CARD else text, where, folder)
    raise SourceError(
        f"there is neither {CONFIG_NAME} nor {_CARD}",
        where=model.label,
        expected="a model that mergekit merged, or the file of its configuration",
    )
