import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hub_magmax.checkpoints.source import MemorySource
from hub_magmax.errors import MismatchError, RecipeError
from hub_magmax.files import digest
from hub_magmax.merging.output.shard import shard_header
from hub_magmax.methods import merge_method
from hub_magmax.pipeline import lock, plan
from hub_magmax.planning.headers import plan_from_headers
from hub_magmax.planning.layout import make_plan
from hub_magmax.planning.plan import Plan
from hub_magmax.planning.summary import explain, notices
from hub_magmax.recipe.loading import load_recipe, parse_recipe
from hub_magmax.recipe.lockfile import Lock, LockedSource, ResolvedPreference
from hub_magmax.registry import METHODS
from hub_magmax.text import format_bytes
from tests.families import make_tensors, recipe_values, write_recipe

BASE = make_tensors(0)


def planned(
    tasks: Mapping[str, Mapping[str, Tensor]], base: Mapping[str, Tensor] = BASE, **changes: object
) -> Plan:
    recipe = parse_recipe(recipe_values(names=tuple(tasks), **changes))
    source = LockedSource("x", "local", None, None, ())
    weights = {name: 1 / len(tasks) for name in tasks}
    options = {"name": "tunable_magmax", "scaling": 0.5, "selection": "algorithm-1", "scope": "tensor"}
    locked = Lock(
        source, dict.fromkeys(tasks, source), options, ResolvedPreference(weights, "uniform"), (), 0
    )
    opened = {"base_model": MemorySource.from_tensors(base, "base")}
    opened |= {name: MemorySource.from_tensors(tensors, f"task {name}") for name, tensors in tasks.items()}
    return make_plan(recipe, locked, opened)


def test_digest_of_a_plan_is_that_of_all_its_values():
    made = planned({"a": BASE, "b": BASE})
    values = {"lock": made.lock.digest, "shards": [asdict(shard) for shard in made.shards]}
    assert {job.pop("factor") for shard in values["shards"] for job in shard["jobs"]} == {
        1
    }  # told if another
    values |= {"files_from": made.recipe.output.files_from}
    values |= {"metadata": dict(made.metadata)} if made.metadata else {}
    assert made.digest == digest(values)


def test_floats_are_merged_and_integers_copied():
    made = planned({"a": BASE, "b": BASE})
    assert {job.name: job.source for job in made.jobs} == dict.fromkeys(BASE, "merge") | {
        "position_ids": "base_model"
    }
    assert next(job for job in made.jobs if not job.merged).reason == "not floating point, and must agree"


def test_bytes_are_counted_once_per_tensor_and_source():
    made = planned({"a": BASE, "b": BASE})
    size = sum(tensor.numel() * tensor.element_size() for tensor in BASE.values())
    assert made.bytes_in == 3 * size
    assert made.bytes_out == size


@pytest.mark.parametrize("shard_size", ["1KB", "2KB", "1GB"])
def test_shards_hold_every_tensor_once_in_the_base_models_order(shard_size):
    made = planned({"a": BASE}, output={"shard_size": shard_size})
    assert [job.name for job in made.jobs] == list(MemorySource.from_tensors(BASE).index.tensors)
    limit = made.recipe.output.shard_size
    assert all(shard.data_bytes <= limit or len(shard.jobs) == 1 for shard in made.shards)


def test_one_shard_has_the_name_that_loaders_expect():
    assert [shard.file for shard in planned({"a": BASE}).shards] == ["model.safetensors"]
    several = [shard.file for shard in planned({"a": BASE}, output={"shard_size": "1KB"}).shards]
    assert several[0] == f"model-00001-of-{len(several):05d}.safetensors"


def test_header_is_what_safetensors_reads(tmp_path):
    made = planned({"a": BASE})
    shard = made.shards[0]
    content = shard_header(made, shard) + bytes(shard.data_bytes)
    index = MemorySource({"model.safetensors": content}).index
    assert {n: (t.shape, t.dtype) for n, t in index.tensors.items()} == {
        job.name: (job.shape, job.dtype) for job in shard.jobs
    }
    (tmp_path / "model.safetensors").write_bytes(content)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as opened:
        provenance = json.loads(opened.metadata()["hub_magmax"])
    assert provenance["method"]["name"] == "tunable_magmax"
    assert provenance["lock"] == made.lock.digest


def without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in BASE.items() if key != name}


def test_missing_tensor_is_named_with_the_rule_that_settles_it():
    with pytest.raises(MismatchError) as caught:
        planned({"a": BASE, "b": without("scale")})
    assert "task b: lacks tensor 'scale' of the base model" in str(caught.value)
    assert 'tensors: [{match: "scale", take: base_model}]' in str(caught.value)


def test_surplus_tensor_is_named_with_the_rule_that_settles_it():
    with pytest.raises(MismatchError) as caught:
        planned({"a": BASE, "b": BASE | {"head": torch.ones(3)}})
    assert "has tensor 'head' that the base model lacks" in str(caught.value)
    assert "take: nothing" in str(caught.value)


