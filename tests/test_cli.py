import inspect
import json
import re
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from hub_magmax.cli import VERBS, main
from tests.families import read_merged, write_checkpoint, write_recipe


def call(*arguments: object, stdin: bytes | None = None) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "--debug" in arguments or "Traceback" not in result.stderr, result.stderr
    return result.exit_code, result.stdout, result.stderr


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def damage_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8:12] = b"\xff\xff\xff\xff"
    path.write_bytes(bytes(content))


def lose_shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write_checkpoint(folder, tensors, num_shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()


def hold_a_model(folder: Path) -> None:
    write_checkpoint(folder, {"w": torch.ones(2)})


#: What is wrong, how it comes about, changes to the recipe, and what the message must say.
BAD_INPUTS: dict[str, tuple[Callable[[Path], None] | None, dict[str, object], str]] = {
    "unknown key": (None, {"outptu": {}}, "unknown key 'outptu'; did you mean 'output'?"),
    "unknown task in the preference": (
        None,
        {"preference": {"weights": {"a": 0.5, "x": 0.5}}},
        "there is no task 'x'; the tasks are a, b, c",
    ),
    "weights that do not sum to one": (
        None,
        {"preference": {"weights": {"a": 0.5, "b": 0.2}}},
        "the weights sum to 0.7, expected 1",
    ),
    "missing file": (
        lambda folder: (folder / "b" / "model.safetensors").unlink(),
        {},
        "./b: no safetensors file",
    ),
    "truncated shard": (
        lambda folder: truncate(folder / "b" / "model.safetensors"),
        {},
        "./b, model.safetensors: the file is truncated",
    ),
    "corrupt header": (
        lambda folder: damage_header(folder / "b" / "model.safetensors"),
        {},
        "./b, model.safetensors: not readable as JSON",
    ),
    "index naming a missing shard": (
        lambda folder: lose_shard(folder / "b"),
        {},
        "'model-00002-of-00002.safetensors', which is not there",
    ),
    "shape mismatch": (
        lambda folder: change_tensors(folder / "b", lambda t: t.update(scale=torch.ones(3))),
        {},
        "./b, tensor 'scale': shape [3]. Expected [] as in ./base",
    ),
    "dtype that cannot be merged": (
        lambda folder: change_tensors(
            folder / "b", lambda t: t.update(scale=torch.tensor(1, dtype=torch.int8))
        ),
        {},
        "./b, tensor 'scale': dtype I8 cannot be merged with F32 of ./base",
    ),
    "missing tensor": (
        lambda folder: change_tensors(folder / "b", lambda t: t.pop("scale")),
        {},
        "./b: lacks tensor 'scale' of the base model",
    ),
    "NaN in a checkpoint": (
        lambda folder: change_tensors(
            folder / "b", lambda t: t["embed.weight"].view(-1)[17:18].fill_(torch.nan)
        ),
        {},
        "tensor 'embed.weight', byte",
    ),
    "output folder that already holds a model": (
        lambda folder: hold_a_model(folder / "merged"),
        {},
        "merged: the output folder already holds a model",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_one_paragraph_exit_one_and_no_output(family, case):
    break_it, changes, message = BAD_INPUTS[case]
    if break_it is not None:
        break_it(family)
    recipe = write_recipe(family, **changes)
    there_before = set(family.rglob("*"))
    code, out, err = call("run", recipe)
    assert code == 1
    assert out == ""
    assert message in err
    paragraph = [line for line in err.strip().split("\n") if not line.startswith("merging ")]
    assert len(paragraph) == 1
    assert paragraph[0].startswith("Error: ")
    assert "Traceback" not in err
    left = set(family.rglob("*")) - there_before
    assert left == set()


@pytest.mark.parametrize("case", ["unknown key", "shape mismatch"])
def test_bad_input_for_machines_is_one_json_value(family, case):
    break_it, changes, _ = BAD_INPUTS[case]
    if break_it is not None:
        break_it(family)
    code, out, _ = call("plan", write_recipe(family, **changes), "--json")
    assert code == 1
    assert json.loads(out)["error"]["what"]


def test_run_merges_and_writes_the_card(family):
    code, out, _ = call("run", write_recipe(family))
    assert code == 0
    assert f"wrote {family / 'merged'}\n" in out
    assert (family / "merged" / "README.md").read_text().startswith("---\n")


@pytest.mark.parametrize("verb", ["run", "merge", "card"])
def test_what_was_written_is_found_from_where_the_command_was_given(family, monkeypatch, verb):
    recipe = write_recipe(family, output={"path": "made/here"})
    monkeypatch.chdir(family.parent)
    if verb == "card":
        assert call("run", recipe)[0] == 0
    code, out, _ = call(verb, recipe.relative_to(family.parent))
    (written,) = [line.removeprefix("wrote ") for line in out.splitlines() if line.startswith("wrote ")]
    assert code == 0 and not Path(written).is_absolute() and Path(written).exists()


def test_run_again_goes_on_from_what_is_there(family):
    recipe = write_recipe(family)
    call("run", recipe)
    (family / "merged" / "README.md").unlink()
    written = (family / "merged" / "model.safetensors").stat().st_mtime_ns
    assert call("run", recipe)[0] == 0
    assert (family / "merged" / "model.safetensors").stat().st_mtime_ns == written
    assert (family / "merged" / "README.md").is_file()


def test_merge_after_its_end_answers_with_the_same_report(family):
    recipe = write_recipe(family)
    first, again = call("merge", recipe, "--json"), call("merge", recipe, "--json")
    assert first[:2] == again[:2]


def test_verbs_that_read_answer_in_json(family):
    recipe = write_recipe(family, preference={"geometric": {"ratio": 2}})
    for verb in ("validate", "lock", "prefer", "plan", "merge"):
        code, out, _ = call(verb, recipe, "--json")
        assert code == 0, verb
        assert json.loads(out), verb
    for words in (("verify", family / "merged"), ("methods",), ("schema",), ("card", recipe)):
        code, out, _ = call(*words, "--json")
        assert code == 0, words
        assert json.loads(out), words


def test_lock_beside_the_recipe_is_followed(family):
    recipe = write_recipe(family, preference={"weights": {"a": 1}})
    call("lock", recipe)
    locked = json.loads((family / "recipe.lock.json").read_text())
    assert locked["preference"]["weights"] == {"a": 1.0, "b": 0.0, "c": 0.0}
    assert call("merge", recipe)[0] == 0
    write_recipe(family, preference={"weights": {"b": 1}})
    code, _, err = call("merge", recipe, "--output", family / "other")
    assert (code, err.startswith("the lock's checkpoints stay; resolved anew: preference")) == (0, True)
    lock = json.loads((family / "other" / "recipe.lock.json").read_text())
    assert lock["preference"]["weights"] == {"a": 0.0, "b": 1.0, "c": 0.0}


def test_output_option_decides_where_it_goes(family):
    code, _, _ = call("merge", write_recipe(family), "--output", family / "elsewhere")
    assert code == 0
    assert read_merged(family / "elsewhere")
    assert not (family / "merged").exists()


def test_device_option_computes_there_and_gives_the_same_weights(family):
    recipe = write_recipe(family)
    assert call("merge", recipe, "--output", family / "there", "--device", "cpu")[0] == 0
    assert call("merge", recipe, "--output", family / "here")[0] == 0
    there, here = read_merged(family / "there"), read_merged(family / "here")
    assert all(there[name].equal(here[name]) for name in here)
    code, _, err = call("merge", recipe, "--device", "tpu")
    assert code == 1 and "device" in err


def test_verify_finds_a_changed_byte(family):
    call("merge", write_recipe(family))
    path = family / "merged" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    code, _, err = call("verify", family / "merged")
    assert code == 1
    assert "the merge report says" in err


def test_verify_of_a_folder_that_no_merge_made_is_refused(family):
    code, _, err = call("verify", family / "base")
    assert code == 1
    assert "no merge_report.json" in err


def test_card_before_the_merge_says_what_to_do(family):
    code, _, err = call("card", write_recipe(family))
    assert code == 1
    assert "Run `hub-magmax merge` first." in err


def test_wrong_usage_exits_two():
    assert call("merge")[0] == 2
    assert call("no-such-verb")[0] == 2


def test_debug_shows_the_traceback(tmp_path):
    code, out, err = call("validate", tmp_path / "none.yaml", "--debug")
    assert (code, out) == (1, "")
    assert err.startswith("Traceback") and "RecipeError: " in err and "cannot be read" in err


def test_help_lists_every_verb():
    _, out, _ = call("--help")
    verbs = re.findall(r"^  ([a-z-]+) ", out.split("Commands:")[1], flags=re.MULTILINE)
    assert verbs == sorted(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb):
    code, out, _ = call(verb, "--help")
    assert code == 0
    assert f"Usage: main {verb} [OPTIONS]" in out
    assert "--json" in out and "--debug" in out


@pytest.mark.parametrize("verb", VERBS)
def test_no_function_of_a_verb_takes_what_its_command_does_not_name(verb):
    parameters = inspect.signature(main.get_command(click.Context(main), verb).callback).parameters
    assert len(parameters) <= 8
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def test_help_and_import_load_nothing_heavy():
    code = (
        "import sys, hub_magmax, hub_magmax.cli\n"
        "for verb in hub_magmax.cli.VERBS: hub_magmax.cli.main.get_command(None, verb)\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'datasets', 'pydantic', 'numpy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_answers_from_headers_does_not_load_torch(family):
    code = (
        "import sys\n"
        "from hub_magmax.cli import main\n"
        "for verb in ('validate', 'lock', 'plan'):\n"
        "    main([verb, sys.argv[1]], standalone_mode=False)\n"
        "    assert 'torch' not in sys.modules, verb"
    )
    command = [sys.executable, "-c", code, str(write_recipe(family))]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def test_merging_by_compiled_loops_does_not_load_torch(family):
    methods = [
        {"name": "average"},
        {"name": "random_mix"},
        {"name": "single_task"},
        {"name": "magmax"},
        {"name": "dare_ties"},
        {"name": "breadcrumbs", "scope": "model"},
        {"name": "ties", "rescale": "norm"},
        {"name": "ties", "rescale": "norm", "consensus": "sum"},
        {"name": "ties", "rescale": "norm", "scope": "model"},
        {"name": "breadcrumbs", "rescale": "norm"},
        {"name": "tunable_magmax"},
        {"name": "tunable_magmax", "selection": "top-n"},
    ]
    recipes = []
    for number, method in enumerate(methods):
        preference, output = {"weights": {"a": 0.5, "b": 0.3, "c": 0.2}}, {"path": f"merged-{number}"}
        recipe = write_recipe(family, method=method, preference=preference, output=output)
        recipes.append(recipe.rename(family / f"{number}-{'-'.join(method.values())}.yaml"))
    code = (
        "import sys, hub_magmax.kernels.dispatch as seam\n"
        "from hub_magmax.cli import main\n"
        "from hub_magmax.pipeline import plan\n"
        "from hub_magmax.planning.process_memory import takes_torch\n"
        "from hub_magmax.recipe.loading import load_recipe\n"
        "seam.LOAD_ABOVE_ELEMENTS = seam.COMPILE_ABOVE_ELEMENTS = 0\n"
        "for recipe in sys.argv[1:]:\n"
        "    assert not takes_torch(plan(load_recipe(recipe))), recipe\n"
        "    main(['merge', recipe], standalone_mode=False)\n"
        "    assert 'torch' not in sys.modules, recipe"
    )
    subprocess.run([sys.executable, "-c", code, *recipes], check=True, stdout=subprocess.DEVNULL)


def test_the_methods_of_recipes_are_found_without_torch():
    code = (
        "import sys\n"
        "from hub_magmax.registry import METHODS\n"
        "found = [METHODS.get(name).name for name in METHODS.names()]\n"
        "assert found == [*METHODS.names()] and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_answers_in_a_real_process():
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "hub_magmax", "--help"], check=True, capture_output=True, text=True
    )
    assert "try `quickstart`" in done.stdout
    assert time.perf_counter() - started < 10  # a hang, not a benchmark: benchmarks/ measures the half second


def test_nothing_written_names_a_folder_of_this_machine(family):
    call("run", write_recipe(family))
    for path in (family / "merged").iterdir():
        assert str(family).encode() not in path.read_bytes(), path.name


def test_the_verb_of_the_docs_is_a_file_and_a_line_of_the_table(family, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "contributing.md").read_text(encoding="utf-8")
    code = page.split("## A verb")[1].split("```python\n")[1].split("```")[0]
    module = types.ModuleType("hub_magmax.cli.sizes")
    exec(compile(code, "contributing.md", "exec"), vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(VERBS, "sizes", "sizes")
    assert "sizes          Show the bytes of each file of weights in FOLDER." in call("--help")[1]
    call("merge", write_recipe(family))
    code, out, _ = call("sizes", family / "merged", "--json")
    weights = family / "merged" / "model.safetensors"
    assert (code, json.loads(out)) == (0, {"model.safetensors": weights.stat().st_size})
    code, _, err = call("sizes", family / "base")
    assert code == 1 and "no merge_report.json" in err


def test_options_of_a_method_are_told_with_their_values_and_defaults_in_words():
    _, out, _ = call("methods", "wudi")
    assert out.splitlines()[1:] == [
        "      scaling  a number, or auto (default: 1)",
        "      share    a number above 0 and at most 1 or adaptive (default: adaptive)",
        "      time     a number above 0 (default: not set)",
    ]
    options = json.loads(call("methods", "wudi", "--json")[1])[0]["options"]
    assert options["time"] == {"allowed": "a number above 0", "default": None, "required": False}
    assert "None" not in call("methods")[1]
    assert "backwards  true or false (default: false)" in call("methods", "model_stock")[1]
