"""Rules that give tensors numbers of their own, by name and block."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hub_magmax.checkpoints.opening import open_inputs
from hub_magmax.errors import RecipeError
from hub_magmax.kernels.compiled.backend import Compiled
from hub_magmax.kernels.reference import Reference
from hub_magmax.merging import bundles
from hub_magmax.merging.execution import make_shards, merge
from hub_magmax.merging.in_memory import InMemoryMerger
from hub_magmax.merging.output.folder import PartialFolder
from hub_magmax.merging.state_dicts import merge_state_dicts
from hub_magmax.pipeline import lock, plan
from hub_magmax.processes import Processes
from hub_magmax.recipe.loading import load_recipe, parse_recipe
from hub_magmax.recipe.tensor_rules import Gradient
from tests import oracles
from tests.families import make_tensors, read_merged, recipe_values, write_family, write_recipe
from tests.test_cli import call
from tests.test_in_memory import same
from tests.test_merging import METHODS, hashes

NAMES = ("a", "b", "c")
SHAPES: Mapping[str, tuple[int, ...]] = {
    "embed.weight": (10, 8),
    **{f"layer.{block}.weight": (16, 8) for block in range(3)},
    **{f"layer.{block}.bias": (16,) for block in range(3)},
    "norm.running_mean": (8,),
    "scale": (),
}
PREFERENCE = {"a": 0.6, "b": 0.3, "c": 0.1}
#: Rules, and by name of a tensor what they say of it, worked out by hand.
RULES = [
    {"match": "layer.1.*", "weights": {"a": 1, "c": 3}, "scaling": 0.25},
    {"match": "*.bias", "weights": {"b": 2}},
    {"layers": [0, 3], "scaling": {"gradient": [0.5, 0.7, 1.5]}},
    {"match": "norm.*", "weights": {"b": 0.5, "c": 0.5}},
]
NUMBERS = {
    "embed.weight": {},
    "layer.0.weight": {"scaling": 0.5},
    "layer.1.weight": {"preference": {"a": 0.25, "c": 0.75}, "scaling": 0.25},
    "layer.2.weight": {"scaling": 1.5},
    "layer.0.bias": {"preference": {"b": 1}},
    "layer.1.bias": {"preference": {"a": 0.25, "c": 0.75}, "scaling": 0.25},
    "layer.2.bias": {"preference": {"b": 1}},
    "norm.running_mean": {"preference": {"b": 0.5, "c": 0.5}},
    "scale": {},
}


@pytest.fixture
def models() -> dict[str, dict[str, torch.Tensor]]:
    base = make_tensors(0, shapes=SHAPES)
    return {"base": base} | {
        name: make_tensors(seed, base=base, shapes=SHAPES) for seed, name in enumerate(NAMES, 1)
    }


def merged(models, rules=(), method="task_arithmetic", preference=PREFERENCE, **changes):
    base, *tasks = models.values()
    named = dict(zip(NAMES, tasks, strict=True))
    return merge_state_dicts(
        base, named, method=method, preference=preference, tensors=rules, seed=7, **changes
    )


def named(method: str | dict[str, Any]) -> dict[str, Any]:
    return {"name": method} if isinstance(method, str) else method


def by_numbers(models, numbers, method, preference=PREFERENCE):
    """Return each tensor of the merge whose recipe has the numbers of this tensor, and no rules."""
    found = {}
    for name, own in numbers.items():
        scaling = {"scaling": own["scaling"]} if "scaling" in own else {}
        how = {**named(method), **scaling, **own.get("options", {})}
        found[name] = merged(models, method=how, preference=own.get("preference", preference))[name]
    return found | {"position_ids": models["base"]["position_ids"]}


def test_three_blocks_worked_by_hand():
    base = {f"h.{block}.w": torch.zeros(2) for block in range(3)} | {"wte": torch.zeros(1)}
    tasks = {"a": {name: value + 1 for name, value in base.items()}}
    tasks["b"] = {name: value + 10 for name, value in base.items()}
    rules = [
        {"match": "*.1.*", "weights": {"a": 3, "b": 1}},
        {"scaling": {"gradient": [0, 2]}},
    ]
    found = merge_state_dicts(base, tasks, method="average", tensors=rules)
    assert found["wte"].tolist() == [0]  # no block: the first number
    assert found["h.0.w"].tolist() == [0, 0]
    assert found["h.1.w"].tolist() == [3.25, 3.25]  # (3 · 1 + 1 · 10) / 4, scaled by 1 as the recipe says
    assert found["h.2.w"].tolist() == [11, 11]  # 2 · (1 + 10) / 2


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_tensor_is_what_it_would_be_if_its_numbers_were_the_recipes(models, method):
    if named(method)["name"] in ("magmax", "last_task"):  # weights are refused there
        rules, numbers = (
            RULES[2:3],
            {
                name: {key: own[key] for key in own if key == "scaling" and name != "layer.1.weight"}
                for name, own in NUMBERS.items()
            },
        )
        for block, scaling in enumerate((0.5, 0.7, 1.5)):
            numbers |= {f"layer.{block}.{part}": {"scaling": scaling} for part in ("weight", "bias")}
    else:
        rules, numbers = RULES, NUMBERS
    found = merged(models, rules, method)
    assert same(found, dict(by_numbers(models, numbers, method)))
    assert not same(found, merged(models, method=method))


def test_sums_and_trimmed_means_are_those_of_the_definitions(models):
    rules = [
        {
            "layers": [1, 3],
            "options": {"density": {"gradient": [0.25, 0.5, 0.75]}},
            "weights": {"a": 2, "b": 6},
        },
        {"match": "*", "scaling": 0.5},
    ]
    base, *tasks = models.values()
    found = merged(models, rules, {"name": "ties", "density": 0.5, "scaling": 1.0})
    for name, (density, weights, scaling) in {
        "layer.0.weight": (0.5, (0.6, 0.3, 0.1), 0.5),
        "layer.1.weight": (0.5, (0.25, 0.75, 0), 1.0),
        "layer.2.bias": (0.75, (0.25, 0.75, 0), 1.0),
        "embed.weight": (0.5, (0.6, 0.3, 0.1), 0.5),
    }.items():
        vectors = np.stack([(task[name] - base[name]).flatten().numpy() for task in tasks])
        keep = int(np.ceil(density * vectors.shape[1]))
        thresholds = [oracles.threshold(vector, keep) for vector in vectors]
        expected = np.array(oracles.ties_merge(vectors, thresholds, weights)) * scaling
        moved = (found[name] - base[name]).flatten().numpy()
        np.testing.assert_allclose(moved, expected, atol=1e-6)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=6), st.integers(1, 40), st.data())
def test_gradients_are_piecewise_linear(numbers, last, data):
    step = data.draw(st.integers(0, last))
    found = Gradient(gradient=numbers).at(step, last)
    expected = np.interp(step / last, np.linspace(0, 1, len(numbers)), numbers)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert min(numbers) <= found <= max(numbers)
    assert Gradient(gradient=numbers).at(last, last) == numbers[-1]


def test_the_only_block_of_a_stack_takes_the_last_number_and_names_without_block_the_first():
    base = {"h.0.w": torch.zeros(1), "wte": torch.zeros(1), "decoder.5.w": torch.zeros(1)}
    tasks = {"a": {name: value + 1 for name, value in base.items()}}
    rules = [{"scaling": {"gradient": [0.25, 0.5]}}]
    found = merge_state_dicts(base, tasks, method="average", tensors=rules)
    assert {name: value.item() for name, value in found.items()} == {
        "h.0.w": 0.5, "wte": 0.25, "decoder.5.w": 0.5
    }  # fmt: skip


def test_numbers_over_layers_restart_in_the_blocks_of_the_rule(models):
    rules = [
        {"layers": [1, 3], "scaling": {"gradient": [0.25, 0.5], "over": "layers"}},
        {"scaling": {"gradient": [1, 0]}},
    ]
    numbers = {name: {"scaling": 1.0} for name in SHAPES}
    for block, scaling in enumerate((1.0, 0.25, 0.5)):
        numbers |= {f"layer.{block}.{part}": {"scaling": scaling} for part in ("weight", "bias")}
    assert same(merged(models, rules), by_numbers(models, numbers, "task_arithmetic"))


def test_layers_may_reach_beyond_the_blocks_that_the_glob_names(models):
    found = merged(models, [{"match": "*layer.1.*", "layers": [1, 3], "scaling": 0}])
    for name in ("layer.1.weight", "layer.1.bias"):
        assert torch.equal(found[name], models["base"][name])
    assert not torch.equal(found["layer.2.weight"], models["base"]["layer.2.weight"])


def test_coefficients_take_the_place_of_weights(models):
    rules = [{"match": "*.weight", "coefficients": {"a": 1, "b": {"gradient": [0, -1]}}}]
    base, a, b, _ = models.values()
    found = merged(models, rules, {"name": "task_arithmetic", "scaling": 1})
    for block, number in enumerate((0, -0.5, -1)):
        name = f"layer.{block}.weight"
        expected = a[name] + number * (b[name] - base[name])
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6)
    plain = merged(models, method={"name": "task_arithmetic", "scaling": 1})
    assert same({"scale": found["scale"]}, {"scale": plain["scale"]})


def files(folder, to, rules, method, processes=None, **options):
    """Merge the family in `folder` and return the plan and the files' hashes; nothing is merged twice."""
    output = {"path": to, "shard_size": "1KB"}
    recipe = load_recipe(
        write_recipe(
            folder, method=method, preference={"weights": PREFERENCE}, tensors=rules, seed=7, output=output
        )
    )
    made = plan(recipe, lock(recipe))
    merge(made, **options)
    return made, hashes(folder / to)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_rule_that_repeats_the_recipe_changes_no_value(tmp_path, method):
    write_family(tmp_path, NAMES, shapes=SHAPES)
    values = files(tmp_path, "plain", [], method)[0].lock.values
    rule: dict[str, Any] = {"match": "*.weight", "scaling": values.scaling}
    if values.options:
        rule["options"] = values.options
    if values.how.uses_preference:
        rule["weights"] = {**PREFERENCE}
    files(tmp_path, "again", [rule, {"layers": [0, 2], "scaling": values.scaling}], method)
    assert same(read_merged(tmp_path / "plain"), read_merged(tmp_path / "again"))


