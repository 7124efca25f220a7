import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hub_magmax.errors import HubMagmaxError, RecipeError
from hub_magmax.recipe.loading import json_schema, load_recipe, parse_recipe
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.values import parse_size
from tests.families import recipe_values


def refusal(folder: Path, text: str) -> RecipeError:
    (folder / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(folder / "recipe.yaml")
    return caught.value


def refusal_of(**changes: object) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(recipe_values(**changes))
    return str(caught.value)


def test_smallest_recipe_has_defaults_that_work():
    recipe = parse_recipe({"base_model": "me/base", "tasks": [{"name": "a", "model": "me/a@v1"}]})
    assert recipe.method.name == "tunable_magmax"
    assert recipe.preference is None
    assert recipe.output.shard_size == 5 * 10**9
    assert recipe.seed == 0


def test_everything_wrong_is_reported_at_once_with_line_and_key(tmp_path):
    error = refusal(
        tmp_path,
        """\
base_model: ./base
tasks:
  - {name: a, model: ./a}
  - {name: b, model: ./b}
method: {name: ties, densty: 0.3, density: 2}
preference: {weights: {a: 0.7, c: 0.2}}
outptu: {path: x}
""",
    )
    text = str(error)
    assert "6 problems" in text or "5 problems" in text
    for fragment in (
        "line 7, column 1, outptu: unknown key 'outptu'; did you mean 'output'?",
        "line 5, column 22, method.densty: ties has no option 'densty'; did you mean 'density'?",
        "line 5, column 35, method.density: 2 should be at most 1",
        "line 6, column 32, preference.weights.c: there is no task 'c'",
        "line 6, column 14, preference.weights: the weights sum to 0.9, expected 1",
    ):
        assert fragment in text


def test_programs_get_one_object_per_problem_with_its_place_and_the_next_step(tmp_path):
    error = refusal(
        tmp_path,
        "base_model: ./base\ntasks: [{name: a, model: ./a}]\n"
        "preference:\n  weights: {b: 1}\noutput: {memory: 1GB,\n  dtpye: bf16}\nseed: -1\n",
    )
    path = str(tmp_path / "recipe.yaml")
    assert error.to_dict()["problems"] == [
        {
            "kind": "conflict",
            "message": "there is no task 'b'",
            "file": path,
            "key": ("preference", "weights", "b"),
            "line": 4,
            "column": 13,
            "expected": "",
            "hint": "the tasks are a",
        },
        {
            "kind": "unknown_key",
            "message": "unknown key 'dtpye'",
            "file": path,
            "key": ("output", "dtpye"),
            "line": 6,
            "column": 3,
            "expected": "",
            "hint": "did you mean 'dtype'?",
        },
        {
            "kind": "value",
            "message": "-1 should be at least 0",
            "file": path,
            "key": ("seed",),
            "line": 7,
            "column": 1,
            "expected": "",
            "hint": "`hub-magmax schema` prints the values that each key takes",
        },
    ]
    assert error.where == path


def test_text_that_is_no_yaml_has_its_line_and_column_for_programs(tmp_path):
    (problem,) = refusal(tmp_path, "base_model: ./b\nseed: 1\nseed: 2\n").problems
    assert (problem.kind, problem.line, problem.column, problem.hint) == ("yaml", 3, 1, "Keep one of them.")


def test_unknown_key_names_the_nearest_one():
    assert "did you mean 'shard_size'?" in refusal_of(output={"shrad_size": "5GB"})


def test_unknown_method_names_the_nearest_one():
    assert "Did you mean 'magmax'?" in refusal_of(method="magmx")


def test_option_of_another_method_is_refused():
    assert "magmax has no option 'density'" in refusal_of(method={"name": "magmax", "density": 0.5})


def test_unknown_task_in_the_preference_names_the_nearest_one():
    assert "there is no task 'bb'; did you mean 'b'?" in refusal_of(
        preference={"weights": {"a": 0.5, "bb": 0.5}}
    )


def test_weights_that_do_not_sum_to_one_come_with_weights_that_do():
    text = refusal_of(preference={"weights": {"a": 3, "b": 1}})
    assert "sum to 4" in text
    assert "a: 0.75" in text


@pytest.mark.parametrize(
    "weights", [{"a": -0.5, "b": 1.5}, {"a": float("nan"), "b": 1}, {"a": True}, {"a": "x"}]
)
def test_weights_that_are_no_shares_are_refused(weights):
    assert "preference.weights" in refusal_of(preference={"weights": weights})


def test_two_kinds_of_preference_are_refused():
    text = refusal_of(preference={"weights": {"a": 1}, "geometric": {"ratio": 2}})
    assert "exactly one of weights, coefficients, geometric, linear, power, labels" in text


def test_a_task_named_twice_is_refused():
    tasks = [{"name": "a", "model": "./a"}, {"name": "a", "model": "./b"}]
    assert "the name 'a' is used twice" in refusal_of(tasks=tasks)


@pytest.mark.parametrize("name", ["base_model", "nothing"])
def test_names_that_rules_take_are_those_of_no_task(name):
    assert f"'{name}' is taken" in refusal_of(tasks=[{"name": name, "model": "./a"}])


def test_take_must_name_a_source():
    assert "there is no task 'd'" in refusal_of(tensors=[{"match": "*", "take": "d"}])


def test_key_written_twice_is_refused(tmp_path):
    error = refusal(tmp_path, "base_model: ./base\ntasks: []\nbase_model: ./other\n")
    assert "appears twice, first on line 1" in str(error)
    assert "line 3" in str(error)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("base_model: [", "not valid YAML"),
        ("- a\n- b\n", "not a mapping"),
        ("", "not a mapping"),
        ("a: &x [1]\nb: *x\n", "anchors and aliases"),
        ("a:\n\tb: 1\n", "indented by spaces, and not by tabs"),
        ("a: 1\n---\nb: 2\n", "A file holds one recipe"),
        ("a: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("[" * 5000, "recipe.yaml"),
        ("a: 2001-99-99\n", "recipe.yaml"),
    ],
)
def test_text_that_is_no_recipe_is_refused_with_its_place(tmp_path, text, reason):
    assert reason in str(refusal(tmp_path, text))


#: Names that YAML takes for true, false, nothing, numbers or dates.
ODD_NAMES = ("no", "on", "Yes", "null", "1e3", "1.5e3", "12_3", "0x1F", "2024", "2024-01-01")


@pytest.mark.parametrize("name", [*ODD_NAMES, "2024-13-45", "007"])
def test_a_name_is_read_as_it_is_written(tmp_path, name):
    (tmp_path / "recipe.yaml").write_text(
        f"""\
base_model: 2024-01-01
tasks:
  - {{name: {name}, model: {name}}}
  - {{name: b, model: ./b}}
preference: {{weights: {{{name}: 0.75, b: 2.5e-1}}}}
evaluation:
  tasks: {{{name}: {{dataset: ./x, config: {name}, label_column: on}}}}
tensors: [{{match: no, take: {name}}}]
output: {{files_from: {name}, path: {name}, language: [no, en]}}
seed: 1_0
"""
    )
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.base_model == "2024-01-01"
    assert recipe.tasks[0].name == recipe.tasks[0].model == recipe.output.path == name
    assert dict(recipe.preference.weights) == {name: 0.75, "b": 0.25}
    assert list(recipe.evaluation.tasks) == [name]
    # Where text may be left out, null leaves it out.
    assert recipe.evaluation.tasks[name].config == (None if name == "null" else name)
    assert recipe.output.files_from == name
    assert recipe.evaluation.tasks[name].label_column == "on"
    assert (recipe.tensors[0].match, recipe.tensors[0].take) == ("no", name)
    assert recipe.output.language == ("no", "en")
    assert recipe.seed == 10
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_classes_are_called_as_they_are_written(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "base_model: ./b\ntasks: [{name: a, model: ./a}]\n"
        "preference: {labels: {target: {dataset: ./t}, classes: {a: [yes, no, 1.0, 3, 1999-01-01]}}}\n"
    )
    classes = load_recipe(tmp_path / "recipe.yaml").preference.labels.classes
    assert classes == {"a": ("yes", "no", "1.0", 3, "1999-01-01")}


def test_options_that_are_text_are_read_as_they_are_written(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "base_model: ./b\ntasks: [{name: a, model: ./a}]\n"
        "evaluation: {evaluator: {name: multiple-choice, choices_column: on}, tasks: {a: {dataset: ./x}}}\n"
    )
    evaluation = load_recipe(tmp_path / "recipe.yaml").evaluation
    assert evaluation.evaluator.options == {"choices_column": "on"}


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ("seed: 2024-01-01", "line 4, column 1, seed"),
        ("preference: {weights: {no: on}}", "line 4, column 24, preference.weights.no"),
        (
            "output: {push_to_hub: no}",
            "line 4, column 10, output.push_to_hub: False should be a repository on the Hub",
        ),
        ("method: {name: ties, density: 2024-01-01}", "line 4, column 22, method.density"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(tmp_path, line, place):
    text = f"base_model: ./b\ntasks:\n  - {{name: no, model: ./a}}\n{line}\n"
    assert place in str(refusal(tmp_path, text))


HEAD = "base_model: ./b\ntasks: [{name: a, model: ./a}]\n"


@pytest.mark.parametrize(
    ("text", "way"),
    [
        ("method: {name: ties, density: 50%}", "write 0.5"),
        ('method: {name: ties, density: "0,25"}', "write 0.25"),
        ("method: {name: task_arithmetic, scaling: 0,5}", "decimals are written with a point, such as 0.5"),
        ("preference: {weights: {a: 70%}}", "write 0.7"),
        ("seed: 1e3", "write 1000"),
        ("output: {dtype: bf16}", "write bfloat16"),
        ("output: {dtype: torch.float16}", "write float16"),
        ("output: merged", "write output: {path: merged}"),
        ("preference: uniform", "leave preference out"),
        ("preference: {weights: [0.5]}", "write weights: {animals: 0.7"),
        ("tensors: {match: a, take: a}", "write tensors: [{match: "),
        ("method: [ties]", "write method: {name: ties, density: 0.2}"),
        ("weights: {a: 1}", "preference: {weights: {animals: 0.7"),
        ("method: {name: task_arithmetic, lambda: 0.5}", "it is called scaling here"),
        ("merge_method: ties", "it is called method here"),
        ("evaluation: {tasks: {a: test.jsonl}}", "write a: {dataset: test.jsonl}"),
        ("evaluation: {tasks: [test.jsonl]}", "write tasks: {animals: {dataset: me/animals, split: test}}"),
        ("training: {steps: 1, data: {a: [1]}}", "write a: {dataset: me/a}"),
        ("evaluation: {tasks: {a: [x.jsonl]}}", "write a: {dataset: x.jsonl}."),
        ("evaluation: {tasks: {a: [x.csv, y.csv]}}", "write a: {dataset: x.csv}; of several files, name"),
        (
            "training: {steps: 1, data: {a: {dataset: x}}, lora: 8}",
            "should be a mapping; its keys are rank,",
        ),
        ("training: {steps: 1, data: [x]}", "training.data: ['x'] should be a mapping"),
        ("sites: {north: }", "write sites: {north: "),
    ],
)
def test_a_value_in_another_form_is_refused_with_the_one_that_is_meant(tmp_path, text, way):
    assert way in str(refusal(tmp_path, f"{HEAD}{text}\n"))


@pytest.mark.parametrize(
    ("tasks", "way"),
    [
        ("[./a, ./b]", "'./a' has another form than expected; write tasks: [{name: animals"),
        ("{a: ./a}", "write tasks: [{name: animals"),
        ("[{name: my task, model: ./a}]", "'my task' cannot be a name; use up to 64 letters"),
        (
            "[{name: a, model: ./a, weight: 1}]",
            "unknown key 'weight'; shares of tasks are said as preference",
        ),
    ],
)
def test_tasks_in_another_form_are_told_once_and_not_called_missing(tmp_path, tasks, way):
    text = str(refusal(tmp_path, f"base_model: ./b\ntasks: {tasks}\n"))
    assert way in text and "at least 1" not in text


def test_a_misspelt_key_is_not_called_missing_too(tmp_path):
    text = "basemodel: ./b\ntask: [{name: a, model: ./a}]\nmethod: {name: ties}\n"
    found = refusal(tmp_path, text).problems
    assert [one.kind for one in found] == ["unknown_key"] * 2
    assert [one.key for one in found] == [("basemodel",), ("task",)]


def test_no_task_at_all_is_refused(tmp_path):
    assert "at least 1" in str(refusal(tmp_path, "base_model: ./b\ntasks: []\n"))


def test_a_name_left_empty_is_no_name(tmp_path):
    text = "base_model: ./b\ntasks: [{name: , model: ./a}]\n"
    assert "tasks.0.name: None should be text" in str(refusal(tmp_path, text))


def test_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")


def test_misspelt_name_of_a_recipe_names_the_file_beside_it(tmp_path):
    (tmp_path / "study.yaml").write_text("")
    with pytest.raises(RecipeError, match=r"cannot be read .*Did you mean .*/study\.yaml\?"):
        load_recipe(tmp_path / "study.yml")


def test_numbers_that_yaml_reads_as_text_are_numbers():
    values = yaml.safe_load("{name: magmax, scaling: 1e-1}")
    assert parse_recipe(recipe_values(method=values)).method.scaling == 0.1


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1 MiB", 2**20), ("1.5kb", 1500), (7, 7)])
def test_sizes_are_written_with_units(text, size):
    assert parse_size(text) == size


def test_recipe_survives_its_own_yaml():
    recipe = parse_recipe(
        recipe_values(
            method={"name": "ties", "density": 0.5},
            preference={"weights": {"a": 0.25, "b": 0.75}},
            tensors=[{"match": "head.*", "take": "a"}],
            evaluation={"tasks": {"a": {"dataset": "data"}}},
        )
    )
    again = parse_recipe(yaml.safe_load(recipe.to_yaml()))
    assert again == recipe
    assert again.digest == recipe.digest


def test_digest_changes_with_the_content():
    assert parse_recipe(recipe_values(seed=1)).digest != parse_recipe(recipe_values(seed=2)).digest


def test_recipe_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        parse_recipe(recipe_values()).seed = 5


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from([*Recipe.model_fields, "schema", "name", "weights", "x"]), inner, max_size=4
            )
        ),
        max_leaves=12,
    )
)
def test_any_values_are_a_recipe_or_refused(values):
    try:
        assert isinstance(parse_recipe(values), Recipe)
    except HubMagmaxError as error:
        assert str(error)


