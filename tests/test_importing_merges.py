"""Imported configurations of mergekit merged, and compared with mergekit's arithmetic in float64."""

import numpy as np
import pytest

from hub_magmax.checkpoints.model_facts import CheckpointFacts
from hub_magmax.merging.execution import merge
from hub_magmax.pipeline import lock, plan
from hub_magmax.recipe.importing.other_tools import import_text
from hub_magmax.recipe.loading import parse_recipe
from tests import oracles_mergekit as oracle
from tests.families import accepted, read_merged, write_family
from tests.test_importing import models_of


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return folder, write_family(folder, ("a", "b", "c"))


def merged(folder, text, output):
    """Return the tensors of the merge that a configuration stands for, in float64, and the verdict."""
    found = import_text(text, "mix.yml", CheckpointFacts(folder, folder))
    assert found.recipe is not None, [f for f in found.findings if f.is_lost]
    values = dict(found.recipe) | {"output": {**found.recipe["output"], "path": str(output)}}
    recipe = parse_recipe(values, folder=folder)
    merge(accepted(plan(recipe, lock(recipe))), output)
    return {name: tensor.double().numpy() for name, tensor in read_merged(output).items()}, found.verdict


def added(**how):
    return lambda base, *tasks: oracle.added(base, tasks, **how)


#: A configuration, and what mergekit computes from base, a, b and c.
CASES = {
    "linear": (
        models_of("linear", "./base 0.4", "./a 1", "./b 0.6", base="./base"),
        lambda base, a, b, c: oracle.linear([base, a, b], [0.4, 1, 0.6]),
    ),
    "linear without a base model": (
        models_of("linear", "./a 0.5", "./b 0.3", "./c 0.2"),
        lambda base, a, b, c: oracle.linear([a, b, c], [0.5, 0.3, 0.2]),
    ),
    "linear with a negative weight": (
        models_of("linear", "./a 1.5", "./b -0.3"),
        lambda base, a, b, c: oracle.linear([a, b], [1.5, -0.3]),
    ),
    "task arithmetic": (
        models_of("task_arithmetic", "./a 0.8", "./b -0.5", base="./base", rest="parameters: {lambda: 0.7}"),
        lambda base, a, b, c: oracle.added(base, [a, b], [0.8, -0.5], scaling=0.7),
    ),
    "task arithmetic, normalized": (
        models_of("task_arithmetic", "./a 3", "./b 1", base="./base", rest="parameters: {normalize: true}"),
        lambda base, a, b, c: oracle.added(base, [a, b], [3, 1], normalize=True),
    ),
    "ties": (
        models_of("ties", "./a 0.7", "./b 0.2", "./c 0.3", base="./base", rest="parameters: {density: 0.5}"),
        lambda base, *tasks: oracle.added(
            base,
            tasks,
            [0.7, 0.2, 0.3],
            elects=True,
            normalize=True,
            sparsify=lambda n, v: oracle.trimmed(v, 0.5),
        ),
    ),
    "breadcrumbs": (
        models_of(
            "breadcrumbs",
            "./a 0.7",
            "./b 0.4",
            base="./base",
            rest="parameters: {density: 0.5, gamma: 0.125}",
        ),
        lambda base, a, b, c: oracle.added(
            base, [a, b], [0.7, 0.4], sparsify=lambda n, v: oracle.trimmed(v, 0.5, 0.125)
        ),
    ),
    "breadcrumbs without density": (
        models_of("breadcrumbs", "./a 0.7", base="./base", rest="parameters: {gamma: 0.25}"),
        lambda base, a, b, c: oracle.added(base, [a], [0.7]),
    ),
    "passthrough": (models_of("passthrough", "./b"), lambda base, a, b, c: b),
}


@pytest.mark.parametrize("case", CASES)
def test_an_imported_configuration_gives_what_mergekit_computes(models, tmp_path, case):
    folder, family = models
    text, expected = CASES[case]
    found, verdict = merged(folder, text, tmp_path / "merged")
    exact = verdict == "exact"
    for name, array in found.items():
        arrays = [family[model][name].double().numpy() for model in ("base", "a", "b", "c")]
        if name == "position_ids":
            continue
        # Tensors of one element are trimmed to it by both.
        wanted = expected(*arrays)
        assert np.abs(array - wanted).max() <= (0 if exact else 1e-6), name