def in_turns(made, output):
    """Make the files of a plan as two processes do, one after the other, and return their hashes."""
    place = PartialFolder(output, made.digest)
    place.prepare()
    with open_inputs(made.recipe, made.lock) as sources:
        for rank in (1, 0):
            make_shards(made, sources, place, place.journal, None, 7, Processes(rank, 2))
    found = hashes(place.folder)
    place.abandon()
    return found


@pytest.mark.parametrize("backend", [Compiled(), Reference()], ids=["compiled", "reference"])
@pytest.mark.parametrize("method", [
    "task_arithmetic",
    {"name": "dare", "density": 0.4},
    {"name": "ties", "density": 0.4},
    {"name": "ties", "density": 0.4, "scope": "model"},
    {"name": "tunable_magmax", "selection": "top-n"},
    {"name": "tunable_magmax", "selection": "top-n", "scope": "model"},
], ids=str)  # fmt: skip
def test_processes_chunks_and_neighbours_change_no_byte(tmp_path, monkeypatch, method, backend):
    write_family(tmp_path, NAMES, shapes=SHAPES)
    made, whole = files(tmp_path, "whole", RULES, method, backend=backend)
    assert len(whole) > 2
    assert files(tmp_path, "chunks", RULES, method, backend=backend, chunk_elements=7)[1] == whole
    assert in_turns(made, tmp_path / "turns") == whole
    with InMemoryMerger(made.recipe, made.lock, backend) as merger:
        held = merger.merge(made.lock.method, made.lock.weights).weights(made.lock.method["scaling"])
    assert same(held, read_merged(tmp_path / "whole"))
    monkeypatch.setattr(bundles, "SMALL_ELEMENTS", 0)  # no neighbours, and each in one pass
    assert files(tmp_path, "alone", RULES, method, backend=backend)[1] == whole


