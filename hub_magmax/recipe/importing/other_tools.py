"""Configurations of other tools: mergekit's, arguments of PEFT, and those that are refused by name."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hub_magmax.errors import RecipeError
from hub_magmax.recipe.importing.findings import Notes
from hub_magmax.recipe.importing.marked import Marked, read_documents
from hub_magmax.recipe.importing.mergekit_files import import_mergekit, is_mergekit, stage_of
from hub_magmax.recipe.importing.model_facts import Models
from hub_magmax.recipe.importing.peft_adapters import is_peft, read_peft
from hub_magmax.recipe.importing.translation import Imported
from hub_magmax.text import shown

#: The beginning of a recipe that sd-mecha wrote.
_SD_MECHA = re.compile(r"version \d+\.\d+\.\d+\s*\n\s*(model|merge|literal|dict|list|parameter)\b")


def import_text(
    text: str, where: str, models: Models, *, without: Sequence[str] = (), stage: str | None = None
) -> Imported:
    """Return what a configuration becomes, line by line.

    Args:
        text: YAML or JSON.
        where: Its name in messages.
        models: Looks checkpoints up.
        without: Keys that are left out, as findings name them.
        stage: Name or number of one merge of several in the file.

    Raises:
        RecipeError: If it is no YAML or no configuration, or what is named is not in it.
    """
    notes = Notes(text.splitlines())
    documents = _documents(text, where)
    several = len(documents) > 1 or stage is not None
    top = stage_of(documents, stage, where, notes) if several else documents[0]
    if top is None:
        return Imported(notes.sorted(), None)
    for key in without:
        top = _without(top, key, where, notes)
    if is_mergekit(top):
        return import_mergekit(top, models, notes)
    recipe = read_peft(top, models, notes)
    return Imported(notes.sorted(), recipe if notes.is_whole else None)


def _documents(text: str, where: str) -> list[Marked]:
    """Return the documents of a text, one of which at least is a configuration that is known."""
    if _SD_MECHA.match(text):
        hint = "It is a graph of expressions over single keys; docs/recipes.md says how a recipe is written."
        raise RecipeError("this is a recipe of sd-mecha, which is not imported", where=where, hint=hint)
    documents = _with_values(read_documents(text, where))
    if not any(is_mergekit(one) or is_peft(one) for one in documents):
        is_recipe = any(one.at(("base_model",)) and one.at(("tasks",)) for one in documents)
        raise RecipeError(
            "this is a recipe already" if is_recipe else "this is no configuration that can be imported",
            where=where,
            expected="mergekit's (merge_method:, and models: or slices:), or arguments of PEFT's "
            "add_weighted_adapter (adapters:, weights: and combination_type:)",
        )
    return documents


def _with_values(documents: list[Marked]) -> list[Marked]:
    """Return the documents that hold anything: a line of `---` too many makes an empty one."""
    return [one for one in documents if not one.is_empty] or documents


def _without(top: Marked, key: str, where: str, notes: Notes) -> Marked:
    """Return a document without a key, and note that."""
    at = top.at(tuple(int(part) if part.isdigit() else part for part in key.split(".")))
    if at is None:
        hint = "Name it as the list of lines does, such as models.0.parameters.scale."
        raise RecipeError(f"there is no key {shown(key)}", where=where, hint=hint)
    notes.add(at, "warning", "left out, as --without says: the recipe goes without it")
    return top.without(at.path)
