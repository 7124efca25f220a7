"""Checks of what is merged: stacks of layers, tasks' own base models, common lengths of task vectors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

from hub_magmax import methods
from hub_magmax.errors import KeyPath, Problem, RecipeError
from hub_magmax.recipe.blocks import Range
from hub_magmax.recipe.layers import LayerSlice
from hub_magmax.recipe.norms import BY_TENSOR
from hub_magmax.recipe.problems import conflict
from hub_magmax.recipe.schema import Compare, Recipe
from hub_magmax.recipe.values import AUTO
from hub_magmax.text import nearest, shown


def layer_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what contradicts itself, the tasks or the output in a stack of layers."""
    for index, layer in enumerate(recipe.layers or ()):
        yield from _slice_problems(layer, ("layers", index), ("base_model", *recipe.task_names))
        if not recipe.tasks and layer.take is None:
            text = "there are no tasks to merge the base model's blocks with"
            yield conflict(("layers", index), text, "add take: base_model, or tasks")
    if recipe.layers and recipe.output.is_adapter:
        text = "an adapter has the layers of its base model"
        yield conflict(("layers",), text, "leave this out, or output.format: adapter")


def choices_without_tasks(recipe: Recipe) -> Iterator[Problem]:
    """Yield keys about a choice between tasks, of a stack of one model's layers."""
    for key in () if recipe.tasks or not recipe.layers else ("preference", "compare", "sweep"):
        if getattr(recipe, key) is not None:
            yield conflict((key,), "there are no tasks to choose between", "leave it out")


def _slice_problems(layer: LayerSlice, key: KeyPath, sources: Sequence[str]) -> Iterator[Problem]:
    if layer.take is not None and layer.take not in sources:
        yield _unknown((*key, "take"), layer.take, sources)
    if isinstance(layer.blocks, dict):
        yield from _range_problems(layer, layer.blocks, (*key, "blocks"), sources)


def _range_problems(
    layer: LayerSlice, blocks: Mapping[str, Range], key: KeyPath, sources: Sequence[str]
) -> Iterator[Problem]:
    """Yield what is wrong with ranges by source."""
    if layer.take is not None:
        yield conflict(
            key,
            f"blocks are taken from {layer.take} alone",
            "write one range, such as blocks: [0, 8], or leave take out to merge them",
        )
    yield from (_unknown((*key, name), name, sources) for name in blocks if name not in sources)
    lengths = {name: end - first for name, (first, end) in blocks.items()}
    if len({*lengths.values()}) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in lengths.items())
        yield conflict(key, f"the ranges hold unequally many blocks ({counts})", "give all the same length")
    if lacking := [name for name in sources if name not in blocks]:
        yield conflict(
            key,
            f"there is no range for {', '.join(lacking)}",
            "name every source; to leave one out, take the blocks from another one",
        )


def _unknown(path: KeyPath, name: str, sources: Sequence[str]) -> Problem:
    hint = nearest(name, sources) or f"the sources are {', '.join(sources)}"
    return conflict(path, f"there is no task {shown(name)}", hint)


def own_base_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what cannot be done with a task that was fine-tuned from another base model."""
    for number, task in enumerate(recipe.tasks):
        if task.base is None:
            continue
        key: KeyPath = ("tasks", number, "base")
        if recipe.adapters == "sequence":
            text = "an adapter of a sequence is added to the checkpoint of the task before it"
            yield conflict(key, text, "leave base out, or adapters: sequence")
        if recipe.matches_tokens:
            text = "rows are matched by token with those of one base model"
            yield conflict(key, text, "leave base out, or token_rows and tokenizer")
        for path, name in _methods(recipe):
            if _compares_models(name):
                yield conflict(
                    path,
                    f"{name} is about whole models, and {task.name} counts by its change of another one",
                    "choose a method that adds task vectors, or leave base out",
                )


def _methods(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """Yield the methods that a recipe merges by, each with its key path."""
    yield ("method", "name"), recipe.method.name
    if recipe.compare is not None or recipe.method.name == AUTO:
        tried = (recipe.compare or Compare()).methods or ()
        yield from ((("compare", "methods", number), method.name) for number, method in enumerate(tried))


def _compares_models(name: str) -> bool:
    with suppress(RecipeError):  # reported with the name
        return name != AUTO and "base" in methods.get_method(name).supplied
    return False


def norm_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what `norms` cannot be said of: a recipe without tasks, layers of an adapter one by one."""
    if recipe.norms is None:
        return
    if not recipe.tasks:
        yield conflict(("norms",), "there are no task vectors to scale", "leave norms out, or name tasks")
    if recipe.norms == BY_TENSOR and recipe.output.is_adapter:
        text = "a layer of an adapter may be several tensors, and has one factor"
        yield conflict(("norms",), text, "norms: equal, or output.format: weights")
