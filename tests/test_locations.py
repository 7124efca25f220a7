import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from hub_magmax.checkpoints.listing import split_part
from hub_magmax.checkpoints.locations import HubModel, LocalFolder, ModelPlace, locate, location_of
from hub_magmax.checkpoints.source_cache import SourceCache
from hub_magmax.checkpoints.storage.local import LocalSource
from hub_magmax.errors import RecipeError
from hub_magmax.merging.execution import merge
from hub_magmax.pipeline import plan, run
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.recipe.lockfile import LockedSource
from hub_magmax.recipe.model_names import parse_model_name
from tests.families import read_merged, recipe_values, write_family

ROOT = Path(__file__).parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("written", "repo_id", "revision"),
    [
        ("me/model", "me/model", None),
        ("gpt2", "gpt2", None),
        ("me/model@v1.0", "me/model", "v1.0"),
        (f"me/model@{COMMIT}", "me/model", COMMIT),
        ("me/model@refs/pr/3", "me/model", "refs/pr/3"),
        ("hf://me/model", "me/model", None),
        ("hf://me/model@dev", "me/model", "dev"),
        ("https://huggingface.co/me/model", "me/model", None),
        ("https://huggingface.co/me/model/tree/dev", "me/model", "dev"),
        ("https://huggingface.co/me/model/", "me/model", None),
    ],
)
def test_names_of_repositories(tmp_path, written, repo_id, revision):
    assert parse_model_name(written, tmp_path) == HubModel(repo_id, revision)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("hf://me/model/unet", HubModel("me/model", None, "unet")),
        ("hf://me/model@v1.0/a/b", HubModel("me/model", "v1.0", "a/b")),
        ("hf://me/model@refs/pr/3/unet", HubModel("me/model", "refs/pr/3", "unet")),
        ("hf://me/model@feature%2Fx/unet", HubModel("me/model", "feature/x", "unet")),
        ("hf://me/model/model.fp16.safetensors", HubModel("me/model", None, "model.fp16.safetensors")),
        ("https://huggingface.co/me/model/tree/dev/unet", HubModel("me/model", "dev", "unet")),
        ("https://huggingface.co/me/model/tree/refs%2Fpr%2F3", HubModel("me/model", "refs/pr/3")),
        (
            "https://huggingface.co/me/model/blob/main/model.fp16.safetensors",
            HubModel("me/model", "main", "model.fp16.safetensors"),
        ),
    ],
)
def test_parts_of_repositories(tmp_path, written, expected):
    assert parse_model_name(written, tmp_path) == expected


@pytest.mark.parametrize(
    ("part", "split", "variant"),
    [
        ("", ("", ""), None),
        ("unet", ("unet", ""), None),
        ("model.safetensors", ("", "model.safetensors"), None),
        ("a/b/model.fp16.safetensors", ("a/b", "model.fp16.safetensors"), "fp16"),
        ("model.safetensors.index.json", ("", "model.safetensors.index.json"), None),
        ("unet/model.safetensors.index.fp16.json", ("unet", "model.safetensors.index.fp16.json"), "fp16"),
    ],
)
def test_part_is_a_folder_or_a_file_of_weights_in_one(part, split, variant):
    assert split_part(part) == split
    assert ModelPlace("me/model", part=part).variant == variant


def test_path_may_end_in_a_file_of_weights(tmp_path):
    written = "./x/model.fp16.safetensors"
    assert parse_model_name(written, tmp_path) == LocalFolder(
        tmp_path / "x", written, "model.fp16.safetensors"
    )
    (tmp_path / "odd.safetensors").mkdir()
    assert parse_model_name("./odd.safetensors", tmp_path).part == ""


def test_an_existing_folder_wins_over_a_repository(tmp_path):
    (tmp_path / "me" / "model").mkdir(parents=True)
    assert parse_model_name("me/model", tmp_path) == LocalFolder(tmp_path / "me" / "model", "me/model")


@pytest.mark.parametrize("written", ["./x", "../x", "/x", "~/x", "."])
def test_what_starts_like_a_path_is_a_path(tmp_path, written):
    assert isinstance(parse_model_name(written, tmp_path), LocalFolder)


@pytest.mark.parametrize(
    "written",
    [
        "a/b/c",
        "me/mo del",
        "me/model@",
        "-x",
        "hf://datasets/me/x",
        "hf://me/x/../y",
        "hf://",
        "me/../x",
        "me//x",
        "https://me:secret@host/me/x",
    ],
)
def test_what_names_nothing_is_refused_or_read_as_the_default(tmp_path, written):
    if written == "me/model@":
        assert parse_model_name(written, tmp_path) == HubModel("me/model", None)
        return
    with pytest.raises(RecipeError):
        parse_model_name(written, tmp_path)


#: Locks, plans and merges the recipe of its argument by the public API.
MERGE = """
import sys, hub_magmax as hm
from pathlib import Path
from hub_magmax.recipe.lockfile import read_lock
folder = Path(sys.argv[1])
recipe = hm.load_recipe(folder / "recipe.yaml")
locked = hm.lock(recipe, hash_files=True)
(folder / "lock.json").write_text(locked.to_json())
assert read_lock(folder / "lock.json") == locked
hm.merge(hm.plan(recipe, locked))
"""


