"""Files that are no recipes of ours, by what they hold: mergekit's, configurations, locks, cards."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hub_magmax.errors import RecipeError
from hub_magmax.recipe.importing.marked import Marked, read_documents
from hub_magmax.recipe.importing.mergekit_files import CONFIG_NAME, is_mergekit, shown_in_card

#: Name of standard input in messages.
STANDARD_INPUT = "standard input"

#: Characters of a text that is looked at, which takes half a second at most.
_MAX_CHARACTERS = 20_000


def refuse_foreign(text: str, name: str) -> None:
    """Raise RecipeError if a text is a known kind of file that is no recipe, with what to give instead."""
    if name.endswith(".md"):
        raise _card_error(name, text)
    first = _first_document(text, name)
    keys = {*(first.entries or {})} if first else {"tasks"}
    if first is None or ("tasks" in keys and not keys & {"genome", "checksum"}):
        return
    found = [_mergekit(first, name), *(how(first.plain(), name) for how in (_configuration, _record, _card))]
    for error in filter(None, found):
        raise error


def _first_document(text: str, name: str) -> Marked | None:
    """Return the first document of a text; None where it is no mapping, or too long to be looked at."""
    with suppress(RecipeError):
        documents = read_documents(text, name) if len(text) <= _MAX_CHARACTERS else []
        return next((one for one in documents[:1] if one.is_mapping), None)
    return None


def folder_error(path: Path) -> RecipeError:
    """Return the error of a folder in place of a recipe."""
    inside = path / "recipe.yaml"
    if inside.is_file():
        return RecipeError("this is a folder", where=str(path), hint=f"Its recipe is {inside}.")
    if (path / CONFIG_NAME).is_file():
        what = "this is the folder of a model that mergekit merged"
        return RecipeError(what, where=str(path), hint=_import_hint(str(path)))
    is_model = any((path / file).is_file() for file in ("config.json", "adapter_config.json"))
    return RecipeError(
        "this is a model's folder, and no recipe" if is_model else "this is a folder, and no recipe",
        where=str(path),
        expected="a YAML file",
        hint="A recipe names such folders: base_model: and tasks:, see docs/recipes.md."
        if is_model
        else "Give the path of a YAML recipe.",
    )


def _mergekit(values: Marked, name: str) -> RecipeError | None:
    """Return how a file of mergekit becomes a recipe."""
    return _other(name, "this is a file of mergekit", _import_hint(name)) if is_mergekit(values) else None


def _import_hint(name: str) -> str:
    """Return the command that imports a file, or standard input."""
    source = "-" if name == STANDARD_INPUT else shlex.quote(name)
    return f"`hub-magmax import {source}` says line by line what becomes of it, and writes the recipe."


def _configuration(values: Mapping[str, Any], name: str) -> RecipeError | None:
    """Return what to do with the configuration of a model or an adapter."""
    if "peft_type" in values:
        what = f"this is the configuration of a {values['peft_type']} adapter"
        return _other(name, what, "A recipe names the adapter's folder: tasks: [{name: ..., model: FOLDER}].")
    if "weight_map" in values:
        return _other(
            name, "this is the index of a checkpoint's weights", "A recipe names the folder that holds it."
        )
    if {"model_type", "architectures", "_class_name"} & values.keys():
        kind = values.get("model_type") or values.get("_class_name") or "model"
        what = f"this is the configuration of a model ({kind})"
        return _other(
            name, what, "A recipe names the folder that holds it, as base_model or as the model of a task."
        )
    return None


def _record(values: Mapping[str, Any], name: str) -> RecipeError | None:
    """Return what to do with files that hub_magmax writes."""
    if {"digest", "checksum"} <= values.keys():
        recipe = re.sub(r"\.lock\.json$", ".yaml", name)
        return _other(
            name, "this is a lock", f"Give the recipe that it was made from ({recipe}); --lock names a lock."
        )
    if {"shards", "lock_digest"} & values.keys() and "shards" in values:
        return _other(name, "this is the report of a merge", "The recipe is recipe.yaml beside it.")
    return None


def _card(values: Mapping[str, Any], name: str) -> RecipeError | None:
    """Return what to do with a model card, whose front matter is YAML."""
    front = {"license", "library_name", "tags", "pipeline_tag", "model-index"} & values.keys()
    return _card_error(name) if front else None


def _card_error(name: str, text: str = "") -> RecipeError:
    if shown_in_card(text):
        return _other(name, "this is a model card that shows a configuration of mergekit", _import_hint(name))
    hint = "The recipe of a merged model is recipe.yaml beside its card."
    return _other(name, "this is a model card", hint)


def _other(name: str, what: str, hint: str) -> RecipeError:
    return RecipeError(what, where=name, expected="a recipe of hub_magmax", hint=hint)
