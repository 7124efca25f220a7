"""Findings from files beside the weights: configurations and labels that differ, adapters' base models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from hub_magmax.checkpoints.adapters.base_names import other_base
from hub_magmax.checkpoints.adapters.config import config_of
from hub_magmax.checkpoints.config import CONFIG_NAME, MAX_CONFIG_BYTES, values_of
from hub_magmax.checkpoints.index import CheckpointIndex
from hub_magmax.checkpoints.rows.labels import head_tensors, labels_of, rows_in_order
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.planning.findings.configs import GENERATION, config_findings, is_compared
from hub_magmax.planning.findings.finding import Finding
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.tensor_rules import rule_for
from hub_magmax.text import listed, rule_text, shown


def stated_findings(recipe: Recipe, lock: Lock, opened: Mapping[str, TensorSource]) -> tuple[Finding, ...]:
    """Return what configurations tell; those whose hashes are the same everywhere are not read.

    Args:
        recipe: Says whose files the merged model gets.
        lock: Gives the hashes of files.
        opened: The sources by name.
    """
    files_from = recipe.output.files_from
    paths = _paths(lock, files_from)
    contents = {
        name: {path: _read(source, size, path) for path in paths if (size := source.size_of(path))}
        for name, source in opened.items()
    }
    configs = {name: values_of(files.get(CONFIG_NAME)) for name, files in contents.items()}
    return (
        *config_findings(contents, files_from),
        *label_findings(recipe, lock, configs, opened["base_model"].index),
        *_adapters(lock, opened, configs["base_model"]),
    )


def _paths(lock: Lock, files_from: str) -> set[str]:
    """Return the configurations that differ somewhere, and those without which these are not understood."""
    hashes: dict[str, set[str]] = {}
    for source in lock.sources.values():
        for path, stated in source.side_files.items():
            if is_compared(path):
                hashes.setdefault(path, set()).add(stated)
    kept = lock.sources[files_from].side_files
    found = {path for path, stated in hashes.items() if len(stated) > 1 or path not in kept}
    names_base = any(task.adapter_config for task in lock.tasks.values())
    return found | ({CONFIG_NAME} if names_base or GENERATION in found else set())


def _adapters(
    lock: Lock, opened: Mapping[str, TensorSource], base_config: Mapping[str, Any]
) -> Iterator[Finding]:
    for name, task in lock.tasks.items():
        if task.adapter_config:
            own = lock.bases.get(name)
            base, config = (lock.base_model, base_config) if own is None else (own, {})
            text = other_base(name, values_of(config_of(opened[name])), base, config)
            if text is not None:
                yield Finding("adapter base", name, text, False)


def _read(source: TensorSource, size: int, path: str) -> bytes:
    return source.read_bytes(path, 0, min(size, MAX_CONFIG_BYTES))


#: Labels and tensors that a sentence names.
_MOST_SHOWN = 4


def label_findings(
    recipe: Recipe, lock: Lock, configs: Mapping[str, Mapping[str, Any]], index: CheckpointIndex
) -> Iterator[Finding]:
    """Yield a note for labels in another order, and a fault where rows of other labels would be merged.

    Args:
        recipe: Its rules say which tensors are merged, and `files_from` whose labels the merged model has.
        lock: Holds the rows that are matched.
        configs: By source, the values of its config.json.
        index: Of the base model.
    """
    named = {name: found for name, config in configs.items() if (found := labels_of(config))}
    target = recipe.output.files_from if recipe.output.files_from in named else next(iter(named), "")
    for name, labels in named.items():
        if rows := lock.sources[name].label_rows:
            text = f"the labels of {name} are in another order than those of {target}: {_rows(rows)} by label"
            yield Finding("label order", name, text, False)
        elif heads := _mixed_heads(recipe, labels, named[target], index):
            is_files_from = target == recipe.output.files_from
            text = _mixed(name, labels, target, named[target], heads, is_files_from=is_files_from)
            yield Finding("labels", name, text, True)


def _mixed_heads(
    recipe: Recipe, labels: Sequence[str], wanted: Sequence[str], index: CheckpointIndex
) -> list[str]:
    """Return the merged tensors whose rows have other labels than the merged model's."""
    if labels == wanted or len(labels) != len(wanted):
        return []
    return [head for head in head_tensors(index, len(labels)) if not rule_for(head, recipe.tensors)]


def _mixed(
    name: str,
    labels: Sequence[str],
    target: str,
    wanted: Sequence[str],
    heads: Sequence[str],
    *,
    is_files_from: bool,
) -> str:
    """Return what is wrong about heads whose rows are not matched, and what to do."""
    globs = dict.fromkeys(f"{head.rpartition('.')[0]}.*" for head in heads)
    rules = ", ".join(rule_text(glob, target) for glob in globs)
    if rows_in_order(labels, wanted) is None:
        what = "other labels than"
        step = f"take the head whole, tensors: [{rules}], or correct `id2label` if only names differ"
    elif is_files_from:
        what, step = "in another order than", "lock again (`hub-magmax lock`), and they are matched"
    else:
        what, step = "in another order than", f"say output.files_from: {target}, and they are matched"
    return (
        f"the labels of {name} ({_some(labels)}) are {what} those of {target} ({_some(wanted)}), so the rows "
        f"of {_some(heads)} mean other things: {step}"
    )


def _rows(tensors: Iterable[str]) -> str:
    return f"rows of {_some(tensors)} are matched"


def _some(names: Iterable[str]) -> str:
    return listed([shown(name).strip("'") for name in names], _MOST_SHOWN)
