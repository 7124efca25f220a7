"""Tasks that were fine-tuned from another base model: their vectors, by hand, and as if they had one."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from hub_magmax import methods
from hub_magmax.analysis.diagnosing import diagnose
from hub_magmax.errors import CheckpointError, LockError, MismatchError, RecipeError, SourceError
from hub_magmax.fleet.rebuilding import rebuild
from hub_magmax.merging.execution import merge
from hub_magmax.merging.in_memory import InMemoryMerger
from hub_magmax.pipeline import lock, plan, run
from hub_magmax.planning.summary import explain
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.recipe.lockfile import read_lock
from hub_magmax.recipe.matching import changed_keys
from tests.families import accepted, make_tensors, read_merged, recipe_values, write_checkpoint
from tests.test_checkpoints_adapter import added, write_adapter

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def write_donors(folder, dtype=torch.float32):
    """Write a base model, one of another family, and a task of each; return their tensors."""
    found = {"base": make_tensors(0, dtype=dtype), "donor": make_tensors(7, dtype=dtype)}
    found["a"] = make_tensors(1, base=found["base"], dtype=dtype)
    found["b"] = make_tensors(2, base=found["donor"], dtype=dtype)
    for name, tensors in found.items():
        write_checkpoint(folder / name, tensors)
    return found


def recipe_of(folder, base="./donor", **changes):
    tasks = [{"name": "a", "model": "./a"}, {"name": "b", "model": "./b", "base": base}]
    values = {
        "tasks": tasks,
        "method": {"name": "task_arithmetic", "scaling": 0.5},
        "output": {"path": "out"},
    }
    return parse_recipe(recipe_values(**values | changes), folder=folder)


def test_vector_worked_by_hand(tmp_path):
    rows = {"base": [10, 10], "donor": [1, 2], "a": [12, 10], "b": [1, 6]}
    for name, values in rows.items():
        write_checkpoint(tmp_path / name, {"w": torch.tensor(values, dtype=torch.float32)})
    merge(accepted(plan(recipe_of(tmp_path))))  # 10 + 0.5 ((12 - 10) + (1 - 1)), 10 + 0.5 (0 + (6 - 2))
    assert read_merged(tmp_path / "out")["w"].tolist() == [11, 12]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vector_is_the_difference_from_the_own_base_in_float32(tmp_path, dtype):
    found = write_donors(tmp_path, dtype)
    made = plan(recipe_of(tmp_path))
    assert [finding.name for finding in made.findings] == []  # no other family, as it would be without `base`
    merge(made, chunk_elements=30)
    merged = read_merged(tmp_path / "out")
    for name, base in found["base"].items():
        if base.is_floating_point():
            one = found["a"][name].float() - base.float()
            two = found["b"][name].float() - found["donor"][name].float()
            torch.testing.assert_close(
                merged[name], (base.float() + 0.5 * (one + two)).to(dtype), rtol=0, atol=1e-6
            )


@pytest.mark.parametrize(
    "method", ["average", "ties", "magmax", "tunable_magmax", {"name": "dare", "density": 0.5}]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_base_model_as_the_own_base_changes_no_bit(tmp_path, method, dtype):
    write_donors(tmp_path, dtype)
    write_checkpoint(tmp_path / "b", make_tensors(2, base=make_tensors(0, dtype=dtype), dtype=dtype))
    for number, base in enumerate((None, "./base")):
        tasks = [
            {"name": "a", "model": "./a"},
            {"name": "b", "model": "./b"} | ({"base": base} if base else {}),
        ]
        recipe = recipe_of(tmp_path, tasks=tasks, method=method, output={"path": f"out{number}"})
        merge(accepted(plan(recipe)))
    one, two = read_merged(tmp_path / "out0"), read_merged(tmp_path / "out1")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_copies_and_integers_are_the_tasks_own(tmp_path):
    found = write_donors(tmp_path)
    merge(accepted(plan(recipe_of(tmp_path, tensors=[{"match": "embed.*", "take": "b"}]))))
    merged = read_merged(tmp_path / "out")
    assert torch.equal(merged["embed.weight"], found["b"]["embed.weight"])
    assert torch.equal(merged["position_ids"], torch.arange(7))


def test_adapter_is_added_to_its_own_base_model(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = {f"m.layers.{n}.q.weight": (16, 8) for n in range(3)}
    models = {
        name: {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
        for name in ("base", "donor")
    }
    for name, tensors in models.items():
        write_checkpoint(tmp_path / name, tensors)
    for seed, name in enumerate("ab", 1):
        factors = write_adapter(tmp_path / f"lora-{name}", models["donor"], ("q",), seed)
        write_checkpoint(tmp_path / name, added(models["donor"], factors, 2.0))
    outs = {}
    for kind in ("lora-", ""):
        tasks = [{"name": name, "model": f"./{kind}{name}", "base": "./donor"} for name in "ab"]
        merge(accepted(plan(recipe_of(tmp_path, tasks=tasks, output={"path": f"out-{kind}"}))))
        outs[kind] = read_merged(tmp_path / f"out-{kind}")
    for name in shapes:
        torch.testing.assert_close(outs["lora-"][name], outs[""][name])


def test_layers_are_stacked_with_the_own_base(tmp_path):
    for name, values in {"base": [10, 20, 30], "donor": [1, 2, 3], "b": [2, 4, 7]}.items():
        write_checkpoint(
            tmp_path / name, {f"h.{n}.w": torch.tensor([float(v)]) for n, v in enumerate(values)}
        )
    tasks = [{"name": "b", "model": "./b", "base": "./donor"}]
    layers = [{"blocks": {"base_model": [0, 2], "b": [1, 3]}}, {"take": "b", "blocks": [0, 1]}]
    method = {"name": "task_arithmetic", "scaling": 1}
    merge(accepted(plan(recipe_of(tmp_path, tasks=tasks, layers=layers, method=method))))
    found = read_merged(tmp_path / "out")
    assert [found[f"h.{n}.w"].item() for n in range(3)] == [10 + 2, 20 + 4, 2]


def test_merges_in_memory_and_looks_are_relative_to_the_own_base(tmp_path):
    write_donors(tmp_path)
    recipe = recipe_of(tmp_path)
    made = plan(recipe)
    merge(made)
    with InMemoryMerger(recipe, made.lock) as merger:
        weights = merger.merge(made.lock.method, made.lock.weights).weights(0.5)
    merged = read_merged(tmp_path / "out")
    assert all(torch.equal(weights[name], merged[name]) for name in merged)
    assert max(diagnose(made).relative_lengths) < 0.2


def test_own_base_on_the_hub_is_pinned_counted_and_told(hub, tmp_path):
    write_donors(tmp_path)
    for name in ("base", "donor", "a", "b"):
        hub.add_repo(f"me/own-{name}", folder=tmp_path / name)
    tasks = [{"name": "a", "model": "me/own-a"}, {"name": "b", "model": "me/own-b", "base": "me/own-donor"}]
    recipe = recipe_of(tmp_path, tasks=tasks, base_model="me/own-base")
    planned = plan(recipe)
    assert planned.lock.bases["b"].commit == hub.head("me/own-donor")
    assert f"relative to me/own-donor@{planned.lock.bases['b'].commit[:7]}" in explain(planned)
    floats = sum(t.numel() * 4 for t in make_tensors(0).values() if t.is_floating_point())
    assert planned.bytes_in == 4 * floats + 3 * 7 * 8
    hub.reset_log()
    done = run(recipe)
    fetched = sum(exchange.bytes_sent for exchange in hub.log if exchange.route == "storage")
    assert fetched <= 1.1 * planned.bytes_in + 4 * 2**14
    assert "me/own-donor" in (done.output / "README.md").read_text()
    assert "base of b/model.safetensors" in (done.output / "provenance.json").read_text()
    stored = read_lock(done.output / "recipe.lock.json")
    assert changed_keys(recipe, stored) == []
    other = recipe_of(
        tmp_path, tasks=[tasks[0], {"name": "b", "model": "me/own-b"}], base_model="me/own-base"
    )
    assert changed_keys(other, stored) == ["base_model and tasks"]


def test_changed_own_base_is_a_changed_lock(tmp_path):
    found = write_donors(tmp_path)
    recipe = recipe_of(tmp_path)
    made = plan(recipe)
    done = merge(made)
    rebuild(str(recipe.output_path), folder=tmp_path)
    assert done.bytes_in == made.bytes_in
    save_file(
        {**found["donor"], "more": torch.ones(2)}, tmp_path / "donor" / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(LockError, match=r"donor.*changed since the lock was written"):
        plan(recipe, made.lock)


def test_copy_of_its_own_base_is_told_and_the_base_model_as_a_task_is_none(tmp_path):
    write_donors(tmp_path)
    tasks = [
        {"name": "a", "model": "./donor", "base": "./donor"},
        {"name": "b", "model": "./base", "base": "./donor"},
    ]
    found = [finding.name for finding in plan(recipe_of(tmp_path, tasks=tasks)).findings]
    assert "unchanged:a" in found and "unchanged:b" not in found


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"base": "./nowhere"}, SourceError, r"tasks\.1\.base|nowhere"),
        ({"base": "a//b"}, RecipeError, r"tasks\.1\.base"),
        ({"adapters": "sequence"}, RecipeError, r"tasks\.1\.base: an adapter of a sequence"),
        ({"token_rows": ["embed.*"]}, RecipeError, r"tasks\.1\.base: rows are matched by token"),
    ],
)
def test_what_cannot_be_is_told_with_its_key(tmp_path, changes, error, reason):
    write_donors(tmp_path)
    with pytest.raises(error, match=reason):
        lock(recipe_of(tmp_path, **changes))


def test_method_that_sees_the_base_model_takes_no_other_one(tmp_path, monkeypatch):
    average = methods.get_method("average")
    monkeypatch.setattr(methods, "get_method", lambda name: replace(average, name=name, supplied=("base",)))
    with pytest.raises(RecipeError, match=r"method\.name: seeing is about whole models.*leave base out"):
        recipe_of(tmp_path, method="seeing")


def test_own_base_of_another_shape_is_refused_by_name(tmp_path):
    write_donors(tmp_path)
    other = make_tensors(7) | {"layer.0.bias": torch.ones(15)}
    write_checkpoint(tmp_path / "donor", other)
    with pytest.raises(MismatchError, match=r"donor, tensor 'layer.0.bias': shape \[15\]"):
        plan(recipe_of(tmp_path))
    del other["layer.0.bias"]
    write_checkpoint(tmp_path / "donor", other)
    with pytest.raises(MismatchError, match=r"donor: lacks tensor 'layer.0.bias'"):
        plan(recipe_of(tmp_path))


def test_adapter_is_no_base_model(tmp_path):
    base = {"m.q.weight": torch.randn(8, 8)}
    write_checkpoint(tmp_path / "base", base)
    for name in ("a", "b", "donor"):
        write_adapter(tmp_path / name, base, ("q",), 1)
    with pytest.raises(CheckpointError, match=r"the base of b is an adapter"):
        lock(recipe_of(tmp_path))
