import json
import shutil
from pathlib import Path

import pytest

from hub_magmax.errors import RecipeError
from hub_magmax.recipe.loading import load_recipe
from tests.families import write_recipe
from tests.test_cli import call


def refusal(folder: Path, text: str, name: str = "mix.yml") -> RecipeError:
    (folder / name).write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(folder / name)
    return caught.value


@pytest.mark.parametrize(
    "text",
    [
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n",
        "slices: [{sources: [{model: a, layer_range: [0, 2]}]}]\nmerge_method: passthrough\n",
        "experts: []\ngate_mode: hidden\nbase_model: a\n",
        "genome: {models: [a]}\ntasks: []\n",
        "merge_method: linear\n---\nmerge_method: linear\n",
        "models: [{model: &a x}, {model: *a}]\nmerge_method: ties\n",
    ],
)
def test_a_file_of_mergekit_names_the_command_that_imports_it(tmp_path, text):
    error = refusal(tmp_path, text)
    assert error.what == "this is a file of mergekit"
    assert f"`hub-magmax import {tmp_path / 'mix.yml'}`" in error.hint


@pytest.mark.parametrize("verb", ["run", "validate", "plan"])
def test_verbs_for_recipes_name_the_import(tmp_path, verb):
    (tmp_path / "a mix.yml").write_text("merge_method: linear\nmodels: []\n")
    code, _, err = call(verb, tmp_path / "a mix.yml")
    assert code == 1 and "a file of mergekit" in err
    assert f"hub-magmax import '{tmp_path / 'a mix.yml'}'" in err


def test_folder_and_card_of_a_model_that_mergekit_merged_name_the_import(tmp_path):
    (tmp_path / "mergekit_config.yml").write_text("merge_method: linear\n")
    card = "---\nlicense: mit\n---\n# Merge\n\n```yaml\nmerge_method: linear\n```\n"
    assert "shows a configuration of mergekit" in str(refusal(tmp_path, card, "README.md"))
    for path in (tmp_path, tmp_path / "README.md"):
        assert f"hub-magmax import {path}" in call("plan", path)[2]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("adapter_config.json", '{"peft_type": "LORA", "r": 8}', "configuration of a LORA adapter"),
        ("config.json", '{"model_type": "llama"}', "configuration of a model (llama)"),
        ("model.safetensors.index.json", '{"weight_map": {}}', "index of a checkpoint's weights"),
        ("README.md", "---\nlicense: mit\n---\n# A model\n", "this is a model card"),
        ("card.txt", "license: mit\n", "this is a model card"),
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
    shutil.rmtree(family / "merged")


def test_a_recipe_that_only_lacks_keys_is_told_what_it_lacks(tmp_path):
    assert "tasks: the key 'tasks' is required" in str(refusal(tmp_path, "base_model: ./a\n"))
    assert "base_model: the key" in str(
        refusal(tmp_path, json.dumps({"tasks": [{"name": "a", "model": "b"}]}))
    )
