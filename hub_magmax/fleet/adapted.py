"""Adapters in use: the base model that a configuration names, with the adapter added."""

from __future__ import annotations

import json
from pathlib import Path

from hub_magmax.checkpoints.adapters.config import config_of
from hub_magmax.checkpoints.locations import Location, locate
from hub_magmax.checkpoints.missing_folders import taken_for_repository
from hub_magmax.checkpoints.source import FileSource
from hub_magmax.errors import EvaluationError, HubMagmaxError


def base_of(adapter: FileSource) -> tuple[str, Location]:
    """Return the name of an adapter's base model, and where it is, pinned.

    Relative paths start in the current folder.

    Raises:
        EvaluationError: If the adapter names none.
        RecipeError, SourceError: If it is not there.
    """
    try:
        stated = json.loads(config_of(adapter))
        name, revision = stated.get("base_model_name_or_path"), stated.get("revision")
    except (ValueError, AttributeError):
        name = revision = None
    if not (isinstance(name, str) and name):
        raise EvaluationError(
            "this is an adapter, and its adapter_config.json names no base model",
            where=adapter.label,
            expected="base_model_name_or_path, as PEFT writes it",
            hint="Write it there, or merge the adapter into whole weights.",
        )
    is_pinned = isinstance(revision, str) and revision and not Path(name).is_dir()
    written = f"{name}@{revision}" if is_pinned else name
    try:
        with taken_for_repository(written, Path()):
            found = locate(written, Path()).pinned()
            found.open().close()  # so that what is not there is told here
            return name, found
    except HubMagmaxError as error:
        error.add_hint(f"{adapter.label} names it as its base model, in adapter_config.json.")
        raise
