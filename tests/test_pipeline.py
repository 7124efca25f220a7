import hashlib
import json
from dataclasses import replace

import pytest

from hub_magmax.errors import LockError
from hub_magmax.fleet.rebuilding import rebuild
from hub_magmax.merging.execution import merge
from hub_magmax.pipeline import lock, plan
from hub_magmax.recipe.loading import load_recipe, updated
from hub_magmax.recipe.lockfile import read_lock
from tests.families import write_recipe
from tests.test_cli import call


def train_on(path):
    """Change a weight and nothing else: not the header, not the size."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_lock_on_request_holds_the_sha256_of_every_local_file(family):
    code, out, _ = call("lock", write_recipe(family), "--hash")
    assert code == 0 and "wrote" in out and "header" not in out
    locked = read_lock(family / "recipe.lock.json")
    for name, source in locked.sources.items():
        folder = family / ("base" if name == "base_model" else name)
        for file in source.files:
            assert file.sha256 == hashlib.sha256((folder / file.path).read_bytes()).hexdigest()


def test_lock_names_the_folders_that_it_pins_by_header_alone(family):
    code, out, _ = call("lock", write_recipe(family))
    assert code == 0 and "by header alone, not by values (--hash does that): ./base, ./a, ./b and ./c" in out


def test_weights_changed_under_an_unchanged_header_are_seen_by_a_lock_with_hashes(family):
    recipe = load_recipe(write_recipe(family))
    cheap, whole = lock(recipe), lock(recipe, hash_files=True)
    merge(plan(recipe, whole), family / "before")
    train_on(family / "b" / "model.safetensors")
    merge(plan(recipe, cheap), family / "cheap")
    with pytest.raises(LockError, match=r"^\./b: model\.safetensors changed since the lock was written"):
        merge(plan(recipe, whole), family / "after")
    assert not list(family.glob("after*"))
    with pytest.raises(LockError, match=r"^\./b: model\.safetensors changed"):
        rebuild(str(family / "before"), folder=family)


def test_finished_merge_is_not_hashed_again(family):
    recipe = load_recipe(write_recipe(family))
    made = plan(recipe, lock(recipe, hash_files=True))
    report = merge(made)
    train_on(family / "b" / "model.safetensors")
    assert merge(made) == report


def test_hashes_change_no_tensor(family):
    recipe = load_recipe(write_recipe(family))
    merge(plan(recipe, lock(recipe, hash_files=True)), family / "whole")
    merge(plan(recipe), family / "cheap")
    from tests.families import read_merged

    whole, cheap = read_merged(family / "whole"), read_merged(family / "cheap")
    assert all(whole[name].equal(cheap[name]) for name in cheap)


def test_local_data_counts_for_the_checksum_and_not_for_the_digest(family):
    (family / "rows.csv").write_text("label\n1\n")
    recipe = load_recipe(write_recipe(family, evaluation={"tasks": {"a": {"dataset": "./rows.csv"}}}))
    first = lock(recipe)
    (family / "rows.csv").write_text("label\n2\n")
    second = lock(recipe)
    assert first.digest == second.digest and first.checksum != second.checksum


def test_lock_from_before_local_data_was_locked_is_read(family):
    locked = lock(load_recipe(write_recipe(family)))
    assert "local_data" not in json.loads(locked.to_json())
    (family / "old.lock.json").write_text(locked.to_json())
    assert read_lock(family / "old.lock.json") == locked


@pytest.mark.parametrize("change", ["nothing", "the data", "the seed", "the method"])
def test_an_estimate_is_kept_while_seed_and_data_are_the_same(family, change):
    (family / "rows.csv").write_text("text,label\n" + "x,0\n" * 7 + "x,1\n" * 3)
    labels = {"target": {"dataset": "./rows.csv"}, "classes": {"a": [0], "b": [1]}}
    tasks = [{"name": name, "model": f"./{name}"} for name in "ab"]
    recipe = load_recipe(write_recipe(family, tasks=tasks, preference={"labels": labels}))
    made = lock(recipe)
    marked = {"a": 0.5, "b": 0.5}
    earlier = replace(made, preference=replace(made.preference, weights=marked))
    if change == "the data":
        (family / "rows.csv").write_text("text,label\n" + "x,0\n" * 1 + "x,1\n" * 9)
    changes = {"the seed": {"seed": 3}, "the method": {"method": {"name": "average"}}}
    found = lock(updated(recipe, changes.get(change, {})), earlier=earlier)
    kept = change in ("nothing", "the method")
    assert (dict(found.preference.weights) == marked) == kept


def test_computed_weights_do_not_depend_on_the_seed(family):
    recipe = load_recipe(write_recipe(family, preference={"weights": {"a": 1, "b": 0, "c": 0}}))
    made = lock(recipe)
    earlier = replace(made, preference=replace(made.preference, weights={"a": 0.5, "b": 0.5, "c": 0.0}))
    assert lock(updated(recipe, {"seed": 3}), earlier=earlier).preference == earlier.preference
