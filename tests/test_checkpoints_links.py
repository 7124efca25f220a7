"""Checkpoints whose files are links into a store of contents, as DVC's cache."""

import hashlib
import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from tests.families import write_recipe
from tests.test_cli import call


def into_store(folder: Path, store: Path) -> None:
    """Replace the files of a folder by links to the store `ab/cdef...`."""
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
        target = store / digest[:2] / digest[2:]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        path.unlink()
        path.symlink_to(target)


@pytest.fixture
def stored(family):
    for name in ("base", "a", "b", "c"):
        into_store(family / name, family / "cache" / "files" / "md5")
    return family


def test_the_refusal_names_the_key_and_the_folder_to_write(stored):
    code, _, err = call("merge", write_recipe(stored, method="average"))
    assert code == 1
    assert "'config.json' and 'model.safetensors' are links that lead out of the folder" in err
    assert f"add to the recipe: trusted_links: ['{stored / 'cache' / 'files' / 'md5'}']" in err


@pytest.mark.parametrize("root", ["cache/files/md5", "./cache", "{folder}/cache"])
def test_links_below_a_trusted_folder_are_read_and_the_folder_is_not_published(stored, root):
    trusted = [root.format(folder=stored)]
    recipe = write_recipe(stored, method="average", trusted_links=trusted)
    assert call("lock", recipe)[0] == 0
    code, _, err = call("merge", recipe)
    assert code == 0, err
    assert set(load_file(stored / "merged" / "model.safetensors")) >= {"embed.weight"}
    assert "trusted_links" not in yaml.safe_load((stored / "merged" / "recipe.yaml").read_text())


def test_links_elsewhere_stay_refused(stored):
    (stored / "other").mkdir()
    recipe = write_recipe(stored, trusted_links=["other"])
    assert "lead out of the folder" in call("plan", recipe)[2]


def test_a_changed_file_of_the_store_is_not_what_was_locked(stored):
    recipe = write_recipe(stored, trusted_links=["cache"])
    call("lock", recipe)
    link = stored / "a" / "config.json"
    link.resolve().write_text(json.dumps({"model_type": "other"}))
    recipe = write_recipe(stored, trusted_links=["cache"], output={"files_from": "a", "path": "merged"})
    assert "config.json changed since the lock was written" in call("merge", recipe)[2]


def test_a_merge_from_links_is_rebuilt_and_compared(stored):
    recipe = write_recipe(stored, method="average", trusted_links=["cache"])
    assert call("merge", recipe)[0] == 0
    words = ("verify", stored / "merged", "--rebuild", "--from", stored)
    assert call(*words)[0] == 0
    link = stored / "a" / "model.safetensors"
    content = bytearray(link.resolve().read_bytes())
    content[-1] ^= 1
    link.resolve().write_bytes(content)
    code, _, err = call(*words)
    assert code == 1 and "is not what the recipe and lock give" in err
