"""What `--help` shows fits a screen, and its examples run."""

import re
import shlex
import shutil
from functools import cache

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from hub_magmax.cli import VERBS, main
from hub_magmax.merging.execution import merge
from hub_magmax.pipeline import plan, run
from hub_magmax.publishing.pushing import push
from hub_magmax.recipe.loading import load_recipe
from tests.classifiers import classifier_recipe, write_classifiers, write_rows
from tests.families import yaml_text
from tests.test_cli import call
from tests.test_fleet_signing import put_stand_in
from tests.tiny_llama import write_llama_family

#: Verbs of a finished merge.
OF_MERGED = ("canary", "card", "evaluate", "predict", "push", "replay", "route", "sign", "verify")


@cache
def help_of(*words: str) -> str:
    result = CliRunner().invoke(main, [*words, "--help"], env={"COLUMNS": "80"}, prog_name="hub-magmax")
    assert result.exit_code == 0
    return result.output


def examples() -> list[str]:
    return [line.strip() for verb in VERBS for line in re.findall("^ +hub-magmax .*$", help_of(verb), re.M)]


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_fits_a_screen_and_has_an_example(verb):
    lines = help_of(verb).splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 40
    assert any(shlex.split(line)[1] == verb for line in examples())


def test_list_of_verbs_says_in_whole_sentences_what_they_do():
    lines = help_of().splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 45  # a line for each verb
    assert [line for line in lines[1:] if line.endswith("...")] == []


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A recipe with everything that a verb may need, its checkpoints and examples, and its merged model."""
    folder = tmp_path_factory.mktemp("family")
    write_classifiers(folder, {"base": [0.0, 0.1, 0.0], "a": [1.0, 0.1, 0.0], "b": [0.0, 0.1, 4.0]})
    write_rows(folder / "rows.parquet", [0] * 30 + [1] * 20 + [2] * 10)  # enough for a router
    write_rows(folder / "others.parquet", [0] * 5 + [1, 1, 2])
    rows, others = {"dataset": "./rows.parquet"}, {"dataset": "./others.parquet"}
    values = classifier_recipe(
        evaluation={"evaluator": "image-classification", "tasks": {"a": rows, "b": others}},
        training={
            "epochs": 0.1,
            "order": "from_base",
            "data": {"a": dict(rows), "b": dict(others)},
            "alternate": {"rounds": 1},
        },
        compare={"tune": dict(rows), "report": dict(others), "methods": ["average"], "scaling": [1.0]},
        sweep={"budget": 3},
        output={"path": "merged"},
    )
    (folder / "recipe.yaml").write_text(yaml_text(values))
    (folder / "other.yaml").write_text(yaml_text(values | {"method": "average", "output": {"path": "other"}}))
    (folder / "key.pem").write_text("a key")
    for number, name in enumerate(("before.csv", "after.csv")):
        (folder / name).write_text("\n".join(["loss", *(str(n % 7 + number) for n in range(40))]))
    north = {key: values[key] for key in ("schema", "base_model", "tasks")}
    north |= {"method": "magmax", "output": {"path": "north", "format": "selection"}}
    (folder / "north.yaml").write_text(yaml_text(north))
    write_what_mergekit_merged(folder)
    (folder / "questions.yaml").write_text(yaml_text(write_llama_family(folder)))
    merge(plan(folder / "questions.yaml"))
    for name in ("recipe", "other", "north"):
        run(load_recipe(folder / f"{name}.yaml"))
    return folder


def write_what_mergekit_merged(folder):
    """Write a configuration of mergekit, and a folder `theirs` with what it gives."""
    text = "merge_method: linear\nmodels:\n"
    text += "".join(f"- {{model: ./{name}, parameters: {{weight: 1}}}}\n" for name in "ab")
    (folder / "mergekit_config.yml").write_text(text)
    shutil.copytree(folder / "a", folder / "theirs")
    (folder / "theirs/mergekit_config.yml").write_text(text)
    one, other = (load_file(folder / name / "model.safetensors") for name in "ab")
    means = {name: (one[name] + other[name]) / 2 for name in one}
    save_file(means, folder / "theirs/model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def shop(family, tmp_path, monkeypatch):
    """The same in the current folder."""
    folder = shutil.copytree(family, tmp_path / "shop")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def stand_in_for_signing(monkeypatch):
    put_stand_in(monkeypatch)


@pytest.mark.usefixtures("stand_in_for_signing")
@pytest.mark.parametrize("line", [line for line in examples() if " quickstart" not in line])
def test_example_runs(line, shop, hub):
    _, verb, *words = shlex.split(line)
    if "me/merged" in words:  # after another model
        push(shop / "other", "me/merged")
        push(shop / "merged", "me/merged")
    if verb == "replay":
        assert call("predict", "merged", "rows.parquet", "--record", words[0])[0] == 0
    if verb not in OF_MERGED:
        shutil.rmtree(shop / "merged")
    code, out, err = call(verb, *words)
    assert code == 0, err
    assert out.strip()


@pytest.mark.slow
def test_example_of_the_quickstart_runs(quickstart_folder, tmp_path, monkeypatch):
    (line,) = [line for line in examples() if " quickstart" in line]
    shutil.copytree(quickstart_folder, tmp_path / "quickstart")
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(*shlex.split(line)[1:])
    assert code == 0 and "The merged model   quickstart/merged" in out
