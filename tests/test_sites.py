"""Recipes with sites: the recipe of each, and a run of all of them."""

import json
import math
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub import HfApi

from hub_magmax import run, run_sites
from hub_magmax.cli import main
from hub_magmax.cli.sites import answer_of
from hub_magmax.errors import OutputError, RecipeError
from hub_magmax.merging.output import opening
from hub_magmax.merging.output.libraries import Opened
from hub_magmax.merging.output.report import REPORT_NAME, read_report
from hub_magmax.pipeline import Run, plan
from hub_magmax.planning.findings import look
from hub_magmax.publishing import preflight
from hub_magmax.publishing.preflight import check_room
from hub_magmax.recipe import loading
from hub_magmax.recipe.loading import load_recipe, parse_recipe, site_recipe, site_recipes
from hub_magmax.recipe.sites import site_values
from hub_magmax.text import format_bytes
from tests.families import read_merged, recipe_values, write_family, write_recipe
from tests.test_merging_sites import content
from tests.test_processes import launch

NORTH = {"preference": {"weights": {"a": 0.8, "b": 0.1, "c": 0.1}}}
SOUTH = {"method": {"name": "ties", "density": 0.5}, "output": {"path": "elsewhere", "dtype": "float32"}}


def invoke(*words, code=0):
    done = CliRunner().invoke(main, [*map(str, words)])
    assert done.exit_code == code, done.output
    return done.stdout if "--json" in words else done.output


