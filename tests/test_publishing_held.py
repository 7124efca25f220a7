"""Pushes of a merge that the Hub holds already: no commit, whatever the times in the report."""

import itertools
import json
import shutil
from dataclasses import replace

import pytest

from hub_magmax.merging.output.report import REPORT_NAME, read_report
from hub_magmax.pipeline import run
from hub_magmax.publishing.pushing import push
from hub_magmax.recipe.loading import load_recipe, updated
from tests.families import write_recipe
from tests.test_cli import call
from tests.test_evaluation_scoring import image_recipe, images  # noqa: F401  (a fixture)

_numbers = itertools.count()


@pytest.fixture
def repo():
    return f"me/held{next(_numbers)}"


def rewrite_report(folder, **changes):
    report = replace(read_report(folder / REPORT_NAME), **changes)
    (folder / REPORT_NAME).write_text(report.to_json())


@pytest.fixture
def folder(family, hub, repo):
    """A merged folder that was pushed, as another machine would have made it: other times, other memory."""
    recipe = load_recipe(write_recipe(family, output={"path": "merged"}))
    run(recipe)
    push(family / "merged", repo)
    rewrite_report(
        family / "merged", seconds=7.5, profile={"read": 9.0}, peak_memory_bytes=1, peak_resident_bytes=2
    )
    hub.reset_log()
    return family / "merged"


def test_other_times_and_memory_are_no_reason_for_a_commit(folder, hub, repo):
    head = hub.head(repo)
    told = push(folder, repo)
    assert (told.commit, told.is_new) == (head, False)
    assert told.url == f"{hub.endpoint}/{repo}/commit/{head}"
    assert hub.counts["POST commit"] == 0 and hub.head(repo) == head


def edit_card(folder):
    with (folder / "README.md").open("a") as file:
        file.write("Mine.\n")


def other_software(folder):
    rewrite_report(folder, versions={"python": "4"})


def other_recipe(folder):
    with (folder / "recipe.yaml").open("a") as file:
        file.write("# a comment\n")


def more_files(folder):
    (folder / "notes.txt").write_text("read me")


@pytest.mark.parametrize("change", [edit_card, other_software, other_recipe, more_files])
def test_whatever_else_differs_is_pushed(folder, hub, repo, change):
    change(folder)
    told = push(folder, repo)
    assert told.is_new and told.commit == hub.head(repo)
    assert hub.counts["POST commit"] == 1
    assert not push(folder, repo).is_new


def test_weights_of_another_model_beside_it_are_removed(folder, hub, repo):
    hub.add_repo(repo, files={"model-00001-of-00002.safetensors": b"x"})
    assert push(folder, repo).is_new
    assert "model-00001-of-00002.safetensors" not in hub.files(repo)


def test_a_signed_folder_is_pushed_with_the_report_that_its_signature_covers(folder, hub, repo):
    (folder / "model.sig").write_text("{}")
    assert push(folder, repo).is_new
    assert json.loads(hub.read(repo, REPORT_NAME))["seconds"] == 7.5


def test_a_second_pull_request_for_the_same_is_not_opened(folder, hub, repo):
    other = f"{repo}-asked"
    hub.add_repo(other, files={"notes.txt": b"mine"})
    first = push(folder, other, create_pr=True)
    rewrite_report(folder, seconds=1.0)
    again = push(folder, other, create_pr=True)
    assert first.is_new and not again.is_new and again.url == first.url
    at_the_branch = push(folder, repo, create_pr=True)
    assert (at_the_branch.commit, at_the_branch.is_new) == (hub.head(repo), False)


def test_commands_say_that_nothing_was_pushed(folder, hub, repo):
    head = hub.head(repo)
    told = f"nothing was pushed, the Hub holds this very merge: model {hub.endpoint}/{repo}\n"
    same = "holds a model of the same checkpoints, method and preference"
    before = f"{repo} {same}: only files that differ are pushed"
    code, out, err = call("push", folder, repo)
    assert code == 0 and out.startswith(told) and f"{before}\n" in err
    found = json.loads(call("push", folder, repo, "--json")[1])
    assert (found["commit"], found["is_new"]) == (head, False)


def test_a_scored_model_made_again_elsewhere_is_known_by_its_scores_too(images, hub, repo, tmp_path):  # noqa: F811
    recipe = updated(
        image_recipe(images), {"output": {"path": str(tmp_path / "merged"), "push_to_hub": repo}}
    )
    first = run(recipe)
    shutil.rmtree(tmp_path / "merged")
    again = run(recipe)
    assert first.published.is_new and not again.merged_before
    assert replace(first.published, is_new=False) == again.published
    other = updated(recipe, {"evaluation": recipe.to_dict()["evaluation"] | {"quantized": ["int8"]}})
    assert run(other).published.is_new, "another evaluation has another card"
