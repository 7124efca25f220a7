"""Own checkpoints and own data in the experiments: their own results and page, with the whole command."""

import re
import shlex

import pytest
import torch

from benchmarks.continual import __main__ as main
from benchmarks.continual import pages
from benchmarks.continual.own import own_family
from benchmarks.continual.results import measure
from hub_magmax.errors import EvaluationError
from tests.classifiers import classifier_recipe, write_classifiers, write_rows
from tests.families import yaml_text
from tests.test_continual import PROTOCOL


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("mine")
    torch.manual_seed(0)
    write_classifiers(found, {"base": (0.0, 0.0, 0.1), "a": (1.0, 0.0, 0.1), "b": (0.0, 1.0, 0.1)})
    write_rows(found / "cats.parquet", [0] * 12)
    write_rows(found / "dogs.parquet", [1] * 9 + [2] * 3)
    write(found, "mine.yaml")
    return found


def write(folder, name, **changes):
    tasks = {"a": {"dataset": "./cats.parquet"}, "b": {"dataset": "./dogs.parquet"}} | changes
    values = classifier_recipe(evaluation={"tasks": {task: data for task, data in tasks.items() if data}})
    (folder / name).write_text(yaml_text(values))
    return folder / name


def test_own_checkpoints_come_into_a_table_of_their_own(folder, tmp_path):
    family = own_family(folder / "mine.yaml", 0)
    assert (family.name, family.kinds, dict(family.classes)) == (
        "t2s0",
        ("labels",),
        {"a": (0,), "b": (1, 2)},
    )
    assert family.owners.tolist() == [0] * 12 + [1] * 12
    result = measure(family, PROTOCOL, tmp_path / "scores", at="here")
    # By hand: what the base model says is never right on cats, and on a fourth of the dogs.
    parts = [target["mixture"] for target in result["targets"]]
    assert parts == [[1, 1], [3, 1]] and result["base_model"][0] < result["targets"][0]["held_out"] / 4
    results, page = tmp_path / "out", tmp_path / "out" / "experiments.md"
    name, flags = main.named(main.parse(["--checkpoints", str(folder / "mine.yaml")]))
    pages.store(name, flags, result, results)
    before = pages.PAGE.read_bytes()
    text = pages.render(results, page)
    assert page.read_text() == text and pages.PAGE.read_bytes() == before
    assert "\n## own-mine\n\n`python -m benchmarks.continual --checkpoints mine.yaml`. 1 seed" in text
    assert str(folder) not in text and str(tmp_path) not in text and "transport sees" not in text
    # One seed has neither a deviation nor an interval nor a test.
    assert " ± " not in text.split("## own-mine")[1] and "(one seed)" in text and "1 seed," in text
    assert "worst task: uniform" in text and "; p " not in text
    rest = page.with_name("experiments_own-mine.md").read_text()
    # Nothing about this repository, and no link to a page of it.
    for place in re.findall(r"\]\(([^)#]+)", text + rest):
        assert (results / place).is_file(), place
    for word in ("## Claims", "make ", "digits", "sentiment", "benchmarks.blocks"):
        assert word not in text + rest, word
    assert "### Accuracy of the worst task, T = 2" in rest and str(tmp_path) not in rest


def test_tasks_that_share_labels_have_the_known_shares_as_preference(folder):
    family = own_family(write(folder, "same.yaml", b={"dataset": "./cats.parquet"}), 3)
    assert (family.kinds, family.classes, family.seed) == (("known",), {}, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b": None}, "b: no examples to draw targets from"),
        ({"b": {"dataset": "./dogs.parquet", "input_column": "image"}}, "name their columns differently"),
    ],
)
def test_recipes_without_what_targets_need_are_refused(folder, changes, message):
    with pytest.raises(EvaluationError, match=message):
        own_family(write(folder, "bad.yaml", **changes), 0)


@pytest.mark.parametrize(
    ("words", "name", "flags"),
    [
        ("--data cifar100", "cifar100", "--data cifar100 --model openai/clip-vit-base-patch16"),
        (
            "--data cifar100 --dataset /home/me/my-images --model ./clip --epochs 3 --batch-size 16 "
            "--learning-rate 1e-4",
            "own-my-images",
            "--data cifar100 --model clip --dataset my-images --epochs 3 --batch-size 16 "
            "--learning-rate 0.0001",
        ),
        (
            "--data language --sequence four --adapters",
            "language-four-adapters",
            "--data language --model google-t5/t5-large --sequence four --adapters",
        ),
    ],
)
def test_the_command_on_the_page_holds_every_option_and_no_path(words, name, flags):
    options = main.parse(shlex.split(words))
    assert main.named(options) == (name, flags)
    assert main.named(main.parse(shlex.split(flags)))[1] == flags


@pytest.mark.parametrize(
    ("words", "is_shipped"),
    [
        ("", True),
        ("--data cifar100", True),
        ("--data language --sequence fifteen", True),
        ("--data cifar100 --dataset mine", False),
        ("--data cifar100 --epochs 1", False),
        ("--data language --sequence mine.yaml", False),
        ("--checkpoints mine.yaml", False),
        ("--data cifar100 --output elsewhere", False),
    ],
)
def test_only_the_data_of_this_repository_come_to_its_page(words, is_shipped):
    results, page = main.results_of(main.parse(shlex.split(words)))
    assert (results == pages.RESULTS) == (page == pages.PAGE) == is_shipped
    assert is_shipped or page.parent == results
