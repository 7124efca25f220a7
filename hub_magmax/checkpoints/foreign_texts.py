"""Texts of configurations of other tools: in files, in folders of merged models, in repositories."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import IO

from hub_magmax.checkpoints.opening import open_model
from hub_magmax.checkpoints.pinning import read_small_file
from hub_magmax.checkpoints.source import FileSource
from hub_magmax.errors import SourceError
from hub_magmax.recipe.foreign import STANDARD_INPUT
from hub_magmax.recipe.importing.mergekit_files import CONFIG_NAME, EXPERTS_NAME, text_of_card
from hub_magmax.recipe.loading import MAX_RECIPE_BYTES, RecipeText, read_text, text_of
from hub_magmax.recipe.model_names import near_sibling

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
