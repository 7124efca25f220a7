"""Findings from files beside the weights: configurations and labels that differ, adapters' base models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hub_magmax.checkpoints.adapters.base_names import other_base
from hub_magmax.checkpoints.adapters.config import config_of
from hub_magmax.checkpoints.config import CONFIG_NAME, MAX_CONFIG_BYTES, values_of
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.planning.findings.configs import GENERATION, config_findings, is_compared
from hub_magmax.planning.findings.finding import Finding
from hub_magmax.planning.findings.labels import label_findings
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.schema import Recipe


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
