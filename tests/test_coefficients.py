"""Coefficients in place of a preference: tasks that are subtracted, and numbers that are no shares."""

import random
import re

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from hub_magmax.errors import RecipeError
from hub_magmax.kernels.compiled.backend import Compiled
from hub_magmax.kernels.reference import Reference
from hub_magmax.merging.execution import merge
from hub_magmax.merging.in_memory import InMemoryMerger
from hub_magmax.methods import get_method
from hub_magmax.pipeline import lock, plan
from hub_magmax.planning.summary import coefficients, explain
from hub_magmax.recipe.loading import load_recipe, parse_recipe
from hub_magmax.recipe.lockfile import read_lock
from tests.families import recipe_values, write_checkpoint, write_recipe
from tests.test_cli import call
from tests.test_in_memory import same

GIVEN = {"a": 1.0, "b": -0.5, "c": 0.25}


def run(folder, **changes):
    recipe = load_recipe(write_recipe(folder, **{"output": {"path": "out"}, **changes}))
    locked = lock(recipe)
    made = plan(recipe, locked)
    merge(made)
    return made, load_file(folder / "out" / "model.safetensors")


def expected(folder, given, scaling=1.0):
    """Return base + λ Σ c τ, from the files alone."""
    base = load_file(folder / "base" / "model.safetensors")
    found = {name: value.double() for name, value in base.items()}
    for task, number in given.items():
        for name, value in load_file(folder / task / "model.safetensors").items():
            if value.is_floating_point():
                found[name] += scaling * number * (value.double() - base[name].double())
    return found