def test_schema_for_editors_knows_the_keys():
    assert {"schema", "base_model", "tasks", "preference"} <= json_schema()["properties"].keys()


def test_checking_a_recipe_does_not_load_torch():
    heavy = "{'torch', 'transformers', 'huggingface_hub'}"
    code = f"import sys, hub_magmax.recipe.schema; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_absolute_paths_are_stored_relative_to_the_recipe(tmp_path):
    values = recipe_values(
        base_model=str(tmp_path / "models" / "base"), output={"path": str(tmp_path / "out")}
    )
    recipe = parse_recipe(values, folder=tmp_path / "recipes")
    assert recipe.base_model == "../models/base"
    assert recipe.output_path == tmp_path / "out"
    assert str(tmp_path) not in recipe.to_yaml()


ENDLESS = {
    "keys": "".join(f"outpu{i}: 1\n" for i in range(60_000)),
    "list": "tensors: [" + "1, " * 300_000 + "]\n",
    "tasks": "preference: {weights: {" + ", ".join(f"x{i}: 1" for i in range(24_000)) + "}}\n",
    "methods": "compare: {methods: [" + "{name: ties, x: 1}, " * 9_000 + "]}\n",
    "number": "seed: " + "9" * 900_000 + "\n",
    "sexagesimal number": "seed: " + "1:" * 400_000 + "1\n",
    "hexadecimal number": "seed: 0x" + "F" * 4_000 + "\n",
    "size": "output: {shard_size: '" + "9" * 900_000 + "GB'}\n",
    "method": "method: " + "x" * 900_000 + "\n",
    "evaluator": "evaluation: {evaluator: " + "x" * 900_000 + ", tasks: {}}\n",
    "name": "output: {path: '" + "x" * 900_000 + "'}\n",
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ENDLESS)
def test_recipe_that_could_take_minutes_is_refused_in_seconds(tmp_path, kind):
    error = refusal(tmp_path, f"base_model: ./base\ntasks:\n  - {{name: a, model: ./a}}\n{ENDLESS[kind]}")
    assert len(str(error)) < 5000


