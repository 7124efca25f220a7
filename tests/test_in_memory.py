import pytest
import torch
from safetensors.torch import load_file

from hub_magmax.errors import MismatchError, NonFiniteError
from hub_magmax.kernels import ops
from hub_magmax.kernels.compiled.backend import Compiled
from hub_magmax.kernels.reference import Reference
from hub_magmax.merging.execution import merge
from hub_magmax.merging.in_memory import InMemoryMerger
from hub_magmax.pipeline import lock, plan
from hub_magmax.recipe.loading import load_recipe
from hub_magmax.recipe.matching import locked_method
from tests.families import make_tensors, write_checkpoint, write_family, write_recipe
from tests.test_merging import METHODS, PREFERENCE


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        (first[n].dtype, first[n].shape) == (second[n].dtype, second[n].shape)
        and first[n]
        .contiguous()
        .view(-1)
        .view(torch.uint8)
        .equal(second[n].contiguous().view(-1).view(torch.uint8))
        for n in first
    )


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("scaling", [0.3, 1.0])
@pytest.mark.parametrize("backend", [Reference(), Compiled()], ids=["reference", "compiled"])
def test_models_in_memory_are_those_of_the_files_to_the_bit(family, method, scaling, backend):
    written = {"name": method} if isinstance(method, str) else method
    recipe = load_recipe(
        write_recipe(family, method={**written, "scaling": scaling}, preference=PREFERENCE, seed=7)
    )
    locked = lock(recipe)
    merge(plan(recipe, locked))
    with InMemoryMerger(recipe, locked, backend) as merger:
        found = merger.merge(locked_method(recipe.method), locked.weights).weights(scaling)
    assert same(found, load_file(recipe.output_path / "model.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rules_and_output_dtypes_hold_in_memory(tmp_path, dtype):
    write_family(tmp_path, ("a", "b"), dtype=dtype)
    rules = [{"match": "embed.*", "take": "b"}, {"match": "*.bias", "take": "nothing"}]
    recipe = load_recipe(
        write_recipe(tmp_path, names=("a", "b"), tensors=rules, output={"path": "out", "dtype": "bfloat16"})
    )
    locked = lock(recipe)
    merge(plan(recipe, locked))
    with InMemoryMerger(recipe, locked) as merger:
        found = merger.merge(locked.method, locked.weights).weights(0.5)
    assert "layer.0.bias" not in found
    assert same(found, load_file(tmp_path / "out" / "model.safetensors"))


def test_one_survey_serves_every_scaling(family):
    recipe = load_recipe(write_recipe(family, method="average"))
    locked = lock(recipe)
    with InMemoryMerger(recipe, locked) as merger:
        model = merger.merge(locked.method, locked.weights)
        base = load_file(family / "base" / "model.safetensors")
        assert same(model.weights(0.0), base)
        tasks = [load_file(family / name / "model.safetensors")["layer.0.bias"] for name in locked.tasks]
        start = base["layer.0.bias"]
        update = ops.weighted_sum([task - start for task in tasks], locked.weights)
        for scaling in (0.25, 2.0):
            assert model.weights(scaling)["layer.0.bias"].equal(start + update * scaling)


def test_checkpoints_of_the_hub_are_fetched_once(tmp_path, hub):
    write_family(tmp_path, ("a", "b"))
    for name in ("base", "a", "b"):
        hub.add_repo(f"me/memory-{name}", folder=tmp_path / name)
    tasks = [{"name": n, "model": f"me/memory-{n}"} for n in "ab"]
    recipe = load_recipe(write_recipe(tmp_path, names=("a", "b"), base_model="me/memory-base", tasks=tasks))
    locked = lock(recipe)
    with InMemoryMerger(recipe, locked) as merger:
        hub.reset_log()
        first = merger.merge({"name": "average"}, (0.5, 0.5)).weights(1.0)
        assert same(first, merger.merge({"name": "average"}, (0.5, 0.5)).weights(1.0))
        assert not hub.log


def test_values_that_are_not_finite_are_named(tmp_path):
    family = write_family(tmp_path, ("a", "b"))
    family["b"]["layer.0.bias"][3] = float("nan")
    write_checkpoint(tmp_path / "b", family["b"])
    recipe = load_recipe(write_recipe(tmp_path, names=("a", "b")))
    locked = lock(recipe)
    with InMemoryMerger(recipe, locked) as merger, pytest.raises(NonFiniteError, match="element 3 is nan"):
        merger.merge(locked.method, locked.weights).weights(1.0)


def test_checkpoints_that_do_not_fit_are_refused_before_anything_is_merged(tmp_path):
    write_family(tmp_path, ("a", "b"))
    other = make_tensors(5)
    del other["layer.0.bias"]
    write_checkpoint(tmp_path / "b", other)
    recipe = load_recipe(write_recipe(tmp_path, names=("a", "b")))
    with pytest.raises(MismatchError, match=r"layer\.0\.bias"):
        InMemoryMerger(recipe, lock(recipe))


def test_tensor_without_elements_is_copied(tmp_path):
    write_family(tmp_path, "ab", shapes={"none": (0, 4), "some": (3, 4)}, dtype=torch.float16)
    recipe = load_recipe(write_recipe(tmp_path, names=("a", "b"), method="average"))
    locked = lock(recipe)
    merge(plan(recipe, locked))
    with InMemoryMerger(recipe, locked) as merger:
        found = merger.merge(locked.method, locked.weights).weights(1.0)
    assert same(found, load_file(recipe.output_path / "model.safetensors"))