@pytest.fixture
def two_sites(tmp_path, monkeypatch):
    """A recipe with the sites north and south, beside its checkpoints in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_family(tmp_path, "abc")
    write_recipe(tmp_path, method="average", sites={"north": NORTH, "south": SOUTH})


def test_a_site_is_the_recipe_with_its_own_values():
    values = recipe_values(
        method="average",
        output={"path": "out", "private": True, "push_to_hub": "me/mix"},
        sites={"north": NORTH, "south": SOUTH, "east": None},
    )
    assert site_values(values, "north") == recipe_values(
        method="average",
        output={"path": "out/north", "private": True, "push_to_hub": "me/mix-north"},
        **NORTH,
    )
    assert site_values(values, "south") == recipe_values(
        method=SOUTH["method"],
        output={"path": "elsewhere", "dtype": "float32", "private": True, "push_to_hub": "me/mix-south"},
    )
    assert site_values(values, "east")["output"]["path"] == "out/east"
    values["sites"].pop("east")
    made = site_recipe(parse_recipe(values), "north")
    assert made.sites is None and made.digest == parse_recipe(site_values(values, "north")).digest


def test_a_selection_does_not_get_the_common_evaluation():
    evaluation = {"evaluator": "image-classification", "tasks": {"a": {"dataset": "./a"}}}
    sites = {"north": {}, "west": {"output": {"format": "selection"}}}
    values = recipe_values(method="magmax", evaluation=evaluation, sites=sites)
    assert "evaluation" in site_values(values, "north")
    assert "evaluation" not in site_values(values, "west")
    parse_recipe(values)
    sites["west"]["evaluation"] = evaluation
    with pytest.raises(RecipeError, match="no weights that could be scored"):
        parse_recipe(values)


@pytest.mark.parametrize(
    ("site", "place", "what"),
    [
        ({"preferense": {}}, "sites.south.preferense", "did you mean 'preference'"),
        (
            {"preference": {"weights": {"a": 0.5, "x": 0.5}}},
            "sites.south.preference.weights.x",
            "there is no task 'x'",
        ),
        ({"preference": {"weights": {"a": 0.5}}}, "sites.south.preference.weights", "the weights sum to 0.5"),
        ({"method": "tiez"}, "sites.south.method.name", "did you mean 'ties'"),
        ({"output": {"path": "merged/north"}}, "sites.south.output.path", "the place of the site north too"),
        ({"output": {"path": "merged"}}, "sites.south.output.path", "the place of the site north too"),
        (
            {"output": {"path": "merged/north/x"}},
            "sites.south.output.path",
            "the place of the site north too",
        ),
        ({"output": {"pth": "x"}}, "sites.south.output.pth", "did you mean 'path'"),
        ("uniform", "sites.south", "write sites: {north: "),
        ({"sites": {}}, "sites.south.sites", "unknown key"),
        (
            {"preference": {"weights": {"no name": 1}}},
            "sites.south.preference.weights.no name",
            "cannot be a name",
        ),
    ],
)
def test_what_is_wrong_with_a_site_is_told_at_its_key(tmp_path, site, place, what):
    path = write_recipe(tmp_path, sites={"north": {}, "south": site})
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    said = str(caught.value)
    assert f", {place}: " in said and "line " in said and what.lower() in said.lower()


def test_verbs_of_one_model_take_one_site(two_sites, tmp_path):
    assert "3 tasks, average, 2 sites" in invoke("validate", "recipe.yaml")
    said = invoke("merge", "recipe.yaml", code=1)
    assert "--site with one of north and south" in said
    assert "did you mean 'north'" in invoke("merge", "recipe.yaml", "--site", "nort", code=1).lower()
    assert "no sites" in invoke("merge", write_recipe(tmp_path / "a"), "--site", "north", code=1)
    write_recipe(tmp_path, method="average", sites={"north": NORTH, "south": SOUTH})
    invoke("lock", "recipe.yaml", "--site", "south")
    assert json.loads((tmp_path / "recipe.south.lock.json").read_text())["method"]["name"] == "ties"
    invoke("merge", "recipe.yaml", "--site", "south", "--set", "method.density=0.25")
    stored = yaml.safe_load((tmp_path / "elsewhere" / "recipe.yaml").read_text())
    assert stored["method"]["density"] == 0.25 and "sites" not in stored
    invoke("verify", "elsewhere")
    assert "recipe with" not in invoke("plan", "recipe.yaml", "--site", "north")
    with pytest.raises(RecipeError, match="2 sites"):
        run(tmp_path / "recipe.yaml")


def test_a_plan_of_all_sites_counts_what_is_read_once(two_sites, tmp_path):
    said = invoke("plan", "recipe.yaml")
    assert invoke("run", "recipe.yaml", "--dry-run") == f"{said}all checks passed\n"
    assert "once for 2 sites; writes" in said and "; memory about" in said
    assert "north: average, scaling 1; a 0.8, b 0.1, c 0.1; merged/north\n" in said
    found = json.loads(invoke("plan", "recipe.yaml", "--json"))
    one = json.loads(invoke("plan", "recipe.yaml", "--site", "north", "--json"))
    assert found["sites"]["north"]["digest"] == one["digest"]
    assert found["bytes_in"] == one["bytes_in"] and found["bytes_out"] == 2 * one["bytes_out"]
    assert "this is one place for all sites" in invoke("run", "recipe.yaml", "--output", "x", code=1)


def test_a_selection_counts_in_a_plan_with_its_own_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_family(tmp_path, "abc")
    sites = {"whole": {}, "thin": {"output": {"format": "selection"}}}
    path = write_recipe(tmp_path, method="magmax", sites=sites)
    sizes = {}
    for site in ("whole", "thin"):
        sizes[site] = json.loads(invoke("plan", "recipe.yaml", "--site", site, "--json"))["bytes_out"]
    assert sizes["thin"] == math.ceil((sizes["whole"] - 56) / 4 * math.log2(3) / 8)  # without 7 positions
    assert json.loads(invoke("plan", "recipe.yaml", "--json"))["bytes_out"] == sum(sizes.values())
    assert f"writes {format_bytes(sum(sizes.values()))}; " in invoke("plan", "recipe.yaml")
    plans = {site: plan(own) for site, own in site_recipes(load_recipe(path)).items()}
    copied = {site: own.copied_bytes for site, own in plans.items()}
    rooms = {site: check_room(own) - copied[site] for site, own in plans.items()}
    assert rooms["whole"] - rooms["thin"] == sizes["whole"] - sizes["thin"]


def test_every_site_is_what_its_own_recipe_gives(tmp_path):
    write_family(tmp_path, "abc", num_shards=2)
    path = write_recipe(tmp_path, method="average", sites={"north": NORTH, "south": SOUTH})
    done = run_sites(path)
    assert list(done) == ["north", "south"]
    for site in done:
        own = site_recipe(load_recipe(path), site)
        together = content(own.output_path)
        shutil.rmtree(own.output_path)
        alone = run(own)
        assert together.pop("README.md")  # tells how long the merge took
        assert content(own.output_path).items() >= together.items()
        assert done[site].report.plan_digest == alone.report.plan_digest
    again = run_sites(path)
    assert all(isinstance(found, Run) and found.merged_before for found in again.values())


def test_what_is_the_same_for_all_sites_is_done_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_family(tmp_path, "abc")
    west = {"output": {"dtype": "bfloat16"}}
    write_recipe(tmp_path, method="average", sites={"north": NORTH, "south": SOUTH, "west": west})
    calls = Counter()
    opened = Opened(("a library",), frozenset(), 6)
    for module, name, answer in (
        (loading, "read_yaml", loading.read_yaml),
        (preflight, "check", preflight.check),
        (look, "Look", look.Look),
        (opening, "open_folder", lambda *arguments: opened),
    ):

        def counted(*arguments, name=name, answer=answer, **named):
            calls[name] += 1
            return answer(*arguments, **named)

        monkeypatch.setattr(module, name, counted)
    invoke("run", "recipe.yaml")
    # The west's output has another dtype.
    assert calls == {"read_yaml": 1, "check": 3, "Look": 1, "open_folder": 2}
    reports = [read_report(tmp_path / place / REPORT_NAME) for place in ("merged/north", "elsewhere")]
    assert all(found.opened == {"library": "a library", "result": "6 tensors fit"} for found in reports)


def test_one_site_that_fails_leaves_the_others_whole(two_sites, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.txt").write_text("kept")
    said = invoke("run", "recipe.yaml", code=1)
    assert "north: merged/north\n" in said and "1 of 2 sites are done" in said
    assert "south: FAILED: " in said and "the output path is taken" in said
    found = json.loads(invoke("run", "recipe.yaml", "--json", code=1))
    assert found["sites"]["north"]["merged_before"] and "taken" in found["sites"]["south"]["error"]["what"]
    done = run_sites(tmp_path / "recipe.yaml")
    assert isinstance(done["north"], Run) and isinstance(done["south"], OutputError)


def test_the_next_version_of_a_site_goes_into_a_folder_of_its_own(hub, tmp_path, monkeypatch):
    """As docs/sites.md writes it."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "sites.md").read_text(encoding="utf-8")
    first, edit = map(yaml.safe_load, re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S))
    (tmp_path / "checkpoints").mkdir()
    write_family(tmp_path / "checkpoints", ("animals", "plants"))
    first["output"]["push_to_hub"] = "me/next-version"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(first))
    invoke("run", recipe.name)
    changed = first | {"sites": first["sites"] | {"north": {**edit["sites"]["north"], "output": {}}}}
    recipe.write_text(yaml.safe_dump(changed))
    for verb in (["run"], ["run", "--dry-run"]):
        said = invoke(*verb, recipe.name, code=1)
        assert "--output" not in said and "sites.north.output.path" in said
    recipe.write_text(yaml.safe_dump(first | {"sites": first["sites"] | edit["sites"]}))
    said = invoke("run", recipe.name)
    assert "north: sites/north-2;" in said and said.count(" was there") == 2
    commits = {site: len(HfApi().list_repo_commits(f"me/next-version-{site}")) for site in first["sites"]}
    assert commits["north"] == commits["south"] + 1 == commits["west"] + 1
    assert "not as" not in invoke("fleet", recipe.name)


