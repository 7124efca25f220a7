"""What is said while the Hub fails, offline, and without a token."""

import logging

import pytest
from huggingface_hub import constants

from hub_magmax.hub import hub_api, hub_errors, retry
from hub_magmax.pipeline import run
from hub_magmax.recipe.loading import load_recipe
from tests.families import write_recipe
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
