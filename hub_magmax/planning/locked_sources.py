"""Sources of a lock: pinned, compared with each other, and their layers stacked."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from glob import escape
from pathlib import Path

from hub_magmax.checkpoints.adapters.finding import with_placed_adapters
from hub_magmax.checkpoints.names.renamed import with_base_names
from hub_magmax.checkpoints.names.renaming import with_renamings
from hub_magmax.checkpoints.opening import as_checkpoints, open_checkpoints, open_pinned
from hub_magmax.checkpoints.rows.labels import with_label_orders
from hub_magmax.checkpoints.rows.token_rows import require_tokenizers
from hub_magmax.checkpoints.rows.vocabulary import ROWS_BY_WORD, check_rows, read_vocabularies, wanted_rows
from hub_magmax.checkpoints.source_cache import PARALLEL_SOURCES, SourceCache
from hub_magmax.checkpoints.ties.finding import with_found_ties
from hub_magmax.errors import RecipeError
from hub_magmax.planning.fitting.stacking import locked_layers
from hub_magmax.planning.statistics import may_lack
from hub_magmax.recipe.lockfile import Lock, LockedSource, LockedTokenizer, own_base_name
from hub_magmax.recipe.model_names import expanded
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.tokenizer import UNION
from hub_magmax.text import step

#: The largest known chat templates are some tens of kilobytes.
_MAX_TEMPLATE_BYTES = 1_000_000


def pinned_sources(
    recipe: Recipe, make: Callable[[str], LockedSource], kept: Mapping[str, LockedSource]
) -> dict[str, LockedSource]:
    """Return the recipe's sources pinned: as `kept` has them, by their names in the recipe, or now."""
    fresh = [name for name in dict.fromkeys(recipe.written_sources.values()) if name not in kept]
    with ThreadPoolExecutor(PARALLEL_SOURCES) as pool:  # they wait for answers most of the time
        pinned = {**kept, **dict(zip(fresh, pool.map(make, fresh), strict=True))}
    return {name: pinned[written] for name, written in recipe.written_sources.items()}


def own_bases(recipe: Recipe, sources: Mapping[str, LockedSource]) -> dict[str, LockedSource]:
    """Return the base models that tasks have of their own, by task."""
    return {task.name: sources[own_base_name(task.name)] for task in recipe.tasks if task.base is not None}


@step("comparing the headers")
def compared_sources(
    recipe: Recipe, sources: Mapping[str, LockedSource], cache: SourceCache
) -> dict[str, LockedSource]:
    """Return pinned sources with what comparing them tells: names, ties, places of adapters, labels."""
    with open_pinned(recipe, sources, cache) as opened:
        found = with_renamings(recipe, sources, opened)
        named = with_base_names(opened, found)
        found = with_placed_adapters(recipe, with_found_ties(found, named, may_lack), named)
        return with_label_orders(recipe, found, opened)


def locked_tokenizer(recipe: Recipe) -> LockedTokenizer | None:
    """Return the recipe's tokenizer with the text of its chat template, where that is a file.

    Raises:
        RecipeError: If the file cannot be read.
    """
    if recipe.tokenizer is None:
        return None
    written = recipe.tokenizer.template_file
    template = None if written is None else _template(recipe.folder / expanded(written))
    return recipe.tokenizer.locked(recipe.output.files_from, template)


def _template(path: Path) -> str:
    try:
        content = path.read_bytes()
        if len(content) <= _MAX_TEMPLATE_BYTES:
            return content.decode()
        reason = f"larger than {_MAX_TEMPLATE_BYTES:,} bytes"
    except OSError as error:
        reason = error.strerror or type(error).__name__
    except UnicodeDecodeError:
        reason = "not UTF-8 text"
    raise RecipeError(
        f"the chat template {path.name} cannot be read ({reason})",
        key=("tokenizer", "chat_template"),
        expected="the path of a Jinja template, from the recipe's folder on",
    )


@step("comparing the tokenizers")
def with_locked_token_rows(recipe: Recipe, found: Lock, cache: SourceCache) -> Lock:
    """Return a lock with the tensors that have a row per token, where the recipe does not name them.

    Raises:
        RecipeError: If no name tells, or the recipe says something of a token that is not there.
    """
    if found.tokenizer is None or found.tokenizer.source is None:
        return found
    files_from = recipe.output.files_from
    with open_pinned(recipe, found.every_source, cache) as opened:
        vocabularies, source = read_vocabularies(found, opened), found.tokenizer.source
        named = files_from if source == UNION else source
        require_tokenizers(opened, vocabularies, ("base_model", files_from, named))
        wanted = wanted_rows(found, vocabularies, files_from)
        tensors = as_checkpoints(recipe, replace(found, token_rows=()), opened)[files_from].index.tensors
        names = [name for name in tensors if re.fullmatch(rf"(.*\.)?({ROWS_BY_WORD})", name)]
        check_rows(wanted, vocabularies, opened, names)
    if not names and not found.token_rows:
        raise RecipeError(
            "no name of a tensor tells that it has a row per token",
            key=("tokenizer",),
            hint="Name the embedding and the head: token_rows: [GLOB, GLOB].",
        )
    return replace(found, token_rows=found.token_rows or tuple(map(escape, names)))


def with_locked_layers(recipe: Recipe, found: Lock, cache: SourceCache) -> Lock:
    """Return a lock with the recipe's stack of layers, where it has one, once that fits the checkpoints."""
    if not recipe.layers:
        return found
    with open_checkpoints(recipe, found, cache) as opened:
        return replace(found, layers=locked_layers(recipe, found.every_source, opened))