def test_different_shape_is_refused_with_both_shapes():
    with pytest.raises(MismatchError) as caught:
        planned({"a": BASE | {"scale": torch.ones(3)}})
    assert "task a, tensor 'scale': shape [3]. Expected [] as in base" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_dtype_that_cannot_be_merged_is_refused(dtype):
    with pytest.raises(MismatchError, match="cannot be merged with F32"):
        planned({"a": BASE | {"layer.0.bias": BASE["layer.0.bias"].to(dtype)}})


def test_integers_of_different_width_are_refused():
    with pytest.raises(MismatchError, match="position_ids"):
        planned({"a": BASE | {"position_ids": torch.arange(7, dtype=torch.int32)}})


def test_floats_of_different_width_are_merged_into_the_base_models_dtype():
    made = planned({"a": {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in BASE.items()}})
    assert {job.dtype for job in made.jobs if job.merged} == {"F32"}


def test_output_dtype_applies_to_floats_only():
    made = planned({"a": BASE}, output={"dtype": "bfloat16"})
    assert {job.name: job.dtype for job in made.jobs} == dict.fromkeys(BASE, "BF16") | {"position_ids": "I64"}


def test_first_matching_rule_decides():
    rules = [
        {"match": "layer.0.*", "take": "a"},
        {"match": "layer.*", "take": "nothing"},
        {"match": "sc*", "take": "base_model"},
    ]
    made = planned({"a": BASE, "b": BASE}, tensors=rules)
    sources = {job.name: job.source for job in made.jobs}
    assert sources["layer.0.weight"] == "a"
    assert sources["scale"] == "base_model"
    assert sources["embed.weight"] == "merge"
    assert made.left_out == ("layer.1.weight",)


def test_rule_takes_a_tensor_that_only_one_task_has():
    made = planned({"a": BASE, "b": BASE | {"head": torch.ones(3)}}, tensors=[{"match": "head", "take": "b"}])
    assert next(job for job in made.jobs if job.name == "head").source == "b"


def test_rule_that_matches_nothing_is_refused():
    with pytest.raises(RecipeError, match="matches no tensor"):
        planned({"a": BASE}, tensors=[{"match": "nothing.*", "take": "base_model"}])


def test_leaving_everything_out_is_refused():
    with pytest.raises(RecipeError, match="every tensor"):
        planned({"a": BASE}, tensors=[{"match": "*", "take": "nothing"}])


def test_empty_tensors_are_copied():
    empty = BASE | {"empty": torch.ones(0, 4)}
    made = planned({"a": empty}, base=empty)
    assert next(job for job in made.jobs if job.name == "empty").reason == "no elements"


def test_digest_follows_what_decides_the_bytes_and_nothing_else(family):
    def digest(**changes: object) -> str:
        return plan(load_recipe(write_recipe(family, **changes))).digest

    same = digest()
    assert digest(output={"path": "elsewhere", "push_to_hub": "me/x"}) == same
    assert digest(output={"device": "cuda:1", "memory": "1GB"}) == same
    assert digest(seed=1) != same
    assert digest(method="average") != same
    assert digest(output={"shard_size": "1KB"}) != same


def test_explanation_says_what_a_person_wants_to_know(family):
    text = explain(plan(load_recipe(write_recipe(family, preference={"geometric": {"ratio": 2}}))))
    for fact in (
        "a: ./a",
        "tunable_magmax, scaling 0.5",
        "a 0.1429, b 0.2857, c 0.5714 (geometric)",
        "5 tensors",
        "memory",
    ):
        assert fact in text


def test_plan_of_a_method_that_ignores_the_preference_says_so(family):
    assert "magmax ignores the preference" in explain(
        plan(load_recipe(write_recipe(family, method="magmax")))
    )


def test_plan_reads_headers_and_integers_only(family, monkeypatch):
    from hub_magmax.checkpoints.storage.local import LocalSource

    beyond = []
    original = LocalSource.read_into

    def counted(self: LocalSource, path: str, start: int, buffer: memoryview) -> None:
        beyond.append((start, start + len(buffer)))
        original(self, path, start, buffer)

    monkeypatch.setattr(LocalSource, "read_into", counted)
    recipe = load_recipe(write_recipe(family))
    made = plan_from_headers(recipe, lock(recipe))
    first = MemorySource.from_tensors(BASE).index.tensors[made.jobs[0].name]
    positions = load_file(family / "base" / "model.safetensors")["position_ids"]
    of_tensors = [stop - start for start, stop in beyond if stop > first.start_byte]
    assert set(of_tensors) == {positions.nbytes}


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2 * 10**12, "2.0 TB")]
)
def test_bytes_are_shown_in_decimal_units(count, text):
    assert format_bytes(count) == text


def test_a_method_whose_bytes_depend_on_the_processor_is_told_of(monkeypatch):
    @merge_method("spectral", source="test", is_portable=False)
    def spectral(task_vectors: Tensor) -> Tensor:
        """Take the sum."""
        return task_vectors.sum(0)

    monkeypatch.setitem(vars(METHODS), "plugins", {"spectral": SimpleNamespace(load=lambda: spectral)})
    made = planned({"a": BASE, "b": BASE})
    found = replace(made, lock=replace(made.lock, method={"name": "spectral", "scaling": 1.0}))
    assert set(notices(found)) - set(notices(made)) == {
        "the last bits that spectral gives depend on processor, device and torch"
    }
