"""The quickstart shows what the preference does, and what it made can be used and checked."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hub_magmax.files import own_command
from hub_magmax.quickstart.demo import closing_text, quickstart
from hub_magmax.recipe.loading import load_recipe
from tests.test_secrecy import leaks, written_below

pytestmark = pytest.mark.slow

TASKS = ("zero-one", "two-three", "four-five", "six-seven", "eight-nine")
ASKED = "tunable_magmax 0.6/0.2/0.1/0.05/0.05"
MIRRORED = "tunable_magmax 0.05/0.05/0.1/0.2/0.6"


@pytest.fixture(scope="module")
def table(quickstart_folder):
    return json.loads((quickstart_folder.parent / "table.json").read_text())


@pytest.fixture(scope="module")
def accuracy(table):
    return table["values"]["accuracy"]


def test_the_favoured_task_is_better_than_under_magmax(accuracy):
    assert accuracy[ASKED]["zero-one"] > accuracy["magmax"]["zero-one"] + 0.1


def test_the_mirrored_preference_favours_the_other_task(accuracy):
    assert accuracy[MIRRORED]["eight-nine"] > accuracy[ASKED]["eight-nine"] + 0.1
    assert accuracy[MIRRORED]["zero-one"] < accuracy[ASKED]["zero-one"] - 0.1


def test_sequential_fine_tuning_forgot_the_first_task_and_merging_brings_it_back(accuracy):
    assert accuracy["last checkpoint (eight-nine)"]["zero-one"] < 0.2
    assert accuracy["magmax"]["zero-one"] > accuracy["last checkpoint (eight-nine)"]["zero-one"] + 0.2


def test_each_checkpoint_knows_its_own_task(accuracy):
    assert min(accuracy["each task's own checkpoint"].values()) > 0.9


def test_text_shows_every_row_and_every_task(table, accuracy):
    for title, values in accuracy.items():
        cells = "  ".join(f"{values[task]:>{max(len(task), 5)}.3f}" for task in TASKS)
        assert any(line.startswith(title) and line.endswith(cells) for line in table["text"].splitlines())


def test_table_shows_the_scores_of_the_run(accuracy, quickstart_folder):
    stored = json.loads((quickstart_folder / "merged" / "scores.json").read_text())
    merged = {score["task"]: score["value"] for score in stored["scores"] if score["model"] == "merged"}
    assert accuracy[ASKED] == merged


def test_merged_model_scores_what_the_scores_say(quickstart_folder):
    folder = quickstart_folder / "merged"
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    data = load_dataset(str(quickstart_folder / "data" / "four-five"), split="test")
    with torch.inference_mode():
        logits = model(**processor(images=list(data["image"]), return_tensors="pt")).logits
    right = sum(logits.argmax(1).tolist()[i] == label for i, label in enumerate(data["label"]))
    stored = json.loads((folder / "scores.json").read_text())["scores"]
    score = next(s for s in stored if (s["model"], s["task"]) == ("merged", "four-five"))
    assert (score["value"], score["num_examples"]) == (right / len(data), len(data))


def test_running_it_again_does_nothing_again_and_ends_the_same(table, quickstart_folder, tmp_path):
    folder = tmp_path / "quickstart"
    shutil.copytree(quickstart_folder, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    report = (folder / "merged" / "merge_report.json").read_bytes()
    lines: list[str] = []
    values, _ = quickstart(folder, report=lines.append)
    assert values["accuracy"] == table["values"]["accuracy"]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == before
    assert (folder / "merged" / "merge_report.json").read_bytes() == report
    assert [line for line in lines if "already" not in line] == [
        *(f"merging {name} to compare with" for name in ("average", "magmax", "mirrored")),
        *(
            f"scoring the model {name} ({n} of 3)"
            for n, name in enumerate(("average", "magmax", "mirrored"), 1)
        ),
    ]


def test_a_changed_recipe_is_followed_and_not_overwritten(quickstart_folder, tmp_path):
    folder = tmp_path / "quickstart"
    shutil.copytree(quickstart_folder, folder, ignore=shutil.ignore_patterns("merged"))
    path = folder / "recipe.yaml"
    changed = "# mine\n" + path.read_text().replace("scaling: 0.5", "scaling: 0.25")
    path.write_text(changed)
    quickstart(folder)
    assert path.read_text() == changed
    lock = json.loads((folder / "merged" / "recipe.lock.json").read_text())
    assert lock["method"]["scaling"] == load_recipe(path).method.scaling == 0.25


def test_nothing_that_quickstart_writes_holds_a_token_or_names_a_folder_of_this_machine(quickstart_folder):
    from tests.test_torture import check_for_secrets

    found = {
        str(path.relative_to(quickstart_folder)): path.read_bytes()
        for path in quickstart_folder.rglob("*")
        if path.is_file()
    }
    written = {"README.md", "scores.json", "tradeoff.png", "provenance.json", "recipe.lock.json"}
    assert written <= {Path(name).name for name in found}
    check_for_secrets(found, quickstart_folder.parent)


def test_no_file_names_a_token_or_a_folder_of_this_machine(quickstart_folder):
    """Scores, outcomes, pictures and cards are among them."""
    found = written_below(quickstart_folder)
    assert {Path(name).name for name in found} >= {
        "scores.json",
        "outcomes.json",
        "README.md",
        "tradeoff.png",
    }
    assert leaks(found, quickstart_folder) == []


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A virtual environment in the current folder, whose programs are not on PATH."""
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    return programs


def add_program(folder):
    script = folder / "hub-magmax"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)


def test_command_is_told_as_it_can_be_typed(environment, monkeypatch):
    assert own_command() == ".venv/bin/python -m hub_magmax"
    add_program(environment)
    assert shutil.which("hub-magmax") is None and own_command() == ".venv/bin/hub-magmax"
    monkeypatch.setenv("PATH", str(environment))
    assert own_command() == "hub-magmax"


def test_quickstart_ends_with_a_command_that_runs(environment):
    add_program(environment)
    line = closing_text(environment.parent / "my models" / "recipe.yaml", environment)[-1]
    assert line.endswith(
        f"run: .venv/bin/hub-magmax run '{environment.parent / 'my models' / 'recipe.yaml'}'"
    )
