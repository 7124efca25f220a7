"""The tag of the last good revision: when it moves, and what canaries and rollbacks make of it."""

import itertools
import json

import pytest

from hub_magmax.errors import EvaluationError
from hub_magmax.fleet.canaries import canary
from hub_magmax.fleet.history import as_table, history
from hub_magmax.fleet.rollback import rollback
from hub_magmax.fleet.tags import LAST_GOOD, move_tag, tagged_commit
from hub_magmax.publishing.pushing import push
from tests.test_cli import call
from tests.test_evaluation_scoring import images  # noqa: F401  (a fixture)
from tests.test_fleet_canaries import merged, pin, published_worse, scored  # noqa: F401  (fixtures)

_numbers = itertools.count()


@pytest.fixture
def repo(merged, hub):  # noqa: F811
    """A repository with one model, which its canary has not seen."""
    name = f"me/tagged{next(_numbers)}"
    push(merged, name)
    return name


def test_tag_moves_when_a_canary_of_the_newest_revision_passes(repo, images, hub):  # noqa: F811
    first = hub.head(repo)
    assert tagged_commit(repo) is None
    said = []
    found = canary(repo, folder=images, dry_run=True, report=said.append)
    assert found.tag == "" and tagged_commit(repo) is None and "tag" not in " ".join(said)
    assert canary(repo, folder=images, report=said.append).tag == tagged_commit(repo) == first
    assert f"the tag last-good names {first[:12]} now" in said
    second = hub.add_repo(repo, files={"README.md": b"my words"})
    assert canary(repo, revision=first, folder=images).tag == first, "not the newest"
    assert canary(repo, against=first, folder=images).tag == "" and tagged_commit(repo) == first
    assert canary(f"{repo}@main", folder=images).tag == tagged_commit(repo) == second
    assert [revision.last_good for revision in history(repo)][:2] == [True, False]
    assert "Add files (last good)" in as_table(history(repo)).write()


def test_tag_stays_when_a_canary_fails_until_its_own_scores_count(repo, merged, images, hub):  # noqa: F811
    canary(repo, folder=images)
    first = hub.head(repo)
    published_worse(merged, repo, hub)
    for against in ((), ("--against", "last-good"), ("--against", "previous")):
        assert call("canary", repo, "--from", images, *against)[0] == 3
        assert tagged_commit(repo) == first
    assert call("canary", repo, "--from", images, "--margin", "0.5", "--against", "previous")[0] == 0
    assert tagged_commit(repo) == first, "compared with another one than the last good"
    assert call("canary", repo, "--from", images, "--against", "main")[0] == 0
    assert tagged_commit(repo) == hub.head(repo)
    assert call("canary", repo, "--from", images)[0] == 0


def test_tagged_revision_counts_whatever_newer_ones_say_of_themselves(repo, merged, images, hub):  # noqa: F811
    canary(repo, folder=images)
    first = hub.head(repo)
    # Scores that nobody measured make the newer one good, by the stored scores.
    published_worse(merged, repo, hub)
    for task in "ab":
        pin(merged, task, [1.0] * 10)
    names = ("scores.json", "outcomes.json")
    hub.add_repo(repo, files={name: (merged / name).read_bytes() for name in names})
    found = canary(repo, folder=images)
    assert found.against == f"{repo}@{first[:7]}" and found.regressed == ("a", "b")


def test_canary_passes_without_the_right_to_write(repo, images, hub):  # noqa: F811
    hub.faults.add("*/tag/*", "status", status=403)
    code, out, said = call("canary", repo, "--from", images, "--json")
    assert code == 0 and json.loads(out)["tag"] == ""
    assert "the tag last-good does not name" in said and "may not write here (status 403)" in said
    hub.faults.clear()
    canary(repo, folder=images)
    before = hub.head(repo)
    hub.add_repo(repo, files={"README.md": b"my words"})
    hub.faults.add("*/tag/*", "status", status=403)
    assert canary(repo, folder=images).tag == tagged_commit(repo) == before


@pytest.mark.parametrize(
    "fault",
    [{"kind": "status", "status": 503, "times": 2}, {"kind": "lose_response", "times": 2}],
    ids=str,
)
def test_tag_moves_once_though_answers_are_lost(repo, hub, fault, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    first = hub.head(repo)
    move_tag(repo, first, None)
    second = hub.add_repo(repo, files={"README.md": b"my words"})
    hub.faults.add("*/tag/*", **fault)
    move_tag(repo, second, first)
    assert tagged_commit(repo) == second
    move_tag(repo, first, "0" * 40)  # somebody else has removed it meanwhile, or it names another one
    assert tagged_commit(repo) == first


def test_other_examples_begin_anew_in_spite_of_the_tag(repo, merged, images, hub):  # noqa: F811
    canary(repo, folder=images)
    hub.add_repo(repo, files={"scores.json": hub.read(repo, "scores.json").replace(b"accuracy", b"F1")})
    second = hub.head(repo)
    with pytest.raises(EvaluationError, match=rf"{repo}@{second[:7]}.*digest does not fit"):
        canary(repo, folder=images)


def test_previous_model_is_the_one_before_with_other_weights(repo, merged, images, hub):  # noqa: F811
    first = hub.head(repo)
    with pytest.raises(EvaluationError, match="no earlier revision with scores and another model"):
        canary(repo, against="previous", folder=images)
    published_worse(merged, repo, hub)
    hub.add_repo(repo, files={"README.md": b"my words"})
    assert canary(repo, against="previous", folder=images).against == f"{repo}@{first[:7]}"


def test_rollback_prefers_the_tag_to_a_newer_revision_that_passes(repo, hub):
    good = hub.head(repo)
    move_tag(repo, good, None)
    hub.add_repo(repo, files={"notes.txt": b"of the same model"})
    hub.add_repo(repo, files={"config.json": b"{}"})
    done = rollback(repo, dry_run=True)
    assert (done.restored, done.why) == (good, "the tag last-good names it, since its canary passed")
    named = rollback(repo, to=good, dry_run=True)
    assert (named.restored, named.why) == (good, "")
    assert LAST_GOOD in call("rollback", repo, "--dry-run")[1]
