import itertools
import json
import shutil

import pytest
from click.testing import CliRunner

from hub_magmax.cli import main
from hub_magmax.errors import HubMagmaxError, OutputError, PublishError
from hub_magmax.pipeline import destination_of, plan, run
from hub_magmax.planning.plan import SMALL_BYTES
from hub_magmax.publishing import preflight
from hub_magmax.publishing.commits import Destination
from hub_magmax.recipe.loading import load_recipe
from tests.families import write_recipe
from tests.test_cli import call

_numbers = itertools.count()


@pytest.fixture
def repo():
    return f"me/prepared{next(_numbers)}"


def recipe_for(family, repo=None, **output):
    named = {"push_to_hub": repo} if repo else {}
    return load_recipe(write_recipe(family, output={"path": "merged", **named, **output}))


def rehearsed(recipe):
    return preflight.rehearse(plan(recipe), destination_of(recipe))


def disk_of(monkeypatch, free_bytes):
    usage = shutil.disk_usage("/")._replace(free=free_bytes)
    monkeypatch.setattr("hub_magmax.publishing.preflight.shutil.disk_usage", lambda path: usage)


def test_disk_that_is_too_small_is_known_before_anything_is_written(family, monkeypatch):
    disk_of(monkeypatch, 1000)
    with pytest.raises(OutputError, match=r"1\.0 kB are free.*output\.keep: false"):
        run(recipe_for(family))
    assert not list(family.glob("merged*"))


def test_merge_looks_for_room_before_it_writes(family, monkeypatch):
    recipe = write_recipe(family)
    disk_of(monkeypatch, 1000)
    code, _, err = call("merge", recipe)
    assert code == 1 and "1.0 kB are free, and the merge needs" in err
    assert not list(family.glob("merged*"))


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_folder_that_cannot_be_written_is_known_before_the_merge(family, monkeypatch, is_finished):
    planned = plan(recipe_for(family))
    if is_finished:
        (family / "merged").mkdir()
        (family / "merged" / "x").write_bytes(b"")
    asked = []

    def refuse(dir):
        asked.append(dir)
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("hub_magmax.files.tempfile.TemporaryFile", refuse)
    with pytest.raises(OutputError, match="cannot be written"):
        preflight.check(planned, None)
    assert asked == [family / "merged" if is_finished else family]
    (failed,) = (found for found in preflight.rehearse(planned, None) if found.error)
    assert failed.subject == "output"


def test_straight_to_the_hub_needs_room_for_two_files(family, repo, monkeypatch):
    planned = plan(recipe_for(family, repo, keep=False, shard_size="600B"))
    two = sum(sorted(shard.data_bytes for shard in planned.shards)[-2:])
    destination = destination_of(planned.recipe)
    assert preflight.check_room(planned, destination) == two + planned.copied_bytes + SMALL_BYTES
    assert planned.bytes_out > two
    disk_of(monkeypatch, two + planned.copied_bytes + SMALL_BYTES - 1)
    with pytest.raises(OutputError, match=r"lower output\.shard_size"):
        preflight.check_room(planned, destination)


def test_what_is_finished_needs_no_room_again(family):
    planned = plan(recipe_for(family))
    needed = preflight.check_room(planned)
    (family / "merged.partial").mkdir()
    (family / "merged.partial" / "x").write_bytes(bytes(1000))
    assert preflight.check_room(planned) == needed - 1000


def test_file_that_the_hub_would_not_take_is_refused(family, repo, monkeypatch):
    monkeypatch.setattr(preflight, "MAX_FILE_BYTES", 1000)
    with pytest.raises(PublishError, match=r"at most 1\.0 kB in a file on the Hub. Lower output.shard_size"):
        run(recipe_for(family, repo))
    assert not (family / "merged").exists()


def test_too_many_files_are_refused(family, repo, monkeypatch):
    monkeypatch.setattr(preflight, "MAX_FILES", 3)
    with pytest.raises(PublishError, match=r"4 files.*Raise output.shard_size"):
        run(recipe_for(family, repo, shard_size="600B"))


@pytest.fixture
def bad_card(monkeypatch):
    """A card that the Hub refuses."""
    monkeypatch.setattr(
        preflight, "render_card", lambda *facts, **options: "---\nlicense: my-own\n---\n# x\n"
    )


def test_card_that_the_hub_would_refuse_is_known_before_the_merge(family, hub, repo, bad_card):
    with pytest.raises(PublishError, match=r'README.md: .*"license" must be one of'):
        run(recipe_for(family, repo))
    assert not (family / "merged").exists()