def test_neighbours_with_other_numbers_are_not_merged_together(tmp_path):
    write_family(tmp_path, NAMES, shapes=SHAPES)
    made, _ = files(tmp_path, "out", [{"match": "layer.1.*", "scaling": 0.5}], "average")
    with open_inputs(made.recipe, made.lock) as sources:
        units = [*bundles.bundled(made.jobs[:6], sources, 2**20, made.values_of)]
    assert [len(unit.jobs) if isinstance(unit, bundles.Bundle) else 1 for unit in units] != [6]
    for unit in units:
        if isinstance(unit, bundles.Bundle):
            assert {made.values_of(job.name).scaling for job in unit.jobs} == {unit.values.scaling}


def test_tasks_without_weight_are_not_read_for_the_tensors_of_the_rule_alone(tmp_path):
    write_family(tmp_path, NAMES, shapes=SHAPES)
    made, _ = files(tmp_path, "out", [{"match": "layer.1.*", "weights": {"a": 1}}], "average")
    unread = {job.name: job.unread for job in made.jobs}
    assert unread["layer.1.bias"] == ("b", "c")
    assert unread["layer.0.bias"] == ()
    assert made.unread == ()
    read = made.tensors_read(made.jobs)
    assert "layer.1.weight" in read["a"]
    assert "layer.1.weight" not in read["b"]
    again, _ = files(tmp_path, "all", [{"weights": {"a": 1}}], "average")
    assert again.unread == ("b", "c")