@pytest.mark.parametrize(
    ("preference", "way"),
    [
        ("uniform", "leave preference out: then every task counts the same"),
        ("geometric", "write preference: {geometric: {ratio: 0.5}}"),
        (
            "{geometric: 0.5}",
            "0.5 has another form than expected; write geometric: {ratio: 0.5}",
        ),
        ("{power: 2}", "write power: {exponent: 2}"),
        ("{a: 1}", "shares of tasks are said as preference: {weights: {animals: 0.7"),
        (
            "{labels: {target: me/x, classes: {a: x}}}",
            "write target: {dataset: me/site-photos,",
        ),
        ("{labels: {target: {dataset: x}, classes: {a: x}}}", "write classes: {animals: [cat, dog]}"),
    ],
)
def test_a_preference_in_another_form_is_told_with_the_right_one(tmp_path, preference, way):
    text = f"base_model: ./b\ntasks: [{{name: a, model: ./a}}]\npreference: {preference}\n"
    assert way in str(refusal(tmp_path, text))


@pytest.mark.parametrize("name", ["tunable/magmax", "TUNABLE_MAGMAX", "tunable-magmax", "tunable magmax"])
def test_signs_and_capitals_of_a_name_are_no_other_name(name):
    assert "Did you mean 'tunable_magmax'?" in refusal_of(method=name)