def test_sites_are_pushed_each_to_its_own_repository(hub, tmp_path):
    write_family(tmp_path, "abc")
    output = {"path": "out", "push_to_hub": "me/of-sites"}
    south = {"method": "magmax", "output": {"keep": False}}
    path = write_recipe(tmp_path, method="average", output=output, sites={"north": NORTH, "south": south})
    done = run_sites(path)
    assert not (tmp_path / "out" / "south").exists()
    for site in ("north", "south"):
        assert HfApi().model_info(f"me/of-sites-{site}").sha == done[site].published.commit


def test_scores_of_checkpoints_are_measured_once_for_all_sites(quickstart_folder, tmp_path):
    values = yaml.safe_load((quickstart_folder / "recipe.yaml").read_text())
    tasks = [task["name"] for task in values["tasks"]]
    sites = {f"s{n}": {"preference": {"weights": {tasks[n]: 1}}} for n in range(2)}
    values |= {"sites": sites, "output": {"path": str(tmp_path / "out")}}
    values.pop("preference", None)
    said = []
    done = run_sites(parse_recipe(values, folder=quickstart_folder), report=said.append)
    assert all(found.scores is not None for found in done.values())
    assert sum("are reused" in line for line in said) == 1
    lines = answer_of(done).text.splitlines()
    assert len(lines) == 3 and not any(".;" in line for line in lines) and all(";" in line for line in lines)


