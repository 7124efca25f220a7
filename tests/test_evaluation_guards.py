"""What must not regress: verdicts, and what a regression keeps from happening."""

import json
import shutil
from types import SimpleNamespace

import pytest

from hub_magmax import pipeline
from hub_magmax.errors import PublishError, RecipeError
from hub_magmax.evaluation import scoring
from hub_magmax.evaluation.evaluators import Outcome
from hub_magmax.evaluation.guards import check_guards, regressed
from hub_magmax.evaluation.scores import Scores, make_score
from hub_magmax.recipe.loading import parse_recipe, updated
from tests.families import recipe_values
from tests.test_evaluation_scoring import image_recipe, images  # noqa: F401 - a fixture


def guarded(base, merged, margin=0.01):
    spec = SimpleNamespace(guard={"general": None}, margin=margin)
    kept = [
        make_score(model, "general", [Outcome(float(v)) for v in values], is_share=True)
        for model, values in (("base_model", base), ("merged", merged))
    ]
    (guard,) = check_guards(spec, Scores("accuracy", "x", tuple(kept), {}))
    return guard


def test_equal_answers_hold():
    guard = guarded([1, 0] * 50, [1, 0] * 50)
    assert (guard.verdict, guard.difference.p_value) == ("held", 1.0)
    assert regressed((guard,)) == ()


def test_a_gain_holds():
    assert guarded([0] * 90 + [1] * 10, [1] * 100).verdict == "held"


def test_a_difference_beyond_the_margin_is_a_regression():
    guard = guarded([1] * 100, [1] * 90 + [0] * 10)
    assert guard.verdict == "regressed"
    assert guard.difference.mean == -0.1
    # McNemar by hand: ten lost and none gained.
    assert guard.difference.p_value == pytest.approx(2 * 0.5**10)
    assert regressed((guard,)) == (guard,)


def test_a_difference_at_the_margin_is_none():
    assert guarded([1] * 100, [1] * 90 + [0] * 10, margin=0.1).verdict == "not shown"


def test_an_interval_that_reaches_beyond_shows_nothing():
    assert guarded([1, 0] * 50, [0, 1] * 50).verdict == "not shown"


def test_guards_that_were_not_scored_have_no_verdict():
    spec = SimpleNamespace(guard={"general": None}, margin=0.01)
    assert check_guards(spec, Scores("accuracy", "x", (), {})) == ()
    assert check_guards(spec, None) == check_guards(None, None) == ()


def test_a_guard_may_not_have_the_name_of_a_task():
    spec = {"tasks": {}, "guard": {"a": {"dataset": "./rows.parquet"}}}
    with pytest.raises(RecipeError, match=r"guard\.a: this is the name of a task"):
        parse_recipe(recipe_values(evaluation=spec))


@pytest.fixture
def regressing(images, tmp_path, monkeypatch):  # noqa: F811
    """A recipe whose evaluation says that the guard regressed, though models are all the same."""
    shutil.copytree(images, tmp_path / "work")
    recipe = image_recipe(tmp_path / "work")
    spec = recipe.to_dict()["evaluation"] | {"guard": {"general": {"dataset": "./rows.parquet"}}}
    real = scoring.evaluate

    def worse(*arguments, **options):
        scores = real(*arguments, **options)
        lost = make_score("merged", "general", [Outcome(0.0)] * 10, is_share=True)
        kept = [lost if (s.model, s.task) == ("merged", "general") else s for s in scores.scores]
        return Scores(scores.metric, scores.pipeline_tag, tuple(kept), scores.data, scores.evaluation_digest)

    monkeypatch.setattr(scoring, "evaluate", worse)
    output = {"path": "merged", "push_to_hub": f"me/{tmp_path.name.replace('_', '-')}"}
    return updated(recipe, {"evaluation": spec, "output": output})


def test_a_regression_is_written_and_told_but_not_pushed(regressing, hub):
    with pytest.raises(PublishError, match=r"falls behind the base model on general by 0\.4.*--push-anyway"):
        pipeline.run(regressing)
    card = (regressing.output_path / "README.md").read_text()
    assert (
        "**It falls behind the base model on `general` by more than the margin of 1.0 points: −40.0" in card
    )
    assert "| regressed | 10 |" in card
    assert (regressing.output_path / "model.safetensors").is_file()
    assert not [entry for entry in hub.log if entry.path.endswith("/commit/main")]


def test_it_is_pushed_if_told_to(regressing, hub):
    with pytest.raises(PublishError):
        pipeline.run(regressing)
    done = pipeline.run(regressing, push_anyway=True)
    assert done.published and [guard.verdict for guard in done.guards] == ["regressed"]
    scores = json.loads(hub.read(regressing.output.push_to_hub, "scores.json"))
    assert scores["data"]["general"]["examples"] == 10
