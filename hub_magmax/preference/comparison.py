"""Preference from a comparison of the target sample with each task's training data.

Features are what the models see (`features`), a distance compares two samples of them (`distance`),
and a mixture of training samples is fitted to the target (`mixture`). Labels are not needed, except for
a held-out check.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float64

from hub_magmax.checkpoints.locations import ModelPlace, locate, location_of
from hub_magmax.evaluation.data import fingerprint, load_examples
from hub_magmax.evaluation.data_keys import about_data
from hub_magmax.files import digest
from hub_magmax.preference.distance import (
    Features,
    Shares,
    cosine_distance,
    mmd_distance,
    similarity,
    transport_distance,
    weights_from_distances,
)
from hub_magmax.preference.features import (
    features,
    holds_images,
    input_column,
    load_feature_model,
)
from hub_magmax.preference.mixture import (
    Space,
    excess_by_mmd,
    excess_by_transport,
    mixture_by_mmd,
    mixture_by_transport,
    whiten,
)
from hub_magmax.preference.safeguards import bootstrap_shares, check_sample_size, conclude, draw, rounded
from hub_magmax.preference.samples import Scorer, split_target
from hub_magmax.recipe.lockfile import LockedSource, ResolvedPreference
from hub_magmax.recipe.preferences import Cosine, DistanceEstimate, Mixture, Mmd, Transport
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.values import Data
from hub_magmax.text import step

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Estimated:
    """Weights that a comparison of samples found, and what they follow from.

    Attributes:
        draws: Weights, one row per weighting of the target sample.
        facts: By name, a number for each task. Of a mixture: how much farther each task alone is from the
            target, by what the weights minimise. Otherwise the distances to each, and the similarities.
    """

    draws: Float64[np.ndarray, "draws tasks"]
    facts: Mapping[str, Float64[np.ndarray, " tasks"]]


def compare_samples(spec: DistanceEstimate, spaces: Sequence[Space], target_shares: Shares) -> Estimated:
    """Return the weights that `spec` asks for.

    Args:
        spec: Kind of distance and its settings.
        spaces: Both samples under each task's model, in task order; or one space that is used for all.
        target_shares: Weightings of the target sample, the first one uniform.
    """
    if isinstance(spec, Mixture) and spec.fit == "mixture":
        return _mixture(spec, spaces, target_shares)
    distance = _distance(spec)
    own = [spaces[t if len(spaces) > 1 else 0] for t in range(len(spaces[0].train))]
    found = np.stack(
        [distance(space.train[t], space.target, target_shares) for t, space in enumerate(own)], axis=1
    )
    nearness = similarity(found[0], spec.temperature)
    weights = weights_from_distances(found, spec.temperature)
    return Estimated(weights, {"distances": found[0], "similarities": nearness})


def _mixture(spec: Mixture, spaces: Sequence[Space], target_shares: Shares) -> Estimated:
    if spec.whiten:
        spaces = [whiten(space) for space in spaces]
    if isinstance(spec, Transport):
        epsilon = spec.regularisation
        draws = mixture_by_transport(spaces, target_shares, regularisation=epsilon)
        excess = excess_by_transport(spaces, draws[0], regularisation=epsilon)
        return Estimated(draws, {"farther_than_mixture": excess})
    assert isinstance(spec, Mmd)
    draws = mixture_by_mmd(spaces, target_shares, bandwidth=spec.bandwidth)
    excess = excess_by_mmd(spaces, draws[0], bandwidth=spec.bandwidth)
    return Estimated(draws, {"farther_than_mixture": excess})


def _distance(
    spec: DistanceEstimate,
) -> Callable[[Features, Features, Shares], Float64[np.ndarray, " draws"]]:
    if isinstance(spec, Transport):
        regularisation = spec.regularisation
        return lambda *samples: transport_distance(*samples, regularisation=regularisation)
    if isinstance(spec, Mmd):
        bandwidth = spec.bandwidth
        return lambda *samples: mmd_distance(*samples, bandwidth=bandwidth)
    assert isinstance(spec, Cosine)
    return cosine_distance


def resolve_comparison(
    recipe: Recipe, *, sources: Mapping[str, LockedSource] | None = None, scorer: Scorer | None = None
) -> ResolvedPreference:
    """Load the samples and the models, compare, and return the preference with what was seen.

    Args:
        recipe: Its preference is a Comparison.
        sources: The pinned checkpoints by name, `base_model` among them; as the recipe names them by default.
        scorer: Scores models on the held-out examples; needed where the recipe asks for a hold-out.

    Raises:
        EvaluationError: If data or models cannot be used, or a sample is too small.
    """
    assert recipe.preference is not None
    kind, spec, tasks = recipe.preference.kind, recipe.preference.spec, recipe.task_names
    target = split_target(spec, recipe, "preference." + kind, limit=spec.samples)
    train = {task: _training_sample(spec, task, recipe) for task in tasks}
    spaces = _spaces(spec, recipe, target.estimation, train, sources)
    with step(f"comparing the samples by {kind}"):
        found = compare_samples(spec, spaces, bootstrap_shares(len(target.estimation), recipe.seed))
    prints = {
        task: fingerprint(examples, [_column(spec.train[task], examples)]) for task, examples in train.items()
    }
    columns = [_column(spec.target, target.drawn), *([spec.target.label_column] if spec.holdout else [])]
    return conclude(
        recipe,
        found.draws,
        fingerprint=digest({"target": fingerprint(target.drawn, columns), "train": prints}),
        seen={
            "target_examples": len(target.estimation),
            "train_examples": {task: len(examples) for task, examples in train.items()},
            **{name: _by_task(tasks, values) for name, values in found.facts.items()},
        },
        score=target.score(scorer, spec.target),
    )


def _by_task(tasks: Sequence[str], values: Float64[np.ndarray, " tasks"]) -> dict[str, float]:
    return rounded(dict(zip(tasks, values.tolist(), strict=True)))


def _column(data: Data, examples: Dataset) -> str:
    return input_column(examples, data)


def _training_sample(spec: DistanceEstimate, task: str, recipe: Recipe) -> Dataset:
    where = f"preference.{recipe.preference.kind if recipe.preference else ''}.train.{task}"
    with about_data(recipe, spec.train[task]):
        examples = load_examples(spec.train[task], recipe.folder, labelled=False)
        _column(spec.train[task], examples)
    check_sample_size(len(examples), where)
    return examples.select(draw(len(examples), spec.samples, recipe.seed, f"train/{task}"))


def _spaces(
    spec: DistanceEstimate,
    recipe: Recipe,
    target: Dataset,
    train: Mapping[str, Dataset],
    sources: Mapping[str, LockedSource] | None,
) -> list[Space]:
    """Return the features of all samples under each model, one model in memory at a time.

    A task's model sees the other tasks' samples only where a mixture is fitted.
    """
    with about_data(recipe, spec.target):
        column = _column(spec.target, target)
        images = holds_images(target, column)
    shared = spec.features == "base_model"
    needs_all = shared or (isinstance(spec, Mixture) and spec.fit == "mixture")
    spaces = []
    for name in ("base_model",) if shared else recipe.task_names:
        model = load_feature_model(_place(recipe, name, sources), images=images)
        of_target = features(model, target, column)
        of_train = tuple(
            features(model, examples, _column(spec.train[task], examples))
            if needs_all or task == name
            else of_target[:0]
            for task, examples in train.items()
        )
        spaces.append(Space(of_train, of_target))
    return spaces


def _place(recipe: Recipe, name: str, sources: Mapping[str, LockedSource] | None) -> ModelPlace:
    pinned = sources.get(name) if sources else None
    folder = recipe.folder
    location = location_of(pinned, folder) if pinned else locate(recipe.written_sources[name], folder)
    return location.model_place
