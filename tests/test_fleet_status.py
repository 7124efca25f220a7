"""Fleets: models listed in a file, in a folder, or of a user, and what is told of each."""

import itertools
import json
import shutil

import pytest
import yaml

from hub_magmax.errors import RecipeError, SourceError
from hub_magmax.fleet.checks import note, noted
from hub_magmax.fleet.status import Origin, Status, fleet_status
from hub_magmax.fleet.status_page import render_page
from hub_magmax.fleet.status_table import as_table, state, summary
from hub_magmax.pipeline import run
from hub_magmax.publishing.pushing import push
from hub_magmax.recipe.loading import load_recipe
from tests.browser import Page, find_browser
from tests.families import write_family, write_recipe
from tests.test_cli import call

_numbers = itertools.count()


def merge_from_hub(hub, folder, start):
    """Merge a family whose checkpoints are on the Hub, under names with this start; return the folder."""
    write_family(folder, ("a", "b"))
    for name in ("base", "a", "b"):
        hub.add_repo(f"{start}-{name}", folder=folder / name)
    tasks = [{"name": name, "model": f"{start}-{name}"} for name in "ab"]
    run(load_recipe(write_recipe(folder, base_model=f"{start}-base", tasks=tasks, method="average")))
    return folder / "merged"


@pytest.fixture(scope="module")
def made(tmp_path_factory, shared_hub):
    """A folder with a merged model, whose sources are on the Hub."""
    return merge_from_hub(shared_hub, tmp_path_factory.mktemp("fleet"), "me/fleet")


