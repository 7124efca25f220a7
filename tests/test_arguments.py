"""Arguments of the public functions: natural forms are taken, and all others are refused in our own words."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import hub_magmax as hm
from hub_magmax.errors import ArgumentError, HubMagmaxError
from hub_magmax.evaluation.tables import FORMATS, Table
from hub_magmax.merging.output.report import read_report
from hub_magmax.recipe import arguments
from hub_magmax.recipe.arguments import checked
from hub_magmax.recipe.lockfile import read_lock
from tests.architecture import modules
from tests.drawn import draw_scores
from tests.families import recipe_values, write_family, write_recipe
from tests.test_architecture import ROOT

FUNCTIONS = {name: found for name in hm.__all__ if inspect.isfunction(found := getattr(hm, name))}

#: Values that are wrong in most places.
WRONG = {
    "number": 5.5,
    "text": "nothing-there",
    "path": Path("nothing-there"),
    "mapping": {"x": 1},
    "list": [1],
    "object": object(),
    "bytes": b"bytes",
    "array": np.zeros((2, 2), dtype=np.int64),
    "function": print,
    "type": dict,
}

#: Those that are right in some, by a word of the annotation.
RIGHT = {
    "str": {"text", "path"},
    "Path": {"text", "path"},
    "float": {"number"},
    "Mapping": {"mapping"},
    "Sequence": {"list", "array"},
    "Iterable": {"list", "array", "text", "bytes"},
    "Report": {"function", "type"},
    "ProgressBar": {"function", "type"},
    "Progress": {"function", "type"},
    "Callable": {"function", "type"},
    "BytesOfMatrix": {"function", "type"},
}

#: Parameters that take whatever there is, because it is what they are about, and wrong only by what it holds.
TAKEN = {("merge_tensors", "options"), ("parse_recipe", "where")}


def right_for(function, parameter):
    """Return the names of the values that a parameter may take; recipes and locks are wrong inside."""
    annotation = str(parameter.annotation)
    if any(word in annotation for word in ("RecipeLike", "LockLike", "Float", "StateDict")):
        return set()
    words = {part.partition("[")[0].rpartition(".")[2] for part in arguments.alternatives(annotation)}
    return set().union(*(names for word, names in RIGHT.items() if word in words))


CASES = [
    (name, parameter.name)
    for name, function in FUNCTIONS.items()
    for parameter in inspect.signature(function).parameters.values()
    if (name, parameter.name) not in TAKEN
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("arguments")
    write_family(found, ("a", "b", "c"))
    write_recipe(found)
    hm.merge(hm.plan(found / "recipe.yaml"))
    (found / "recipe.lock.json").write_bytes((found / "merged" / "recipe.lock.json").read_bytes())
    return found


@pytest.fixture(scope="module")
def valid(folder):
    """Values that every function takes, by the name of the parameter."""
    recipe = hm.load_recipe(folder / "recipe.yaml")
    locked, report = (
        read_lock(folder / "recipe.lock.json"),
        read_report(folder / "merged" / "merge_report.json"),
    )
    base = {"w": torch.zeros(2)}
    return {
        "recipe": recipe, "lock": locked, "locked": locked, "plan": hm.plan(recipe, locked),
        "merged": folder / "merged", "report": report, "scores": None, "output": folder / "merged",
        "model": str(folder / "merged"), "folder": folder / "merged", "repo_id": "me/model",
        "target": str(folder / "merged"),
        "private_key": folder / "key.pem", "path": folder / "recipe.yaml", "values": recipe.to_dict(),
        "base": base, "tasks": {"a": {"w": torch.ones(2)}}, "task_vectors": torch.ones(2, 3),
        "labels": [1], "classes": {"a": [1]}, "result": draw_scores(("a", "b")), "name": "mine",
        "source": "me", "record": folder / "decisions.jsonl", "selection": folder / "merged",
        "history": folder, "first": [n % 7 for n in range(40)], "second": [n % 5 for n in range(40)],
    }  # fmt: skip


def needed(function, valid):
    own = {"write_card": {"merged": valid["report"]}}.get(function.__name__, {})
    parameters = inspect.signature(function).parameters.values()
    return {
        p.name: {**valid, **own}[p.name]
        for p in parameters
        if p.default is p.empty and p.kind != p.VAR_KEYWORD
    }


@pytest.mark.parametrize(("name", "parameter"), CASES)
def test_what_a_function_does_not_take_is_an_error_of_ours(name, parameter, valid, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    function, others = FUNCTIONS[name], {}
    for kind in sorted(WRONG.keys() - right_for(function, inspect.signature(function).parameters[parameter])):
        try:
            found = function(**needed(function, valid) | {parameter: WRONG[kind]})
            others[kind] = f"taken: {type(found).__name__}"
        except HubMagmaxError as error:
            assert error.what
        except Exception as error:
            others[kind] = repr(error)
    assert not others and not [*tmp_path.iterdir()]


def test_every_kind_that_an_annotation_names_is_known():
    """A new alias has to be named in `recipe.arguments`: values tell their class, and no alias."""
    text = "\n".join(module.text for module in modules(ROOT, ("hub_magmax",)).values())
    classes = {*re.findall(r"^class (\w+)", text, re.MULTILINE)}
    for function in FUNCTIONS.values():
        if function is hm.merge_method:
            continue  # below the recipe, and with checks of its own
        for parameter in inspect.signature(function).parameters.values():
            for part in arguments.alternatives(str(parameter.annotation)):
                name = part.partition("[")[0].rpartition(".")[2]
                known = {*arguments.KINDS, *arguments.LEFT_ALONE, "Literal", *classes}
                assert name in known, f"{function.__name__}, {parameter.name}: {part}"


def forms(folder):
    recipe = hm.load_recipe(folder / "recipe.yaml")
    return {
        "recipe": recipe,
        "path": folder / "recipe.yaml",
        "text": str(folder / "recipe.yaml"),
        "mapping": recipe_values(
            base_model=str(folder / "base"),
            tasks=[{"name": name, "model": str(folder / name)} for name in "abc"],
        ),
    }


@pytest.mark.parametrize("form", ["recipe", "path", "text", "mapping"])
def test_a_recipe_is_taken_in_every_form(folder, form):
    recipe = forms(folder)[form]
    locked = hm.lock(recipe)
    assert hm.plan(recipe, locked).bytes_out == hm.plan(recipe).bytes_out > 0
    assert hm.prefer(recipe).weights == pytest.approx(dict.fromkeys("abc", 1 / 3))
    assert hm.diagnose(recipe, locked).table()
    for study in (hm.compare, hm.sweep, hm.evaluate):
        more = (locked, folder / "merged") if study is hm.evaluate else ()
        with pytest.raises(hm.HubMagmaxError, match=r"needs|evaluation"):
            study(recipe, *more)


def test_a_lock_is_taken_by_its_path(folder):
    recipe, path = folder / "recipe.yaml", folder / "recipe.lock.json"
    assert hm.plan(recipe, path).lock == hm.plan(recipe, str(path)).lock == read_lock(path)
    report = read_report(folder / "merged" / "merge_report.json")
    text = hm.render_card(recipe, str(path), report)
    assert text == hm.render_card(hm.load_recipe(recipe), read_lock(path), report)
    assert hm.write_card(recipe, path, report, None, str(folder / "merged")).is_file()


def test_one_text_is_a_list_of_one_and_a_path_is_a_text(folder):
    assert hm.plan(str(folder / "recipe.yaml"), in_spite_of="unchanged:a").in_spite_of == ("unchanged:a",)
    assert hm.verify(folder / "merged") == hm.verify(str(folder / "merged"))


def test_arrays_are_taken_for_tensors():
    array = np.array([[1.0, 2.0, -3.0], [4.0, -5.0, 6.0]])
    expected = hm.merge_tensors(torch.tensor(array, dtype=torch.float32), method="average")
    read_only = array.astype(np.float32)
    read_only.flags.writeable = False
    rows = {"a": array[0], "b": array[1]}
    for given in (
        array,
        read_only,
        array[:, ::-1][:, ::-1],
        array.astype(">f8"),
        rows,
        [*array],
        [*torch.tensor(array)],
    ):
        assert hm.merge_tensors(given, method="average").equal(expected)
    weights = np.array([0.25, 0.75])
    assert hm.merge_tensors(array, preference=weights, method="average").tolist() == [3.25, -3.25, 3.75]
    dicts = {"w": array[0].astype(np.float32)}, {"a": {"w": array[1].astype(np.float32)}}
    assert hm.merge_state_dicts(*dicts, method={"name": "average", "scaling": 1})["w"].tolist() == [4, -5, 6]
    assert hm.preference_from_labels(
        torch.tensor([1, 2, 2]), {"a": np.array([1]), "b": [2]}
    ) == pytest.approx({"a": 1 / 3, "b": 2 / 3})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.ones(2, 3, dtype=torch.long), "of torch.int64"),
        (torch.tensor(1.0), "there is no task"),
        ({}, "there is no task"),
        ({"a": torch.ones(2), "b": torch.ones(3)}, r"the shapes differ \(a: \[2\], b: \[3\]\)"),
        (torch.ones(2, 3).to_sparse(), "sparse"),
        (torch.ones(2, 3, device="meta"), "on meta"),
        (np.array(["a"]), "ndarray"),
        (torch.tensor([[1.0, float("nan")]]), "a NaN or an infinity"),
    ],
)
def test_task_vectors_that_are_none_are_refused(given, message):
    with pytest.raises(HubMagmaxError, match=message):
        hm.merge_tensors(given)


@pytest.mark.parametrize("form", ["html", "", None, 5, ["csv"]])
def test_a_form_that_no_table_has_names_those_there_are(form):
    with pytest.raises(ArgumentError, match=f"Expected one of {', '.join(FORMATS)}"):
        Table(("n",), ((1,),)).write(form)
    with pytest.raises(ArgumentError):
        draw_scores(("a", "b")).table(form)


#: Parameters that name what has to be there.
PLACES = [
    ("canary", "model"), ("evaluate", "merged"), ("history", "model"), ("load_recipe", "path"),
    ("push", "folder"), ("rebuild", "model"), ("rollback", "model"), ("sign", "folder"),
    ("sign", "private_key"), ("verify", "model"), ("write_card", "output"), ("plan", "locked"),
    ("run", "locked"), ("lock", "earlier"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "parameter"), PLACES)
@pytest.mark.parametrize("place", ["nothing-there", Path("nothing/there"), "", "a\0b", "x" * 5000, "\ud800"])
def test_what_is_not_there_is_an_error_of_ours(name, parameter, place, valid, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if place == "" and parameter == "output":
        return  # the current folder
    with pytest.raises(HubMagmaxError):
        FUNCTIONS[name](**needed(FUNCTIONS[name], valid) | {parameter: place})


@pytest.mark.parametrize("name", ["apply", "merge"])
@pytest.mark.parametrize("output", ["", ".", Path(), "/"])
def test_an_output_without_a_name_is_refused_and_nothing_goes_to_the_place_of_the_recipe(
    name, output, valid, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    before = {*valid["plan"].recipe.folder.rglob("*")}
    with pytest.raises(ArgumentError, match=f"{name}, output: the output has no name"):
        FUNCTIONS[name](**needed(FUNCTIONS[name], valid) | {"output": output})
    assert {*tmp_path.rglob("*")} == set()
    assert {*valid["plan"].recipe.folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("name", "parameter", "value"),
    [
        ("merge", "chunk_elements", 0),
        ("merge", "chunk_elements", -1),
        ("history", "limit", 0),
        ("history", "limit", -5),
        ("canary", "margin", float("nan")),
        ("canary", "margin", -0.1),
        ("load_recipe", "folder", 5),
        ("push", "repo_id", "no/such/name"),
        ("rollback", "to", "no such revision"),
        ("merge_method", "name", ""),
        ("merge_method", "scaling", float("inf")),
    ],
)
def test_numbers_and_names_out_of_range_are_errors_of_ours(
    name, parameter, value, valid, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    more = {"output": tmp_path / "out"} if name == "merge" else {}
    with pytest.raises(HubMagmaxError):
        FUNCTIONS[name](**needed(FUNCTIONS[name], valid) | more | {parameter: value})


def test_progress_that_opens_nothing_is_told(folder, tmp_path):
    recipe = forms(folder)["mapping"] | {"output": {"path": str(tmp_path / "out")}}
    with pytest.raises(ArgumentError, match=r"progress returned None\. Expected a context manager"):
        hm.run(recipe, progress=print)
    for wrong in (lambda total: None, lambda: None, 5):
        with pytest.raises(ArgumentError, match="a function of a total, a text and a unit"):
            hm.run(recipe, progress=wrong)
    with pytest.raises(ArgumentError, match="run, report"):
        hm.run(recipe, report=lambda: None)


def test_missing_and_unknown_arguments_are_told_by_python():
    with pytest.raises(TypeError, match=r"evaluate\(\) missing 2 required"):
        hm.evaluate("recipe.yaml")
    with pytest.raises(TypeError, match="unexpected keyword argument 'verbose'"):
        hm.lock("recipe.yaml", verbose=True)


def test_the_message_says_what_was_given_what_is_taken_and_what_makes_it():
    with pytest.raises(ArgumentError) as caught:
        hm.merge("recipe.yaml")
    assert str(caught.value) == (
        "merge, plan: 'recipe.yaml' is of the kind str. Expected what hub_magmax.plan(recipe) returns."
    )
    assert isinstance(caught.value, ValueError)


def test_a_checked_function_keeps_its_name_signature_and_defaults():
    def twice(count: "int", *, by: "float | None" = None, **more: "object") -> "float":
        """Say how much."""
        return count * (by or 2), more

    found = checked(twice)
    assert (found.__name__, found.__doc__) == ("twice", "Say how much.")
    assert inspect.signature(found) == inspect.signature(twice)
    assert found(3) == (6, {}) and found(np.int64(3), by=1, x="y") == (3, {"x": "y"})
    for wrong in (True, 3.5, "3"):
        with pytest.raises(ArgumentError, match="twice, count"):
            found(wrong)