def announce(folder, line):
    """Make `folder`, once it is on the path, look as if a package with this entry point were installed."""
    info = folder / "archives-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: archives\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[hub_magmax.sources]\n{line}\n")


def archive(folder):
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w", zipfile.ZIP_STORED) as file:
        for path in sorted(folder.iterdir()):
            file.write(path, path.name)


def merge_in_a_process(folder):
    return subprocess.run(
        [sys.executable, "-c", MERGE, str(folder)],
        env=os.environ | {"PYTHONPATH": f"{folder}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_kind_of_source_from_another_package_is_merged_like_a_folder(tmp_path):
    write_family(tmp_path, "ab", num_shards=2)
    values = {"names": ("a", "b"), "method": "ties"}
    merge(plan(parse_recipe(recipe_values(**values, output={"path": "expected"}), folder=tmp_path)))
    for name in ("base", "a", "b"):
        archive(tmp_path / name)
        shutil.rmtree(tmp_path / name)
    announce(tmp_path, "zip = tests.zip_archives:ZipArchive")
    tasks = [{"name": name, "model": f"zip:{name}.zip"} for name in "ab"]
    recipe = recipe_values(base_model="zip:base.zip", tasks=tasks, method="ties")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = merge_in_a_process(tmp_path)
    assert done.returncode == 0, done.stderr
    found, expected = read_merged(tmp_path / "merged"), read_merged(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)
    assert (tmp_path / "merged" / "config.json").read_text() == '{"model_type": "test"}'
    source = json.loads((tmp_path / "lock.json").read_text())["tasks"]["a"]
    assert (source["kind"], source["repo_id"], source["commit"]) == ("zip", None, None)
    assert [len(file["sha256"]) for file in source["files"]] == [64, 64]
    assert "zip:a.zip/model-00001-of-00002.safetensors" in (tmp_path / "merged/provenance.json").read_text()


def test_name_of_a_kind_that_no_package_reads_is_refused_with_its_place(tmp_path):
    with pytest.raises(RecipeError, match=r"base_model: 'zip:base.zip' is neither"):
        parse_recipe(recipe_values(base_model="zip:base.zip"), folder=tmp_path)
    locked = LockedSource("zip:base.zip", "zip", None, None, ())
    with pytest.raises(RecipeError, match=r"there is no kind of source 'zip'.*local, hub"):
        location_of(locked, tmp_path)


def test_lock_and_recipe_give_the_same_location(tmp_path):
    for written in ("./base", "./base/model.half.safetensors"):
        location = locate(written, tmp_path)
        locked = LockedSource(written, location.name, *location.pin[:2], (), part=location.pin.part)
        assert location_of(locked, tmp_path) == location.pinned() == location
    location = HubModel("me/model", COMMIT, "unet")
    locked = LockedSource("hf://me/model@main/unet", "hub", "me/model", COMMIT, (), part="unet")
    assert location_of(locked, tmp_path) == location
    assert location.pin == ("me/model", COMMIT, "unet")


@pytest.mark.parametrize(
    ("location", "uri", "place"),
    [
        (LocalFolder(Path("/x/a"), "./a"), "./a", ModelPlace("/x/a")),
        (
            LocalFolder(Path("/x/a"), "./a/b.safetensors", "b.safetensors"),
            "./a",
            ModelPlace("/x/a", part="b.safetensors"),
        ),
        (HubModel("me/model", COMMIT), f"hf://me/model@{COMMIT}", ModelPlace("me/model", COMMIT)),
        (
            HubModel("me/model", COMMIT, "unet/model.fp16.safetensors"),
            f"hf://me/model@{COMMIT}/unet",
            ModelPlace("me/model", COMMIT, "unet/model.fp16.safetensors"),
        ),
    ],
)
def test_address_and_loading_place(location, uri, place):
    assert (location.uri, location.model_place) == (uri, place)


def test_headers_of_a_folder_are_read_once_and_again_after_a_change(tmp_path):
    write_family(tmp_path, "a")
    cache, location = SourceCache(), locate("./a", tmp_path)
    first = cache.open(location)
    index = first.index
    first.close()
    assert cache.open(location) is first
    os.utime(tmp_path / "a" / "model.safetensors", ns=(0, 0))
    assert cache.open(location) is not first
    assert cache.open(location).index == index


def test_headers_of_folders_are_read_once_in_a_run(tmp_path, monkeypatch):
    write_family(tmp_path, "ab", num_shards=2)
    read, seen = LocalSource.read_into, []

    def noted(self, path, start, buffer):
        if start == 0 and len(buffer) == 8:
            seen.append((self.folder.name, path))
        read(self, path, start, buffer)

    monkeypatch.setattr(LocalSource, "read_into", noted)
    run(parse_recipe(recipe_values(names=("a", "b"), method="average"), folder=tmp_path))
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    sources = [one for one in seen if one[0] != "merged"]  # the output is opened, too
    assert sorted(sources) == [(name, shard) for name in ("a", "b", "base") for shard in shards]