def test_more_tasks_than_a_method_tells_apart_are_refused():
    tasks = [{"name": f"t{number}", "model": "./a"} for number in range(70)]
    assert "tunable_magmax tells at most 64 tasks apart, and 70 have a share" in refusal_of(tasks=tasks)
    few = {"weights": {f"t{number}": 1 / 64 for number in range(64)}}
    assert parse_recipe(recipe_values(tasks=tasks, preference=few))
    assert parse_recipe(recipe_values(tasks=tasks, method="average"))


@pytest.mark.parametrize("method", ["slerp", "nuslerp"])
def test_more_tasks_than_go_on_an_arc_are_refused_with_what_takes_them(method):
    tasks = [{"name": f"t{number}", "model": "./a"} for number in range(3)]
    told = f"{method} goes from one model to another, and 3 tasks have a weight"
    found = refusal_of(tasks=tasks, method=method)
    assert told in found and "multislerp, karcher, model_stock and average take more" in found
    for kept in ({"t0": 0.5, "t2": 0.5}, {"t1": 1.0}):
        assert parse_recipe(recipe_values(tasks=tasks, method=method, preference={"weights": kept}))
    assert told in refusal_of(tasks=tasks, method="average", compare={"methods": ["ties", method]})


ALL_AT_ONCE = """\
base_model: ./base
tasks:
- {name: a, model: ./a}
- {name: b, model: ./b}
preference: {weights: {a: .5, nosuch: .2, b: much}}
output: {dtype: nonsense, files_from: other}
tensors: [{match: "*", take: third, also: 1}]
evaluation: {tasks: {a: {dataset: ./a.csv}, fourth: {dataset: ./b.csv}}}
"""


