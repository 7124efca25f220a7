"""Addresses of what was published: the model first."""

from hub_magmax.publishing.addresses import places_of, told
from hub_magmax.publishing.pushing import push
from tests.test_cli import call
from tests.test_publishing_pushing import merged

COMMIT = "https://hub.example/me/model/commit/abc"


def test_the_model_comes_before_its_commit():
    assert told(COMMIT) == f"model https://hub.example/me/model\ncommit {COMMIT}"
    assert [*places_of(COMMIT, "production")] == ["model", "commit"]
    assert places_of(COMMIT, "production")["model"] == "https://hub.example/me/model/tree/production"


def test_a_pull_request_is_its_own_place():
    url = "https://hub.example/me/model/discussions/3"
    assert told(url, "production") == f"pull request {url}"


def test_commands_print_the_model_first(family, hub):
    folder = merged(family)
    code, out, _ = call("push", folder, "me/addressed")
    assert code == 0
    first, second = out.splitlines()
    assert first == f"published model {hub.endpoint}/me/addressed"
    assert second == f"commit {hub.endpoint}/me/addressed/commit/{hub.head('me/addressed')}"
    hub.add_repo("me/asked", files={"README.md": b"# asked"})
    assert [*places_of(push(folder, "me/asked", create_pr=True).url)] == ["pull request"]
