"""Options of which every task has its own value: in recipes, locks, plans, cards and merges."""

import math
from typing import Annotated

import numpy as np
import pytest
import torch

from hub_magmax import methods
from hub_magmax.errors import RecipeError
from hub_magmax.kernels.compiled.backend import Compiled
from hub_magmax.kernels.reference import Reference
from hub_magmax.merging import bundles
from hub_magmax.merging.execution import merge
from hub_magmax.merging.in_memory import InMemoryMerger
from hub_magmax.merging.tensors import merge_tensors
from hub_magmax.methods import merge_method
from hub_magmax.options import PerTask, for_each_task
from hub_magmax.pipeline import lock, plan
from hub_magmax.planning.summary import explain
from hub_magmax.recipe.loading import load_recipe, parse_recipe
from hub_magmax.recipe.lockfile import read_lock
from tests import oracles
from tests.families import recipe_values, write_recipe
from tests.test_bundles import merged_files, write_many
from tests.test_cli import call
from tests.test_in_memory import same

DENSITIES = {"c": 1.0, "a": 0.5, "b": 0.25}
BY_TASK = [
    {"name": "ties", "density": DENSITIES},
    {"name": "ties", "density": DENSITIES, "scope": "model", "rounding": "down"},
    {"name": "dare", "density": DENSITIES},
    {"name": "dare_ties", "density": DENSITIES},
    {"name": "dare_ties", "density": DENSITIES, "consensus": "sum"},
    {"name": "breadcrumbs", "density": 0.5, "outliers": {"a": 0.2, "b": 0.0, "c": 0.1}},
]
VECTORS = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))


def title(method: dict) -> str:
    return " ".join(str(value) for value in method.values() if isinstance(value, str))


@pytest.mark.parametrize("method", ["dare", "breadcrumbs"])
def test_a_sum_is_that_of_the_tasks_each_with_its_own_value(method):
    density = (0.3, 1.0, 0.6)
    found = merge_tensors(VECTORS, method=method, density=density)
    alone = [
        merge_tensors(VECTORS, method=method, density=one, preference=[float(t == task) for t in range(3)])
        for task, one in enumerate(density)
    ]
    torch.testing.assert_close(found, sum(alone) / 3, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("consensus", ["mean", "sum"])
def test_elections_by_task_agree_with_their_oracles(consensus):
    weights, density, flat = (0.5, 0.3, 0.2), (0.3, 1.0, 0.6), VECTORS.double().numpy()
    oracle = {"mean": oracles.ties_merge, "sum": oracles.ties_sum}[consensus]
    numbers = weights if consensus == "mean" else [3 * weight for weight in weights]
    options = {"preference": weights, "density": density, "consensus": consensus}

    thresholds = [
        oracles.threshold(row, math.ceil(200 * one)) for row, one in zip(flat, density, strict=True)
    ]
    found = merge_tensors(VECTORS, method="ties", **options)
    np.testing.assert_allclose(found.numpy(), oracle(flat, thresholds, numbers), rtol=1e-5, atol=1e-6)

    dropped = np.concatenate([
        oracles.dropped(flat, one, 0, "")[task : task + 1] for task, one in enumerate(density)
    ])  # fmt: skip
    found = merge_tensors(VECTORS, method="dare_ties", **options)
    np.testing.assert_allclose(found.numpy(), oracle(dropped, [0.0] * 3, numbers), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["ties", "dare", "dare_ties", "breadcrumbs"])
def test_equal_values_by_task_are_one_value_for_all(method):
    one, each = (merge_tensors(VECTORS, method=method, density=density) for density in (0.4, (0.4,) * 3))
    assert one.equal(each)


def test_values_in_order_and_by_name_are_the_same():
    named = dict(zip("abc", VECTORS, strict=True))
    found = merge_tensors(named, method="ties", density=DENSITIES)
    assert found.equal(merge_tensors(VECTORS, method="ties", density=(0.5, 0.25, 1.0)))


@pytest.mark.parametrize("wrong", [(0.5, 0.3), {"a": 0.5}, (0.5, 0.3, 2.0), {"0": 1, "1": 1, "2": 1, "3": 1}])
def test_wrong_values_by_task_are_refused(wrong):
    with pytest.raises(RecipeError, match=r"^ties: density"):
        merge_tensors(VECTORS, method="ties", density=wrong)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (
            {"name": "ties", "density": {"a": 0.5, "b": 0.5}},
            "method.density: there is no density for c; name",
        ),
        ({"name": "ties", "density": DENSITIES | {"d": 1}}, "method.density.d: there is no task 'd'"),
        ({"name": "ties", "density": DENSITIES | {"b": 2}}, "method.density.b: 2 should be at most 1"),
        ({"name": "ties", "density": [0.5, 0.5, 0.5]}, "method.density: .* a value for each by its name"),
        ({"name": "ties", "scope": {"a": "model"}}, "method.scope: .* should be 'tensor' or 'model'"),
    ],
    ids=str,
)
def test_a_recipe_names_every_task_once_and_no_other(method, expected):
    with pytest.raises(RecipeError, match=expected):
        parse_recipe(recipe_values(method=method))
    compared = {"tune": {"dataset": "./x"}, "methods": [method]}
    with pytest.raises(RecipeError, match=expected.replace("method.", r"compare\.methods\.0\.")):
        parse_recipe(recipe_values(method="average", compare=compared))


