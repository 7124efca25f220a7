"""What the documentation shows runs: Python, recipes, and the commands of hub-magmax."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import click
import pytest
import torch
import yaml

import hub_magmax as hm
from hub_magmax.cli import main
from hub_magmax.evaluation.evaluators import evaluator_names, get_evaluator
from hub_magmax.recipe.loading import json_schema, parse_recipe
from hub_magmax.recipe.schema import Recipe

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = (README, *sorted((ROOT / "docs").glob("*.md")))
DOCS = {path.name: path for path in DOCUMENTS}

#: How the program is called, whatever comes before.
CALL = re.compile(r"(?:(?:^|[ /])hub-magmax|-m hub_magmax) ")

#: The method that docs/plugins.md writes.
PLUGIN = "agreeing_average"

#: What fragments of recipes are put into.
AROUND = {
    "base_model": "me/vit-base",
    "tasks": [{"name": name, "model": f"me/vit-{name}"} for name in ("animals", "vehicles", "plants")],
}


@cache
def blocks(path: Path, language: str) -> tuple[str, ...]:
    return tuple(re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), re.M | re.S))


def every(language: str) -> list:
    return [
        pytest.param(block, id=f"{path.name}-{number}")
        for path in DOCUMENTS
        for number, block in enumerate(blocks(path, language), 1)
        if PLUGIN not in block  # which has a test of its own
    ]


def commands() -> list[str]:
    """Return the lines of console blocks that call hub-magmax."""
    lines = [line for path in DOCUMENTS for block in blocks(path, "console") for line in block.splitlines()]
    return sorted({line for line in lines if CALL.search(line)})


def mentions() -> list[str]:
    """Return the calls of hub-magmax in running text, which may lack arguments."""
    texts = [path.read_text(encoding="utf-8") for path in DOCUMENTS]
    return sorted({span for text in texts for span in re.findall("`([^`\n]+)`", text) if CALL.search(span)})


def command_of(line: str) -> tuple[click.Command, list[str]]:
    """Return the verb that a command line calls, and its arguments."""
    verb, *arguments = shlex.split(line[CALL.search(line).end() :], comments=True)
    return main.get_command(click.Context(main), verb), arguments


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("path", DOCUMENTS[1:], ids=lambda path: path.name)
def test_documents_are_short(path):
    # Tables of results are looked up and not read.
    most = 300 if path.stem.startswith(("experiments", "performance")) else 200
    assert len(path.read_text(encoding="utf-8").splitlines()) <= most


def test_there_is_something_to_check():
    assert len(blocks(README, "python")) == 2 and len(blocks(README, "yaml")) == 1
    assert len(commands()) > 10


@pytest.mark.parametrize("block", every("yaml"))
def test_yaml_is_a_recipe_or_a_part_of_one(block):
    values = yaml.safe_load(block)
    assert isinstance(parse_recipe(AROUND | values), Recipe)


@pytest.mark.parametrize("line", commands())
def test_commands_use_verbs_and_options_that_exist(line):
    command, arguments = command_of(line)
    with click.Context(command) as context:
        command.parse_args(context, arguments)  # raises UsageError for what the verb does not take


@pytest.mark.parametrize("line", mentions())
def test_mentioned_commands_exist(line):
    if line == "hub-magmax --help":
        return
    command, arguments = command_of(line)
    options = {option for param in command.params for option in param.opts}
    assert {word for word in arguments if word.startswith("-")} <= options


@pytest.mark.slow
def test_readme_python_runs(quickstart_folder, hub, tmp_path, monkeypatch, capsys):
    (tmp_path / "quickstart").symlink_to(quickstart_folder)
    monkeypatch.chdir(tmp_path)
    whole, core = blocks(README, "python")
    names: dict = {}
    exec(compile(whole, "README.md", "exec"), names)
    assert "merged       56 tensors" in capsys.readouterr().out
    assert names["card"].read_text(encoding="utf-8").startswith("---\n")
    published = hub.read("me/digits-merged", "model.safetensors")
    assert published == (tmp_path / "merged-again" / "model.safetensors").read_bytes()
    # The same recipe as the quickstart's, so the same bytes.
    assert published == (quickstart_folder / "merged" / "model.safetensors").read_bytes()
    exec(compile(core, "README.md", "exec"), names)
    assert names["merged"].shape == (64, 64)


@pytest.fixture
def plugin(tmp_path):
    """A folder that looks like an installed package with the method of docs/plugins.md."""
    (tmp_path / "my_methods.py").write_text(blocks(DOCS["plugins.md"], "python")[0])
    announced = tomllib.loads(blocks(DOCS["plugins.md"], "toml")[0])["project"]["entry-points"]
    (group, points), *others = announced.items()
    assert not others
    info = tmp_path / "my_methods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-methods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[{group}]\n" + "".join(f"{name} = {place}\n" for name, place in points.items())
    )
    return tmp_path


#: Merges two small task vectors with two agreements, lists the methods, and merges a recipe.
PLUGIN_AT_WORK = """
import sys, torch, hub_magmax as hm
from hub_magmax.cli import main
task_vectors = torch.tensor([[1.0, -1.0, 2.0], [1.0, 0.75, -2.0]])
for agreement in (0.125, 0.25):
    print(hm.merge_tensors(task_vectors, method="agreeing_average", agreement=agreement).tolist())
