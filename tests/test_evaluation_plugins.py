"""Evaluators of other packages: wrong results and errors name them and the task."""

import sys
from importlib.metadata import Distribution, EntryPoint

import pytest
from click.testing import CliRunner

from hub_magmax.analysis.comparing import comparable, compare
from hub_magmax.cli import main
from hub_magmax.errors import EvaluationError, RecipeError
from hub_magmax.evaluation.evaluators import Outcome, evaluator, make_evaluator
from hub_magmax.evaluation.evaluators.classification import ImageClassification
from hub_magmax.evaluation.evaluators.plugins import PluginEvaluator, answers
from hub_magmax.evaluation.evaluators.registry import Sample
from hub_magmax.evaluation.scoring import evaluate
from hub_magmax.pipeline import lock
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.registry import EVALUATORS
from tests.classifiers import classifier_recipe, write_classifiers, write_rows
from tests.families import yaml_text


class Strange(ImageClassification):
    """Images to classes, with a fault."""

    fault = staticmethod(lambda found: found)

    def outcomes(self, model, batches):
        return type(self).fault(super().outcomes(model, batches))


@pytest.fixture
def announced(monkeypatch):
    """Have the package `odd` 3.1 announce `Strange` as the evaluator `strange`."""

    class Odd(Distribution):
        version, name = "3.1", "odd"

        def read_text(self, filename):
            return None

        def locate_file(self, path):
            return path

    made = evaluator("strange")(
        type("Made", (Strange,), {"__doc__": Strange.__doc__, "__module__": __name__})
    )
    EVALUATORS.registered.pop("strange")
    monkeypatch.setattr(sys.modules[__name__], "strange", made, raising=False)
    point = EntryPoint("strange", f"{__name__}:strange", EVALUATORS.group)._for(Odd())
    monkeypatch.setitem(vars(EVALUATORS), "plugins", {"strange": point})
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("plugins")
    write_classifiers(found, {"base": (0.0, 0.0, 0.1), "a": (1.0, 0.0, 0.1), "b": (0.0, 1.0, 0.1)})
    write_rows(found / "others.parquet", [0] * 5 + [2] * 3)
    return found


def values(**changes):
    data = {"a": {"dataset": "./rows.parquet"}}
    return classifier_recipe(evaluation={"evaluator": "strange", "tasks": data} | changes)


def scored(folder, **changes):
    recipe = parse_recipe(values(**changes), folder=folder)
    return evaluate(recipe, lock(recipe), folder / "a", again=True)


