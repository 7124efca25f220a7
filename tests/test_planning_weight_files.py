"""Names of the output's weight files, and metadata in their headers."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hub_magmax.checkpoints.index import CheckpointIndex, ShardInfo
from hub_magmax.fleet.rebuilding import rebuild
from hub_magmax.fleet.verifying import verify
from hub_magmax.pipeline import plan, run
from hub_magmax.planning.summary import notices
from hub_magmax.planning.weight_files import file_stem, kept_metadata, lost_metadata
from hub_magmax.recipe.loading import load_recipe
from hub_magmax.recipe.lockfile import LockedSource
from tests.families import read_merged, write_recipe


def stem(*files, model_type=None):
    index = CheckpointIndex("x", tuple(ShardInfo(file, 1, "") for file in files), {})
    return file_stem(index, LockedSource("x", "local", None, None, (), model_type=model_type))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["model.safetensors"], "model"),
        (["model.fp16.safetensors"], "model"),
        (["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"], "model"),
        (["diffusion_pytorch_model.safetensors"], "diffusion_pytorch_model"),
        (["diffusion_pytorch_model.non_ema.safetensors"], "diffusion_pytorch_model"),
        (["diffusion_pytorch_model-00001-of-00002.fp16.safetensors"] * 2, "diffusion_pytorch_model"),
        (["open_clip_model.safetensors"], "open_clip_model"),
        (["consolidated.00.safetensors"], "consolidated"),
        (["v1-5-pruned-emaonly.safetensors"], "v1-5-pruned-emaonly"),
        (["v1-5-pruned.fp16.safetensors"], "v1-5-pruned"),
        (["sd_xl_base_1.0.safetensors"], "sd_xl_base_1.0"),
        (["layers-0.safetensors", "layers-1.safetensors"], "model"),
        (["con.safetensors"], "model"),
    ],
)
def test_output_has_the_name_of_its_source_without_numbers_and_variant(files, expected):
    assert stem(*files) == expected


@pytest.mark.parametrize("file", ["weights.safetensors", "best-step-500.safetensors"])
def test_model_of_transformers_gets_the_name_that_transformers_looks_for(file):
    assert stem(file, model_type="llama") == "model"
    assert stem("consolidated.safetensors", model_type="llama") == "consolidated"


def diffusers(family, *, num_shards=1):
    """Turn the family into components of a diffusers pipeline, as its `save_pretrained` writes them."""
    for name in ("base", "a", "b", "c"):
        tensors = load_file(family / name / "model.safetensors")
        (family / name / "model.safetensors").unlink()
        (family / name / "config.json").write_text('{"_class_name": "UNet2DModel"}')
        names = sorted(tensors)
        files = [
            f"diffusion_pytorch_model-{n + 1:05d}-of-{num_shards:05d}.safetensors" for n in range(num_shards)
        ]
        files = files if num_shards > 1 else ["diffusion_pytorch_model.safetensors"]
        for number, file in enumerate(files):
            save_file({key: tensors[key] for key in names[number::num_shards]}, family / name / file)
        if num_shards > 1:
            weight_map = {key: files[number % num_shards] for number, key in enumerate(names)}
            index = {"metadata": {}, "weight_map": weight_map}
            (family / name / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("num_shards", [1, 2])
def test_component_of_diffusers_has_the_files_that_diffusers_looks_for(family, num_shards):
    diffusers(family, num_shards=num_shards)
    run(load_recipe(write_recipe(family, output={"path": "one"})))
    run(load_recipe(write_recipe(family, output={"path": "several", "shard_size": "1KB"})))
    assert (family / "one" / "diffusion_pytorch_model.safetensors").is_file()
    index = json.loads((family / "several" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (family / "several").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert files[0].startswith("diffusion_pytorch_model-00001-of-")
    one, several = read_merged(family / "one"), read_merged(family / "several")
    assert all(torch.equal(one[name], several[name]) for name in one)
    verify(str(family / "several"))
    rebuild(str(family / "several"), folder=family)


def test_file_of_a_pipeline_keeps_its_name_and_the_parts_stay_behind(family):
    for name in ("base", "a", "b", "c"):
        (family / name / "model.safetensors").rename(family / name / "v1-5.safetensors")
        (family / name / "config.json").unlink()
    base = family / "base"
    (base / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (base / "unet").mkdir()
    (base / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    recipe = load_recipe(write_recipe(family, base_model="./base/v1-5.safetensors"))
    run(recipe)
    assert (family / "merged" / "v1-5.safetensors").is_file()
    assert not (family / "merged" / "model_index.json").exists(), "it names parts that are not merged"
    assert notices(plan(recipe)) == (
        "left behind from base_model: parts of a diffusers pipeline (model_index.json, unet/)",
    )


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def mark(family, name, values):
    path = family / name / "model.safetensors"
    save_file(load_file(path), path, metadata=values)


MARKS = {
    "config": '{"layers": 2}',
    "modelspec.prediction_type": "v",
    "modelspec.hash_sha256": "0xabc",
    "sshs_model_hash": "abc",
    "ss_sd_model_hash": "abc",
    "hub_magmax": "an earlier merge",
}


def test_header_keeps_what_its_source_says_and_names_what_is_no_longer_true(family):
    mark(family, "base", {"format": "pt"} | MARKS)
    recipe = load_recipe(write_recipe(family))
    report = run(recipe).report
    found = metadata(family / "merged" / "model.safetensors")
    assert list(found) and found["format"] == "pt"
    assert {*found} == {"format", "config", "modelspec.prediction_type", "ss_sd_model_hash", "hub_magmax"}
    assert found["config"] == MARKS["config"]
    assert json.loads(found["hub_magmax"])["method"]["name"]
    told = (
        "left out of the header, since they describe the file of base_model: 'modelspec.hash_sha256', "
        "'sshs_model_hash'"
    )
    assert report.notices == (told,)
    rebuild(str(family / "merged"), folder=family)


def test_header_is_that_of_the_source_whose_files_are_copied(family):
    mark(family, "base", {"config": "base"})
    mark(family, "a", {"config": "a"})
    run(load_recipe(write_recipe(family, output={"path": "out", "files_from": "a"})))
    assert metadata(family / "out" / "model.safetensors")["config"] == "a"


def test_plan_follows_metadata_and_is_as_before_without(family):
    before = plan(load_recipe(write_recipe(family)))
    assert before.metadata == {}
    mark(family, "base", {"format": "pt", "config": "x"})
    assert plan(load_recipe(write_recipe(family))).digest != before.digest


def test_headers_of_several_files_are_united_and_the_first_counts():
    shards = (
        ShardInfo("a", 1, "", {"one": "1", "both": "a", "format": "mlx", "bad": "\ud800"}),
        ShardInfo("b", 1, "", {"two": "2", "both": "b", "format": "pt", "sha256": "x"}),
    )
    index = CheckpointIndex("x", shards, {})
    assert kept_metadata(index) == {"format": "mlx", "both": "a", "one": "1", "two": "2"}
    assert lost_metadata(index) == ("bad", "sha256")


@pytest.mark.parametrize("layout", ["np", "\ud800", ""])
def test_layout_that_loaders_do_not_know_is_torchs(layout):
    assert kept_metadata(CheckpointIndex("x", (ShardInfo("a", 1, "", {"format": layout}),), {})) == {}


def test_part_of_a_pipeline_on_the_hub_comes_out_as_diffusers_reads_it(family, hub):
    """Of a repository with variants and other parts, one folder and one file in it."""
    diffusers(family)
    weights = (family / "base" / "diffusion_pytorch_model.safetensors").read_bytes()
    files = {
        "model_index.json": b'{"unet": ["diffusers", "UNet2DModel"]}',
        "unet/config.json": b'{"_class_name": "UNet2DModel"}',
        "unet/diffusion_pytorch_model.safetensors": weights,
        "unet/diffusion_pytorch_model.fp16.safetensors": weights,
        "vae/config.json": b"{}",
    }
    hub.add_repo("me/pipeline", files=files)
    base = "hf://me/pipeline/unet/diffusion_pytorch_model.fp16.safetensors"
    recipe = load_recipe(write_recipe(family, base_model=base))
    run(recipe)
    names = {path.name for path in (family / "merged").iterdir()}
    assert {"config.json", "diffusion_pytorch_model.safetensors"} <= names
    assert not names & {"model_index.json", "vae", "diffusion_pytorch_model.fp16.safetensors"}
    assert notices(plan(recipe)) == (
        "left behind from base_model: weights that are not merged (diffusion_pytorch_model.safetensors)",
    )
