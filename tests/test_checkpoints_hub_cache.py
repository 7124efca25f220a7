"""Repositories in the Hub's local cache, read offline: their commits, and links to shared blobs."""

import shutil

import pytest
from huggingface_hub import constants

from hub_magmax.errors import HubMagmaxError, SourceError
from hub_magmax.merging.execution import merge
from hub_magmax.pipeline import plan
from hub_magmax.recipe.loading import parse_recipe
from tests.families import read_merged, recipe_values, write_checkpoint, write_family

COMMIT, OTHER = "0123456789" * 4, "89abcdef01" * 4


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Return the folder of a family whose task `a` is also the one commit of `me/tiny` in a cache."""
    family = write_family(tmp_path, ["a"])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    write_checkpoint(snapshot(tmp_path), family["a"])
    return tmp_path


def snapshot(folder, commit=COMMIT):
    return folder / "cache" / "models--me--tiny" / "snapshots" / commit


def planned(folder, model):
    tasks = [{"name": "a", "model": model}]
    return plan(parse_recipe(recipe_values(tasks=tasks, method="average"), folder=folder))


def refusal(folder, model="me/tiny"):
    with pytest.raises(HubMagmaxError) as caught:
        planned(folder, model)
    return str(caught.value)


def test_commit_without_a_branch_is_named_and_can_be_taken(cached):
    assert f"me/tiny@{COMMIT}" in refusal(cached)
    merge(planned(cached, f"me/tiny@{COMMIT}"), cached / "out")
    merge(planned(cached, "./a"), cached / "again")
    found, expected = read_merged(cached / "out"), read_merged(cached / "again")
    assert all(found[name].equal(expected[name]) for name in expected)


def test_beginning_of_a_commit_is_enough_offline(cached):
    made = planned(cached, f"me/tiny@{COMMIT[:7]}")
    assert made.lock.tasks["a"].commit == COMMIT


@pytest.mark.parametrize("revision", [COMMIT[:3], "v1.0", "main"])
def test_other_names_are_no_commits_of_the_cache(cached, revision):
    assert f"does not know {revision}; of this repository it has the commit {COMMIT}" in refusal(
        cached, f"me/tiny@{revision}"
    )


def test_commit_that_is_not_in_the_cache_is_answered_with_those_that_are(cached):
    assert f"it has the commit {COMMIT}" in refusal(cached, f"me/tiny@{OTHER}")


def test_several_commits_are_all_named(cached):
    shutil.copytree(snapshot(cached), snapshot(cached, OTHER))
    error = refusal(cached)
    assert COMMIT[:7] in error
    assert OTHER[:7] in error
    assert planned(cached, f"me/tiny@{OTHER[:7]}").lock.tasks["a"].commit == OTHER


def test_snapshot_without_weights_says_how_to_get_them(cached):
    (snapshot(cached) / "model.safetensors").unlink()
    assert f"hf download me/tiny --revision {COMMIT}" in refusal(cached, f"me/tiny@{COMMIT}")


def test_ways_out_are_names_that_a_recipe_can_have(cached):
    weights = snapshot(cached) / "model.safetensors"
    (snapshot(cached) / "model-00001-of-00002.safetensors").write_bytes(weights.read_bytes())
    way = f"hf://me/tiny@{COMMIT}/model.safetensors"
    assert way in refusal(cached, f"me/tiny@{COMMIT}")
    assert planned(cached, way).jobs


def shared(folder, *, marked):
    """Move the weights of the snapshot to the blobs that all repositories share, as Xet's downloads."""
    store = folder / "cache" / "blobs" / "ab"
    store.mkdir(parents=True)
    if marked:
        (store.parent / ".huggingface-shared-blobs").write_text("1\n")
    blobs = snapshot(folder).parents[1] / "blobs"
    blobs.mkdir()
    weights = snapshot(folder) / "model.safetensors"
    weights.rename(store / f"ab{'0' * 62}")
    (blobs / "etag").symlink_to(f"../../blobs/ab/ab{'0' * 62}")
    weights.symlink_to("../../blobs/etag")


def test_blobs_that_repositories_of_the_cache_share_are_read(cached):
    shared(cached, marked=True)
    merge(planned(cached, f"me/tiny@{COMMIT}"), cached / "out")
    assert read_merged(cached / "out")


def test_links_to_other_folders_called_blobs_are_refused(cached):
    shared(cached, marked=False)
    with pytest.raises(SourceError, match="is a link that leads out of the folder"):
        planned(cached, f"me/tiny@{COMMIT}")


def test_links_out_of_the_cache_are_refused_all_the_same(cached):
    shared(cached, marked=True)
    (cached / "secret").write_text("token")
    (snapshot(cached) / "notes.txt").symlink_to(cached / "secret")
    with pytest.raises(SourceError, match=r"'notes\.txt' is a link that leads out of the folder"):
        planned(cached, f"me/tiny@{COMMIT}")
