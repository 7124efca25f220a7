import json
from dataclasses import replace

import pytest

from hub_magmax.merging.execution import merge
from hub_magmax.merging.output.provenance import PROVENANCE_NAME, provenance
from hub_magmax.merging.output.report import MergeReport, ShardRecord
from hub_magmax.pipeline import lock, plan
from hub_magmax.recipe.loading import load_recipe, parse_recipe
from tests.families import recipe_values, write_recipe

REPORT = MergeReport(
    plan_digest="sha256:plan",
    shards=(ShardRecord("model.safetensors", 8, "5" * 64),),
    shares={},
    num_unaligned={},
    duality_gap=None,
    elements_merged=2,
    bytes_in=8,
    bytes_out=8,
    seconds=1.5,
    peak_memory_bytes=7,
    versions={"torch": "2"},
)


def stated(recipe, **options):
    return json.loads(provenance(recipe, lock(recipe, **options), REPORT))


def test_statement_has_the_shape_that_in_toto_and_slsa_ask_for(family):
    found = stated(load_recipe(write_recipe(family)))
    assert found.keys() == {"_type", "subject", "predicateType", "predicate"}
    assert found["_type"] == "https://in-toto.io/Statement/v1"
    assert found["predicateType"] == "https://slsa.dev/provenance/v1"
    assert found["subject"] == [{"name": "model.safetensors", "digest": {"sha256": "5" * 64}}]
    definition, details = found["predicate"]["buildDefinition"], found["predicate"]["runDetails"]
    assert {"buildType", "externalParameters", "resolvedDependencies"} <= definition.keys()
    assert details["builder"]["id"].startswith("urn:")
    assert details["builder"]["version"] == {"torch": "2"}
    for described in definition["resolvedDependencies"]:
        assert described.keys() & {"uri", "digest", "content"}, "each names a place, a hash or a content"
        assert all(int(value, 16) >= 0 for value in described.get("digest", {}).values()), "hexadecimal"


def test_hub_sources_are_named_by_commit_and_hash(hub, family):
    hub.add_repo("me/provenance-base", folder=family / "base")
    recipe = parse_recipe(recipe_values(base_model="me/provenance-base"), folder=family)
    dependencies = stated(recipe)["predicate"]["buildDefinition"]["resolvedDependencies"]
    head = hub.head("me/provenance-base")
    place = f"hf://me/provenance-base@{head}"
    whole, weights, config = [d for d in dependencies if d["name"].startswith("base_model")]
    assert whole == {"name": "base_model", "uri": place, "digest": {"gitCommit": head}}
    assert (weights["uri"], set(weights["digest"])) == (f"{place}/model.safetensors", {"sha256"})
    assert (config["uri"], set(config["digest"])) == (f"{place}/config.json", {"gitBlob"})


def test_data_sets_on_the_hub_are_named_by_commit(family):
    recipe = load_recipe(write_recipe(family))
    locked = replace(lock(recipe), datasets={"me/photos@main": "7" * 40})
    found = json.loads(provenance(recipe, locked, REPORT))
    assert found["predicate"]["buildDefinition"]["resolvedDependencies"][-1] == {
        "name": "me/photos@main",
        "uri": f"hf://datasets/me/photos@{'7' * 40}",
        "digest": {"gitCommit": "7" * 40},
    }


def test_local_data_is_named_by_the_digest_of_its_files(family):
    recipe = load_recipe(write_recipe(family))
    locked = replace(lock(recipe), local_data={"./rows.csv": "sha256:" + "1" * 64, "./rows": "tree:2"})
    found = json.loads(provenance(recipe, locked, REPORT))
    assert found["predicate"]["buildDefinition"]["resolvedDependencies"][-2:] == [
        {"name": "./rows.csv", "uri": "./rows.csv", "digest": {"sha256": "1" * 64}},
        {"name": "./rows", "uri": "./rows", "digest": {"sha256Tree": "2"}},
    ]


@pytest.mark.parametrize("hash_files", [False, True])
def test_local_sources_are_named_by_path_and_by_hash_where_it_is_locked(family, hash_files):
    found = stated(load_recipe(write_recipe(family)), hash_files=hash_files)
    dependencies = {d["name"]: d for d in found["predicate"]["buildDefinition"]["resolvedDependencies"]}
    assert dependencies["a"] == {"name": "a", "uri": "./a"}
    assert ("digest" in dependencies["a/model.safetensors"]) is hash_files
    assert "a/config.json" not in dependencies, "it is not copied"
    assert set(dependencies["base_model/config.json"]["digest"]) == {"sha256", "gitBlob"}


def test_statement_lies_beside_the_model_and_is_the_same_every_time(family):
    made = plan(load_recipe(write_recipe(family, output={"shard_size": "600B"})))
    first, second = merge(made, family / "first"), merge(made, family / "second")
    texts = [(family / name / PROVENANCE_NAME).read_text() for name in ("first", "second")]
    assert texts[0] == texts[1] == provenance(made.recipe, made.lock, first)
    subjects = {entry["name"]: entry["digest"]["sha256"] for entry in json.loads(texts[0])["subject"]}
    assert subjects == {shard.file: shard.sha256 for shard in second.shards}


def test_tokens_and_absolute_paths_are_shortened(family):
    token = "hf_" + "a" * 34
    recipe = parse_recipe(recipe_values(base_model=str(family / "base")), folder=family)
    output = {
        "license": token,
        "push_to_hub": f"https://x:{token}@host/y",
    }  # a recipe that is read is refused
    recipe = recipe.model_copy(update={"output": recipe.output.model_copy(update=output)})
    text = provenance(recipe, lock(recipe), REPORT)
    assert token not in text and str(family) not in text
