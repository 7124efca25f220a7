"""Correction of a merged model's representation in a lock, with statistics of a merge in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hub_magmax.checkpoints.data_statistics import open_statistics
from hub_magmax.checkpoints.source_cache import SourceCache
from hub_magmax.evaluation.statistics_files import locked_statistics
from hub_magmax.kernels.lazy_imports import Tensor
from hub_magmax.merging.in_memory import InMemoryMerger
from hub_magmax.methods.data_statistics import REPRESENTATION
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.schema import Recipe
from hub_magmax.text import Report


def locked_correction(
    recipe: Recipe, lock: Lock, cache: SourceCache, report: Report, *, hash_files: bool
) -> Lock:
    """Return a lock with the recipe's correction and its statistics; missing ones are made.

    Args:
        recipe: Has a correction.
        lock: Complete but for that.
        cache: Checkpoints that are open already.
        report: Called with a line before models are run.
        hash_files: Read local files of statistics whole, and lock their sha256 too.
    """
    assert recipe.correction is not None

    def merged_weights() -> Mapping[str, Tensor]:
        uncorrected = recipe.model_copy(update={"correction": None})
        with InMemoryMerger(uncorrected, lock) as merger:
            return merger.merge(lock.method, lock.weights).weights(lock.method["scaling"])

    found = locked_statistics(
        recipe,
        lock,
        report,
        kinds=[REPRESENTATION],
        hash_files=hash_files,
        cache=cache,
        merged_weights=merged_weights,
    )
    lock = replace(lock, statistics={**lock.statistics, **found})
    with open_statistics(recipe, lock, REPRESENTATION, cache) as statistics:
        assert statistics is not None
        values: dict[str, Any] = recipe.correction.model_dump()
        return replace(lock, correction={**values, "tensor": statistics.head})
