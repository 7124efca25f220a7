"""Task vectors scaled to a common length: by hand, against an oracle, by rules, for every method."""

import math
from dataclasses import replace

import pytest
import torch

from hub_magmax import merge_state_dicts
from hub_magmax.analysis.diagnosing import diagnose
from hub_magmax.checkpoints.opening import open_inputs
from hub_magmax.errors import NonFiniteError, RecipeError
from hub_magmax.kernels.compiled.backend import Compiled
from hub_magmax.kernels.reference import Reference
from hub_magmax.merging.execution import make_shards, merge
from hub_magmax.merging.in_memory import InMemoryMerger
from hub_magmax.merging.output.folder import PartialFolder
from hub_magmax.methods import get_method
from hub_magmax.pipeline import lock, plan, run
from hub_magmax.planning.summary import describe, explain, notices
from hub_magmax.processes import Processes
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.recipe.lockfile import read_lock
from hub_magmax.recipe.matching import changed_keys
from hub_magmax.registry import METHODS as BUILT_IN
from tests.families import accepted, make_tensors, read_merged, recipe_values, write_checkpoint

BOTH = ("equal", "equal-by-tensor")
#: Built-in methods but those that need data.
METHODS = tuple(name for name in BUILT_IN.built_in if get_method(name).statistics is None)
#: Methods of two models.
OF_TWO = ("slerp", "nuslerp")


def write_family(folder, dtype=torch.float32):
    """Write a base model and tasks of which each moved further than the one before; return their tensors."""
    found = {"base": make_tensors(0, dtype=dtype)}
    for number, name in enumerate("abc", 1):
        found[name] = make_tensors(number, base=found["base"], dtype=dtype)
        for tensor, start in found["base"].items():
            if start.is_floating_point():
                moved = number**2 * (found[name][tensor].double() - start.double())
                found[name][tensor] = (start.double() + moved).to(dtype)
    for name, tensors in found.items():
        write_checkpoint(folder / name, tensors)
    return found


def recipe_of(folder, norms="equal", tasks="abc", **changes):
    values = {
        "tasks": [{"name": name, "model": f"./{name}"} for name in tasks],
        "method": {"name": "task_arithmetic", "scaling": 0.5},
        "norms": norms,
        "output": {"path": "out"},
    }
    return parse_recipe(recipe_values(**values | changes), folder=folder)


def lengths_of(found, names):
    """Return by task the length of its vector over some tensors, an oracle in float64."""
    squares = {
        task: [(found[task][n].float() - found["base"][n].float()).double().square().sum() for n in names]
        for task in found
        if task != "base"
    }
    return {task: math.sqrt(math.fsum(map(float, parts))) for task, parts in squares.items()}


def oracle(found, names, norms, weights, scaling=0.5):
    """Return the merge by task arithmetic of scaled vectors: T times the weighted mean, times λ."""
    merged = {}
    for name in names:
        lengths = lengths_of(found, names if norms == "equal" else [name])
        moved = [task for task in weights if lengths[task]]
        common = sum(weights[t] * lengths[t] for t in moved) / sum(weights[t] for t in moved)
        base = found["base"][name].double()
        total = sum(weights[t] * (found[t][name].double() - base) * (common / lengths[t]) for t in moved)
        merged[name] = base + scaling * len(weights) * total
    return merged


def test_lengths_and_factors_worked_by_hand(tmp_path):
    rows = {"base": [0.0, 0.0], "a": [3.0, 4.0], "b": [0.0, 10.0]}
    for name, values in rows.items():
        write_checkpoint(tmp_path / name, {"w": torch.tensor(values)})
    recipe = recipe_of(tmp_path, tasks="ab", preference={"weights": {"a": 0.8, "b": 0.2}})
    made = accepted(plan(recipe))
    assert made.lock.lengths.whole == {"a": 5.0, "b": 10.0}
    # The mean length is 0.8 · 5 + 0.2 · 10 = 6, so a counts 6/5 times and b 6/10 times.
    assert made.lock.lengths.factors("w", made.lock.values) == (1.2, 0.6)
    merge(made)  # 0.5 · 2 (0.8 · 1.2 a + 0.2 · 0.6 b)
    assert read_merged(tmp_path / "out")["w"].tolist() == pytest.approx([2.88, 3.84 + 1.2])
    text = explain(made)
    assert "a: length 5, times 1.2" in text and "b: length 10, times 0.6" in text
    assert describe(made)["norms"]["tasks"]["b"] == {"length": 10.0, "factors": [0.6, 0.6]}


