import itertools
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hub_magmax.errors import LockError, OutputError
from hub_magmax.files import sha256_of
from hub_magmax.fleet.checks import noted
from hub_magmax.fleet.rebuilding import rebuild
from hub_magmax.fleet.verifying import verify
from hub_magmax.merging.execution import merge
from hub_magmax.merging.output.report import read_report
from hub_magmax.pipeline import lock, plan
from hub_magmax.publishing.pushing import push
from hub_magmax.recipe.loading import load_recipe
from tests.families import make_tensors, recipe_values, write_checkpoint, write_family, write_recipe
from tests.test_cli import call

_numbers = itertools.count()


@pytest.fixture
def merged(family):
    recipe = load_recipe(
        write_recipe(family, output={"shard_size": "600B"}, preference={"geometric": {"ratio": 2}})
    )
    return merge(plan(recipe))


def test_model_is_rebuilt_to_the_bit(family, merged):
    assert rebuild(str(family / "merged"), folder=family).shards == merged.shards


def test_first_tensor_that_differs_is_named(family, merged):
    path = next(p for p in (family / "merged").glob("*.safetensors") if "layer.1.weight" in load_file(p))
    tensors = load_file(path)
    tensors["layer.1.weight"][2, 3] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(OutputError) as caught:
        rebuild(str(family / "merged"), folder=family)
    assert "tensor 'layer.1.weight': element 35 is not what" in str(caught.value)


def test_tensor_that_was_added_is_named(family, merged):
    path = min((family / "merged").glob("*.safetensors"))
    save_file(load_file(path) | {"extra": torch.ones(2)}, path, metadata={"format": "pt"})
    index = json.loads((family / "merged" / "model.safetensors.index.json").read_text())
    index["weight_map"]["extra"] = path.name
    (family / "merged" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(OutputError, match="'extra'"):
        rebuild(str(family / "merged"), folder=family)


def test_of_several_added_tensors_the_first_in_the_order_of_the_file_is_named(family, merged):
    path = min((family / "merged").glob("*.safetensors"))
    added = {f"extra.{number}": torch.ones(2) for number in range(10)}
    save_file(load_file(path) | added, path, metadata={"format": "pt"})
    index = json.loads((family / "merged" / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(added, path.name)
    (family / "merged" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(OutputError, match=r"'extra\.0' is in"):
        rebuild(str(family / "merged"), folder=family)


def tell_in_report(folder, name):
    """Have the merge report agree with a file that was changed after the merge, as an attacker would."""
    report = read_report(folder / "merge_report.json")
    shards = tuple(
        replace(s, sha256=sha256_of(folder / name), size_bytes=(folder / name).stat().st_size)
        if s.file == name
        else s
        for s in report.shards
    )
    files = report.files | ({name: sha256_of(folder / name)} if name in report.files else {})
    (folder / "merge_report.json").write_text(replace(report, shards=shards, files=files).to_json())
    assert verify(str(folder))


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors.index.json", "provenance.json", "model-00001-of-00004.safetensors"],
)
def test_file_that_was_changed_together_with_the_report_is_named(family, merged, name):
    folder = family / "merged"
    if name.endswith(".safetensors"):
        save_file(load_file(folder / name), folder / name, metadata={"format": "pt"})
    else:
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(values | {"changed": {}}))
    tell_in_report(folder, name)
    with pytest.raises(OutputError, match="the file is not what the recipe and lock give") as caught:
        rebuild(str(folder), folder=family)
    assert caught.value.where == f"{folder}, {name}"


def test_versions_in_the_provenance_may_differ(family, merged):
    path = family / "merged" / "provenance.json"
    values = json.loads(path.read_text())
    values["predicate"]["runDetails"]["builder"]["version"]["torch"] = "1.0"
    path.write_text(json.dumps(values))
    assert rebuild(str(family / "merged"), folder=family).shards == merged.shards


def test_source_that_changed_is_named(family, merged):
    write_checkpoint(family / "b", make_tensors(5, shapes={"other": (2,)}))
    with pytest.raises(LockError, match=r"\./b"):
        rebuild(str(family / "merged"), folder=family)


def verify_again(family):
    """Return the exit codes of `verify --rebuild` and `fleet`, what the first said, and what was noted."""
    code, _, said = call("verify", family / "merged", "--rebuild", "--from", family)
    return code, call("fleet", family / "merged")[0], said, [check.result for check in noted()]


def test_rebuild_from_a_folder_with_other_values_is_noted_as_failed_and_names_the_folders(family, merged):
    assert verify_again(family)[:2] == (0, 0)
    write_checkpoint(family / "b", make_tensors(5))
    code, fleet, said, results = verify_again(family)
    assert (code, fleet, results) == (1, 3, ["passed", "failed"])
    assert "the lock pins ./base, ./a, ./b and ./c by headers alone" in said and "lock --hash" in said


@pytest.mark.parametrize("change", [{"other": (2,)}, None])
def test_rebuild_that_is_refused_is_not_noted_as_passed(change, family, merged):
    if change is None:
        shutil.rmtree(family / "b")
    else:
        write_checkpoint(family / "b", make_tensors(5, shapes=change))
    code, fleet, _, results = verify_again(family)
    # A folder that is not there says nothing of the model.
    assert (code, fleet, results) == ((1, 0, []) if change is None else (1, 3, ["failed"]))


def test_sources_whose_every_byte_is_pinned_are_not_named(family):
    recipe = load_recipe(write_recipe(family))
    merge(plan(recipe, lock(recipe, hash_files=True)))
    name = min((family / "merged").glob("*.safetensors"))
    save_file({key: value + 1 for key, value in load_file(name).items()}, name, metadata={"format": "pt"})
    with pytest.raises(OutputError) as caught:
        rebuild(str(family / "merged"), folder=family)
    assert "headers" not in caught.value.hint


def test_folder_that_no_merge_made_cannot_be_rebuilt(family):
    with pytest.raises(LockError, match="what the model was made from is not known"):
        rebuild(str(family / "base"), folder=family)


def test_published_model_is_rebuilt_from_the_hub_after_its_sources_moved(hub, tmp_path):
    write_family(tmp_path, "ab")
    prefix = f"me/rebuild{next(_numbers)}"
    for name in ("base", "a", "b"):
        hub.add_repo(f"{prefix}-{name}", folder=tmp_path / name)
    tasks = [{"name": name, "model": f"{prefix}-{name}"} for name in "ab"]
    from hub_magmax.recipe.loading import parse_recipe

    recipe = parse_recipe(recipe_values(base_model=f"{prefix}-base", tasks=tasks), folder=tmp_path)
    merge(plan(recipe))
    push(tmp_path / "merged", f"{prefix}-merged")
    hub.add_repo(f"{prefix}-a", folder=write_checkpoint(tmp_path / "moved", make_tensors(8)))
    rebuild(f"{prefix}-merged")
