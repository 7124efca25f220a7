"""What is said while the Hub fails, offline, and without a token."""

import logging

import pytest
import yaml
from huggingface_hub import constants

import hub_magmax as hm
from hub_magmax.errors import HubMagmaxError, SourceError
from hub_magmax.fleet.history import history
from hub_magmax.fleet.members import find_members
from hub_magmax.hub import hub_api, hub_errors, retry
from hub_magmax.pipeline import run
from hub_magmax.recipe.loading import load_recipe
from hub_magmax.recipe.model_names import near_folder
from tests.families import recipe_values, write_recipe
from tests.test_cli import call


@pytest.fixture
def merged(family):
    run(load_recipe(write_recipe(family)))
    return family / "merged"


def test_push_offline_says_so_and_does_not_blame_xet(merged, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, said = call("push", merged, "me/offline")
    assert code == 1 and "nothing can be published offline. Unset HF_HUB_OFFLINE" in said
    assert "XET" not in said


@pytest.mark.parametrize("verb", ["push", "run", "dry run"])
def test_empty_token_is_named(family, merged, hub, monkeypatch, verb):
    monkeypatch.setenv("HF_TOKEN", "")
    recipe = write_recipe(family, output={"path": "other", "push_to_hub": "me/empty"})
    words = {"push": ("push", merged, "me/empty"), "run": ("run", recipe)}.get(
        verb, ("run", recipe, "--dry-run")
    )
    code, out, said = call(*words)
    assert code == 1 and "HF_TOKEN is set and empty" in said + out, said + out
    assert "Traceback" not in said


def test_empty_token_is_named_while_reading(hub, family, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    hub.add_repo("me/hidden", folder=family / "a", private=True)
    code, _, said = call("lock", write_recipe(family, tasks=[{"name": "a", "model": "me/hidden"}]))
    assert code == 1 and "HF_TOKEN is set and empty, so no token was sent: unset it." in said


def test_a_folder_elsewhere_of_the_name_is_told_with_its_path_from_the_recipe(family, hub, monkeypatch):
    (family / "models").mkdir()
    for name in ("a", "b"):
        (family / name).rename(family / "models" / name)
    (family / "recipes").mkdir()
    monkeypatch.chdir(family)

    def locked(*models):
        values = recipe_values("ab"[: len(models)], base_model="../base")
        values["tasks"] = [{"name": name, "model": model} for name, model in zip("ab", models, strict=False)]
        (family / "recipes" / "recipe.yaml").write_text(yaml.safe_dump(values))
        return call("lock", "recipes/recipe.yaml")

    code, _, said = locked("models/a")
    assert code == 1 and f"There is a folder {family}/models/a, but relative paths start at" in said
    assert f"{family}/recipes: write ../models/a for it." in said
    assert locked("../models/a")[0] == 0
    code, _, said = locked("models/none")
    assert code == 1 and "There is no folder recipes/models/none either." in said
    hub.add_repo("me/gated", folder=family / "base", gated=True)
    monkeypatch.setenv("HF_TOKEN", hub.add_user("nobody"))
    assert "folder" not in locked("me/gated")[2]


def test_a_folder_of_examples_elsewhere_is_told_too(family, hub, monkeypatch):
    recipe = write_recipe(family, evaluation={"tasks": {"a": {"dataset": "data/rows"}}})
    (family / "cwd" / "data" / "rows").mkdir(parents=True)
    monkeypatch.chdir(family / "cwd")
    code, _, said = call("lock", recipe)
    assert code == 1 and f"relative paths start at {family}: write ./cwd/data/rows for it." in said


@pytest.mark.parametrize("verb", ["history", "rollback"])
def test_a_folder_is_no_repository_with_a_history(family, hub, monkeypatch, verb):
    (family / "me" / "only-here").mkdir(parents=True)
    monkeypatch.chdir(family)
    code, _, said = call(verb, "me/only-here")
    assert code == 1 and "me/only-here is a folder here, but only repositories on the Hub are read." in said


def test_fleet_asks_an_unreachable_hub_again_in_one_loop(hub, monkeypatch):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    hub.faults.add("/api/models", "status")
    with pytest.raises(SourceError, match="the Hub answered with an error"):
        find_members("nobody")
    assert 1 <= len(waits) <= 6


def test_history_asks_an_unreachable_hub_again_in_one_loop(hub, monkeypatch):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    hub.add_repo("me/unreachable")
    hub.faults.add("/api/models/me/unreachable/commits/*", "status")
    with pytest.raises(SourceError, match="the Hub answered with an error"):
        history("me/unreachable")
    assert 1 <= len(waits) <= 6


def levels(hub, caplog, monkeypatch, times, **fault):
    """Return the levels and lines of the records of a request that fails so often."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.add_repo("me/slow")
    hub.faults.add("/api/models/me/slow", times=times, **fault)
    with caplog.at_level(logging.DEBUG, logger="hub_magmax.hub"), hub_errors("me/slow"):
        retry(lambda: hub_api().model_info("me/slow"))
    return [(record.levelname, record.getMessage()) for record in caplog.records]


def test_repeated_requests_are_one_line_each_and_seen_where_they_take_long(hub, caplog, monkeypatch):
    host = hub.endpoint.removeprefix("http://").partition(":")[0]
    assert levels(hub, caplog, monkeypatch, 3, kind="status") == [
        ("DEBUG", f"{host} answered 503; asking again in 0.5 s"),
        ("DEBUG", f"{host} answered 503; asking again in 1 s"),
        ("INFO", f"{host} answered 503; asking again in 2 s"),
    ]


def test_lost_connection_is_one_line_too(hub, caplog, monkeypatch):
    ((level, line),) = levels(hub, caplog, monkeypatch, 1, kind="lose_response")
    assert level == "DEBUG" and line.startswith("a request failed (") and "\n" not in line


def test_pause_that_the_hub_asks_for_is_said_at_once(hub, caplog, monkeypatch):
    found = levels(hub, caplog, monkeypatch, 1, kind="status", status=429, retry_after_seconds=7)
    assert found[0][0] == "INFO" and found[0][1].endswith("answered 429; asking again in 7 s")


#: Commands that take the name of a folder first, and what follows it.
OF_FOLDERS = {
    **dict.fromkeys(("verify", "apply", "canary", "fleet", "import"), ()),
    "predict": ["rows.csv", "--record", "record.jsonl"],
    "tails": ["rows.csv"],
    "sign": ["--private-key", "key.pem"],
    "push": ["me/missing-folders"],
}


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("verb", OF_FOLDERS)
def test_misspelt_folder_is_told_as_one(tmp_path, monkeypatch, verb):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sites" / "north-west").mkdir(parents=True)
    (tmp_path / "rows.csv").write_text("loss\n1\n")

    def told(name):
        code, out, said = call(verb, name, *OF_FOLDERS[verb])
        return code, out + said

    only_last = verb in ("sign", "push")  # no name of a repository can be meant
    for name in ("sites/north-wset", "sitse/north-west", "./sites/north-wset", "sites//north-wset/"):
        code, said = told(name)
        assert code == 1 and ("sites/north-west?" in said or (only_last and "sitse" in name)), said
        assert (
            "no such folder" in said or "neither an existing folder nor" in said or "no such file or" in said
        )
        assert "Traceback" not in said
    code, said = told("sites/other")
    assert code == 1 and "there is no such folder" in said
    if not only_last:
        assert "A repository is written org/model, org/model@revision or hf://org/model." in said
    code, said = told("gpt-not-there")
    assert code == 1 and "Did you mean" not in said, "like any name on the Hub"


def test_misspelt_folder_is_told_by_python_and_in_recipes(family, hub, monkeypatch):
    monkeypatch.chdir(family)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for load in (hm.Router.load, hm.verify, hm.canary):
        with pytest.raises(HubMagmaxError, match=r"there is no such folder.* Did you mean \./base\?"):
            load("bsae")
    code, _, said = call("lock", write_recipe(family, base_model="bsae"))
    assert (
        code == 1 and "there is no such folder; as a repository: " in said and "Did you mean ./base?" in said
    )
    code, _, said = call("lock", write_recipe(family, base_model="./bsae"))
    assert code == 1 and "there is no such folder" in said and "Did you mean ./base?" in said
    for name in ("", ".", "@main"):
        assert not near_folder(name, family), "nothing is near to no name"
    hub.faults.add("/api/models/bsae*", "status", status=503)
    code, _, said = call("lock", write_recipe(family, base_model="bsae"))
    assert code == 1 and "Did you mean ./base?" in said and "or try again later" in said, "both may be meant"


def test_what_is_wrong_with_data_that_is_there_is_not_taken_for_a_missing_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows.csv").write_text("loss\n")
    code, _, said = call("tails", "rows.csv", "rows.csv")
    assert code == 1 and "folder" not in said
