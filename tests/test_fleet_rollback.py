import itertools
import json

import pytest
from huggingface_hub import HfApi

from hub_magmax.errors import PublishError, SourceError
from hub_magmax.fleet.history import history
from hub_magmax.fleet.rollback import rollback
from hub_magmax.fleet.verifying import verify
from hub_magmax.pipeline import run
from hub_magmax.publishing.pushing import push
from hub_magmax.recipe.loading import load_recipe
from tests.families import write_recipe
from tests.test_cli import call

_numbers = itertools.count()


def merged(family, name, **changes):
    recipe = load_recipe(write_recipe(family, output={"path": name, "shard_size": "1KB"}, **changes))
    run(recipe)
    return family / name


@pytest.fixture
def first(family):
    return merged(family, "first", method="average")


@pytest.fixture
def repo(family, first, hub):
    """A repository with a good model, and a later one."""
    name = f"me/restored{next(_numbers)}"
    push(first, name)
    push(merged(family, "second", method="last_task"), name)
    hub.reset_log()
    return name


def tree(hub, repo, revision):
    return {path: hub.read(repo, path, revision) for path in hub.files(repo, revision)}


def test_branch_holds_the_files_of_the_last_model_that_passed_in_one_commit(repo, hub):
    good, bad = hub.commits(repo)[1].sha, hub.head(repo)
    published = rollback(repo)
    assert [commit.sha for commit in hub.commits(repo)][:3] == [published.commit, bad, good]
    assert tree(hub, repo, published.commit) == tree(hub, repo, good)
    assert verify(repo) == verify(repo, revision=good)


def test_no_weights_travel(repo, hub):
    rollback(repo)
    assert hub.counts["POST commit"] == 1
    assert not [name for name in hub.counts if name.startswith("PUT") or "batch" in name]
    assert "GET storage" not in hub.counts


def test_revisions_that_do_not_pass_are_passed_over(repo, hub):
    good = hub.commits(repo)[1].sha
    hub.add_repo(repo, files={"config.json": b'{"model_type": "other"}'})
    hub.add_repo(repo, files={"README.md": b"my words", "notes.txt": b"x"})
    published = rollback(repo)
    # Two back lies the second model, which passes; one back its config had changed.
    assert verify(repo, revision=published.commit) == verify(repo, revision=hub.commits(repo)[3].sha)
    assert "notes.txt" not in hub.files(repo)
    again = rollback(repo)
    assert tree(hub, repo, again.commit) == tree(hub, repo, good)


def test_commits_that_change_the_card_alone_are_the_same_model(repo, hub):
    good = hub.commits(repo)[1].sha
    hub.add_repo(repo, files={"README.md": b"my words"})
    rollback(repo)
    assert tree(hub, repo, "main") == tree(hub, repo, good)


def test_named_revision_is_restored_on_the_named_branch(repo, hub):
    good, main = hub.commits(repo)[1].sha, hub.head(repo)
    HfApi().create_branch(repo, branch="production", revision=main)
    code, out, _ = call("rollback", repo, "--branch", "production", "--to", good)
    assert code == 0 and out.startswith(f"{repo}@production: {good} was restored in place of {main}")
    assert tree(hub, repo, "production") == tree(hub, repo, good)
    assert hub.head(repo) == main


def test_revision_whose_hashes_do_not_match_is_refused(repo, hub, first):
    weights = next(path.name for path in first.glob("*.safetensors"))
    damaged = hub.add_repo(repo, files={weights: b"other bytes"})
    hub.add_repo(repo, files={weights: (first / weights).read_bytes()})
    before = hub.head(repo)
    with pytest.raises(PublishError, match="the merge report says"):
        rollback(repo, to=damaged)
    assert hub.head(repo) == before


def test_branch_that_moves_meanwhile_stays_as_it_is(repo, hub, monkeypatch):
    create_commit = HfApi.create_commit
    moved = []

    def somebody_was_faster(*arguments, **options):
        moved.append(hub.add_repo(repo, files={"notes.txt": b"theirs"}))
        return create_commit(*arguments, **options)

    monkeypatch.setattr(HfApi, "create_commit", somebody_was_faster)
    with pytest.raises(PublishError, match="412"):
        rollback(repo)
    assert [hub.head(repo)] == moved