def test_branch_that_is_missing_is_refused_before_the_merge(family, hub, repo):
    hub.add_repo(repo, files={"notes.txt": b"mine"})
    with pytest.raises(PublishError, match="there is no such branch"):
        run(recipe_for(family, repo), destination=Destination(repo, revision="trial"))
    assert not (family / "merged").exists()


def test_rehearsal_changes_nothing_and_finds_nothing_wrong(family, hub, repo):
    before = [*family.rglob("*"), family / "recipe.yaml"]
    findings = rehearsed(recipe_for(family, repo))
    assert [finding.error for finding in findings] == [None] * len(findings)
    assert f"{repo} is not there, and will be created (public)" in {finding.found for finding in findings}
    with pytest.raises(HubMagmaxError):
        hub.head(repo)
    assert set(family.rglob("*")) == set(before)


def test_rehearsal_tells_everything_that_is_wrong_at_once(family, hub, monkeypatch, bad_card):
    disk_of(monkeypatch, 0)
    (family / "merged").mkdir()
    (family / "merged" / "x").touch()
    findings = rehearsed(recipe_for(family, "stranger/model"))
    wrong = {finding.subject for finding in findings if finding.error}
    assert wrong == {"output", "repository", "card"}  # an output that is there needs no room
    monkeypatch.setenv("HF_TOKEN", hub.add_user("somebody"))
    findings = rehearsed(recipe_for(family, "stranger/model"))
    (error,) = [finding.error for finding in findings if finding.subject == "repository"]
    assert "can create one under somebody only" in str(error)