main(["methods"], standalone_mode=False)
main(["merge", sys.argv[1]])
"""


def test_plugin_of_the_docs_merges(plugin, family):
    text = next(block for block in blocks(DOCS["plugins.md"], "yaml") if PLUGIN in block)
    tasks = [{"name": name, "model": f"./{name}"} for name in "abc"]
    recipe = yaml.safe_load(text) | {"base_model": "./base", "tasks": tasks}
    (family / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = subprocess.run(
        [sys.executable, "-c", PLUGIN_AT_WORK, str(family / "recipe.yaml")],
        env=os.environ | {"PYTHONPATH": f"{plugin}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second, *rest = done.stdout.splitlines()
    # Of the sums 2, −0.25 and 0 the second is a seventh of what cancels in it.
    assert first == "[1.0, -0.125, 0.0]"
    assert second == "[1.0, 0.0, 0.0]"
    summary = "Average, without the elements in which the tasks mostly cancel each other."
    assert any(re.fullmatch(rf"{PLUGIN} +{re.escape(summary)}", line) for line in rest)
    assert (family / "merged" / "model.safetensors").is_file()


def described_keys(heading: str) -> set[str]:
    """Return the first cells of the tables below a heading of the pages about recipes."""
    pages = ("recipes.md", "evaluation.md", "comparison.md", "data.md")
    text = "\n".join(DOCS[name].read_text(encoding="utf-8") for name in pages)
    section = re.search(rf"^##+ {re.escape(heading)}\n(.*?)(?=^##|\Z)", text, re.M | re.S)[1]
    cells = re.findall(r"^\| (`[a-z_`, ]+`) \|", section, re.M)
    return {key for cell in cells for key in re.findall("[a-z_]+", cell)}


@pytest.mark.parametrize(
    ("heading", "model"),
    [
        ("Top level", None),
        ("`tasks`", "Task"),
        ("`method`", "Method"),
        ("`preference`", "Preference"),
        ("Data", "Data"),
        ("`tensors`", "TensorRule"),
        ("`evaluation`", "Evaluation"),
        ("`compare`", "Compare"),
        ("`sweep`", "Sweep"),
        ("Statistics", "Statistics"),
        ("`output`", "Output"),
    ],
)
def test_every_key_of_a_recipe_is_described(heading, model):
    schema = json_schema()
    properties = schema["properties"] if model is None else schema["$defs"][model]["properties"]
    assert described_keys(heading) == set(properties)


def test_every_key_of_an_estimate_is_described():
    kinds = ("Labels", "Transport", "Mmd", "Cosine", "Search")
    properties = [json_schema()["$defs"][kind]["properties"] for kind in kinds]
    assert described_keys("Estimates") == set().union(*properties)


def test_every_evaluator_is_described_with_its_options():
    text = DOCS["evaluation.md"].read_text(encoding="utf-8")
    for name in evaluator_names():
        row = re.search(rf"^\| `{name}` \|.*\| (.*) \|$", text, re.M)
        assert re.findall("`([a-z_]+)`", row[1]) == list(get_evaluator(name).options)


def test_methods_are_all_described_with_their_defaults():
    text = DOCS["methods.md"].read_text(encoding="utf-8")
    readme = README.read_text(encoding="utf-8")
    for name in hm.methods.method_names():
        method = hm.methods.get_method(name)
        assert f"| `{name}` | {method.scaling:g} |" in text
        assert f"`{name}`" in readme.split("## Methods")[1].split("\n## ")[0]


def test_layers_of_the_design_are_those_that_are_checked():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = [layer.replace("hub_magmax.", "") for layer in contracts[0]["layers"]]
    text = DOCS["design.md"].read_text(encoding="utf-8")
    table = text.split("## Packages")[1].split("\n## ")[0].replace("\\|", "|")
    rows = re.findall(r"^\| (`[a-z]+`(?: [:|] `[a-z]+`)*) \|", table, re.M)
    assert [row.replace("`", "") for row in rows] == layers


def test_links_between_documents_lead_somewhere():
    for path in DOCUMENTS:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / link).exists(), f"{path.name}: {link}"


def test_schedules_are_what_the_table_says():
    tasks = AROUND["tasks"]
    shown = {
        "geometric": ({"ratio": 2.0}, (1, 2, 4)),
        "linear": ({"ratio": 3.0}, (1, 2, 3)),
        "power": ({"exponent": 2.0}, (1, 4, 9)),
    }
    from hub_magmax.preference import resolve_preference

    for kind, (spec, masses) in shown.items():
        recipe = parse_recipe(AROUND | {"preference": {kind: spec}})
        weights = list(resolve_preference(recipe).weights.values())
        assert weights == pytest.approx([mass / sum(masses) for mass in masses])
        assert len(weights) == len(tasks)


def test_the_core_is_torch_alone():
    assert torch.equal(hm.merge_tensors(torch.ones(1, 3)), torch.ones(3))


@pytest.mark.parametrize("block", blocks(DOCS["python.md"], "python"), ids=["models in memory", "tensors"])
def test_python_of_the_guide_runs_as_printed(block):
    exec(compile(block, "python.md", "exec"), {})


def test_the_guide_to_python_lists_every_name():
    text = DOCS["python.md"].read_text(encoding="utf-8").split("## ")[0]
    listed = set(re.findall(r"`(\w+)`", "\n".join(row for row in text.splitlines() if row.startswith("| `"))))
    assert set(hm.__all__) - listed == {"HubMagmaxError", "__version__", "render_card"}
    assert listed <= set(hm.__all__)
    assert all(getattr(hm, name).__doc__ for name in listed)
