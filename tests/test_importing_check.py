"""Published merges made again from their configurations: bits, roundings, draws, and what differs."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.families import make_tensors, write_checkpoint
from tests.test_cli import call
from tests.test_importing import models_of

SHAPES = {
    "embed.weight": (40, 8),
    "layers.0.weight": (48, 32),
    "layers.1.weight": (48, 32),
    "norm.bias": (8,),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    family = {"base": make_tensors(0, shapes=SHAPES)}
    for seed, task in enumerate("ab", 1):
        family[task] = make_tensors(seed, base=family["base"], shapes=SHAPES)
    for name, tensors in family.items():
        write_checkpoint(folder / name, tensors)
    return folder


@pytest.fixture
def here(models, tmp_path, monkeypatch):
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def publish(folder, text, change=lambda tensors: None, dtype=None):
    """Publish what a configuration gives as `theirs`, changed; return what the check of it says."""
    (folder / "mix.yml").write_text(text)
    assert call("import", "mix.yml", "--out", "made.yaml")[0] == 0
    assert call("merge", "made.yaml", "--output", "theirs", "--in-spite-of", "opposed:b")[0] == 0
    for path in (folder / "theirs").iterdir():
        if path.suffix not in (".safetensors",) and path.name != "config.json":
            path.unlink()
    (folder / "theirs/mergekit_config.yml").write_text(text)
    path = folder / "theirs/model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    code, out, err = call("import", "theirs", "--check", "--json")
    assert code in (0, 3), out + err
    return code, json.loads(out)["check"]


SUM = models_of("task_arithmetic", "./a 0.8", "./b 0.5", base="./base", rest="parameters: {lambda: 0.7}\n")


def test_the_same_merge_is_the_same_bits(here):
    code, found = publish(here, SUM)
    assert (code, found["verdict"]) == (0, "same bits")
    assert {one["name"] for one in found["tensors"]} == {*SHAPES, "position_ids"}
    assert not (here / "recipe.yaml").exists()


def test_roundings_are_the_last_bit(here):
    def nudge(tensors):
        for name in SHAPES:
            tensors[name] = torch.nextafter(tensors[name], torch.tensor(torch.inf))

    code, found = publish(here, SUM, nudge)
    assert (code, found["verdict"]) == (0, "last bit")
    (bias,) = [one for one in found["tensors"] if one["name"] == "norm.bias"]
    assert bias["num_different"] == 8 and 0 < bias["largest"] < 1e-6


def test_one_other_element_differs_and_is_named(here):
    def change(tensors):
        tensors["layers.1.weight"][3, 4] += 0.01

    code, found = publish(here, SUM, change)
    assert (code, found["verdict"]) == (3, "differs")
    (other,) = [one for one in found["tensors"] if one["verdict"] != "same bits"]
    assert other["name"] == "layers.1.weight" and other["num_different"] == 1
    assert other["largest"] == pytest.approx(0.01, rel=1e-4)
    code, out, _ = call("import", "theirs", "--check")
    assert code == 3 and "layers.1.weight  differs" in out and "1 of 1,536 elements, by 0.01 at most" in out


def test_tensors_that_are_missing_added_or_of_another_shape_differ(here):
    def change(tensors):
        tensors["extra"] = tensors.pop("norm.bias")
        tensors["embed.weight"] = tensors["embed.weight"][:30].clone()

    code, found = publish(here, SUM, change)
    problems = {one["name"]: one["problem"] for one in found["tensors"] if one["problem"]}
    assert code == 3 and problems == {
        "norm.bias": "not published",
        "embed.weight": "shape [30, 8] was published, and the merge gives [40, 8]",
        "extra": "published, and not made again",
    }


def test_another_scaling_within_roundings_is_seen_in_the_sum(here):
    # Each element of a bfloat16 merge may be rounded otherwise, by more than a tenth of these task vectors.
    text = SUM + "dtype: bfloat16\n"
    bases = load_file(here / "base/model.safetensors")
    for task in "ab":
        tensors = load_file(here / task / "model.safetensors")
        small = {name: bases[name] + 0.02 * (tensors[name] - bases[name]) for name in SHAPES}
        save_file(tensors | small, here / task / "model.safetensors", metadata={"format": "pt"})
    assert publish(here, text)[0] == 0
    shutil.rmtree(here / "theirs")

    def change(tensors):
        for name in SHAPES:
            way = sum(
                0.35 * weight * (load_file(here / task / "model.safetensors")[name] - bases[name])
                for task, weight in (("a", 0.8), ("b", 0.5))
            )
            tensors[name] = (bases[name] + way).to(torch.bfloat16)

    (here / "made.yaml").unlink()
    code, found = publish(here, text, change)
    assert code == 3 and "times as far from the base model" in found["remarks"][0]
    assert {one["verdict"] for one in found["tensors"]} <= {"same bits", "last bit"}
    assert 0.3 < found["share"] < 0.9


def test_draws_are_compared_by_what_moved(here):
    text = models_of("dare_linear", "./a 0.8", "./b 0.5", base="./base", rest="parameters: {density: 0.6}\n")
    tensors = {}
    assert publish(here, text, tensors.update)[1]["verdict"] == "same bits"
    shutil.rmtree(here / "theirs")
    (here / "made.yaml").unlink()
    values = text.replace("0.6", "0.5")
    (here / "mix.yml").write_text(text)
    assert call("import", "mix.yml", "--out", "made.yaml")[0] == 0
    assert call("merge", "made.yaml", "--output", "theirs", "--set", "seed=3")[0] == 0
    (here / "theirs/mergekit_config.yml").write_text(text)
    code, out, _ = call("import", "theirs", "--check", "--json")
    assert code == 0 and json.loads(out)["check"]["verdict"] == "same statistics"
    (here / "theirs/mergekit_config.yml").write_text(values)
    code, out, _ = call("import", "theirs", "--check")
    assert code == 3 and "of the elements moved" in out


def test_equal_numbers_of_16_bits_are_compared_by_what_moved(here):
    """Some elements whose magnitude equals the smallest kept one fall to the other side."""
    text = models_of("ties", "./a 0.8", "./b 0.5", base="./base", rest="parameters: {density: 0.5}\n")
    text += "dtype: bfloat16\n"
    bases = load_file(here / "base/model.safetensors")

    def swap(tensors):
        for name in ("layers.0.weight", "layers.1.weight"):
            moved = (tensors[name] != bases[name].bfloat16()).nonzero()[:8]
            tensors[name][moved[:, 0], moved[:, 1]] = bases[name].bfloat16()[moved[:, 0], moved[:, 1]]

    code, found = publish(here, text, swap)
    assert (code, found["verdict"]) == (0, "same statistics")
    (here / "theirs/mergekit_config.yml").write_text(text.replace("density", "lambda: 0.8, density"))
    code, out, _ = call("import", "theirs", "--check")
    assert code == 3 and "of the elements moved" in out


def test_weights_beside_the_file_and_recipe_can_be_named(here):
    publish(here, SUM)
    code, out, _ = call("import", "mix.yml", "--check", "--against", "theirs", "--out", "again.yaml")
    assert code == 0 and "theirs: same bits" in out and (here / "again.yaml").is_file()
