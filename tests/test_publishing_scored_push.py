"""Scored or signed, and published without a folder: `keep: false` with `evaluation`, and `--private-key`."""

import itertools
from types import SimpleNamespace

import pytest

from hub_magmax.errors import RegressedError
from hub_magmax.evaluation.scores import MERGED
from hub_magmax.fleet.canaries import canary
from hub_magmax.fleet.signing import check_signature
from hub_magmax.fleet.verifying import verify
from hub_magmax.pipeline import destination_of, run
from hub_magmax.publishing import scored_push
from hub_magmax.publishing.pushing import push
from hub_magmax.recipe.loading import load_recipe, updated
from tests.families import write_recipe
from tests.test_cli import call
from tests.test_evaluation_scoring import image_recipe, images  # noqa: F401  (a fixture)
from tests.test_fleet_signing import put_stand_in

_numbers = itertools.count()


@pytest.fixture
def repo():
    return f"me/scored{next(_numbers)}"


@pytest.fixture
def recipe(images, repo, tmp_path):  # noqa: F811
    return updated(
        image_recipe(images),
        {"output": {"path": str(tmp_path / "merged"), "push_to_hub": repo, "keep": False}},
    )


def test_model_is_scored_published_and_its_folder_removed(recipe, repo, hub, images):  # noqa: F811
    done = run(recipe)
    assert not recipe.output_path.exists()
    assert done.scores.get(MERGED, "a").value == 0.4
    assert {"scores.json", "outcomes.json", "README.md", "model.safetensors"} <= {*hub.files(repo)}
    assert verify(repo)
    assert len(hub.commits(repo)) == 2, "the empty one of a new repository, and this"
    assert canary(repo, folder=images).regressed == ()


def test_second_run_finds_it_with_its_scores_and_does_nothing(recipe, repo, hub):
    first = run(recipe)
    hub.reset_log()
    again = run(recipe)
    assert (again.merged_before, again.published.commit) == (True, first.published.commit)
    assert again.scores == first.scores
    assert not recipe.output_path.exists()
    assert hub.counts["POST commit"] == 0 and hub.counts["GET storage"] == 0
    other = updated(recipe, {"evaluation": recipe.to_dict()["evaluation"] | {"quantized": ["int8"]}})
    assert run(other).published.commit != first.published.commit, "another evaluation is carried out"


def test_model_that_regressed_stays_in_its_folder(recipe, repo, hub, monkeypatch):
    fallen = SimpleNamespace(name="general", difference=SimpleNamespace(mean=-0.5))
    monkeypatch.setattr("hub_magmax.evaluation.guards.regressed", lambda guards: [fallen])
    with pytest.raises(RegressedError, match=r"falls behind the base model on general by 0\.5"):
        run(recipe)
    assert (recipe.output_path / "scores.json").is_file()
    assert "scores.json" not in hub.files(repo)


def test_scores_and_signature_of_an_earlier_model_do_not_stay_beside_the_next(recipe, repo, hub, family):
    run(recipe)
    hub.add_repo(repo, files={"model.sig": b"of the first one", "notes.txt": b"mine"})
    run(load_recipe(write_recipe(family, output={"path": "next"})))
    push(family / "next", repo)
    assert not {"scores.json", "outcomes.json", "model.sig"} & {*hub.files(repo)}
    assert "notes.txt" in hub.files(repo)


@pytest.fixture
def key(tmp_path, monkeypatch):
    """A key, and a stand-in for model-signing."""
    put_stand_in(monkeypatch)
    (tmp_path / "key.pem").write_text("mine")
    return tmp_path / "key.pem"


@pytest.mark.parametrize("keep", [True, False])
def test_model_is_signed_in_the_commit_that_publishes_it(family, repo, hub, key, keep, tmp_path):
    output = {"path": "signed", "push_to_hub": repo, "keep": keep}
    recipe = write_recipe(family, output=output)
    assert call("run", recipe, "--private-key", key)[0] == 0
    assert (family / "signed").exists() == keep
    assert len(hub.commits(repo)) == 2
    for name in hub.files(repo):
        (tmp_path / "there" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "there" / name).write_bytes(hub.read(repo, name))
    (tmp_path / "there" / ".gitattributes").unlink(missing_ok=True)
    check_signature(tmp_path / "there", key)
    head = hub.head(repo)
    assert call("run", recipe, "--private-key", key)[0] == 0
    assert hub.head(repo) == head, "nothing new is published"


def test_unsigned_model_on_the_hub_is_made_again_and_signed(family, repo, hub, key):
    recipe = write_recipe(family, output={"path": "signed", "push_to_hub": repo, "keep": False})
    assert call("run", recipe)[0] == 0 and "model.sig" not in hub.files(repo)
    assert call("run", recipe, "--private-key", key)[0] == 0 and "model.sig" in hub.files(repo)


def test_key_that_cannot_sign_is_known_before_anything_is_merged(family, repo, hub, key):
    recipe = write_recipe(family, output={"path": "signed", "push_to_hub": repo})
    code, _, said = call("run", recipe, "--private-key", key.with_name("none.pem"))
    assert code == 1 and "the key cannot be used" in said and "openssl ecparam" in said
    assert not (family / "signed").exists()


def test_push_signs_the_folder_first(family, repo, hub, key):
    run(load_recipe(write_recipe(family, output={"path": "signed"})))
    assert call("push", family / "signed", repo, "--private-key", key)[0] == 0
    assert "model.sig" in hub.files(repo)


def test_scores_need_a_folder_for_a_while(recipe):
    destination = destination_of(recipe)
    assert not scored_push.is_streamed(recipe, destination)
    straight = updated(recipe, {"evaluation": None})
    assert scored_push.is_streamed(straight, destination_of(straight))
