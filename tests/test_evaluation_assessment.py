"""A merged model is assessed beside its base model and the tasks' own checkpoints, and not flattered."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from hub_magmax.evaluation.assessment import assess
from hub_magmax.evaluation.scores import Score, Scores
from hub_magmax.reporting.headline import result
from tests.classifiers import classifier_recipe, write_classifiers
from tests.test_cli import call


def lock_of(weights):
    """Return what the first lines read of a lock."""
    return SimpleNamespace(preference=SimpleNamespace(shares=weights))


def scores(table, *, is_share=True):
    """Return scores from base, own and merged of each task; None where a model was not scored."""
    found = [
        Score({"own": task}.get(model, model), task, value, value, value, 10)
        for task, values in table.items()
        for model, value in zip(("base_model", "own", "merged"), values, strict=True)
        if value is not None
    ]
    return Scores("accuracy", "text-generation", tuple(found), {}, is_share=is_share)


EVEN = {"a": 0.5, "b": 0.5}


def test_task_that_falls_below_the_base_model_is_told_though_the_mean_rises():
    found = assess(scores({"a": (0.2, 0.9, 0.8), "b": (0.5, 0.9, 0.4)}), EVEN)
    assert [row.task for row in found.below_base] == ["b"]
    assert found.is_below_base and not found.weighted.is_below_base
    # 0.8 of 0.9 and 0.4 of 0.9.
    assert found.kept == {"a": pytest.approx(8 / 9), "b": pytest.approx(4 / 9)}
    assert found.worst.task == "b"


def test_mean_below_the_base_model_is_told_whichever_way_tasks_count():
    table = {"a": (0.2, 0.9, 0.4), "b": (0.9, 0.9, 0.3)}
    wanted = assess(scores(table), {"a": 0.9, "b": 0.1})
    # .9 · .4 + .1 · .3 against .9 · .2 + .1 · .9; and .35 against .55.
    assert wanted.weighted.merged == pytest.approx(0.39) and wanted.weighted.base == pytest.approx(0.27)
    assert wanted.plain.merged == pytest.approx(0.35) and wanted.plain.base == pytest.approx(0.55)
    assert not wanted.weighted.is_below_base and wanted.plain.is_below_base


def test_model_as_good_as_its_base_model_is_not_below_it():
    found = assess(scores({"a": (0.3, 0.9, 0.3), "b": (0.1, 0.7, 0.1)}), {"a": 0.3, "b": 0.7})
    assert not found.is_below_base and found.below_base == ()


def test_tasks_below_are_told_the_worst_first():
    found = assess(
        scores({"a": (0.5, 0.9, 0.4), "b": (0.5, 0.9, 0.1), "c": (0.5, 0.9, 0.3)}),
        dict.fromkeys("abc", 1 / 3),
    )
    assert [row.task for row in found.below_base] == ["b", "c", "a"]


def test_log_likelihoods_have_no_share_and_the_worst_loses_most():
    found = assess(scores({"a": (-3.0, -1.0, -1.5), "b": (-3.0, -1.0, -2.5)}, is_share=False), EVEN)
    assert found.kept == {} and found.worst.task == "b"
    assert found.to_dict()["share_kept"] is None


def test_log_likelihoods_that_no_task_loses_are_not_called_behind():
    better = scores({"a": (-3.0, -1.0, -0.5), "b": (-3.0, -1.0, -1.0)}, is_share=False)
    assert "behind its own checkpoint on no task" in result(better, lock_of(EVEN))[1]
    worse = scores({"a": (-3.0, -1.0, -0.5), "b": (-3.0, -1.0, -1.5)}, is_share=False)
    assert "furthest behind its own checkpoint on b (" in result(worse, lock_of(EVEN))[1]


def test_checkpoint_that_scores_nothing_has_no_share_to_keep():
    found = assess(scores({"a": (0.0, 0.0, 0.1), "b": (0.1, 0.8, 0.4)}), EVEN)
    assert found.kept == {"b": pytest.approx(0.5)}


def test_model_that_was_not_scored_is_not_assessed():
    assert assess(None, EVEN) is None
    assert assess(scores({"a": (0.2, 0.9, None), "b": (0.5, 0.9, None)}), EVEN) is None


def test_task_that_was_not_scored_leaves_the_weighted_mean_open():
    found = assess(scores({"a": (0.2, 0.9, 0.8), "b": (0.5, 0.9, None)}), EVEN)
    assert found.weighted.merged is None and found.plain.merged == pytest.approx(0.8)


WANTED = {"a": 0.7, "b": 0.3, "c": 0.0}


@pytest.mark.parametrize(
    ("table", "below"),
    [
        (
            {"a": (0.5, 0.9, 0.4), "b": (0.5, 0.9, 0.6), "c": (0.5, 0.9, 0.0)},
            "on average (46.0 % against 50.0 %) and on 1 of 2 tasks that it is for, a (50.0 % → 40.0 %), "
            "and on the other one",
        ),
        (
            {"a": (0.5, 0.9, 0.8), "b": (0.5, 0.9, 0.8), "c": (0.5, 0.9, 0.4)},
            "on the task that it is not for, c (50.0 % → 40.0 %)",
        ),
    ],
)
def test_tasks_that_a_model_is_not_for_are_told_apart(table, below):
    first, rest = result(scores(table), lock_of(WANTED))
    assert first == f"Below its base model {below}."
    least = min(table[task][2] for task in "ab")
    assert f"{100 * least / 0.9:.0f} % on the worst task, a " in rest, "of those that it is for"


def test_a_checkpoint_that_does_better_alone_is_named():
    table = scores({"a": (0.1, 0.9, 0.8), "b": (0.1, 0.7, 0.7)})
    cells = (Score("a", "b", 0.8, 0.8, 0.8, 10), Score("b", "a", 0.1, 0.1, 0.1, 10))
    measured = replace(table, scores=table.scores + cells)
    # .85 of a alone on both, against .75.
    assert (
        "The checkpoint of a alone does better on average (85.0 % against 75.0 %)."
        in result(measured, lock_of(EVEN))[1]
    )
    assert "alone" not in result(table, lock_of(EVEN))[1], "not known"


def test_programs_get_plain_values():
    found = assess(scores({"a": (0.5, 1.0, 0.25), "b": (0.25, 0.5, 0.5)}), EVEN).to_dict()
    assert found == {
        "is_below_base": True,
        "below_base": {"a": -0.25},
        "tasks_compared_with_base": 2,
        "own_below_base": {},
        "weighted_means": {"merged": 0.375, "base": 0.375, "own": 0.75},
        "plain_means": {"merged": 0.375, "base": 0.375, "own": 0.75},
        "share_kept": {"mean": 0.625, "least": 0.25},
        "worst_task": "a",
    }


def test_model_worse_than_its_base_model_is_told_before_it_is_published(tmp_path, hub):
    """The base model takes all for cats, the tasks for dogs: 6 and 3 of 10 examples."""
    write_classifiers(tmp_path, {"base": [1.0, 0.0, 0.0], "a": [0.0, 4.0, 0.0], "b": [0.0, 3.0, 0.0]})
    rows = {"dataset": str(tmp_path / "rows.parquet")}
    spec = {"evaluator": "image-classification", "tasks": {"a": rows, "b": rows}}
    output = {"path": "merged", "push_to_hub": "me/worse"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(classifier_recipe(method="average", evaluation=spec, output=output)))
    told = (
        "Below its base model on average (30.0 % against 60.0 %) and on all 2 tasks, "
        "most on a (60.0 % → 30.0 %)."
    )
    code, out, err = call("run", recipe, "--json")
    assert code == 0
    assert f"warning: {told}" in err and err.index(told) < err.index("pushing")
    assert json.loads(out)["assessment"]["below_base"] == pytest.approx({"a": -0.3, "b": -0.3})
    assert f"**{told}**".replace("most on a ", "most on `a` ") in hub.read("me/worse", "README.md").decode()
    code, out, err = call("evaluate", recipe)
    assert code == 0 and f"warning: {told}" in err
    assert f"{told} accuracy is 30.0 %" in out
    assert json.loads(call("evaluate", recipe, "--json")[1])["assessment"]["is_below_base"]


def test_model_that_is_better_than_its_base_model_is_told_without_a_warning(tmp_path):
    write_classifiers(tmp_path, {"base": [0.0, 1.0, 0.0], "a": [4.0, 0.0, 0.0], "b": [3.0, 0.0, 0.0]})
    rows = {"dataset": str(tmp_path / "rows.parquet")}
    spec = {"evaluator": "image-classification", "tasks": {"a": rows, "b": rows}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(classifier_recipe(method="average", evaluation=spec)))
    code, out, err = call("run", recipe)
    assert code == 0 and "warning" not in err
    assert "accuracy is 60.0 % on average over 2 tasks, against 30.0 % for the base model and 60.0 %" in out