def test_a_disk_without_room_for_all_is_told_before_the_first(tmp_path, monkeypatch):
    write_family(tmp_path, "abc")
    path = write_recipe(tmp_path, method="average", sites={"north": NORTH, "south": SOUTH})
    recipe = load_recipe(path)
    one = check_room(plan(site_recipe(recipe, "north")))
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=one * 3 // 2))
    with pytest.raises(OutputError, match="the merges together need more"):
        run_sites(path)
    assert not (tmp_path / "merged").exists()


def test_what_is_wrong_with_a_checkpoint_is_told_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_family(tmp_path, "ab")
    write_recipe(tmp_path, method="average", sites={"north": NORTH, "south": SOUTH})
    said = invoke("run", "recipe.yaml", code=1)
    assert said.count("./c") == 1 and "FAILED" not in said


def test_values_of_the_command_line_may_not_give_two_sites_one_place(hub, two_sites, tmp_path):
    for key, place in (("path", "other"), ("push_to_hub", "me/of-two-sites")):
        for verb in (["plan"], ["run"], ["run", "--dry-run"]):
            said = invoke(*verb, "recipe.yaml", "--set", f"output.{key}={place}", code=1)
            assert f"--set output.{key}" in said and "one place for the sites north and south" in said
    assert not (tmp_path / "other").exists()
    assert not HfApi().repo_exists("me/of-two-sites")
    invoke("run", "recipe.yaml", "--site", "north", "--set", "output.path=other")
    assert (tmp_path / "other").is_dir()


def test_a_rehearsal_and_the_first_lines_tell_what_is_taken(two_sites, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.txt").write_text("kept")
    said = invoke("run", "recipe.yaml", "--dry-run", code=1)
    assert "south: output" in said and "the output path is taken" in said and "north: output" not in said
    done = invoke("run", "recipe.yaml", code=1)
    assert done.index("elsewhere: the output path is taken") < done.index("merging 6 tensors by average")
    assert "1 of 2 sites are done; merged in" in done
    assert ", there" in invoke("plan", "recipe.yaml")


@pytest.mark.slow
def test_two_processes_make_the_same_sites(tmp_path):
    write_family(tmp_path, "abc", num_shards=2)
    output = {"path": "one", "shard_size": 1000}
    path = write_recipe(tmp_path, method="ties", output=output, sites={"x": NORTH, "y": {}})
    run_sites(path)
    path = write_recipe(tmp_path, method="ties", output=output | {"path": "two"}, sites={"x": NORTH, "y": {}})
    done: subprocess.CompletedProcess[str] = launch("run", str(path))
    assert done.returncode == 0, done.stderr
    for site in "xy":
        one, two = (read_merged(tmp_path / folder / site) for folder in ("one", "two"))
        assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)