@pytest.mark.parametrize(("rules", "message"), [
    ([{"scaling": {"gradient": []}}], r"tensors\.0\.scaling\.gradient: \[\] should hold at least 2"),
    ([{"scaling": {"gradient": [1]}}], r"tensors\.0\.scaling\.gradient: \[1\] should hold at least 2"),
    ([{"scaling": [0, 1]}], r"should be a number, or over the blocks \{gradient: \[0, 1\]\}"),
    ([{"scaling": "auto"}], r"tensors\.0\.scaling: 'auto' should be a number"),
    ([{"scaling": {"gradient": [0, float("inf")]}}], r"gradient\.1: inf should be a finite number"),
    ([{"weights": {"aa": 1}}], r"tensors\.0\.weights\.aa: there is no task 'aa'; did you mean 'a'\?"),
    ([{"coefficients": {"d": 1}}], r"tensors\.0\.coefficients\.d: there is no task 'd'"),
    ([{"weights": {"a": {"gradient": [1, -1]}}}], "-1 is no share of the tasks; to subtract a task, give"),
    ([{"weights": {"a": 0}}], "no task has a weight"),
    ([{"weights": {"a": {"gradient": [1, 0]}}}], "the weights of block 2 sum to 0"),
    ([{"take": "a"}], r"tensors\.0: the key 'match' is required"),
    ([{"match": "*"}], "neither whose the tensors are nor how they are merged; add take"),
    ([{"match": "*", "take": "a", "scaling": 1}], "take copies the tensors, so scaling would have no effect"),
    ([{"weights": {"a": 1}, "coefficients": {"a": 1}}], "weights and coefficients both say"),
    ([{"layers": [2, 2], "scaling": 1}], r"\[2, 2\] has no block"),
    ([{"layers": 2, "scaling": 1}], r"2 should be \[first, end\], such as \[0, 8\]"),
    ([{"layers": [0, 4], "scaling": 1}], r"\[0, 4\] goes beyond the blocks: 'layer' has 3. .*at most 3"),
    ([{"match": "scale", "layers": [0, 1], "scaling": 1}], "no name that 'scale' matches has a number"),
    ([{"match": "s*", "scaling": {"gradient": [0, 1]}}], "no tensor that the rule decides about is in"),
    ([{"match": "x*", "scaling": 1}], r"the glob 'x\*' matches no tensor"),
    ([{"match": "position_ids", "scaling": 1}], "covers only tensors that are not merged: 'position_ids'"),
    ([{"scaling": 1}, {"match": "scale", "scaling": 2}], "rules before it decide about every tensor that"),
    ([{"scaling": {"gradient": [0, 1], "over": "layers"}}], "there are no layers to spread the numbers over"),
    ([{"density": 0.3}], r"unknown key 'density'.*options: \{density: 0\.3\}"),
    ([{"options": {"density": 0.3}}], "task_arithmetic has no option 'density'"),
])  # fmt: skip
def test_rules_that_cannot_be_are_refused(models, rules, message):
    with pytest.raises(RecipeError, match=message):
        merged(models, rules)


@pytest.mark.parametrize(("method", "rule", "message"), [
    ("magmax", {"weights": {"a": 1}}, "magmax ignores how much each task counts"),
    ("ties", {"coefficients": {"a": 1}}, "ties needs shares of the tasks, which are weights"),
    ("ties", {"options": {"density": 2}}, r"tensors\.0\.options\.density: 2 should be at most 1"),
    ("ties", {"options": {"density": {"gradient": [0.5, 2]}}}, "density: 2(.0)? should be at most 1"),
    ("ties", {"options": {"density": {"gradient": [0.5]}}}, "should hold at least 2"),
    ("ties", {"options": {"name": "dare"}}, "ties has no option 'name'"),
    ("ties", {"options": {"scaling": 1}}, "ties has no option 'scaling'"),
])  # fmt: skip
def test_numbers_that_the_method_does_not_take_are_refused(models, method, rule, message):
    with pytest.raises(RecipeError, match=message):
        merged(models, [rule], method)


