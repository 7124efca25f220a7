"""Front matter of the card: the metadata by which the Hub finds and describes a model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from hub_magmax.evaluation.scores import MERGED, Scores
from hub_magmax.recipe.lockfile import Lock, LockedSource
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.values import DatasetId, Language
from hub_magmax.reporting.card_rows import Measured, measured_on
from hub_magmax.reporting.licence import License
from hub_magmax.reporting.model_kind import ModelKind
from hub_magmax.text import one_line


def model_name(recipe: Recipe) -> str:
    """Return the title of a model: its repository, else the name of its folder."""
    return valid_repo_id(recipe.output.push_to_hub) or one_line(Path(recipe.output.path).name) or "merged"


def valid_repo_id(text: str | None) -> str | None:
    """Return `text` if it can be a repository on the Hub, else None."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(text or "")
    except HFValidationError:
        return None
    return text


def hub_id(source: LockedSource) -> str | None:
    """Return the repository of a source on the Hub, None for any other source."""
    return valid_repo_id(source.repo_id)


# Complex, and flat: one condition for each key that may be absent.
def front_matter(
    recipe: Recipe,
    lock: Lock,
    kind: ModelKind,
    scores: Scores | None,
    license_: License,
    *,
    is_copied: bool = False,
) -> str:
    """Return the metadata as YAML, without the lines that enclose it; with the method where it merged."""
    from huggingface_hub import ModelCardData, constants

    sources = [lock.base_model] if recipe.output.is_adapter else [*lock.every_source.values()]
    base_models = list(dict.fromkeys(filter(None, map(hub_id, sources))))
    repo_id = valid_repo_id(recipe.output.push_to_hub)
    results = _eval_results(scores, lock) if scores else []
    return ModelCardData(
        base_model=base_models or None,
        base_model_relation=("adapter" if recipe.output.is_adapter else "merge") if base_models else None,
        language=_said(recipe.output.language, [s.languages for s in lock.every_source.values()], Language),
        datasets=_said(recipe.output.datasets, [s.datasets for s in lock.every_source.values()], DatasetId),
        library_name=_library(recipe, kind),
        pipeline_tag=(kind.task or None) if not recipe.output.is_selection else None,
        license=license_.id,
        license_name=license_.name,
        license_link=f"{constants.ENDPOINT}/{repo_id}#licence" if license_.name and repo_id else None,
        tags=["merge", "hub_magmax", *([] if is_copied else [one_line(lock.method["name"])])],
        eval_results=results or None,
        model_name=model_name(recipe) if results else None,
    ).to_yaml()


def _library(recipe: Recipe, kind: ModelKind) -> str | None:
    """Return the library that opens what is published; no library opens a selection."""
    if recipe.output.is_selection:
        return None
    return "peft" if recipe.output.is_adapter else kind.library or None


def _said(own: Sequence[str] | None, stated: Sequence[Sequence[str] | None], kind: Any) -> list[str] | None:
    """Return the recipe's values, or else all valid values of the sources' cards."""
    if own is not None:
        return list(own) or None
    adapter, found = TypeAdapter(kind), []
    for text in dict.fromkeys(text for texts in stated for text in texts or ()):
        with suppress(ValidationError):
            found.append(adapter.validate_python(text))
    return found or None


def _eval_results(scores: Scores, lock: Lock) -> list[Any]:
    """Return the merged model's scores, each tied to the data it was measured on."""
    from huggingface_hub import EvalResult

    def line(value: Any) -> str | None:
        return None if value is None else one_line(str(value))

    data = {measured.task: measured for measured in measured_on(scores, lock, ())}
    unknown = Measured("", None, None, {})
    return [
        EvalResult(
            task_type=one_line(scores.pipeline_tag),
            dataset_type=line(on.dataset) or "unknown",
            dataset_name=line(on.dataset) or "unknown",
            dataset_config=line(on.values.get("config")),
            dataset_split=line(on.values.get("split")),
            dataset_revision=line(on.revision),
            metric_type=one_line(scores.metric),
            # Tasks can share a data set and a split: only this name tells their results apart.
            metric_name=f"{one_line(scores.metric)} on {score.task}",
            metric_value=score.value,
        )
        for score in scores.scores
        if score.model == MERGED
        for on in (data.get(score.task, unknown),)
    ]
