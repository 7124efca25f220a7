from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub_magmax.analysis.candidates import Candidate, candidates
from hub_magmax.analysis.tuning import Trial, best
from hub_magmax.errors import EvaluationError, LockError, RecipeError
from hub_magmax.evaluation.evaluators import Outcome
from hub_magmax.evaluation.margins import normalised_margins, within
from hub_magmax.methods import get_method
from hub_magmax.pipeline import lock, run
from hub_magmax.preference import resolve_preference
from hub_magmax.preference.search import choose, on_simplex, search_weights
from hub_magmax.recipe.loading import parse_recipe, updated
from hub_magmax.recipe.lockfile import read_lock
from hub_magmax.recipe.matching import check_lock
from hub_magmax.recipe.schema import SCALINGS, Compare, Method
from hub_magmax.registry import METHODS
from tests.classifiers import classifier_recipe, write_classifiers, write_rows

ROWS = {"dataset": "./rows.parquet"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Task `a` says cat, task `b` says emu with more force, and most examples are cats."""
    found = tmp_path_factory.mktemp("classifiers")
    write_classifiers(found, {"base": [0.0, 0.1, 0.0], "a": [1.0, 0.1, 0.0], "b": [0.0, 0.1, 4.0]})
    return found


def recipe(folder: Path, **changes):
    return parse_recipe(classifier_recipe(**changes), folder=folder)


def test_candidates_are_all_combinations_once():
    compare = Compare(methods=(Method(name="average"), Method(name="magmax")), scaling=(0.5, 0.3))
    weights = {"recipe": (0.8, 0.2), "uniform": (0.5, 0.5)}
    found = candidates(compare, Method(name="average"), weights)
    seen = [(c.method["name"], c.preference, c.method["scaling"]) for c in found]
    # magmax ignores the preference, so it is tried with one only. The recipe as it stands is no listed one.
    assert seen == [
        ("average", "recipe", 0.5), ("average", "recipe", 0.3),
        ("average", "uniform", 0.5), ("average", "uniform", 0.3),
        ("magmax", "recipe", 0.5), ("magmax", "recipe", 0.3),
        ("average", "recipe", 1.0),
    ]  # fmt: skip
    assert [c.label for c in found if c.is_recipe] == [found[-1].label] == ["the recipe: average"]


def test_what_is_listed_is_tried_and_nothing_else_but_the_recipe_itself():
    listed = Compare(methods=(Method(name="ties"),))
    found = candidates(listed, Method(name="average", scaling=0.9), {"recipe": (0.8, 0.2)})
    assert [(c.label, c.method["scaling"]) for c in found if c.is_recipe] == [("the recipe: average", 0.9)]
    # Without a list of coefficients the method's own is tried too: 1, which is among the usual ones.
    assert {(c.method["name"], c.method["scaling"]) for c in found[:-1]} == {("ties", s) for s in SCALINGS}
    everything = candidates(Compare(), Method(name="ties", density=0.3), {"recipe": (0.8, 0.2)})
    assert everything[0].method["density"] == 0.3
    assert everything[0].label == "the recipe: ties density 0.3"
    assert {"average", "magmax", "ties density 0.2", "ties density 0.3"} <= {c.group for c in everything}


def test_equal_preferences_are_tried_once():
    weights = {"recipe": (0.5, 0.5), "uniform": (0.5, 0.5)}
    found = candidates(Compare(methods=(Method(name="average"),)), Method(name="average"), weights)
    assert {candidate.preference for candidate in found} == {"recipe"}


def test_a_named_scaling_is_the_only_one_and_auto_scaling_keeps_the_method():
    fixed = Compare(methods=(Method(name="average", scaling=0.3),))
    found = candidates(fixed, Method(name="average", scaling=0.3), {"recipe": (1.0,)})
    assert [(c.method["scaling"], c.is_recipe) for c in found] == [(0.3, True)]
    found = candidates(fixed, Method(name="ties", scaling="auto"), {"recipe": (1.0,)})
    assert {c.method["name"] for c in found} == {"ties"} and len(found) == len(Compare().tried_scaling)


def test_the_best_of_the_default_comparison_is_tried_for_every_registered_method():
    found = candidates(Compare(), Method(name="auto"), {"recipe": (0.5, 0.5)})
    labels = {c.label for c in found}
    assert {"tunable_magmax algorithm-1", "tunable_magmax top-n", "ties", "average"} <= labels


def test_the_default_comparison_leaves_out_methods_that_say_so(monkeypatch):
    wanted = [name for name in METHODS.built_in if get_method(name).in_comparison]
    assert [m.name for m in Compare().tried_methods] == [*wanted, "tunable_magmax"]
    assert {"ties", "localize_stitch"} <= {*wanted}
    assert not {"tsv", "ram", "nearswap", "slerp", "weighted_sum"} & {*wanted}
    assert Compare().tried_methods[-1].options == {"selection": "top-n"}
    slow = replace(METHODS.get("ties"), in_comparison=())
    monkeypatch.setattr("hub_magmax.methods.sparse.ties.merge_method", slow)
    assert "ties" not in {m.name for m in Compare().tried_methods}


def test_auto_takes_what_does_best_on_the_target(folder):
    asked = recipe(folder, method="auto", compare={"tune": ROWS, "methods": ["single_task", "last_task"]},
                   preference={"weights": {"a": 1.0}})  # fmt: skip
    found = lock(asked)
    # The single task is `a`, which says cat and is right on 6 of 10; the last is `b`, right on 1.
    assert found.method["name"] == "single_task"
    assert found.chosen["best"]["single_task"]["accuracy"] == 0.6
    assert found.chosen["best"]["last_task"]["accuracy"] < 0.6
    assert (found.chosen["examples"], found.chosen["tried"]) == (10, 2 * len(Compare().tried_scaling))


def test_auto_scaling_is_chosen_and_the_lock_goes_with_the_recipe_alone(folder, tmp_path):
    asked = recipe(folder, method={"name": "average", "scaling": "auto"}, compare={"tune": ROWS},
                   preference={"weights": {"a": 1.0}})  # fmt: skip
    found = lock(asked)
    assert found.method["name"] == "average" and found.method["scaling"] in Compare().tried_scaling
    # Below λ = .1 / 1 the dog's bias of .1 wins; at .1 both are equal, and the first class is taken.
    assert found.chosen["best"]["average"]["accuracy"] == 0.6
    path = tmp_path / "recipe.lock.json"
    path.write_text(found.to_json())
    check_lock(asked, read_lock(path), "here")
    for changes in ({"compare": {"tune": ROWS, "scaling": [0.5]}}, {"method": "magmax"}):
        with pytest.raises(LockError, match="method"):
            check_lock(updated(asked, changes), found, "here")


@pytest.mark.parametrize("method", ["average", "agreement", "ties", "magmax", "tunable_magmax"])
def test_a_lock_goes_with_an_auto_recipe_whichever_method_was_chosen(folder, method):
    asked = recipe(folder, method="auto", compare={"tune": ROWS, "methods": [method]},
                   preference={"weights": {"a": 1.0}})  # fmt: skip
    found = lock(asked)
    assert found.method["name"] == method
    check_lock(asked, found, "here")
    with pytest.raises(LockError, match="method"):
        check_lock(updated(asked, {"method": {"name": method, "scaling": 0.123}}), found, "here")


def test_a_run_with_auto_makes_the_model_that_was_chosen(folder, tmp_path):
    output = {"path": str(tmp_path / "merged")}
    asked = recipe(folder, method="auto", output=output, preference={"weights": {"a": 1.0}},
                   compare={"tune": ROWS, "methods": ["average", "last_task"], "scaling": [1.0]})  # fmt: skip
    lines: list[str] = []
    done = run(asked, report=lines.append)
    assert done.plan.lock.method["name"] == "average"
    (told,) = [line for line in lines if line.startswith("auto chose ")]
    assert (
        told.startswith("auto chose average, scaling 1, accuracy ") and "on 10 examples: the best of" in told
    )
    assert read_lock(tmp_path / "merged" / "recipe.lock.json").chosen == done.plan.lock.chosen


def test_auto_without_examples_to_choose_by_is_a_problem_of_the_recipe(folder):
    with pytest.raises(RecipeError, match=r"method\.name: there is no labelled sample of the target"):
        recipe(folder, method="auto")
    with pytest.raises(RecipeError, match=r"method\.scaling: there is no labelled sample"):
        recipe(folder, method={"name": "ties", "scaling": "auto"})


def test_auto_is_no_method_to_try_and_a_search_needs_a_method(folder):
    with pytest.raises(RecipeError, match="auto is no method to try"):
        recipe(folder, compare={"methods": ["auto"]})
    with pytest.raises(RecipeError, match="a search needs a method"):
        recipe(folder, method="auto", preference={"search": {"target": ROWS}})


def test_a_search_without_a_scorer_says_that_it_cannot_choose(folder):
    with pytest.raises(EvaluationError, match="a search needs models that are merged and scored"):
        resolve_preference(recipe(folder, preference={"search": {"target": ROWS}}))


def test_a_search_finds_the_weights_that_serve_the_target(folder, tmp_path):
    found = lock(recipe(folder, method={"name": "average", "scaling": 1.0},
                        preference={"search": {"target": ROWS, "budget": 12}}))  # fmt: skip
    # Cats win as soon as 1·w_a > 4·w_b, which uniform weights do not reach.
    weights = found.preference.weights
    assert weights["a"] > 4 * weights["b"]
    assert found.preference.explanation["tried"] <= 12
    assert found.preference.explanation["best"] > found.preference.explanation["uniform"]
    assert set(found.preference.explanation["intervals"]) == {"a", "b"}
    assert found.preference.data_fingerprint


def test_a_search_is_the_same_every_time(folder):
    asked = recipe(folder, method="average", preference={"search": {"target": ROWS, "budget": 8}})
    assert lock(asked) == lock(asked)


def test_a_search_that_cannot_tell_the_tasks_apart_is_refused(folder):
    with pytest.raises(RecipeError, match="2 tries cannot tell 2 tasks apart"):
        lock(recipe(folder, preference={"search": {"target": ROWS, "budget": 2}}))


def test_a_search_with_a_holdout_gives_way_where_it_loses(folder, tmp_path):
    write_rows(tmp_path / "mixed.parquet", [0, 2] * 10)
    spec = {"target": {"dataset": str(tmp_path / "mixed.parquet")}, "budget": 6, "holdout": 0.5}
    found = lock(recipe(folder, method="average", preference={"search": spec}))
    assert found.preference.explanation["holdout"]["used"] in ("estimate", "prior")
    assert found.preference.explanation["holdout"]["examples"] == 10


def greedily(values):
    """Return what is chosen where the set of members of a soup tells its merit, and the soups in order."""
    tried = []

    def values_of(weights):
        members = frozenset(np.flatnonzero(weights).tolist())
        assert np.allclose(weights[list(members)], 1 / len(members))
        tried.append(members)
        return np.array([values[members]])

    return choose(values_of, ("a", "b", "c")), tried


def test_a_greedy_choice_adds_tasks_in_order_of_merit_and_keeps_what_does_no_harm():
    # By hand: b is best alone; then c, which harms; then a, which changes nothing and is kept.
    merits = {(0,): 0.2, (1,): 0.5, (2,): 0.4, (1, 2): 0.3, (0, 1): 0.5}
    choice, tried = greedily({frozenset(members): merit for members, merit in merits.items()})
    assert tried == [{0}, {1}, {2}, {1, 2}, {1, 0}]
    assert choice.tried[choice.chosen].weights.tolist() == [0.5, 0.5, 0]
    assert choice.seen == {
        "alone": {"b": 0.5, "c": 0.4, "a": 0.2},
        "with_those_before": {"b": 0.5, "c": 0.3, "a": 0.5},
        "kept": ["b", "a"],
    }


@given(st.lists(st.integers(0, 5), min_size=7, max_size=7))
def test_no_soup_that_was_tried_surpasses_the_greedy_choice(merits):
    sets = [frozenset(s) for n in (1, 2, 3) for s in combinations(range(3), n)]
    choice, _ = greedily(dict(zip(sets, merits, strict=True)))
    best = max(attempt.mean for attempt in choice.tried)
    assert choice.tried[choice.chosen].mean == best
    assert len(choice.tried) == 5


def test_a_greedy_preference_leaves_out_the_task_that_harms(folder):
    found = lock(
        recipe(folder, method={"name": "average", "scaling": 1.0}, preference={"greedy": {"target": ROWS}})
    )
    # Most examples are cats, which task b calls emus with four times the force.
    assert found.preference.weights == {"a": 1, "b": 0}
    assert found.preference.kind == "greedy" and found.preference.explanation["kept"] == ["a"]
    with pytest.raises(RecipeError, match="a search needs a method"):
        recipe(folder, method="auto", preference={"greedy": {"target": ROWS}})
    with pytest.raises(EvaluationError, match=r"preference\.greedy: a search needs models"):
        resolve_preference(recipe(folder, preference={"greedy": {"target": ROWS}}))


@pytest.mark.parametrize("num_tasks", [1, 2, 5])
def test_search_stays_in_its_budget_and_starts_with_uniform_weights(num_tasks):
    wanted = np.arange(1, num_tasks + 1) / (num_tasks * (num_tasks + 1) / 2)
    calls = []

    def values_of(weights):
        calls.append(weights)
        return -np.abs(weights - wanted)

    tried = search_weights(values_of, num_tasks, 60)
    assert len(calls) == len(tried) <= 60
    assert np.allclose(tried[0].weights, 1 / num_tasks)
    assert all(weights.min() >= 0 and weights.sum() == pytest.approx(1) for weights in calls)
    nearest = max(tried, key=lambda t: t.values.mean())
    assert np.abs(nearest.weights - wanted).mean() < 0.04


def test_points_outside_stand_for_weights():
    assert on_simplex(np.array([-1.0, 1.0, 3.0])).tolist() == [0, 0.25, 0.75]
    assert on_simplex(np.array([-1.0, -1.0])).tolist() == [0.5, 0.5]


def outcomes(margins):
    return tuple(Outcome(float(m > 0), None, m) for m in margins)


def tried(scaling, margins, label="average", preference="recipe"):
    return Trial(Candidate({"name": label, "scaling": scaling}, preference, (1.0,)), outcomes(margins))


def test_merits_are_margins_in_units_of_their_mean_size():
    wanted = pytest.approx(np.tanh([1, -1, 2, 0]).tolist())
    assert normalised_margins(outcomes([2.0, -2.0, 4.0, 0.0])).tolist() == wanted
    # A model that is ten times as sure of everything is not better.
    assert normalised_margins(outcomes([20.0, -20.0, 40.0, 0.0])).tolist() == wanted
    assert normalised_margins([Outcome(1.0), Outcome(0.0)]).tolist() == [1, 0]
    assert normalised_margins(outcomes([0.0, 0.0])).tolist() == [0, 0]


def test_within_counts_standard_errors_of_the_difference():
    first, second = np.array([1.0, 1.0, 1.0, 1.0]), np.array([1.0, 1.0, 1.0, 0.0])
    # The differences 0, 0, 0, 1 have the mean ¼ and the standard error ½ / √4 = ¼.
    assert within(first, second, 1.0) and not within(first, second, 0.99)
    assert within(second, first, 0.0)


def test_one_example_says_nothing_about_errors():
    better, worse = np.array([1.0]), np.array([0.9])
    assert within(better, better, 1.0) and not within(better, worse, 1.0)


def test_the_best_method_is_taken_where_it_is_clearly_better():
    good, bad = [1.0] * 19 + [-1.0], [1.0, -1.0] * 10
    assert best([tried(1.0, bad), tried(1.0, good, "ties")]).candidate.label == "ties"
    assert best([tried(1.0, good), tried(1.0, bad, "ties")]).candidate.label == "average"


def test_of_methods_that_do_about_equally_well_the_first_is_taken():
    first, second = [1.0, -1.0] * 5 + [1.0, 1.0, -1.0], [1.0, -1.0] * 5 + [1.0, 1.0, 1.0]
    assert best([tried(1.0, first), tried(1.0, second, "ties")]).candidate.label == "average"
    found = best([tried(1.0, first), tried(1.0, second, preference="uniform")])
    assert found.candidate.preference == "recipe"


def test_of_scalings_that_do_equally_well_the_nearest_to_the_methods_own_is_taken():
    margins = [1.0, -1.0, 1.0, 1.0]
    found = best([tried(0.1, margins), tried(0.7, margins), tried(2.0, margins)])
    # The default is 1: ln(1/0.7) is less than ln 2.
    assert found.candidate.method["scaling"] == 0.7


def test_methods_without_margins_are_chosen_by_their_scores():
    worse, better = ([Outcome(1.0)] * n + [Outcome(0.0)] * (20 - n) for n in (4, 18))
    trials = [
        Trial(Candidate({"name": name, "scaling": 1.0}, "recipe", (1.0,)), tuple(found))
        for name, found in (("average", worse), ("ties", better))
    ]
    assert best(trials).candidate.label == "ties"
