"""Forgetting: scores of every task after every task, their average and transfer, and the picture."""

import json
import shutil

import pytest

import hub_magmax as hm
from hub_magmax.files import code_digest
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.recipe.result_files import ResultFiles
from hub_magmax.reporting.figures import Scale
from hub_magmax.reporting.figures.forgetting import forgetting_figure
from hub_magmax.training.forgetting import Forgetting, write_forgetting
from tests.learners import training_recipe, write_learner

SCORES = {"a": {"a": 0.9}, "b": {"a": 0.5, "b": 0.8}, "c": {"a": 0.4, "b": 0.9, "c": 0.5}}


def test_average_and_backward_transfer_by_hand():
    found = Forgetting("accuracy", "", True, SCORES)
    assert found.average == pytest.approx((0.4 + 0.9 + 0.5) / 3)
    assert found.backward_transfer == pytest.approx(((0.4 - 0.9) + (0.9 - 0.8)) / 2)
    assert Forgetting("accuracy", "", True, {"a": {"a": 0.9}}).backward_transfer is None
    assert found.table().splitlines() == [
        "accuracy after      a      b      c",
        "             a  0.900",
        "             b  0.500  0.800",
        "             c  0.400  0.900  0.500",
        "average after the last task 0.600, backward transfer -0.200",
    ]


def test_values_and_picture_are_written_and_are_the_same_again(tmp_path):
    found = Forgetting("accuracy", "", True, SCORES)
    files = write_forgetting(found, ResultFiles(tmp_path, "mix."))
    assert [file.name for file in files] == [f"mix.forgetting.{kind}" for kind in ("json", "png", "svg")]
    assert json.loads(files[0].read_text())["backward_transfer"] == pytest.approx(-0.2)
    text = files[2].read_text()
    assert all(f">{word}<" in text for word in ("average", "a", "c", "after learning"))
    before = [file.read_bytes() for file in files]
    assert [file.read_bytes() for file in write_forgetting(found, ResultFiles(tmp_path, "mix."))] == before


@pytest.mark.parametrize("num_tasks", [2, 3, 6])
def test_no_name_of_a_task_leaves_the_picture(num_tasks):
    names = [f"{'W' * 30}{number}" for number in range(num_tasks)]
    scores = {name: dict.fromkeys(names[: number + 1], 0.5) for number, name in enumerate(names)}
    figure = forgetting_figure(scores, Scale("accuracy", True))
    figure.canvas.draw()
    for label in figure.axes[0].get_xticklabels():
        box = label.get_window_extent()
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, label


@pytest.fixture(scope="module")
def sequence(tmp_path_factory):
    folder = write_learner(tmp_path_factory.mktemp("sequence"))
    recipe = parse_recipe(training_recipe({"steps": 20}), folder=folder)
    return folder, recipe, hm.finetune(recipe).forgetting


def test_scores_are_those_of_the_evaluation(sequence, tmp_path):
    folder, recipe, found = sequence
    hm.run(recipe)
    scores = {
        (one.model, one.task): one.value
        for one in hm.evaluate(recipe, hm.lock(recipe), folder / "merged").scores
    }
    assert found.scores == {
        "a": {"a": scores["a", "a"]},
        "b": {"a": scores["b", "a"], "b": scores["b", "b"]},
    }
    assert found.scores["a"]["a"] == 1 and found.backward_transfer == scores["b", "a"] - 1


def test_known_scores_are_not_measured_again(sequence, tmp_path):
    folder, recipe, found = sequence
    before, lines = code_digest(folder.glob("[ab]/*"), folder), []
    assert hm.finetune(recipe, report=lines.append).forgetting == found
    assert not any("scoring" in line for line in lines)
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "a.jsonl").write_text((other / "a.jsonl").read_text().splitlines()[0])
    (other / "a" / "finetune_report.json").unlink()
    again = hm.finetune(parse_recipe(recipe.to_dict(), folder=other), report=lines.append).forgetting
    assert [line for line in lines if "scoring" in line] == ["scoring a on a", "scoring b on a, b"]
    assert again.scores.keys() == {"a", "b"} and code_digest(folder.glob("[ab]/*"), folder) == before


@pytest.mark.parametrize("changes", [{"order": "from_base"}, {}], ids=["from_base", "unevaluated"])
def test_without_a_sequence_or_an_evaluation_nothing_is_measured(tmp_path, changes):
    values = training_recipe({"steps": 1, "evaluator": "text-classification", **changes})
    if not changes:
        del values["evaluation"]
    made = hm.finetune(parse_recipe(values, folder=write_learner(tmp_path)))
    assert made.forgetting is None and all(one.scores == {} for one in made.tasks)
