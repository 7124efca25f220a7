"""Names of repositories and revisions: the Hub's own rules, told before any request."""

import json
import subprocess

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from hypothesis import given
from hypothesis import strategies as st

from hub_magmax.checkpoints.locations import locate
from hub_magmax.errors import PublishError, RecipeError
from hub_magmax.publishing.commits import Destination
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.recipe.model_names import repository_problem, revision_problem
from tests.families import recipe_values


@given(st.text("aZ0_-./é g", max_size=12) | st.from_regex(r"\A[a-z./-]{1,6}(git)?\Z"))
def test_a_repository_id_is_what_huggingface_hub_takes_for_one(name):
    try:
        validate_repo_id(name)
        is_valid = True
    except HFValidationError:
        is_valid = False
    assert (repository_problem(name) == "") is is_valid


@pytest.mark.parametrize("name", ["a" * 97, "org/" + "a" * 97, "a/b/c", "", "/a", "a/", "a\n"])
def test_a_longer_or_odd_name_is_no_repository_id(name):
    assert "is no repository id" in repository_problem(name)


REVISIONS = ("main", "v1.0", "refs/pr/3", "a" * 40, "feature/x_y", "1", "é", "a-", "x.lock.y")
NO_REVISIONS = (
    "a b", "a..b", "/a", "a/", "a//b", ".a", "a/.b", "a.", "a.lock", "a/b.lock/c", "@", "a@{1}", "a~1", "a^",
    "a:b", "a?", "a*", "a[", "a\\b", "a\x00", "\x7f", "", "-a", "x" * 300,
)  # fmt: skip


@pytest.mark.parametrize("name", [*REVISIONS, *NO_REVISIONS])
def test_a_revision_is_what_git_takes_for_a_branch(name):
    assert (revision_problem(name) == "") is (name in REVISIONS)
    if "\x00" not in name and len(name) < 300 and name != "@":  # another name of HEAD
        git = subprocess.run(["git", "check-ref-format", "--branch", name], capture_output=True, check=False)
        assert (git.returncode == 0) is (name in REVISIONS)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"output": {"push_to_hub": "acme/-x"}}, "output.push_to_hub: 'acme/-x' is no repository id"),
        ({"output": {"datasets": ["a/b/c"]}}, "output.datasets.0: 'a/b/c' is no repository id"),
        (
            {"base_model": "acme/a--b"},
            "base_model: 'acme/a--b' is neither an existing folder nor a repository",
        ),
        ({"base_model": "acme/model@a b"}, "base_model: 'a b' is no revision"),
        ({"base_model": "C:\\models\\base"}, "Folders are written with / between their names"),
        ({"base_model": ".\\base"}, "Folders are written with / between their names"),
        ({"base_model": "hf://acme/model@x%2Fy..z/part"}, "base_model: 'x/y..z' is no revision"),
        (
            {"evaluation": {"tasks": {"a": {"dataset": "my data"}}}},
            "evaluation.tasks.a.dataset: 'my data' is no repository id",
        ),
        (
            {"evaluation": {"tasks": {"a": {"dataset": "acme/x", "revision": "no way"}}}},
            "evaluation.tasks.a.revision: 'no way' is no revision",
        ),
    ],
)
def test_a_recipe_is_refused_for_a_name_that_the_hub_cannot_have(changes, told, tmp_path):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(recipe_values(**changes), folder=tmp_path)
    assert told in str(caught.value)


def test_folder_and_files_of_data_may_have_any_name(tmp_path):
    (tmp_path / "my data").mkdir()
    for name in ("my data", "./no such data", "eval set.csv", "hf://datasets/acme/x/a b.parquet"):
        parse_recipe(recipe_values(evaluation={"tasks": {"a": {"dataset": name}}}), folder=tmp_path)


def test_destination_is_refused_before_any_request(hub):
    for options in ({"repo_id": "no name"}, {"repo_id": "acme/x", "revision": "a..b"}):
        with pytest.raises(PublishError, match="is no re"):
            Destination(**options)
    assert not hub.log


def test_names_that_can_be_are_located(tmp_path):
    for name in (
        "org/model",
        "_org/model_",
        "model",
        "org/model@refs/pr/1",
        "hf://org/model@feature%2Fx/part",
    ):
        locate(name, tmp_path)
    assert json.dumps(locate("hf://org/model@feature%2Fx/part", tmp_path).revision) == '"feature/x"'