def test_dry_run_prints_the_plan_and_what_was_checked(family, hub, repo):
    recipe_for(family, repo)
    done = CliRunner().invoke(main, ["run", str(family / "recipe.yaml"), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "merged       " in done.output
    assert "will be created" in done.output
    assert done.output.splitlines()[-1] == "all checks passed"
    assert not (family / "merged").exists()
    monkey = CliRunner().invoke(main, ["run", str(family / "recipe.yaml"), "--dry-run", "--json"])
    checks = json.loads(monkey.stdout)["checks"]
    assert [check["subject"] for check in checks] == [
        "checkpoints",
        "room",
        "output",
        "limits",
        "repository",
        "card",
        "licence",
    ]


def test_dry_run_that_finds_something_wrong_ends_with_exit_code_1(family, hub, repo, bad_card):
    recipe_for(family, repo)
    done = CliRunner().invoke(main, ["run", str(family / "recipe.yaml"), "--dry-run"])
    assert done.exit_code == 1
    (failed,) = [line for line in done.output.splitlines() if "FAILED" in line]
    assert failed.startswith("card         FAILED: ") and '"license" must be one of' in failed
    assert done.output.splitlines()[-1] == "1 of 7 checks failed"


def test_options_of_run_say_how_to_commit(family, hub, repo):
    recipe_for(family, repo)
    options = ["--create-pr", "--private", "--commit-message", "My title"]
    done = CliRunner().invoke(main, ["run", str(family / "recipe.yaml"), *options])
    assert done.exit_code == 0, done.output
    assert "model.safetensors" in hub.files(repo, "refs/pr/1")
    assert "model.safetensors" not in hub.files(repo)
    assert hub.commits(repo, revision="refs/pr/1")[0].title == "My title"


def test_options_of_run_need_a_repository(family):
    recipe_for(family)
    done = CliRunner().invoke(main, ["run", str(family / "recipe.yaml"), "--create-pr"])
    assert done.exit_code == 1
    assert "the recipe does not say where to publish" in done.output


def test_pull_request_against_another_branch_is_refused(family, hub, repo):
    recipe_for(family, repo)
    options = ["--create-pr", "--revision", "trial"]
    done = CliRunner().invoke(main, ["run", str(family / "recipe.yaml"), *options])
    assert done.exit_code == 1
    assert "Leave out --revision or --create-pr" in done.output


def test_stranger_may_open_a_pull_request(family, hub, repo, monkeypatch):
    hub.add_repo(repo, files={"notes.txt": b"mine"})
    monkeypatch.setenv("HF_TOKEN", hub.add_user(f"stranger{next(_numbers)}"))
    done = run(recipe_for(family, repo), destination=Destination(repo, create_pr=True))
    assert done.published.url.endswith("/discussions/1")


def licensed(folder, **licences):
    for name, licence in licences.items():
        (folder / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n")


def test_plan_and_run_say_what_a_push_replaces_and_the_title_says_it_too(family, hub, repo):
    path = write_recipe(family, output={"path": "merged", "push_to_hub": repo})
    licensed(family, base="mit", a="mit", b="mit", c="mit")
    first = f"{repo} is not there, and will be created (public)"
    later = (
        f"{repo} holds a model: the push replaces its weights and files of the same names; others stay; it "
        "was merged otherwise (seed 0, and now 1): to keep it, name another repository with "
        "--set output.push_to_hub=ORG/MODEL"
    )
    assert f"publishes    {first}\n" in call("plan", path)[1]
    assert f"{repo} holds no model yet\n" in call("run", path)[2]
    assert hub.commits(repo)[0].title == "Add merged model"
    write_recipe(family, output={"path": "other", "push_to_hub": repo}, seed=1)
    assert json.loads(call("plan", path, "--json")[1])["publishing"] == {"to": later, "warning": None}
    assert f"{later}; the branch is at" in call("run", path, "--dry-run")[1]
    assert f"{later}\n" in call("run", path)[2]
    assert hub.commits(repo)[0].title == "Update merged model"
    call("run", path, "--output", family / "third", "--set", "seed=2", "--commit-message", "Third")
    assert hub.commits(repo)[0].title == "Third"


def test_a_push_over_a_model_that_was_merged_otherwise_says_by_what_and_how_to_keep_it(family, hub, repo):
    path = write_recipe(
        family, output={"path": "merged", "push_to_hub": repo}, preference={"weights": {"a": 1}}
    )
    licensed(family, base="mit", a="mit", b="mit", c="mit")
    assert call("run", path)[0] == 0
    assert "merged otherwise" not in call("run", path)[2]
    other = ("--output", str(family / "variant"), "--preference", "b=1")
    keep = "to keep it, name another repository with"
    told = f"it was merged otherwise (preference a 1, b 0, c 0, and now a 0, b 1, c 0): {keep}"
    assert f"{told} --set output.push_to_hub=ORG/MODEL\n" in call("plan", path, *other)[1]
    assert (
        f"{told} --set output.push_to_hub=ORG/MODEL; the branch is at"
        in call("run", path, *other, "--dry-run")[1]
    )
    kept = call("run", path, *other, "--set", f"output.push_to_hub={repo}-variant")
    assert f"{repo}-variant holds no model yet\n" in kept[2]
    code, _, err = call("push", family / "variant", repo)
    assert code == 0 and f"{told} another REPO_ID\n" in err
    hub.add_repo(
        f"{repo}-foreign", files={"model.safetensors": (family / "a" / "model.safetensors").read_bytes()}
    )
    assert (
        "others stay; it was not merged by hub_magmax: to keep it"
        in call("push", family / "variant", f"{repo}-foreign")[2]
    )


def test_other_checkpoints_methods_and_seeds_are_told_where_they_matter(family, hub, repo):
    drawn = {"name": "dare", "density": 0.5}
    path = write_recipe(family, output={"path": "merged", "push_to_hub": repo}, method=drawn)
    assert call("run", path)[0] == 0
    changed = ("--set", "seed=3", "--set", f"base_model={family / 'a'}")
    assert "otherwise (other checkpoints; seed 0, and now 3): " in call("plan", path, *changed)[1]
    assert (
        "otherwise (other options of the method): " in call("plan", path, "--set", "method.density=0.25")[1]
    )
    assert "otherwise (method dare, scaling " in call("plan", path, "--set", "method=magmax")[1]


def test_plan_does_not_wait_for_a_hub_that_cannot_be_asked(family, hub, repo, monkeypatch):
    path = write_recipe(family, output={"path": "merged", "push_to_hub": repo})
    hub.faults.add("/api/models/*", "status", status=503)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it is asked once"))
    code, out, _ = call("plan", path)
    assert code == 0 and f"publishes    {repo}, which was not looked at: the Hub answered 503" in out
    monkeypatch.undo()
    hub.faults.clear()
    assert (
        f"publishes    {repo}, which was not looked at: nothing can be published offline"
        in (call("plan", path, "--from-cache")[1])
    )


def test_sources_without_a_licence_are_a_warning_where_the_model_is_published(family, hub, repo):
    output = {"path": "merged", "push_to_hub": repo}
    licensed(family, base="apache-2.0", a="unknown", b="mit")
    path = write_recipe(family, output=output)
    told = "a and c state no licence, which gives no permission to publish what is made of it"
    assert f"warning      {told}" in call("plan", path)[1]
    assert f"licence      warning: {told}" in call("run", path, "--dry-run")[1]
    assert f"warning: {told}" in call("run", path)[2]
    path = write_recipe(family, output=output | {"license": "mit"})
    assert "no licence" not in call("plan", path)[1], "the recipe says"
    path = write_recipe(family)
    assert "no licence" not in call("plan", path)[1], "nothing is published"