def test_lock_plan_and_card_tell_values_by_task(family):
    written = write_recipe(family, method=BY_TASK[0])
    assert "density (a 0.5, b 0.25, c 1.0)" in explain(plan(load_recipe(written)))
    code, _, err = call("run", written)
    assert code == 0, err
    locked = read_lock(family / "merged" / "recipe.lock.json")
    assert [*locked.method["density"].items()] == [("a", 0.5), ("b", 0.25), ("c", 1.0)]
    assert "`density` (`a` `0.5`, `b` `0.25`, `c` `1.0`)" in (family / "merged" / "README.md").read_text()
    assert call("verify", family / "merged", "--rebuild", "--from", family)[0] == 0


@pytest.mark.parametrize("method", BY_TASK, ids=title)
def test_every_backend_merges_by_task_to_the_same_bits(family, method):
    made = plan(load_recipe(write_recipe(family, method=method)))
    recipe, locked = made.recipe, made.lock
    models = []
    for backend in (Reference(), Compiled()):
        with InMemoryMerger(recipe, locked, backend) as merger:
            models.append(merger.merge(locked.method, locked.weights).weights(0.7))
    assert same(*models)


@pytest.mark.parametrize("method", BY_TASK, ids=title)
def test_small_tensors_merge_together_as_one_by_one(tmp_path, monkeypatch, method):
    write_many(tmp_path, torch.bfloat16)
    changes = {"method": method, "output": {"path": "m", "shard_size": "1KB"}}
    together = merged_files(tmp_path, "together", **changes)
    monkeypatch.setattr(bundles, "SMALL_ELEMENTS", 0)
    assert merged_files(tmp_path, "one-by-one", **changes) == together


def test_the_order_in_which_a_recipe_names_tasks_changes_nothing(family):
    digests = []
    for density in (DENSITIES, dict(sorted(DENSITIES.items()))):
        recipe = load_recipe(write_recipe(family, method={"name": "ties", "density": density}))
        locked = lock(recipe)
        report = merge(plan(recipe, locked), family / f"out-{len(digests)}")
        digests.append((locked.digest, report.shards))
    assert digests[0] == digests[1]


def test_a_function_gets_a_number_for_each_task():
    def method(num_tasks: int, *, factor: Annotated[tuple[float, ...], PerTask(float)] = (2.0,)) -> tuple:
        """Ignores the preference."""
        return factor

    found = merge_method("factors", source="test", form="linear")(method).merge_method
    assert methods.check_options(found, {}) == {"factor": 2.0}
    assert found.coefficients(3, (1 / 3,) * 3, {}) == (2.0, 2.0, 2.0)
    options = methods.check_options(found, {"factor": {"a": 1, "b": 2}})
    assert for_each_task(found, options, 2) == {"factor": (1.0, 2.0)}


@pytest.mark.parametrize(
    ("size", "density", "kept"),
    [(10, 0.25, 2), (10, 0.05, 1), (3200, 0.57, 1823), (100, 0.29, 28), (7, 1, 7)],
)
def test_a_share_rounded_down_is_that_of_the_binary_product(size, density, kept):
    """Which 0.57 of 3200 is 1823, though the decimal gives 1824; at least one magnitude is kept."""
    vector = torch.arange(1.0, size + 1)[None]
    found = merge_tensors(vector, method="ties", density=density, rounding="down")
    assert found.count_nonzero() == kept
    assert found[-kept:].equal(vector[0, -kept:])


def test_both_shares_of_breadcrumbs_are_rounded_down():
    vector = torch.arange(1.0, 101)[None]
    found = merge_tensors(vector, method="breadcrumbs", density=0.29, outliers=0.07, rounding="down")
    # The binary product of .07 and 100 is 7.000000000000001, and of .29 and 100 it is 28.999999999999996.
    assert found.nonzero().flatten().tolist() == [*range(100 - 7 - 28, 93)]


def test_nothing_of_a_tensor_smaller_than_the_share_is_kept_by_breadcrumbs_rounded_down():
    found = merge_tensors(VECTORS[:, :3], method="breadcrumbs", density=0.3, outliers=0.0, rounding="down")
    assert not found.any()