def test_nothing_to_go_back_to_is_said_with_reasons(hub, first):
    name = f"me/restored{next(_numbers)}"
    push(first, name)
    with pytest.raises(PublishError, match=r"no earlier revision passes .*there is no merge_report\.json"):
        rollback(name)
    with pytest.raises(PublishError, match=r"holds the files of .* already"):
        rollback(name, to="main")


def test_what_does_not_exist_is_said(repo, hub):
    with pytest.raises(PublishError, match="no such repository"):
        rollback("me/none-such")
    with pytest.raises(PublishError, match="there is no such branch"):
        rollback(repo, branch="none")
    with pytest.raises(SourceError, match="no such revision"):
        rollback(repo, to="none")


@pytest.fixture
def three(family, first, hub):
    """A repository with three models, and their commits, the newest first."""
    name = f"me/three{next(_numbers)}"
    push(first, name)
    push(merged(family, "second", method="last_task"), name)
    push(merged(family, "third", method="magmax"), name)
    return name, [commit.sha for commit in hub.commits(name)][:3]


def test_second_rollback_goes_on_to_older_models_and_never_back(three, hub):
    repo, (_, second, first) = three
    done = rollback(repo)
    assert (done.restored, tree(hub, repo, "main")) == (second, tree(hub, repo, second))
    done = rollback(repo)
    assert (done.restored, tree(hub, repo, "main")) == (first, tree(hub, repo, first))
    before = hub.head(repo)
    with pytest.raises(
        PublishError, match=r"no earlier revision passes .*was rolled back.*hub-magmax history"
    ):
        rollback(repo)
    assert hub.head(repo) == before


def test_what_was_rolled_back_stays_so_after_the_card_was_edited(three, hub):
    repo, (_, _, first) = three
    rollback(repo)
    hub.add_repo(repo, files={"README.md": b"my words"})
    assert rollback(repo).restored == first


def test_model_that_is_pushed_again_after_a_rollback_counts_again(three, family, hub):
    repo, (_, _, first) = three
    rollback(repo, to=first)
    again = push(family / "third", repo).commit
    push(family / "second", repo)
    assert rollback(repo).restored == again
    assert tree(hub, repo, rollback(repo).restored) == tree(hub, repo, first)


def test_rollback_is_recorded_and_says_what_it_restored(three, hub):
    repo, (third, second, _) = three
    code, out, _ = call("rollback", repo)
    made = hub.commits(repo)[0]
    assert code == 0 and f"{second} was restored in place of {third}" in out
    assert made.title == f"Roll back to {second[:12]}"
    restores = f"Restores the files of {second}, in place of those of {third}."
    assert made.message == f"{restores}\n\nCommitted by hub_magmax."


def test_rehearsal_says_what_would_be_restored_and_changes_nothing(three, hub):
    repo, (third, second, _) = three
    code, out, _ = call("rollback", repo, "--dry-run")
    assert code == 0 and f"{second} would be restored in place of {third}" in out
    assert hub.head(repo) == third
    values = json.loads(call("rollback", f"{repo}@main", "--dry-run", "--json")[1])
    assert (values["restored"], values["commit"], values["dry_run"]) == (second, "", True)
    assert "merge_report.json" in values["copied"]


@pytest.mark.parametrize(
    "fault",
    [{"kind": "status", "status": 503, "times": 2}, {"kind": "lose_response", "times": 1}],
    ids=str,
)
def test_rollback_goes_on_after_what_passes(three, hub, fault, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    repo, (_, second, _) = three
    for path in ("/api/models/*", "*/commit/*"):
        hub.faults.add(path, **fault)
    assert rollback(repo).restored == second
    assert len(hub.commits(repo)) == 5, "three models, the rollback, and the empty commit of a new repository"


def test_history_lists_models_and_marks_what_was_rolled_back(three, hub):
    repo, (third, second, first) = three
    done = rollback(repo)
    found = history(repo)
    assert [revision.commit for revision in found[:4]] == [done.commit, third, second, first]
    assert [revision.rolled_back for revision in found[:4]] == [False, True, False, False]
    assert found[0].weights == found[2].weights != found[3].weights
    assert found[-1].weights == "" and found[0].scores is None
    code, out, _ = call("history", repo, "--limit", "2")
    assert code == 0 and third[:12] in out and "(rolled back)" in out and first[:12] not in out
    assert call("history", repo, "--format", "csv")[1].startswith(
        "commit,created,model,metric,plain mean,lowest,of,title\n"
    )