@pytest.fixture
def merged(made, tmp_path, monkeypatch):
    """A copy of it in the current folder."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(made, tmp_path / "merged")


@pytest.fixture
def org(hub):
    """An organisation that nobody else uses, without models."""
    name = f"fleet-org{next(_numbers)}"
    hub.add_repo(f"{name}/rows", repo_type="dataset")
    hub.reset_log()
    return name


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_models_of_an_organisation_are_those_with_a_report(merged, org, hub):
    for name in ("second", "first"):
        push(merged, f"{org}/{name}")
    hub.add_repo(f"{org}/other", files={"config.json": b"{}"})
    code, out, _ = call("fleet", org, "--json")
    found = json.loads(out)["models"]
    assert code == 0 and [status["model"] for status in found] == [f"{org}/first", f"{org}/second"]
    for status in found:
        assert status["commit"] == hub.head(status["model"])
        assert status["method"]["name"] == "average" and status["preference"] == {"a": 0.5, "b": 0.5}
        assert status["version"] == "0.1.0" and not status["is_faulty"]
        pinned = {origin["role"]: (origin["name"], origin["commit"]) for origin in status["origins"]}
        names = {"base_model": "base", "a": "a", "b": "b"}
        assert pinned == {
            role: (f"me/fleet-{name}", hub.head(f"me/fleet-{name}")) for role, name in names.items()
        }
    assert "2 models: all as merged, none behind its sources" in call("fleet", org)[1]


def test_few_requests_and_no_weights(merged, org, hub):
    for name in "xyz":
        push(merged, f"{org}/{name}")
    hub.reset_log()
    fleet_status(org)
    # Of each model: commits, tags, files, report and lock. Of all together: the list, and three sources.
    assert sum(hub.counts.values()) == 3 * 5 + 1 + 3
    assert not [exchange for exchange in hub.log if exchange.path.endswith(".safetensors")]
    assert "GET storage" not in hub.counts


def test_source_that_moved_is_told_with_its_first_new_commit(org, hub, tmp_path):
    push(merge_from_hub(hub, tmp_path, "me/moving"), f"{org}/model")
    assert fleet_status(f"{org}/model")[0].behind == ()
    hub.clock = lambda: 1_800_000_000.0
    hub.add_repo("me/moving-a", files={"README.md": b"1"})
    hub.clock = lambda: 1_900_000_000.0
    head = hub.add_repo("me/moving-a", files={"README.md": b"2"})
    (found,) = fleet_status(f"{org}/model")
    (behind,) = found.behind
    assert (behind.role, behind.head, behind.num_behind) == ("a", head, 2)
    assert behind.since == "2027-01-15T08:00:00+00:00"
    assert state(found) == "behind a since 2027-01-15"
    assert call("fleet", f"{org}/model")[0] == 0, "told, and no fault"


def test_commits_and_files_by_hand(merged, org, hub):
    repo = f"{org}/model"
    push(merged, repo, commit_message="Summer data")
    assert fleet_status(repo)[0].by_hand == (), "its text says whose it is"
    hub.add_repo(repo, files={"README.md": b"my words"}, message="My words")
    (found,) = fleet_status(repo)
    assert (found.by_hand, found.changed, found.is_faulty) == (("My words",), (), False)
    assert state(found) == "1 commit by hand"
    hub.add_repo(
        repo, files={"model.safetensors": b"theirs", "tokenizer.json": b"{}"}, message="Other weights"
    )
    (found,) = fleet_status(repo)
    assert found.by_hand == ("Other weights", "My words")
    assert found.changed == ("model.safetensors", "tokenizer.json") and found.is_faulty
    code, out, _ = call("fleet", repo)
    assert code == 3 and "not as merged: model.safetensors and tokenizer.json; 2 commits by hand" in out
    push(merged, repo)
    assert fleet_status(repo)[0].by_hand == ()


def test_folders_below_a_folder(merged, tmp_path):
    shutil.copytree(merged, tmp_path / "sites" / "north")
    shutil.copytree(merged, tmp_path / "sites" / "south.partial")
    (tmp_path / "notes").mkdir()
    assert [status.model for status in fleet_status(".")] == ["merged", "sites/north"]
    (tmp_path / "sites/north/config.json").write_text("{}")
    with (merged / "model.safetensors").open("ab") as file:
        file.write(b"more")
    first, second = fleet_status(str(tmp_path))
    assert (first.changed, second.changed) == (("model.safetensors",), ("config.json",))
    with pytest.raises(SourceError, match=r"there is no merged model.*merge_report\.json"):
        fleet_status("notes")


def test_file_lists_repositories_folders_and_recipes(merged, org, hub, tmp_path):
    push(merged, f"{org}/model")
    sites = {"north": {}, "south": {"output": {"push_to_hub": f"{org}/model"}}}
    write_recipe(tmp_path, output={"path": "sites"}, sites=sites)
    shutil.copytree(merged, tmp_path / "sites/north")
    listed = [f"{org}/model", "./merged", "merged", f"hf://{org}/model", f"{org}/model@main", "recipe.yaml"]
    listed += ["sites/../merged", "latest"]
    (tmp_path / "latest").symlink_to("merged")
    for name, text in (("fleet.yaml", yaml.safe_dump(listed)), ("fleet.json", json.dumps(listed))):
        (tmp_path / name).write_text(text)
        found = fleet_status(name)
        assert [(status.model, status.site) for status in found] == [
            (f"{org}/model", "south"),
            ("merged", ""),
            ("sites/north", "north"),
        ], "each once"
        assert not any(status.problems for status in found)
    assert [status.site for status in fleet_status("recipe.yaml")] == ["north", "south"]
    assert call("fleet", "recipe.yaml")[1].splitlines()[0].split()[:2] == ["model", "site"]
    (tmp_path / "fleet.yaml").write_text("models: [a]")
    with pytest.raises(RecipeError):
        fleet_status("fleet.yaml")


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ((0.3, 0.7, 0.0, 0.0), "b 0.7, a 0.3"),
        ((0.3, 0.4, 0.2, 0.1), "b 0.4 and 3 more"),
        ((0.25, 0.25, 0.25, 0.25), "equal, 4 tasks"),
        ((0.0, 1.0, 0.0, 0.0), "b 1"),
    ],
)
def test_tasks_that_a_model_is_not_for_do_not_hide_those_that_it_is_for(weights, told):
    status = Status("me/model", preference=dict(zip("abcd", weights, strict=True)))
    assert f" {told}  " in as_table([status]).write()


def test_model_that_is_not_what_its_recipe_asks_now(merged, tmp_path):
    names = {"base_model": "me/fleet-base", "tasks": [{"name": t, "model": f"me/fleet-{t}"} for t in "ab"]}

    def told(**changes):
        write_recipe(tmp_path, **names, **{"method": "average"} | changes)
        code, out, _ = call("fleet", "recipe.yaml")
        assert code == 0, "told, and no fault"
        return fleet_status("recipe.yaml")[0].not_as_asked, out

    assert told()[0] == told(output={"path": "merged", "shard_size": "1KB"})[0] == ()
    changed, out = told(
        method={"name": "average", "scaling": 0.5}, preference={"weights": {"a": 0.7, "b": 0.3}}
    )
    assert changed == ("method", "preference")
    assert "not as the recipe asks now: method and preference" in out and "1 not as their recipes ask" in out
    assert "method is not as the recipe asks now" in render_page(fleet_status("recipe.yaml"), "recipe.yaml")
    assert fleet_status("merged")[0].not_as_asked == (), "no recipe asks"


def test_model_of_local_checkpoints_is_what_its_recipe_asks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "below").mkdir()
    write_family(tmp_path / "below", ("a", "b"))
    run(load_recipe(write_recipe(tmp_path / "below", names=("a", "b"))))
    (found,) = fleet_status("below/recipe.yaml")
    assert found.method and found.not_as_asked == ()


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("verb", ["fleet", "history", "canary"])
def test_cache_is_advised_where_the_command_can_read_it(merged, org, hub, verb):
    push(merged, f"{org}/model")
    hub.faults.add(f"/api/models/{org}/*", "status", status=503)
    code, out, said = call(verb, f"{org}/model")
    assert code == 1 and "503" in out + said
    assert ("--from-cache" in out + said) == (verb == "canary")
    hub.faults.clear()
    hub.faults.add("/api/models/me/fleet-b/commits/*", "status", status=503)
    code, out, _ = call("fleet", f"{org}/model", "--json")
    assert code == 1 and "503" in out and "--from-cache" not in out


@pytest.mark.usefixtures("at_once")
def test_broken_models_do_not_hide_the_others(merged, org, hub, tmp_path):
    push(merged, f"{org}/good")
    report = json.loads((merged / "merge_report.json").read_bytes())
    later = ("files", "profile", "opened", "parameters", "peak_resident_bytes", "unchanged")
    older = json.dumps({key: value for key, value in report.items() if key not in later}).encode()
    changed = json.dumps({**report, "plan_digest": "sha256:other"}).encode()
    files = contents(merged)
    hub.add_repo(f"{org}/plain", files={"config.json": b"{}"})
    hub.add_repo(f"{org}/older", files={**files, "merge_report.json": older}, message="Add merged model")
    hub.add_repo(f"{org}/broken", files={**files, "merge_report.json": b'{"shards": 1'})
    hub.add_repo(f"{org}/edited", files={**files, "merge_report.json": changed})
    hub.add_repo(f"{org}/no-lock", files={k: v for k, v in files.items() if k != "recipe.lock.json"})
    hub.add_repo(f"{org}/odd-lock", files={**files, "recipe.lock.json": b"[]"})
    hub.add_repo(f"{org}/gated", files=files)
    hub.faults.add(f"/api/models/{org}/gated*", "status", status=403, error_code="GatedRepo")
    hub.add_repo(f"{org}/away", files=files)
    hub.faults.add(f"/api/models/{org}/away*", "status", status=503)
    names = ("good", "plain", "older", "broken", "edited", "no-lock", "odd-lock", "gated", "away", "none")
    listed = [f"{org}/{name}" for name in names]
    listed += ["../no/such/folder", f"{org}/good@no-branch", 3, "no.yaml"]
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(listed))
    code, out, _ = call("fleet", "fleet.yaml", "--json")
    found = {status["model"].removeprefix(f"{org}/"): status for status in json.loads(out)["models"]}
    reasons = {
        "good": "", "older": "",
        "plain": "there is no merge_report.json", "broken": "not a merge report of this version",
        "edited": "the merge report was changed", "no-lock": "recipe.lock.json",
        "odd-lock": "not a lock of this version", "gated": "access is gated", "away": "503",
        "none": "there is no such repository", "../no/such/folder": "neither an existing folder nor",
        "good@no-branch": "there is no such revision", "3": "3 is no name of a model",
        "no.yaml": "there is no such file",
    }  # fmt: skip
    assert code == 3 and found.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in found[name]["problem"] and bool(reason) == bool(found[name]["problem"]), name
    assert found["no-lock"]["version"] == "0.1.0", "what is known is told"
    assert found["older"]["changed"] == []
    assert found["no-lock"]["changed"] == found["odd-lock"]["changed"] == ["recipe.lock.json"]
    told = call("fleet", "fleet.yaml")[1]
    assert "14 models: 2 faulty, 12 not looked at" in told
    assert f"\n{org}/none: there is no such repository" in told, "the name once"
    others = [name for name in listed if "-lock" not in str(name)]
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(others))
    assert call("fleet", "fleet.yaml")[0] == 1, "nothing is known to be wrong"


def test_source_that_cannot_be_asked_is_told(merged, org, hub):
    push(merged, f"{org}/model")
    hub.faults.add("/api/models/me/fleet-b/commits/*", "status", status=403)
    code, out, _ = call("fleet", f"{org}/model")
    assert code == 1 and "me/fleet-b: this token may not read it (status 403)" in out
    assert "average 1" in out


def test_checks_are_noted_and_shown(merged, org, hub, monkeypatch):
    repo = f"{org}/model"
    push(merged, repo)
    assert call("verify", repo)[0] == call("verify", "merged")[0] == 0
    first, second = noted()
    assert (first.model, first.commit, first.result) == (repo, hub.head(repo), "passed")
    assert (second.model, second.commit) == (str(merged), "")
    note("canary", f"{repo}@main", "regressed", commit=first.commit)
    assert (noted()[-1].model, noted()[-1].commit) == (repo, first.commit)
    (found,) = fleet_status(repo)
    assert found.verified == first and found.canary.result == "regressed" and found.is_faulty
    hub.add_repo(repo, files={"README.md": b"my words"})
    day = first.time[:10]
    assert f"passed {day}, earlier" in call("fleet", repo)[1]
    assert not fleet_status(repo)[0].is_faulty, "the canary that failed was of an earlier revision"
    assert f"passed {day} " in call("fleet", "merged")[1]
    (merged / "config.json").write_text("{}")
    assert call("verify", "merged")[0] == 1
    (found,) = fleet_status("merged")
    assert found.verified.result == "failed"


def test_journal_with_other_lines_is_read_and_one_that_cannot_be_written_is_a_warning(merged, monkeypatch):
    lines = ["", "no json", "[]", '{"kind": "verify"}', '{"kind": 1, "model": 2, "commit": 3}']
    journal = merged.parent / "checks.jsonl"
    journal.write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("HUB_MAGMAX_CHECKS", str(journal))
    assert call("verify", "merged")[0] == 0 and len(noted()) == 1
    monkeypatch.setenv("HUB_MAGMAX_CHECKS", str(merged / "config.json" / "checks.jsonl"))
    code, _, said = call("verify", "merged")
    assert code == 0 and "this check is not noted" in said and noted() == ()
    monkeypatch.setenv("HUB_MAGMAX_CHECKS", "")
    code, _, said = call("verify", "merged")
    assert code == 0 and "not noted" not in said


def forty():
    """Models with long and odd names, of three families, in all states."""
    behind = Origin("base_model", "me/base", "a" * 40, "b" * 40, 3, "2026-05-04T00:00:00+00:00")
    for number in range(40):
        name = f"an-organisation/a-model-with-a-very-long-name-for-the-site-{number:02}-merged"
        name = "me/<b>bold</b>&\u202e\x07" if number == 7 else name
        origins = (behind if number % 7 == 0 else Origin("base_model", "me/base", "a" * 40),)
        origins += tuple(Origin(f"task-{t}", f"me/task-{t}", f"{number % 3}" * 40) for t in range(8))
        yield Status(
            name,
            f"site-{number:02}",
            f"{number:040x}",
            "2026-04-01T00:00:00+00:00",
            {"name": "tunable_magmax", "scaling": 0.5},
            {f"task-{t}": (t + 1) / 36 for t in range(8)},
            origins,
            "0.1.0",
            guard={"general": -0.004} if number % 2 else {},
            tag="head" if number % 5 else "earlier",
            by_hand=("<script>alert(1)</script>",) if number % 11 == 0 else (),
            changed=("config.json",) if number == 13 else (),
            problem="there is no merge_report.json" if number == 20 else "",
        )


def test_forty_models_are_a_legible_table():
    found = tuple(forty())
    lines = as_table(found).write().splitlines()
    rows = lines[: lines.index("")]
    assert len(rows) == 41 and max(map(len, rows)) <= 200
    assert len({line.split()[0] for line in rows}) == 41, "cut names differ"
    assert [line.split(":")[0] for line in lines[42:]][:3] == ["1", "2", "3"], "families are told once"
    assert "\x07" not in "".join(rows) and "\u202e" not in "".join(rows)
    assert summary(found) == "40 models: 1 faulty, 6 behind, 4 with commits by hand, 1 not looked at"
    assert as_table(found).write("csv").count("task-7 me/task-7 at 0000000") == 14


def test_page_holds_everything_and_shows_others_words_as_text(merged):
    page = render_page(tuple(forty()), "all <models>")
    assert "<script" not in page and "<b>bold" not in page and "&lt;script&gt;alert(1)" in page
    assert "http" not in page.replace("http-equiv", "") and page.count("<tr>") == 41
    assert "all &lt;models&gt;" in page
    code, out, _ = call("fleet", "merged", "--html", "fleet.html")
    assert code == 0 and "wrote fleet.html" in out
    written = (merged.parent / "fleet.html").read_text()
    assert "average 1" in written and str(merged) not in written
    assert call("fleet", "merged", "--html", "no/fleet.html")[0] == 1


def test_page_in_a_browser(tmp_path):
    if (program := find_browser()) is None:
        pytest.skip("no browser: install chromium to test the page that people open")
    path = tmp_path / "fleet.html"
    path.write_text(render_page(tuple(forty()), "fleet.yaml"))
    browser = Page(program, tmp_path / "profile")
    try:
        for width in (1400, 400):
            browser.open(path, width=width)
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            assert browser.evaluate("document.querySelectorAll('tbody tr').length") == 40
        assert browser.complaints == [] and browser.requests == [path.as_uri()] * 2
    finally:
        browser.close()
