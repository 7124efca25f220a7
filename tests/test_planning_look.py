"""What is seen of checkpoints before a merge: faults by samples, refused unless they are accepted by name."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from hub_magmax.analysis.diagnosing import Sample, diagnose
from hub_magmax.cli import main
from hub_magmax.errors import MismatchError, NonFiniteError
from hub_magmax.merging.execution import merge
from hub_magmax.pipeline import lock, plan, run
from hub_magmax.planning.summary import describe, explain, notices
from hub_magmax.recipe.loading import load_recipe, parse_recipe
from tests.families import make_tensors, read_merged, write_checkpoint, write_recipe

SHAPES = {"embed.weight": (50, 8), "norm.weight": (8,)} | {f"layers.{n}.weight": (16, 8) for n in range(3)}


def floats(tensors, change):
    return {name: change(value) if value.is_floating_point() else value for name, value in tensors.items()}


def from_another_base(family):
    return make_tensors(5, base=make_tensors(99, shapes=SHAPES), shapes=SHAPES)


def swapped(family):
    return family["b"] | {
        "layers.0.weight": family["b"]["layers.1.weight"],
        "layers.1.weight": family["b"]["layers.0.weight"],
    }


FAULTS = {
    "other-base:b": (from_another_base, "fine-tuned from another one"),
    "unchanged:b": (lambda family: dict(family["base"]), "b is the base model, unchanged"),
    "zeros:b": (lambda family: floats(family["b"], torch.zeros_like), "b holds nothing but zeros"),
    "scaled:b": (lambda family: floats(family["b"], lambda value: 100 * value), "times as long"),
    "swapped:b": (swapped, "layers.0.weight holds what is layers.1.weight"),
    "near-identical:b": (lambda family: dict(family["a"]), "b is almost a"),
}


def write(folder, dtype=torch.float32, **changes):
    """Write a base model and three tasks, some of them changed, and a recipe; return the recipe."""
    family = {"base": make_tensors(0, shapes=SHAPES)}
    for seed, task in enumerate("abc", 1):
        family[task] = make_tensors(seed, base=family["base"], shapes=SHAPES)
    for name, change in changes.items():
        family[name] = change(family)
    for name, tensors in family.items():
        write_checkpoint(folder / name, floats(tensors, lambda value: value.to(dtype)))
    return load_recipe(write_recipe(folder, method={"name": "average"}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_nothing_is_said_of_a_sound_family(tmp_path, dtype):
    made = plan(write(tmp_path, dtype))
    assert made.findings == () and notices(made) == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_refused_by_its_name_and_merged_where_that_is_accepted(tmp_path, name, dtype):
    change, words = FAULTS[name]
    recipe = write(tmp_path, dtype, b=change)
    made = plan(recipe)
    assert [fault.name for fault in made.findings] == [name]
    assert f"FAULT        {made.findings[0].text} (not merged without --in-spite-of {name})" in explain(made)
    assert describe(made)["findings"][0]["name"] == name
    for refused in (lambda: run(recipe), lambda: merge(made)):
        with pytest.raises(MismatchError, match=words) as caught:
            refused()
        assert f"add --in-spite-of {name} to merge" in caught.value.hint
    assert not (tmp_path / "merged").exists()
    done = run(recipe, in_spite_of=[name])
    assert done.report.notices == (f"{made.findings[0].text} (accepted as {name})",)
    assert f"(accepted as {name})" in (tmp_path / "merged" / "README.md").read_text()
    found = read_merged(tmp_path / "merged")["layers.2.weight"].double()
    sources = [read_merged(tmp_path / task)["layers.2.weight"].double() for task in "abc"]
    assert torch.allclose(found, sum(sources) / 3, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("name", FAULTS)
def test_the_look_and_the_diagnosis_agree(tmp_path, name):
    made = plan(write(tmp_path, b=FAULTS[name][0]))
    found = [finding.name for finding in diagnose(made).findings if finding.is_fault]
    assert found == [fault.name for fault in made.findings]


@pytest.mark.parametrize("times", [2, 4, 6])
def test_samples_of_a_small_tensor_count_by_its_size(tmp_path, times):
    """As of adapters: a small matrix has changed much, and of a large one, which has not, a part is read."""
    base = make_tensors(0, shapes={"embed.weight": (1000, 100), "layers.0.q.weight": (64, 64)})
    write_checkpoint(tmp_path / "base", base)
    for number, name in enumerate("abc", 1):
        noise = make_tensors(number, shapes={"layers.0.q.weight": (64, 64)})["layers.0.q.weight"]
        changed = base["layers.0.q.weight"] * times + 0.1 * noise
        write_checkpoint(tmp_path / name, base | {"layers.0.q.weight": changed})
    made = plan(load_recipe(write_recipe(tmp_path, method={"name": "average"})))
    whole = diagnose(made, sample=Sample(whole_elements=1 << 30))
    assert [fault.name for fault in made.findings] == [one.name for one in whole.findings if one.is_fault]


def test_the_wrong_base_model_is_one_fault_of_each_task(tmp_path):
    recipe = write(tmp_path, base=lambda family: make_tensors(77, shapes=SHAPES))
    names = [fault.name for fault in plan(recipe).findings]
    assert names == ["other-base:a", "other-base:b", "other-base:c"]


def test_the_command_line_tells_and_takes_the_options(tmp_path):
    write(tmp_path, b=FAULTS["unchanged:b"][0], c=FAULTS["zeros:b"][0])
    recipe = str(tmp_path / "recipe.yaml")
    refused = CliRunner().invoke(main, ["run", recipe])
    assert refused.exit_code == 1 and "Traceback" not in refused.output
    options = ["--in-spite-of", "unchanged:b", "--in-spite-of", "zeros:c"]
    assert f"add {' '.join(options)} to merge" in refused.output
    rehearsed = CliRunner().invoke(main, ["run", recipe, "--dry-run"])
    assert rehearsed.exit_code == 1 and "b is the base model, unchanged" in rehearsed.output
    assert CliRunner().invoke(main, ["run", recipe, "--dry-run", *options]).exit_code == 0
    assert CliRunner().invoke(main, ["merge", recipe, *options[:2]]).exit_code == 1
    assert CliRunner().invoke(main, ["merge", recipe, *options]).exit_code == 0
    planned = json.loads(CliRunner().invoke(main, ["plan", recipe, "--json"]).stdout)
    assert [finding["name"] for finding in planned["findings"]] == ["unchanged:b", "zeros:c"]


def test_a_single_element_that_differs_is_a_change(tmp_path):
    shapes = {"w": (300, 300)}
    base = make_tensors(0, shapes=shapes)
    task = base | {"w": base["w"].clone()}
    task["w"][200, 7] += 1
    for name, tensors in {
        "base": base,
        "a": task,
        "b": base,
        "c": make_tensors(3, base=base, shapes=shapes),
    }.items():
        write_checkpoint(tmp_path / name, tensors)
    assert [fault.name for fault in plan(load_recipe(write_recipe(tmp_path))).findings] == ["unchanged:b"]


def test_what_rules_cover_may_be_all_that_a_task_changed(tmp_path):
    def head_only(family):
        return family["base"] | {"embed.weight": family["b"]["embed.weight"]}

    write(tmp_path, b=head_only)
    for take, notes in {
        "b": (),
        "base_model": (
            "b is the base model, unchanged, in all tensors that no rule covers: its task "
            "vector is zero, and its share of the merge stays the base model's",
        ),
    }.items():
        rules = [{"match": "embed.weight", "take": take}]
        recipe = load_recipe(write_recipe(tmp_path, tensors=rules, output={"path": f"out_{take}"}))
        assert run(recipe).report.notices == notes


def test_few_elements_decide_no_direction(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "a", "b", "c"):
        write_checkpoint(tmp_path / name, {"w": torch.randn(3, 3, generator=generator)})
    assert plan(load_recipe(write_recipe(tmp_path))).findings == ()


def test_a_task_without_weight_is_not_looked_at(tmp_path):
    write(tmp_path, b=from_another_base)
    weights = {"weights": {"a": 0.5, "b": 0, "c": 0.5}}
    made = plan(load_recipe(write_recipe(tmp_path, method={"name": "magmax"}, preference=weights)))
    assert bool(made.unread) == (made.findings == ())


def test_a_nan_is_noted_by_the_plan_and_stops_the_merge_with_its_place(tmp_path):
    def broken(family):
        tensors = family["b"] | {"layers.1.weight": family["b"]["layers.1.weight"].clone()}
        tensors["layers.1.weight"][3, 2] = torch.nan
        return tensors

    recipe = write(tmp_path, b=broken)
    (found,) = plan(recipe).findings
    assert found.text == "b holds a NaN or an infinity in layers.1.weight, at which the merge will stop"
    with pytest.raises(NonFiniteError, match=r"layers\.1\.weight"):
        run(recipe)


def test_the_base_model_as_a_task_is_told_with_what_that_does(tmp_path):
    write(tmp_path)
    tasks = [{"name": "a", "model": "./a"}, {"name": "b", "model": "./base"}]
    recipe = load_recipe(write_recipe(tmp_path, tasks=tasks))
    note = (
        "b is the base model, as the recipe says: its task vector is zero, and its share of the merge stays "
        "the base model's"
    )
    assert f"note         {note}" in explain(plan(recipe))
    assert note in run(recipe).report.notices


@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("remote", [(), ("base",), ("base", "a", "lora")], ids=str)
def test_an_adapter_that_learned_nothing_is_the_base_model(tmp_path, hub, remote, zero):
    write(tmp_path)
    factors = {
        "base_model.model.layers.0.lora_A.weight": torch.randn(2, 8),
        "base_model.model.layers.0.lora_B.weight": torch.full((16, 2), zero),
    }
    (tmp_path / "lora").mkdir()
    save_file(factors, tmp_path / "lora" / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["0"]}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(values))
    names = {name: f"me/zero-{name}-{len(remote)}{zero}" for name in remote}
    for name, repo_id in names.items():
        hub.add_repo(repo_id, folder=tmp_path / name)
    tasks = [{"name": name, "model": names.get(name, f"./{name}")} for name in ("a", "lora")]
    base = names.get("base", "./base")
    made = plan(load_recipe(write_recipe(tmp_path, base_model=base, tasks=tasks)))
    (fault,) = made.findings
    assert fault.name == "unchanged:lora" and "an adapter of zeros" in fault.text
    assert "its task vector is zero, and its share of the merge stays the base model's" in fault.text
    if "lora" in remote:
        return
    factors["base_model.model.layers.0.lora_B.weight"][0, 0] = 1
    save_file(factors, tmp_path / "lora" / "adapter_model.safetensors")
    assert plan(load_recipe(tmp_path / "recipe.yaml")).findings == ()


def test_one_checkpoint_under_two_names_is_a_fault(tmp_path):
    write(tmp_path)
    tasks = [{"name": "a", "model": "./a"}, {"name": "again", "model": "./a"}]
    (fault,) = plan(load_recipe(write_recipe(tmp_path, tasks=tasks))).findings
    assert fault.text == "again is a: their files are the same"


def test_equal_files_on_the_hub_are_known_without_reading_them(tmp_path, hub):
    recipe = write(tmp_path, b=FAULTS["unchanged:b"][0], c=FAULTS["near-identical:b"][0])
    for name in ("base", "a", "b", "c"):
        hub.add_repo(f"me/looked-{name}", folder=tmp_path / name)
    values = recipe.to_dict() | {
        "base_model": "me/looked-base",
        "tasks": [{"name": task, "model": f"me/looked-{task}"} for task in "abc"],
    }
    made = plan(parse_recipe(values))
    assert [fault.name for fault in made.findings] == ["unchanged:b", "near-identical:c"]
    assert "c is a: their files are the same" in made.findings[1].text
    assert "not seen     values of a, b, c, for faults: that would take requests" in explain(made)
    assert "not seen" not in explain(plan(recipe))


def test_the_look_decides_nothing_of_the_output(tmp_path):
    recipe = write(tmp_path, b=from_another_base)
    locked = lock(recipe)
    made = plan(recipe, locked, in_spite_of=["other-base:b"])
    assert made.digest == replace(made, findings=(), in_spite_of=()).digest


def test_samples_of_large_tensors_are_enough(tmp_path):
    shapes = {f"layers.{n}.weight": (300, 100) for n in range(300)}
    base = make_tensors(0, shapes=shapes)
    tensors = {"a": make_tensors(1, base=base, shapes=shapes), "b": make_tensors(2, shapes=shapes)}
    for name, values in {"base": base, "c": make_tensors(3, base=base, shapes=shapes), **tensors}.items():
        write_checkpoint(tmp_path / name, values)
    found = plan(load_recipe(write_recipe(tmp_path))).findings
    assert [fault.name for fault in found] == ["other-base:b"]
    assert np.isclose(float(found[0].text.split("cosine of ")[1].split()[0]), 0, atol=0.01)