@pytest.mark.parametrize(("rule", "message"), [
    ({"options": {"density": 0.5}}, "options belong to a method, and auto leaves it open"),
    ({"coefficients": {"a": 1}}, "a comparison tries methods that need shares"),
])  # fmt: skip
def test_what_a_comparison_leaves_open_has_no_numbers_of_its_own(rule, message):
    compare = {"tune": {"dataset": "d"}}
    with pytest.raises(RecipeError, match=message):
        parse_recipe(recipe_values(method="auto", compare=compare, tensors=[rule]))


def test_a_misspelt_key_is_the_only_problem(models):
    with pytest.raises(RecipeError, match="unknown key 'wieghts'; did you mean 'weights'") as caught:
        merged(models, [{"match": "*.bias", "wieghts": {"a": 1}}])
    assert len(caught.value.problems) == 1


def test_all_problems_are_told_at_once_with_their_lines(family):
    path = write_recipe(family)
    written = path.read_text() + "tensors:\n- {match: 'x*', scaling: 1}\n- {layers: [0, 9], scaling: 1}\n"
    path.write_text(written)
    lines = [number for number, line in enumerate(written.splitlines(), 1) if "scaling" in line]
    code, _, error = call("plan", path)
    assert code
    assert re.search(rf"2 problems\n.*line {lines[0]}, .*match: .*\n.*line {lines[1]}, .*layers: ", error)
    path.write_text(written.replace("scaling: 1", "scaling: [1]"))
    code, _, error = call("validate", path)
    assert code
    assert re.search(rf"2 problems\n.*line {lines[0]}, .*scaling: .*\n.*line {lines[1]}, .*scaling: ", error)


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_some_tensors_may_be_looked_at_alone_and_others_with_the_model(models, scope):
    other = {"tensor": "model", "model": "tensor"}[scope]
    rules = [
        {"match": "layer.*", "options": {"scope": other}},
        {"match": "scale", "options": {"density": 0.9}},
    ]
    numbers = {name: {"options": {"scope": other}} if "layer" in name else {} for name in SHAPES}
    numbers["scale"] = {"options": {"density": 0.9}}
    method = {"name": "ties", "density": 0.4, "scope": scope}
    assert same(merged(models, rules, method), by_numbers(models, numbers, method))


def test_the_place_between_two_models_may_change_over_the_blocks(models):
    two = {name: models[name] for name in ("base", "a")}

    def between(options, rules=()):
        base, task = two.values()
        method = {"name": "slerp", **options}
        return merge_state_dicts(base, {"a": task}, method=method, tensors=rules)

    rules = [
        {"match": "*.weight", "options": {"t": {"gradient": [0, 0.5, 1]}}},
        {"match": "*.bias", "options": {"t": {"gradient": [1, 0]}}},
    ]
    found = between({"t": 0.5}, rules)
    for part, numbers in (("weight", (0.0, 0.5, 1.0)), ("bias", (1.0, 0.5, 0.0))):
        for block, t in enumerate(numbers):
            name = f"layer.{block}.{part}"
            assert found[name].equal(between({"t": t})[name])
    assert found["layer.0.weight"].equal(models["base"]["layer.0.weight"])
    assert found["layer.0.bias"].equal(models["a"]["layer.0.bias"])
    message = (
        r"tensors\.0\.weights: the weights of block 1: slerp goes from one model to another, and 3 tasks"
    )
    with pytest.raises(RecipeError, match=message):
        weights = {"a": 1, "b": {"gradient": [0, 1]}, "c": {"gradient": [0, 1]}}
        merged(models, [{"match": "layer.*", "weights": weights}], "slerp", {"a": 1})


def test_values_by_task_of_an_option_may_change_over_the_blocks(models):
    rules = [{"options": {"density": {"c": 0.9, "a": {"gradient": [0.2, 0.6]}, "b": 0.5}}}]
    numbers = {name: {} for name in SHAPES}
    for name in SHAPES:
        a = {"0": 0.2, "1": 0.4, "2": 0.6}.get(name.split(".")[1] if "." in name else "", 0.2)
        numbers[name] = {"options": {"density": {"a": a, "b": 0.5, "c": 0.9}}}
    assert same(merged(models, rules, "ties"), by_numbers(models, numbers, "ties"))
    with pytest.raises(RecipeError, match=r"tensors\.0\.options\.density: there is no density for b and c"):
        merged(models, [{"options": {"density": {"a": {"gradient": [0.2, 0.6]}}}}], "ties")