def test_longer_vectors_are_clipped_to_the_mean_and_shorter_ones_stay(tmp_path):
    rows = {"base": [0.0, 0.0], "a": [3.0, 4.0], "b": [0.0, 10.0], "c": [0.0, 0.0]}
    for name, values in rows.items():
        write_checkpoint(tmp_path / name, {"w": torch.tensor(values)})
    made = accepted(
        plan(recipe_of(tmp_path, "clipped", preference={"weights": {"a": 0.4, "b": 0.4, "c": 0.2}}))
    )
    # The mean length of those that have one is 7.5: a is shorter, and b counts 3/4 times.
    assert made.lock.lengths.factors("w", made.lock.values) == (1.0, 0.75, 1.0)
    merge(made)  # 0.5 · 3 (0.4 a + 0.4 · 0.75 b)
    assert read_merged(tmp_path / "out")["w"].tolist() == pytest.approx([1.8, 2.4 + 4.5])
    assert "task vectors of the model are clipped to their mean length" in explain(made)


@pytest.mark.parametrize("norms", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merge_is_that_of_vectors_of_one_length(tmp_path, norms, dtype):
    found, weights = write_family(tmp_path, dtype), {"a": 0.5, "b": 0.3, "c": 0.2}
    recipe = recipe_of(
        tmp_path, norms, preference={"weights": weights}, output={"path": "out", "dtype": "float32"}
    )
    made = accepted(plan(recipe))
    merge(made, chunk_elements=30)
    merged = read_merged(tmp_path / "out")
    for name, value in oracle(found, [job.name for job in made.merged], norms, weights).items():
        torch.testing.assert_close(merged[name].double(), value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("norms", BOTH)
@pytest.mark.parametrize("name", METHODS)
def test_all_preference_for_one_task_is_the_merge_without_scaling(tmp_path, norms, name):
    write_family(tmp_path)
    found = []
    for number, option in enumerate((None, norms)):
        recipe = recipe_of(
            tmp_path,
            option,
            method=name,
            preference={"weights": {"a": 0, "b": 1, "c": 0}},
            output={"path": f"out{number}"},
        )
        made = accepted(plan(recipe))
        if not made.lock.values.how.uses_preference:
            return  # it looks at all tasks alike
        merge(made)
        found.append(read_merged(tmp_path / f"out{number}"))
    assert all(torch.equal(value, found[1][tensor]) for tensor, value in found[0].items())


@pytest.mark.parametrize("norms", BOTH)
@pytest.mark.parametrize("name", METHODS)
def test_scaled_vectors_are_merged_as_checkpoints_that_have_them_would_be(tmp_path, norms, name):
    tasks = "ab" if name in OF_TWO else "abc"
    found = write_family(tmp_path, torch.float64)
    recipe = recipe_of(tmp_path, norms, tasks, method=name, preference={"geometric": {"ratio": 0.5}})
    made = accepted(plan(recipe))
    merge(made)
    for number, task in enumerate(tasks):
        moved = dict(found[task])
        for tensor, value in found[task].items():
            factor = made.lock.lengths.factors(tensor, made.lock.values)[number]
            base = found["base"][tensor]
            if base.is_floating_point() and factor != 1:
                moved[tensor] = base + factor * (value - base)
        write_checkpoint(tmp_path / task, moved)
    merge(
        accepted(
            plan(
                recipe_of(
                    tmp_path,
                    None,
                    tasks,
                    method=name,
                    preference={"geometric": {"ratio": 0.5}},
                    output={"path": "out2"},
                )
            )
        )
    )
    one, two = read_merged(tmp_path / "out"), read_merged(tmp_path / "out2")
    assert all(torch.equal(value, two[tensor]) for tensor, value in one.items())


@pytest.mark.parametrize("norms", BOTH)
@pytest.mark.parametrize(
    "method", ["average", "ties", {"name": "ties", "scope": "model"}, "model_stock", "dare"]
)
def test_chunks_processes_backends_and_memory_change_no_byte(tmp_path, norms, method):
    write_family(tmp_path)
    made = accepted(
        plan(recipe_of(tmp_path, norms, method=method, output={"path": "out", "shard_size": "2KB"}))
    )
    expected = [shard.sha256 for shard in merge(made, tmp_path / "one", backend=Reference()).shards]
    assert [
        s.sha256 for s in merge(made, tmp_path / "two", chunk_elements=7, backend=Compiled()).shards
    ] == expected
    with InMemoryMerger(made.recipe, replace(made.lock, lengths=None)) as merger:
        weights = merger.merge(made.lock.method, made.lock.weights).weights(made.lock.method["scaling"])
    merged = read_merged(tmp_path / "one")
    assert all(torch.equal(weights[name], value) for name, value in merged.items())


@pytest.mark.parametrize("norms", BOTH)
def test_two_processes_and_a_stored_lock_give_the_same_bytes(tmp_path, norms):
    write_family(tmp_path)
    recipe = recipe_of(tmp_path, norms, method="ties", output={"path": "out", "shard_size": "1KB"})
    made = accepted(plan(recipe))
    report = merge(made, tmp_path / "one")
    (tmp_path / "lock.json").write_text(made.lock.to_json())
    again = accepted(plan(recipe, read_lock(tmp_path / "lock.json")))
    place = PartialFolder(tmp_path / "two", again.digest)
    place.prepare()
    with open_inputs(recipe, again.lock) as sources:
        for rank in (1, 0):  # what two processes make, one after the other
            make_shards(again, sources, place, place.journal, None, 100, Processes(rank, 2))
    assert len(report.shards) > 2
    for shard in report.shards:
        assert (tmp_path / "one" / shard.file).read_bytes() == (place.folder / shard.file).read_bytes()
    place.abandon()


@pytest.mark.parametrize("norms", BOTH)
def test_lengths_are_the_same_for_all_chunks_and_backends(tmp_path, monkeypatch, norms):
    from hub_magmax.merging import lengths

    write_family(tmp_path)
    recipe = recipe_of(tmp_path, norms)
    expected = lock(recipe).lengths
    assert (not expected.by_tensor) == (norms == "equal")
    for size in (1, 2**14, 2**15):
        monkeypatch.setattr(lengths, "CHUNK_ELEMENTS", size)
        assert lock(recipe).lengths == expected
    monkeypatch.setattr(lengths, "choose_backend", lambda *arguments: Compiled())
    assert lock(recipe).lengths == expected
    assert lock(recipe).digest == lock(recipe).digest


def test_merges_of_state_dicts_are_those_of_files(tmp_path):
    found = write_family(tmp_path)
    base, tasks = found.pop("base"), found
    for norms in BOTH:
        merge(accepted(plan(recipe_of(tmp_path, norms, output={"path": norms}))))
        state = merge_state_dicts(
            base, tasks, method={"name": "task_arithmetic", "scaling": 0.5}, norms=norms
        )
        assert all(torch.equal(value, state[name]) for name, value in read_merged(tmp_path / norms).items())


def test_rules_weigh_the_lengths_by_their_own_numbers(tmp_path):
    write_family(tmp_path)
    made = accepted(plan(recipe_of(tmp_path, tensors=[{"match": "embed.*", "weights": {"c": 1}}])))
    (name,) = (job.tensor for job in made.merged if job.tensor.startswith("embed") and len(job.shape) == 2)
    assert made.lock.lengths.factors(name, made.values_of(name)) == (1, 1, 1)
    other = next(job.tensor for job in made.merged if not job.tensor.startswith("embed"))
    assert 1 not in made.lock.lengths.factors(other, made.values_of(other))


def test_copied_tensors_have_no_part_in_the_length(tmp_path):
    found = write_family(tmp_path)
    made = plan(recipe_of(tmp_path, tensors=[{"match": "embed.*", "take": "c"}]))
    names = [job.tensor for job in made.merged]
    assert not any(name.startswith("embed") for name in names)
    for task, length in lengths_of(found, names).items():
        assert made.lock.lengths.whole[task] == pytest.approx(length)
    merge(accepted(made))
    merged = read_merged(tmp_path / "out")
    assert all(torch.equal(merged[name], found["c"][name]) for name in merged if name.startswith("embed"))


def test_coefficients_weigh_the_lengths_without_their_signs(tmp_path):
    write_family(tmp_path)
    made = plan(recipe_of(tmp_path, preference={"coefficients": {"a": 1, "b": -0.5, "c": 0}}))
    lengths = made.lock.lengths.whole
    common = (lengths["a"] + 0.5 * lengths["b"]) / 1.5
    factors = made.lock.lengths.factors("", made.lock.values)
    assert factors == pytest.approx((common / lengths["a"], common / lengths["b"], 1))


def test_vectors_of_zeros_are_not_scaled_and_are_told(tmp_path):
    found = write_family(tmp_path)
    write_checkpoint(tmp_path / "b", found["base"])
    made = plan(recipe_of(tmp_path))
    assert made.lock.lengths.whole["b"] == 0
    assert made.lock.lengths.factors("", made.lock.values)[1] == 1
    assert any("not scaled, since their task vectors are zero: b" in text for text in notices(made))
    first = next(iter(found["a"]))
    write_checkpoint(tmp_path / "b", {**found["b"], first: found["base"][first]})
    made = plan(recipe_of(tmp_path, "equal-by-tensor"))
    (told,) = (text for text in notices(made) if "not scaled, since b does not change them" in text)
    assert first in told


def test_lock_and_card_hold_lengths_and_a_changed_option_is_a_changed_recipe(tmp_path):
    write_family(tmp_path)
    recipe = recipe_of(tmp_path)
    done = run(recipe)
    stored = read_lock(tmp_path / "out" / "recipe.lock.json")
    assert stored.lengths == done.plan.lock.lengths and stored.digest == done.plan.lock.digest
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**Norms:** task vectors of the model are scaled to their mean length" in card
    assert changed_keys(recipe, stored) == []
    assert changed_keys(recipe_of(tmp_path, "equal-by-tensor"), stored) == ["norms"]
    assert changed_keys(recipe_of(tmp_path, None), stored) == ["norms"]


def test_diagnosis_names_the_option_unless_the_recipe_has_it(tmp_path):
    write_family(tmp_path)
    (note,) = (f for f in diagnose(plan(recipe_of(tmp_path, None))).findings if f.rule == "uneven")
    assert "norms: equal" in note.text
    assert "uneven" not in {f.rule for f in diagnose(plan(recipe_of(tmp_path))).findings}


def test_what_is_not_finite_is_told_with_its_place(tmp_path):
    found = write_family(tmp_path)
    name = next(iter(found["a"]))
    broken = found["a"][name].clone()
    broken.view(-1)[3] = math.nan
    write_checkpoint(tmp_path / "a", {**found["a"], name: broken})
    with pytest.raises(NonFiniteError, match="element 3 is nan"):
        lock(recipe_of(tmp_path))


def test_norms_need_tasks_and_adapters_one_factor(tmp_path):
    with pytest.raises(RecipeError, match="a layer of an adapter may be several tensors"):
        recipe_of(tmp_path, "equal-by-tensor", output={"path": "out", "format": "adapter"})
    with pytest.raises(RecipeError, match="there are no task vectors to scale"):
        recipe_of(tmp_path, tasks="", layers=[{"take": "base_model", "blocks": [0, 1]}])
    with pytest.raises(RecipeError, match="equal-by-tensor"):
        recipe_of(tmp_path, "unequal")