def test_names_of_no_task_are_told_beside_wrong_values(tmp_path):
    found = refusal(tmp_path, ALL_AT_ONCE).problems
    told = [(problem.line, ".".join(map(str, problem.key))) for problem in found]
    assert told == [
        (5, "preference.weights.nosuch"),
        (5, "preference.weights.b"),
        (6, "output.dtype"),
        (6, "output.files_from"),
        (7, "tensors.0.take"),
        (7, "tensors.0.also"),
        (8, "evaluation.tasks.fourth"),
    ]


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        # What is left out is not missed: weights that lack one, a push that is no name.
        ({"preference": {"weights": {"a": 0.5, "b": 0.25, "c": "x"}}}, ["preference.weights.c"]),
        ({"output": {"keep": False, "push_to_hub": "no name"}}, ["output.push_to_hub"]),
        (
            {"method": "auto", "compare": {"tune": {"dataset": 7.5}, "budget": "x"}},
            ["compare.tune.dataset", "compare.budget"],
        ),
        # Tasks of which one has no name that can be are not looked up.
        (
            {"tasks": [{"name": "a b", "model": "./a"}], "preference": {"weights": {"c": 1}}},
            ["tasks.0.name"],
        ),
        ({"tasks": 7, "preference": {"weights": {"c": 1}}}, ["tasks"]),
        # A model that is no name counts as one.
        (
            {"tasks": [{"name": "a", "model": []}], "preference": {"weights": {"c": 1}}},
            ["tasks.0.model", "preference.weights.c"],
        ),
        ({"base_model": None, "tensors": [{"match": "*", "take": "x"}]}, ["base_model", "tensors.0.take"]),
        ({"seed": -1, "output": {"keep": False}}, ["seed", "output.keep"]),
    ],
)
def test_only_what_is_wrong_is_told(changes, problems):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(recipe_values(**changes))
    assert [".".join(map(str, problem.key)) for problem in caught.value.problems] == problems


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("base_model: ./ba\0se\n", "line 1, column 17: not valid YAML: the control character U+0000"),
        ("a: 1\r\nb: ünï\x1b\n", "line 2, column 7: not valid YAML: the control character U+001B"),
        ("a: 1\n\x7f", "line 2, column 1: not valid YAML: the control character U+007F"),
    ],
)
def test_a_control_character_is_told_with_its_line(tmp_path, text, place):
    (tmp_path / "recipe.yaml").write_bytes(text.encode())
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert str(caught.value).startswith(f"{tmp_path / 'recipe.yaml'}, {place}")
    assert caught.value.problems[0].line


def test_an_escaped_control_character_is_told_by_its_key(tmp_path):
    text = 'base_model: "./ba\\0se"\ntasks: [{name: a, model: "./a\\eb"}]\noutput: {path: "x\\u0007"}\n'
    assert [(problem.line, problem.key[-1]) for problem in refusal(tmp_path, text).problems] == [
        (1, "base_model"),
        (2, "model"),
        (3, "path"),
    ]


def test_a_template_may_lay_out_its_text():
    data = {"dataset": "./x", "template": "\x1e{{ question }}\n\tAnswer:"}
    evaluation = {"tasks": {"a": data}, "evaluator": "multiple-choice"}
    assert (
        parse_recipe(recipe_values(evaluation=evaluation)).evaluation.tasks["a"].template == data["template"]
    )