def assert_close(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert torch.allclose(value.double(), wanted[name], atol=1e-6), name


@pytest.mark.parametrize("given", [GIVEN, {"a": -1.0}, {"a": 2.0, "b": 2.0, "c": 2.0}, {"b": 0.0, "c": -3}])
@pytest.mark.parametrize("method", [
    "task_arithmetic",
    {"name": "dare", "density": 1.0},
    {"name": "breadcrumbs", "density": 1.0, "outliers": 0.0},
])  # fmt: skip
def test_coefficients_multiply_the_task_vectors_as_they_are_written(family, given, method):
    made, found = run(family, method=method, preference={"coefficients": given})
    assert made.lock.method["scaling"] == 1.0
    assert_close(found, expected(family, given))
    with InMemoryMerger(made.recipe, made.lock) as merger:
        again = merger.merge(made.lock.method, made.lock.weights).weights(1.0)
    assert same(again, found)


@pytest.mark.parametrize("method", [
    "task_arithmetic",
    {"name": "dare", "density": 0.5},
    {"name": "breadcrumbs", "density": 0.5, "outliers": 0.1},
    {"name": "breadcrumbs", "density": 0.5, "outliers": 0.1, "scope": "model"},
    {"name": "ties", "density": 0.5, "consensus": "sum"},
    {"name": "ties", "density": 0.5, "consensus": "sum", "scope": "model"},
    {"name": "dare_ties", "density": 0.5, "consensus": "sum"},
])  # fmt: skip
def test_every_backend_subtracts_to_the_same_bits(family, method):
    recipe = load_recipe(write_recipe(family, method=method, preference={"coefficients": GIVEN}))
    locked = lock(recipe)
    models = []
    for backend in (Reference(), Compiled()):
        with InMemoryMerger(recipe, locked, backend) as merger:
            models.append(merger.merge(locked.method, locked.weights).weights(0.7))
    assert same(*models)


def test_scaling_multiplies_all_coefficients(family):
    method = {"name": "task_arithmetic", "scaling": -2.0}
    made, found = run(family, method=method, preference={"coefficients": GIVEN})
    assert_close(found, expected(family, GIVEN, -2.0))
    assert coefficients(made) == {"a": -2.0, "b": 1.0, "c": -0.5}


def test_numbers_come_out_as_they_were_written():
    numbers = random.Random(0)
    for num_tasks in range(1, 40):
        given = [round(numbers.uniform(-3, 3), 3) for _ in range(num_tasks)]
        weights = tuple(number / num_tasks for number in given)
        found = get_method("task_arithmetic").multipliers(num_tasks, weights, {})
        assert np.array_equal(np.array(found, np.float32), np.array(given, np.float32))


def test_a_lock_holds_coefficients_and_goes_on_holding_them(family):
    recipe = write_recipe(family, method="task_arithmetic", preference={"coefficients": GIVEN})
    assert call("lock", recipe)[0] == 0
    locked = read_lock(family / "recipe.lock.json")
    assert (locked.preference.kind, dict(locked.preference.weights)) == ("coefficients", GIVEN)
    code, _, err = call("run", recipe)
    assert code == 0, err
    card = (family / "merged" / "README.md").read_text()
    assert "the coefficients `a` 1, `b` -0.5 and `c` 0.25" in card
    assert "A task whose number is below zero is subtracted" in card
    assert call("verify", family / "merged")[0] == 0


@pytest.mark.parametrize("method", ["average", "ties", "tunable_magmax", "magmax", "single_task"])
def test_methods_that_need_shares_refuse_coefficients_by_name(method):
    with pytest.raises(
        RecipeError, match=f"{method} needs shares.*task_arithmetic, opcm, dare, breadcrumbs and della_"
    ):
        parse_recipe(recipe_values(method=method, preference={"coefficients": GIVEN}))


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_an_elected_mean_refuses_coefficients_and_its_sum_takes_them(method):
    preference = {"coefficients": GIVEN}
    with pytest.raises(RecipeError, match=f"with consensus: sum {method} adds what agrees"):
        parse_recipe(recipe_values(method=method, preference=preference))
    parse_recipe(recipe_values(method={"name": method, "consensus": "sum"}, preference=preference))


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_an_elected_sum_of_tasks_that_agree_is_the_sum_of_their_multiples(family, method):
    """A task that is subtracted is turned round before the election."""
    base = load_file(family / "base" / "model.safetensors")
    for name, step in (("a", 0.25), ("b", -0.5)):
        moved = {key: value + step if value.is_floating_point() else value for key, value in base.items()}
        write_checkpoint(family / name, moved)
    given = {"a": 1.5, "b": -0.5}
    whole = {"name": method, "density": 1.0, "consensus": "sum"}
    made, found = run(family, method=whole, preference={"coefficients": given})
    assert made.lock.method["consensus"] == "sum"
    assert_close(found, expected(family, given))


def test_a_lock_does_not_tell_of_an_option_that_came_later_and_is_not_set(family):
    locked = lock(load_recipe(write_recipe(family, method="ties")))
    assert dict(locked.method) == {"name": "ties", "scaling": 1.0, "density": 0.2, "scope": "tensor"}
    written = write_recipe(family, method={"name": "ties", "consensus": "mean"})
    assert lock(load_recipe(written)).digest == locked.digest


def test_a_comparison_refuses_coefficients(family):
    with pytest.raises(RecipeError, match=r"preference\.coefficients: a comparison tries"):
        parse_recipe(
            recipe_values(
                method={"name": "task_arithmetic", "scaling": "auto"},
                preference={"coefficients": GIVEN},
                compare={"tune": {"dataset": "./x"}},
            )
        )


def test_an_unknown_task_has_no_coefficient():
    with pytest.raises(RecipeError, match=r"preference\.coefficients\.d: there is no task 'd'"):
        parse_recipe(recipe_values(method="task_arithmetic", preference={"coefficients": {"d": 1}}))


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "average"])
@pytest.mark.parametrize(
    "weights", [{"a": 1.5, "b": -0.5}, {"a": -1.0}, {"a": 0.1, "b": -0.3, "c": 1.2}], ids=str
)
def test_advice_about_negative_weights_gives_the_model_that_was_meant(family, method, weights):
    written = write_recipe(family, method=method, preference={"weights": weights})
    code, _, err = call("run", written)
    assert code == 1 and "to subtract a task" in err
    advice = re.search(r"preference: (\{coefficients: \{[^}]*\}\})", err)
    method = re.search(r"method: (\w+)", err)
    _, found = run(
        family,
        method=method[1] if method else "task_arithmetic",
        preference=yaml.safe_load(advice[1]),
    )
    assert_close(found, expected(family, weights))


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0}, {"a": 1.5, "b": 0.5, "c": 0.25}], ids=str)
def test_advice_about_magnitudes_keeps_them(family, weights):
    written = write_recipe(family, method="task_arithmetic", preference={"weights": weights})
    code, _, err = call("run", written)
    assert code == 1 and "in the same proportions" in err
    advice = re.search(r"preference: (\{coefficients: \{[^}]*\}\})", err)
    _, found = run(family, method="task_arithmetic", preference=yaml.safe_load(advice[1]))
    assert_close(found, expected(family, weights))


def test_methods_that_need_shares_are_told_of_proportions_alone(family):
    code, _, err = call("validate", write_recipe(family, method="ties", preference={"weights": {"a": 2}}))
    assert code == 1 and "in the same proportions: {a: 1}" in err and "coefficients" not in err


@pytest.mark.parametrize(
    ("method", "preference", "row"),
    [
        ({"name": "average"}, {"weights": {"a": 0.5, "b": 0.5}}, "a 0.5, b 0.5, c 0"),
        ({"name": "task_arithmetic", "scaling": 0.4}, {"weights": {"a": 1}}, "a 1.2, b 0, c 0"),
        ({"name": "dare"}, {"coefficients": {"c": -2}}, "a 0, b 0, c -2"),
        ({"name": "ties"}, {"weights": {"a": 1}}, None),
    ],
)
def test_a_plan_tells_what_each_task_vector_is_multiplied_by(family, method, preference, row):
    made = plan(load_recipe(write_recipe(family, method=method, preference=preference)))
    lines = [line.split(maxsplit=1)[1] for line in explain(made).splitlines() if "coefficients " in line[:13]]
    assert [line.partition(" (")[0] for line in lines] == ([row] if row else [])
