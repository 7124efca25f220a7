"""Several seeds in comparisons and sweeps: methods that draw are averaged, others run once."""

import statistics

import pytest
import torch

from hub_magmax.analysis.candidates import draws
from hub_magmax.analysis.comparing import comparable, compare
from hub_magmax.analysis.sweeping import sweep, sweepable
from hub_magmax.analysis.tuning import mean_outcomes
from hub_magmax.errors import RecipeError
from hub_magmax.evaluation.evaluators import Outcome
from hub_magmax.pipeline import lock
from hub_magmax.recipe.loading import parse_recipe, updated
from tests.classifiers import classifier_recipe, write_classifiers, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("seeds")
    torch.manual_seed(0)
    # The answer is the class whose number the draw takes from the task that leans to it.
    write_classifiers(found, {"base": (0.0, 0.0, 0.1), "a": (1.0, 0.0, 0.1), "b": (0.0, 1.0, 0.1)})
    write_rows(found / "others.parquet", [0] * 5 + [2] * 3)
    return found


def make_recipe(folder, method="random_mix", **changes):
    data = {"a": {"dataset": "./rows.parquet"}, "b": {"dataset": "./others.parquet"}}
    compared = {
        "tune": {"dataset": "./rows.parquet"},
        "report": {"dataset": "./others.parquet"},
        "methods": [method, "average"],
        "scaling": [1.0],
    }
    spec = {"method": method, "evaluation": {"tasks": data}, "sweep": {"walk": "grid", "budget": 3}}
    return parse_recipe(classifier_recipe(**spec | {"compare": compared} | changes), folder=folder)


def swept(recipe, **changes):
    asked = updated(recipe, changes)
    return sweep(asked, lock(sweepable(asked)))


def test_a_point_of_several_seeds_is_the_mean_of_theirs(folder):
    recipe = make_recipe(folder)
    several = swept(recipe, sweep={"walk": "grid", "budget": 3, "seeds": [1, 2, 5]})
    single = {seed: swept(recipe, seed=seed) for seed in (1, 2, 5)}
    for number, point in enumerate(several.points):
        for column, task in enumerate(("a", "b")):
            values = {s: found.points[number].scores[column].value for s, found in single.items()}
            assert dict(point.by_seed[task]) == values
            assert point.scores[column].value == pytest.approx(statistics.mean(values.values()))
            assert point.deviation(task) == statistics.stdev(values.values())
    middle = several.points[0]  # the equal weights of the recipe itself
    assert max(middle.deviation("a"), middle.deviation("b")) > 0  # the draws do differ


def test_a_comparison_averages_what_draws_and_runs_the_rest_once(folder):
    recipe = make_recipe(folder)
    compared = recipe.to_dict()["compare"]
    locked = lock(comparable(recipe))
    found = compare(updated(recipe, {"compare": compared | {"seeds": [1, 2, 5]}}), locked)
    rows = {row.candidate.method["name"]: row for row in found.methods}
    assert set(rows["random_mix"].by_seed) == {1, 2, 5} and not rows["average"].by_seed
    assert rows["average"].deviation is None
    mean = statistics.mean(rows["random_mix"].by_seed.values())
    assert rows["random_mix"].reported.value == pytest.approx(mean)
    assert rows["random_mix"].deviation == statistics.stdev(rows["random_mix"].by_seed.values())
    assert all(row.reported.low <= row.reported.value <= row.reported.high for row in found.methods)
    (other,) = (row.to_winner for row in found.methods if row.to_winner is not None)
    assert other.mean != 0 and (other.gained, other.lost) == (None, None)


def test_without_seeds_the_recipe_keeps_its_digest(folder):
    assert "seeds" not in make_recipe(folder).to_dict()["compare"]


def test_a_seed_twice_is_refused(folder):
    with pytest.raises(RecipeError, match="each seed once"):
        make_recipe(folder, sweep={"seeds": [1, 1]})


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({"name": "random_mix"}, True),
        ({"name": "dare"}, True),
        ({"name": "tunable_magmax", "selection": "algorithm-1"}, True),
        ({"name": "tunable_magmax", "selection": "top-n"}, False),
        ({"name": "ties"}, False),
    ],
)
def test_methods_that_draw_are_known(method, expected):
    assert draws(method) is expected


def test_the_mean_of_outcomes_worked_by_hand():
    first = (Outcome(1.0, 0.9, 2.0), Outcome(0.0, 0.2, None))
    second = (Outcome(0.0, 0.3, -1.0), Outcome(0.0, 0.4, 1.0, is_cut=True))
    assert mean_outcomes([first]) is first
    (one, two) = mean_outcomes([first, second])
    assert one == (0.5, pytest.approx(0.6), 0.5, False)
    assert two == (0.0, pytest.approx(0.3), None, True)
