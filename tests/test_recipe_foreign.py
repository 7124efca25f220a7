import json
from pathlib import Path

import pytest
import yaml

from hub_magmax.errors import RecipeError
from hub_magmax.recipe.loading import load_recipe, parse_recipe
from tests.families import write_recipe
from tests.test_cli import call

BASE = "base_model: me/base\nmerge_method: {}\nmodels:\n"
TWO = BASE + "  - {{model: me/base}}\n  - {{model: me/a, parameters: {{weight: {}}}}}\n"
TWO += "  - {{model: ./b, parameters: {{weight: {}}}}}\n"


def refusal(folder: Path, text: str, name: str = "mix.yml") -> RecipeError:
    (folder / name).write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(folder / name)
    return caught.value


def translated(folder: Path, text: str) -> dict:
    """Return the recipe that the message prints, checked."""
    hint = refusal(folder, text).hint
    values = yaml.safe_load(hint.partition("\n\n")[2].rpartition("\nSave it")[0])
    parse_recipe(values, folder=folder)
    return values


def test_a_task_arithmetic_of_mergekit_becomes_coefficients(tmp_path):
    values = translated(tmp_path, TWO.format("task_arithmetic", 0.8, -0.5) + "parameters: {lambda: 0.7}\n")
    assert values["base_model"] == "me/base"
    assert values["tasks"] == [{"name": "a", "model": "me/a"}, {"name": "b", "model": "./b"}]
    assert values["method"] == {"name": "task_arithmetic", "scaling": 0.7}
    assert values["preference"] == {"coefficients": {"a": 0.8, "b": -0.5}}


def test_a_mean_counts_the_base_model_in_the_scaling(tmp_path):
    # (0.4 base + 1 a + 0.6 b) / 2 = base + 0.8 (0.625 τ_a + 0.375 τ_b)
    text = "merge_method: linear\nbase_model: me/base\nmodels:\n"
    text += "".join(
        f"  - {{model: {m}, parameters: {{weight: {w}}}}}\n"
        for m, w in (("me/base", 0.4), ("a", 1), ("b", 0.6))
    )
    values = translated(tmp_path, text + "dtype: bfloat16\n")
    assert values["method"] == {"name": "average", "scaling": 0.8}
    assert values["preference"] == {"weights": {"a": 0.625, "b": 0.375}}
    assert values["output"]["dtype"] == "bfloat16"


def test_ties_becomes_shares_and_a_density(tmp_path):
    values = translated(
        tmp_path, TWO.format("ties", 0.6, 0.2) + "parameters: {density: 0.5, int8_mask: true}\n"
    )
    assert values["method"] == {"name": "ties", "density": 0.5, "scaling": 1.0}
    assert values["preference"] == {"weights": {"a": 0.75, "b": 0.25}}


def test_adapters_on_one_model_are_tasks_over_it(tmp_path):
    text = "merge_method: linear\nmodels:\n"
    text += "".join(f"  - {{model: me/base+lora/{n}, parameters: {{weight: 1}}}}\n" for n in "ab")
    values = translated(tmp_path, text)
    assert values["base_model"] == "me/base"
    assert [task["model"] for task in values["tasks"]] == ["lora/a", "lora/b"]
    assert values["method"] == {"name": "average", "scaling": 1.0}


@pytest.mark.parametrize(
    ("text", "place", "why"),
    [
        (
            TWO.format("slerp", 1, 1) + "parameters: {t: 0.5}\n",
            "line 7, column 14, parameters.t",
            "belongs to slerp",
        ),
        (TWO.format("ties", "[0.1, 0.9]", 1), "line 5, column 32", "a weight that differs between layers"),
        (TWO.format("dare_ties", 1, 1), "line 2, column 1, merge_method", "sums the tasks that agree"),
        (TWO.format("ties", 1, -1), "line 3, column 1, models", "weights below 0"),
        (
            TWO.format("ties", 1, 1) + "chat_template: auto\n",
            "line 7, column 1, chat_template",
            "no counterpart",
        ),
        (
            TWO.format("ties", 1, 1) + "slices: []\n",
            "line 7, column 1, slices",
            "layers are not put together",
        ),
        (TWO.format("linear", 1, 1), "models.0: no counterpart: it has no weight", "also in mergekit"),
        (TWO.format("ties", 1, "&x 0.5"), "line 2, column 1, merge_method", "ties is a method here too"),
    ],
)
def test_what_has_no_counterpart_is_named_with_its_line(tmp_path, text, place, why):
    error = refusal(tmp_path, text)
    assert "this is a mergekit recipe" in error.what
    assert any(place in line and why in line for line in str(error).split("\n")), str(error)
    assert "did you mean" not in str(error)


def test_keys_that_mergekit_reads_over_are_named(tmp_path):
    error = refusal(tmp_path, TWO.format("ties", 1, 1) + "normalise: true\nparameters: {lamda: 2}\n")
    assert "line 7, column 1, normalise: mergekit reads over this key" in str(error)
    assert "parameters.lamda: mergekit reads over this key here" in str(error)
    assert {problem.kind for problem in error.problems} == {"mergekit"}


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("m.yml", "experts: []\ngate_mode: hidden\nbase_model: a\n", "mergekit-moe"),
        ("m.yml", "genome: {models: [a]}\ntasks: []\n", "mergekit-evolve"),
        ("m.yml", "merge_method: linear\n---\nmerge_method: linear\n", "mergekit-multi, with 2 stages"),
        ("adapter_config.json", '{"peft_type": "LORA", "r": 8}', "configuration of a LORA adapter"),
        ("config.json", '{"model_type": "llama"}', "configuration of a model (llama)"),
        ("model.safetensors.index.json", '{"weight_map": {}}', "index of a checkpoint's weights"),
        ("README.md", "---\nlicense: mit\n---\n# A model\n", "this is a model card"),
    ],
)
def test_another_kind_of_file_is_called_what_it_is(tmp_path, name, text, told):
    error = refusal(tmp_path, text, name)
    assert told in error.what
    assert error.hint


def test_files_beside_a_recipe_are_called_what_they_are(family):
    recipe = write_recipe(family)
    call("run", recipe)
    call("lock", recipe)
    for path, told in {
        "recipe.lock.json": "this is a lock. Expected a recipe of hub_magmax. Give the recipe",
        "merged/merge_report.json": "this is the report of a merge",
        "merged/README.md": "this is a model card",
        "merged": "this is a folder. Its recipe is",
        "base": "this is a model's folder, and no recipe",
    }.items():
        assert told in call("plan", family / path)[2], path


def test_a_recipe_that_only_lacks_keys_is_told_what_it_lacks(tmp_path):
    assert "tasks: the key 'tasks' is required" in str(refusal(tmp_path, "base_model: ./a\n"))
    assert "base_model: the key" in str(
        refusal(tmp_path, json.dumps({"tasks": [{"name": "a", "model": "b"}]}))
    )
