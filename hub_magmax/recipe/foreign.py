"""Files that are no recipes of ours, by what they hold: mergekit's, configurations, locks, cards."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from hub_magmax.errors import KeyPath, Problem, RecipeError
from hub_magmax.recipe.mergekit import Line, translate
from hub_magmax.recipe.strict_yaml import Place

#: Values that are walked through; anchors may repeat some.
_MAX_VALUES = 20_000

#: Characters of a YAML text that is looked at, which takes half a second at most.
_MAX_CHARACTERS = 20_000

#: Lines of a message about a mergekit recipe.
_MAX_LINES = 40


def refuse_foreign(text: str, name: str) -> None:
    """Raise RecipeError if a text is a known kind of file that is no recipe, with what to give instead."""
    try:
        documents = [(json.loads(text), {})] if text.lstrip()[:1] == "{" else [*_documents(text)]
    except (yaml.YAMLError, ValueError, RecursionError):
        documents = []
    values, places = documents[0] if documents else ({}, {})
    if not isinstance(values, dict) or (
        "tasks" in values and "genome" not in values and "checksum" not in values
    ):
        return
    for recognise in (_mergekit, _configuration, _record, _card):
        if found := recognise(values, places, name, len(documents)):
            raise found


def folder_error(path: Path) -> RecipeError:
    """Return the error of a folder in place of a recipe."""
    inside = path / "recipe.yaml"
    if inside.is_file():
        return RecipeError("this is a folder", where=str(path), hint=f"Its recipe is {inside}.")
    is_model = any((path / file).is_file() for file in ("config.json", "adapter_config.json"))
    return RecipeError(
        "this is a model's folder, and no recipe" if is_model else "this is a folder, and no recipe",
        where=str(path),
        expected="a YAML file",
        hint="A recipe names such folders: base_model: and tasks:, see docs/recipes.md."
        if is_model
        else "Give the path of a YAML recipe.",
    )


def _documents(text: str) -> Iterator[tuple[Any, dict[KeyPath, Place]]]:
    """Yield the values and places of each document, without a check of tags, anchors and dates."""
    if len(text) > _MAX_CHARACTERS:
        return
    for node in yaml.compose_all(text, Loader=yaml.SafeLoader):
        places: dict[KeyPath, Place] = {}
        counter = iter(range(_MAX_VALUES))
        yield _plain(node, (), places, counter), places


def _plain(node: yaml.Node, path: KeyPath, places: dict[KeyPath, Place], counter: Iterator[int]) -> Any:
    if next(counter, None) is None:
        raise ValueError("too many values")
    if isinstance(node, yaml.MappingNode):
        found = {}
        for key, value in node.value:
            name = str(key.value) if isinstance(key, yaml.ScalarNode) else "?"
            places[*path, name] = key.start_mark.line + 1, key.start_mark.column + 1
            found[name] = _plain(value, (*path, name), places, counter)
        return found
    if isinstance(node, yaml.SequenceNode):
        items = []
        for number, item in enumerate(node.value):
            places[*path, number] = item.start_mark.line + 1, item.start_mark.column + 1
            items.append(_plain(item, (*path, number), places, counter))
        return items
    return _scalar(node)


def _scalar(node: yaml.Node) -> Any:
    if len(node.value) > 100 or node.tag.endswith((":str", ":timestamp")):
        return node.value
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node)
    except (yaml.YAMLError, ValueError):
        return node.value


#: Files of mergekit's other programs: a key of them, what they are, and what to do.
_PROGRAMS: Mapping[str, tuple[str, str]] = {
    "experts": (
        "this is a recipe of mergekit-moe, which makes a mixture of experts",
        "Checkpoints are merged into one of the same architecture here; list them as tasks.",
    ),
    "genome": (
        "this is a recipe of mergekit-evolve, which searches for a merge",
        "Name the checkpoints as tasks, and search the weights: preference: {search: {target: ...}}.",
    ),
    "layer_slices": (
        "this is a recipe of bakllama, which puts layers together",
        "Whole models are merged here; list them as tasks.",
    ),
}


def _mergekit(
    values: Mapping[str, Any], places: Mapping[KeyPath, Place], name: str, count: int
) -> RecipeError | None:
    """Return what a mergekit file becomes here, key by key."""
    for key, (what, hint) in _PROGRAMS.items():
        if key in values:
            return _other(name, what, hint)
    if "tasks" in values or not {"merge_method", "models", "slices", "modules"} & values.keys():
        return None
    if count > 1:
        what = f"this is a recipe of mergekit-multi, with {count} stages"
        step = "Write one recipe for each stage; the folder that one writes can be a model of the next."
        return _other(name, what, step)
    return _key_by_key(values, places, name)


def _key_by_key(values: Mapping[str, Any], places: Mapping[KeyPath, Place], name: str) -> RecipeError:
    found = translate(values)
    lines = sorted(found.lines, key=lambda line: _place(line, places))
    shown = [f"  - {_label(line, places)}: {line.text}" for line in lines[:_MAX_LINES]]
    shown += [f"  - and {len(lines) - _MAX_LINES} more"] if len(lines) > _MAX_LINES else []
    hint = "What has no counterpart cannot be merged here yet; docs/recipes.md lists what can."
    if found.recipe is not None:
        recipe = yaml.safe_dump(found.recipe, sort_keys=False, default_flow_style=None, width=100)
        hint = (
            "Equal up to rounding and random draws, as a recipe of hub_magmax (folders start at its own "
            f"folder):\n\n{recipe}\nSave it as a file, and run `hub-magmax validate` on that."
        )
    what = "\n".join(["this is a mergekit recipe, which is not read here", *shown])
    problems = tuple(_problem(line, places, name) for line in lines)
    return RecipeError(what, where=name, hint=hint, problems=problems)


def _place(line: Line, places: Mapping[KeyPath, Place]) -> Place:
    return places.get(line.key, (0, 0))


def _label(line: Line, places: Mapping[KeyPath, Place]) -> str:
    return _problem(line, places, "").place


def _problem(line: Line, places: Mapping[KeyPath, Place], name: str) -> Problem:
    row, column = places.get(line.key, (None, None))
    kind = "mergekit" if line.is_kept else "no_counterpart"
    return Problem(kind, line.text, file=name, key=line.key, line=row, column=column)


def _configuration(
    values: Mapping[str, Any], places: Mapping[KeyPath, Place], name: str, count: int
) -> RecipeError | None:
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


def _record(
    values: Mapping[str, Any], places: Mapping[KeyPath, Place], name: str, count: int
) -> RecipeError | None:
    """Return what to do with files that hub_magmax writes."""
    if {"digest", "checksum"} <= values.keys():
        recipe = re.sub(r"\.lock\.json$", ".yaml", name)
        return _other(
            name, "this is a lock", f"Give the recipe that it was made from ({recipe}); --lock names a lock."
        )
    if {"shards", "lock_digest"} & values.keys() and "shards" in values:
        return _other(name, "this is the report of a merge", "The recipe is recipe.yaml beside it.")
    return None


def _card(
    values: Mapping[str, Any], places: Mapping[KeyPath, Place], name: str, count: int
) -> RecipeError | None:
    """Return what to do with a model card, whose front matter is YAML."""
    front = {"license", "library_name", "tags", "pipeline_tag", "model-index"} & values.keys()
    if front or name.endswith(".md"):
        return _other(
            name, "this is a model card", "The recipe of a merged model is recipe.yaml beside its card."
        )
    return None


def _other(name: str, what: str, hint: str) -> RecipeError:
    return RecipeError(what, where=name, expected="a recipe of hub_magmax", hint=hint)
