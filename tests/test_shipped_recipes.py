"""Every shipped recipe is valid, runs as its comment says, and shows what its comment says."""

import json
import re

import pytest
from safetensors.torch import load_file

from benchmarks.cards import RECIPES, lay_out, recipe_names
from hub_magmax.pipeline import run
from hub_magmax.quickstart.demo import shipped_recipe
from hub_magmax.recipe.loading import load_recipe
from hub_magmax.registry import METHODS

ON_THE_HUB = ("hub-to-hub", "revisions")


@pytest.fixture(scope="module")
def runs(quickstart_folder, tmp_path_factory):
    """A function that runs a recipe on the quickstart's checkpoints, once; those are scored by the first."""
    recipes = lay_out(tmp_path_factory.mktemp("recipes"), quickstart_folder)
    scores = tmp_path_factory.mktemp("scores")
    done = {}

    def run_once(name):
        if name not in done:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("HUB_MAGMAX_SCORES", str(scores))
                done[name] = run(load_recipe(recipes[name]))
        return done[name]

    return run_once


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_is_valid(name):
    load_recipe(RECIPES / f"{name}.yaml")


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_starts_with_a_comment_that_says_how_to_run_it(name):
    comment = re.match(r"(#.*\n)+", (RECIPES / f"{name}.yaml").read_text())
    assert comment
    assert name == "quickstart" or f"hub-magmax run recipes/{name}.yaml" in comment[0]


def test_every_output_has_a_folder_of_its_own():
    outputs = [load_recipe(RECIPES / f"{name}.yaml").output_path for name in recipe_names()]
    assert len(set(outputs)) == len(outputs)


def test_every_method_is_in_a_recipe_or_named_by_the_comment_of_one():
    paths = [RECIPES / f"{name}.yaml" for name in recipe_names()]
    used = {load_recipe(path).method.name for path in paths}
    comments = "".join(re.match(r"(#.*\n)+", path.read_text())[0] for path in paths)
    assert {*METHODS.built_in} <= used | {*re.findall("`([a-z_]+)`", comments)}


def test_the_quickstart_writes_the_recipe_of_this_folder():
    assert shipped_recipe() == (RECIPES / "quickstart.yaml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in recipe_names() if name not in ON_THE_HUB])
def test_local_recipe_runs(name, runs):
    done = runs(name)
    merged = {score.task: score.value for score in done.scores.scores if score.model == "merged"}
    assert list(merged) == list(done.plan.recipe.task_names)
    # The digits of all tasks were learned; a model that lost them all answers one in ten.
    assert sum(merged.values()) / len(merged) > 0.2
    assert (done.output / "README.md").read_text().startswith("---\n")


@pytest.mark.slow
def test_average_does_not_count_elements(runs):
    assert runs("average").report.shares == {}


@pytest.mark.slow
def test_a_block_that_writes_nothing_changes_no_answer(runs):
    deeper, average = runs("layers"), runs("average")
    answers = [
        [score.value for score in done.scores.scores if score.model == "merged"] for done in (deeper, average)
    ]
    assert answers[0] == answers[1]
    assert json.loads((deeper.output / "config.json").read_text())["num_hidden_layers"] == 4


@pytest.mark.slow
def test_magmax_says_that_it_knows_no_preference(runs):
    assert "ignores the preference" in (runs("magmax").output / "README.md").read_text()


@pytest.mark.slow
def test_top_n_keeps_as_much_magnitude_as_the_preference_allows(runs):
    report = runs("top-n").report
    assert report.duality_gap == pytest.approx(0, abs=1e-6)
    assert report.num_unaligned == {}


@pytest.mark.slow
def test_labels_become_the_shares_of_the_years_digits(runs):
    # Of 1990 to 1999: ten 1s, twenty 9s, and each digit once more as the last one.
    expected = {"zero-one": 12, "two-three": 2, "four-five": 2, "six-seven": 2, "eight-nine": 22}
    weights = runs("labels").plan.lock.preference.weights
    assert weights == {task: pytest.approx(count / 40) for task, count in expected.items()}


@pytest.mark.slow
def test_rules_keep_head_and_patch_embedding_and_nothing_else(runs, quickstart_folder):
    done = runs("tensors")
    base = load_file(quickstart_folder / "checkpoints" / "base" / "model.safetensors")
    merged = load_file(done.output / "model.safetensors")
    patches = "vit.embeddings.patch_embeddings.projection"
    kept = {"classifier.weight", "classifier.bias", f"{patches}.weight", f"{patches}.bias"}
    assert {job.name for job in done.plan.jobs if not job.merged} == kept
    assert all(base[name].equal(merged[name]) for name in kept)
    assert not base["vit.layernorm.weight"].equal(merged["vit.layernorm.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hub-to-hub", "revisions"])
def test_hub_recipe_runs(name, runs, family_on_hub):
    done = runs(name)
    assert {source.kind for source in done.plan.lock.sources.values()} == {"hub"}
    assert all(re.fullmatch("[0-9a-f]{40}", source.commit) for source in done.plan.lock.sources.values())
    assert done.scores.data["zero-one"]["dataset"] == "me/digits"


@pytest.mark.slow
def test_hub_to_hub_merges_what_the_quickstart_merges_and_publishes_it(runs, family_on_hub, tmp_path):
    published = runs("hub-to-hub").published
    assert family_on_hub.head("me/digits-merged") == published.commit
    (tmp_path / "hub.safetensors").write_bytes(family_on_hub.read("me/digits-merged", "model.safetensors"))
    from_hub = load_file(tmp_path / "hub.safetensors")
    from_disk = load_file(runs("quickstart").output / "model.safetensors")
    assert from_hub.keys() == from_disk.keys()
    assert all(from_hub[name].equal(from_disk[name]) for name in from_disk)


@pytest.mark.slow
def test_revisions_are_pinned_to_the_commits_of_their_branches(runs, family_on_hub):
    sources = runs("revisions").plan.lock.tasks
    commits = [source.commit for source in sources.values()]
    assert commits == [
        family_on_hub.head("me/digits-sequence", revision=f"task-{number}") for number in range(1, 6)
    ]


@pytest.mark.slow
def test_no_output_names_a_folder_of_this_machine(runs):
    for name in ("average", "labels"):
        for path in runs(name).output.iterdir():
            if path.suffix in (".json", ".md", ".yaml"):
                assert str(runs(name).output.parent) not in path.read_text()
    lock = json.loads((runs("average").output / "recipe.lock.json").read_text())
    assert lock["base_model"]["reference"] == "../quickstart/checkpoints/base"