FAULTS = {
    "short": (lambda found: found[:-1], r"it returned 9 outcomes\. Expected 10, one for each example"),
    "long": (lambda found: [*found, found[0]], "it returned 11 outcomes"),
    "nothing": (lambda found: None, "it returned a NoneType. Expected a list with one Outcome"),
    "generator": (iter, "it returned a list_iterator"),
    "bare numbers": (lambda found: [o.score for o in found], "it returned a float for example 0"),
    "NaN": (lambda found: [*found[:3], Outcome(float("nan")), *found[4:]], "the score nan for example 3"),
    "no share": (
        lambda found: [Outcome(1.5)] * 10,
        r"the score 1\.5 for example 0\. Expected a number from 0",
    ),
    "text": (lambda found: [Outcome("right")] * 10, "the score 'right' for example 0"),
    "probability": (lambda found: [Outcome(1.0, 2.0)] * 10, r"the probability 2\.0 for example 0"),
    "margin": (lambda found: [Outcome(1.0, None, float("inf"))] * 10, "the margin inf for example 0"),
    "error": (lambda found: found[99], r"it failed \(IndexError: list index out of range"),
    "exit": (lambda found: sys.exit("no licence"), r"it failed \(SystemExit: no licence"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_wrong_result_names_plugin_package_and_task(announced, folder, case):
    announced.fault, message = staticmethod(FAULTS[case][0]), FAULTS[case][1]
    with pytest.raises(EvaluationError, match=message) as caught:
        scored(folder)
    assert caught.value.where == "evaluator strange (package odd 3.1), a"


def test_a_right_one_scores_as_the_built_in_one_does(announced, folder):
    found = scored(folder)
    built_in = scored(folder, evaluator="image-classification")
    assert [(s.model, s.outcomes) for s in found.scores] == [(s.model, s.outcomes) for s in built_in.scores]


@pytest.mark.parametrize("name", ["encode", "wanted"])
def test_an_error_elsewhere_names_them_too(announced, folder, monkeypatch, name):
    def fail(self, *arguments):
        raise KeyError("by hand")

    monkeypatch.setattr(announced, name, fail)
    with pytest.raises(EvaluationError, match=r"it failed \(KeyError: 'by hand'") as caught:
        scored(folder)
    assert caught.value.where.startswith("evaluator strange (package odd 3.1)")


def test_a_comparison_names_the_examples(announced, folder):
    announced.fault = staticmethod(lambda found: found[1:])
    both = {"tune": {"dataset": "./rows.parquet"}, "report": {"dataset": "./others.parquet"}}
    recipe = parse_recipe(values() | {"compare": {**both, "methods": ["average"]}}, folder=folder)
    with pytest.raises(EvaluationError, match="it returned 9 outcomes") as caught:
        compare(recipe, lock(comparable(recipe)))
    assert caught.value.where == "evaluator strange (package odd 3.1), tune"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": None}, "its metric is missing. Expected a text"),
        ({"is_share": "yes"}, "its is_share is 'yes'. Expected True or False"),
        ({"model_class": 5}, "its model_class is 5"),
    ],
)
def test_what_is_no_evaluator_is_refused_when_it_is_made(announced, monkeypatch, change, message):
    for name, value in change.items():
        monkeypatch.setattr(announced, name, value, raising=False)
    with pytest.raises(EvaluationError, match=message):
        make_evaluator("strange", {})


def test_an_evaluator_that_cannot_be_made_says_whose_it_is(announced, monkeypatch):
    monkeypatch.setattr(announced, "__init__", lambda self: 1 / 0)
    with pytest.raises(EvaluationError, match=r"strange \(package odd 3\.1\): it failed \(ZeroDivisionError"):
        make_evaluator("strange", {})


def test_samples_are_samples():
    class Showing(Strange):
        def samples(self, model, batches):
            return batches

    found = PluginEvaluator(Showing(), "evaluator showing (package odd 3.1)")
    shown = [Sample("prompt", None, "cat", 1.0)]
    assert found.samples(None, shown) == shown
    with pytest.raises(EvaluationError, match="samples returned 'cat', which is no Sample"):
        found.samples(None, ["cat"])


def test_built_in_evaluators_are_not_looked_at():
    class Whatever:
        def outcomes(self, model, batches):
            return ["anything"]

    assert answers(Whatever(), None, [], "a", 3) == ["anything"]
    assert not isinstance(make_evaluator("image-classification", {}), PluginEvaluator)


def test_a_script_s_own_evaluator_is_checked_and_named(folder):
    class Mine(Strange):
        """Images to classes, in a script."""

        fault = staticmethod(lambda found: found[:2])

    evaluator("mine")(Mine)
    try:
        with pytest.raises(
            EvaluationError, match=r"evaluator mine \(of no package\), a: it returned 2 outcomes"
        ):
            scored(folder, evaluator="mine")
    finally:
        EVALUATORS.registered.pop("mine")
    with pytest.raises(RecipeError, match="there is no evaluator 'mine'"):
        scored(folder, evaluator="mine")


def test_the_command_says_it_in_one_paragraph(announced, folder, tmp_path):
    announced.fault = staticmethod(lambda found: found[99])
    path = folder / "strange.yaml"
    path.write_text(yaml_text(values() | {"output": {"path": str(tmp_path / "out")}}))
    done = CliRunner().invoke(main, ["run", str(path)])
    last = done.stderr.strip().splitlines()[-1]
    told = "evaluation.tasks.a: evaluator strange (package odd 3.1), a: it failed"
    assert done.exit_code == 1 and last.startswith("Error: ") and told in last
    assert "Traceback" not in done.stderr and (tmp_path / "out" / "model.safetensors").is_file()
