"""Methods of other packages: wrong results and errors name them, and locks hold the code that merged."""

import importlib
import json
import sys
import types
from importlib.metadata import Distribution, EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hub_magmax.errors import ArgumentError, LockError, MissingDependencyError, NonFiniteError, RecipeError
from hub_magmax.evaluation.evaluators import evaluator_names, make_evaluator
from hub_magmax.evaluation.evaluators.registry import evaluator
from hub_magmax.fleet.rebuilding import rebuild
from hub_magmax.kernels import ops
from hub_magmax.kernels.ops import Op
from hub_magmax.merging.execution import merge
from hub_magmax.merging.tensors import merge_tensors
from hub_magmax.methods import Rule, merge_method
from hub_magmax.methods.rules import chosen_rule, precomputed_rule
from hub_magmax.pipeline import lock, plan
from hub_magmax.planning.summary import explain
from hub_magmax.recipe.loading import load_recipe
from hub_magmax.recipe.lockfile import LOCK_NAME, read_lock
from hub_magmax.registry import EVALUATORS, METHODS, Plugin
from tests.families import write_recipe
from tests.test_cli import call

VECTORS = torch.arange(24.0).reshape(2, 3, 4) - 12


def announced(monkeypatch, function, form):
    """Have the package `soft` 1.2 announce a function as the method `strange`; return what registered it."""

    class Soft(Distribution):
        version, name = "1.2", "soft"

        def read_text(self, filename):
            return None

        def locate_file(self, path):
            return path

    made = merge_method("strange", source="test", form=form)(function)
    point = EntryPoint("strange", f"{__name__}:strange", METHODS.group)._for(Soft())
    monkeypatch.setitem(vars(METHODS), "plugins", {"strange": point})
    monkeypatch.setattr(sys.modules[__name__], "strange", made, raising=False)
    return made


def merged_by(monkeypatch, form, give):
    def method(chunks):
        """Ignores the preference."""
        return give(chunks)

    announced(monkeypatch, method, form)
    return merge_tensors(VECTORS, method="strange", name="layer.weight")


WHOLE = {
    "scalar": (lambda v: v.sum(), r"torch\.float32 of shape \[\]"),
    "too short": (lambda v: v[0].reshape(-1)[:-1], r"of shape \[11\]"),
    "double": (lambda v: v[0].double(), r"torch\.float64"),
    "integer": (lambda v: v[0].long(), r"torch\.int64"),
    "nothing": (lambda v: None, "returned None"),
    "list": (lambda v: v[0].tolist(), "returned a list"),
    "array": (lambda v: v[0].numpy(), "returned a ndarray"),
    "NaN": (lambda v: v[0] * torch.nan, "returned nan as element 0, from finite numbers"),
    "infinity": (lambda v: v[0] / 0.0, "as element"),
    "another device": (lambda v: v[0].to("meta"), "on meta"),
    "sparse": (lambda v: v[0].to_sparse(), "sparse"),
    "error": (lambda v: v[9], r"the method failed \(IndexError: index 9 is out of bounds"),
    "error without a text": (lambda v: next(iter(())), r"the method failed \(StopIt"),
    "its own missing file": (lambda v: Path("gone").read_text(), r"the method failed \(FileNotFoundError"),
    "exit": (lambda v: sys.exit("no licence"), r"the method failed \(SystemExit: no licence"),
}


@pytest.mark.parametrize("form", ["tensor", "elementwise"])
@pytest.mark.parametrize("case", WHOLE)
def test_wrong_values_are_an_error_that_names_plugin_package_and_tensor(monkeypatch, form, case):
    give, told = WHOLE[case]
    with pytest.raises(RecipeError, match=told) as caught:
        merged_by(monkeypatch, form, give)
    assert caught.value.where == "plug-in strange (package soft 1.2), tensor 'layer.weight'"


def test_another_shape_of_as_many_elements_is_no_result(monkeypatch):
    with pytest.raises(RecipeError, match=r"shape \[4, 3\].* Expected torch.float32 of shape \[3, 4\]"):
        merged_by(monkeypatch, "tensor", lambda v: v[0].T)


RULES = {
    "no rule": (lambda c: 3, "returned 3"),
    "no operation": (lambda c: Rule(max), "a Rule whose op is a builtin"),
    "weights of other tasks": (
        lambda c: Rule(ops.WEIGHTED_SUM, per_task=(np.ones(3, np.float32),)),
        r"float32 of shape \[3\]\. Expected 1 of float32 of shape \[2\]",
    ),
    "weights as float64": (lambda c: Rule(ops.WEIGHTED_SUM, per_task=(np.ones(2),)), "float64"),
    "no weights": (lambda c: Rule(ops.TIES), "per_task nothing"),
    "NaN as a weight": (
        lambda c: Rule(ops.WEIGHTED_SUM, per_task=(np.array([1, np.nan], np.float32),)),
        "nan",
    ),
    "a winner that is no task": (lambda c: chosen_rule(np.full(12, 2, np.uint8)), "task 2 as a winner"),
    "too few winners": (lambda c: chosen_rule(np.zeros(11, np.uint8)), r"shape \[11\]"),
    "winners as int64": (lambda c: chosen_rule(np.zeros(12, np.int64)), "int64"),
    "values that are not finite": (
        lambda c: precomputed_rule(np.full(12, np.inf, np.float32)),
        "inf as element 0",
    ),
    "bits of too few tasks": (
        lambda c: Rule(
            ops.DROPPED, lambda start, count: (np.zeros(count, np.uint8),), (np.ones(2, np.float32),)
        ),
        "uint8 of shape",
    ),
    "numbers that nobody takes": (
        lambda c: Rule(ops.LARGEST, lambda start, count: (np.zeros(count),)),
        "1 numbers per element",
    ),
    "own operation, a scalar": (lambda c: Rule(Op(lambda rows: rows[0].sum())), r"shape \[\]"),
    "own operation, a winner that is no task": (
        lambda c: Rule(Op(lambda rows: torch.full_like(rows[0], 7, dtype=torch.uint8), selects=True)),
        "task 7",
    ),
    "own operation, too few numbers": (
        lambda c: Rule(Op(lambda rows, given: rows[0]), lambda start, count: (np.zeros(count - 1),)),
        "11 numbers for 12 elements",
    ),
    "weights without the base model's": (
        lambda c: Rule(ops.AFFINE_SUM, per_task=(np.ones(2, np.float32),)),
        r"Expected 1 of float32 of shape \[3\] for the operation affine_sum",
    ),
    "weights of each element, of other tasks": (
        lambda c: Rule(ops.AFFINE_SUM_OF_EACH, lambda start, count: (np.ones((count, 2), np.float32),)),
        r"shape \[12, 3\]",
    ),
    "error in a chunk": (lambda c: Rule(Op(lambda rows: rows[9])), "IndexError"),
    "error in its numbers": (lambda c: Rule(ops.LARGEST, lambda start, count: 1 / 0), "ZeroDivisionError"),
}


@pytest.mark.parametrize("case", RULES)
def test_wrong_rule_is_an_error_that_names_plugin_package_and_tensor(monkeypatch, case):
    give, told = RULES[case]
    with pytest.raises(RecipeError, match=told) as caught:
        merged_by(monkeypatch, "rule", give)
    assert caught.value.where == "plug-in strange (package soft 1.2), tensor 'layer.weight'"


def test_right_rules_of_a_plugin_merge(monkeypatch):
    first_wins = chosen_rule(np.zeros(12, np.uint8))
    assert merged_by(monkeypatch, "rule", lambda c: first_wins).equal(VECTORS[0])
    own = Rule(Op(lambda rows, given: rows[1] * given), lambda start, count: (np.ones(count, np.float32),))
    assert merged_by(monkeypatch, "rule", lambda c: own).equal(VECTORS[1])


BASE = torch.arange(12.0).reshape(3, 4)


@pytest.mark.parametrize("form", ["tensor", "elementwise"])
def test_plugin_gets_the_base_models_values(monkeypatch, form):
    def towards_zero(vectors, *, base):
        """Ignores the preference."""
        return vectors.sum(0) - base / 2

    announced(monkeypatch, towards_zero, form)
    found = merge_tensors(VECTORS, method="strange", base=BASE)
    assert found.equal(VECTORS.sum(0) - BASE / 2)


@pytest.mark.parametrize("form", ["tensor", "elementwise"])
def test_plugin_merges_files_with_the_base_models_values(monkeypatch, family, form):
    def doubled(vectors, *, base):
        """Ignores the preference."""
        return base

    announced(monkeypatch, doubled, form)
    merge(plan(load_recipe(write_recipe(family, method={"name": "strange"}))))
    before, after = (load_file(family / name / "model.safetensors") for name in ("base", "merged"))
    assert after["layer.0.weight"].equal(2 * before["layer.0.weight"])


def test_rule_of_a_plugin_adds_the_base_model(monkeypatch):
    weights = np.array([0.5, 1, 0], np.float32)
    each = np.repeat(weights[None], 12, axis=0)
    own = Op(lambda base, rows: rows[0] + 0.5 * base, takes_base=True)
    rules = {
        "the same weights": Rule(ops.AFFINE_SUM, per_task=(weights,)),
        "weights of each element": Rule(
            ops.AFFINE_SUM_OF_EACH, lambda start, count: (each[start : start + count],)
        ),
        "its own operation": Rule(own),
    }
    for name, rule in rules.items():
        announced(monkeypatch, lambda chunks, rule=rule: rule, "rule")
        assert merge_tensors(VECTORS, method="strange", base=BASE).equal(VECTORS[0] + BASE / 2), name
        with pytest.raises(RecipeError, match="needs the base model's values"):
            merge_tensors(VECTORS, method="strange")


def test_base_of_another_shape_or_kind_is_refused(monkeypatch):
    for base, told in ((BASE[:2], r"shape is \[2, 4\]"), (BASE.long(), "int64"), (BASE.tolist(), "list")):
        with pytest.raises(ArgumentError, match=told):
            merge_tensors(VECTORS, method="average", base=base)


def test_base_is_for_forms_that_see_values():
    with pytest.raises(ValueError, match="base is for the forms tensor and elementwise, not for 'linear'"):
        merge_method("odd", source="test", form="linear")(lambda num_tasks, *, base: [1.0])


def test_coefficients_that_are_no_numbers_name_the_plugin(monkeypatch):
    for give in (lambda n: 0.5, lambda n: [0.5], lambda n: [1.0, float("nan")], lambda n: None):
        with pytest.raises(RecipeError) as caught:
            merged_by(monkeypatch, "linear", give)
        assert caught.value.where == "plug-in strange (package soft 1.2)"


def test_tasks_that_are_not_there_cannot_be_used(monkeypatch):
    made = announced(monkeypatch, lambda v: v[0], "tensor")
    made.merge_method.__dict__["uses"] = lambda weights: (0, 5)
    with pytest.raises(
        RecipeError, match=r"plug-in strange .*, uses: the method returned the tasks \[0, 5\]"
    ):
        made.merge_method.unread((0.5, 0.5))


def test_damaged_checkpoint_is_no_fault_of_the_plugin(monkeypatch, family):
    path = family / "a" / "model.safetensors"
    tensors = load_file(path)
    tensors["layer.0.weight"][0, 0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    announced(monkeypatch, lambda v: v.sum(0), "elementwise")
    with pytest.raises(NonFiniteError, match=r"a/model\.safetensors|\./a"):
        merge(plan(load_recipe(write_recipe(family, method={"name": "strange"}))))


def test_command_tells_of_a_wrong_plugin_in_one_paragraph_and_debug_shows_the_line(monkeypatch, family):
    def failing(vectors):
        """Ignores the preference."""
        raise ValueError("by hand")

    announced(monkeypatch, failing, "elementwise")
    recipe = write_recipe(family, method={"name": "strange"})
    code, out, err = call("merge", recipe)
    step, told = err.splitlines()
    assert (code, out) == (1, "") and step.startswith("merging 6 tensors by strange")
    assert told.startswith("Error: plug-in strange (package soft 1.2), tensor 'embed.weight'")
    assert "the method failed (ValueError: by hand)" in err and not (family / "merged").exists()
    assert 'raise ValueError("by hand")' in call("merge", recipe, "--debug")[2]


SOURCE = '''
from hub_magmax import merge_method

@merge_method("half", source="test", form="linear")
def half(num_tasks):
    """Ignores the preference."""
    return [{factor}] * num_tasks
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return what installs the package `halving` with the method `half` of a factor, and takes it away."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)

    def install(factor, version="1.0"):
        (site / "halving.py").write_text(SOURCE.format(factor=factor))
        for old in site.glob("*.dist-info/*"):
            old.unlink()
        for old in site.glob("*.dist-info"):
            old.rmdir()
        info = site / f"halving-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: halving\nVersion: {version}\n")
        (info / "entry_points.txt").write_text("[hub_magmax.methods]\nhalf = halving:half\n")
        sys.modules.pop("halving", None)
        importlib.invalidate_caches()
        sys.path_importer_cache.pop(str(site), None)
        found = {p.name: p for p in importlib.metadata.entry_points(group=METHODS.group) if p.name == "half"}
        monkeypatch.setitem(vars(METHODS), "plugins", found)

    yield install
    sys.modules.pop("halving", None)


def test_lock_and_provenance_hold_package_version_and_code(package, family):
    package(0.5)
    recipe = load_recipe(write_recipe(family, method={"name": "half"}))
    first = lock(recipe)
    assert {**first.plugin, "code": ""} == {"package": "halving", "version": "1.0", "code": ""}
    merge(plan(recipe, first))
    stated = json.loads((family / "merged" / "provenance.json").read_text())
    assert stated["predicate"]["buildDefinition"]["internalParameters"]["plugin"] == first.plugin
    assert read_lock(family / "merged" / LOCK_NAME) == first
    assert rebuild(str(family / "merged"), folder=family).shards


def test_changed_code_is_another_merge(package, family):
    package(0.5)
    recipe = write_recipe(family, method={"name": "half"})
    assert call("lock", recipe)[0] == 0 and call("merge", recipe)[0] == 0
    assert call("merge", recipe)[0] == 0  # the same again: nothing to do
    package(0.25)
    code, _, err = call("merge", recipe)
    assert code == 1 and "the code of the package halving 1.0 is not what it was" in err
    (family / "recipe.lock.json").unlink()
    code, _, err = call("merge", recipe)
    assert code == 1 and "the output folder already holds a model" in err
    package(0.5, "2.0")
    with pytest.raises(
        LockError, match=r"made with the package halving 1\.0, and here is the package halving 2"
    ):
        rebuild(str(family / "merged"), folder=family)


def test_code_that_cannot_be_read_is_not_taken_for_none(package, monkeypatch):
    package(0.5)
    METHODS.get("half")

    def refuse(files, folder):
        raise PermissionError(13, "Permission denied", "/site/halving.py")

    monkeypatch.setattr("hub_magmax.registry.code_digest", refuse)
    with pytest.raises(RecipeError, match=r"'half' cannot be read \(Permission denied\)"):
        METHODS.plugin("half")


def test_rebuilding_without_the_plugin_names_its_package(package, monkeypatch, family):
    package(0.5)
    assert call("merge", write_recipe(family, method={"name": "half"}))[0] == 0
    monkeypatch.setitem(vars(METHODS), "plugins", {})
    with pytest.raises(MissingDependencyError) as caught:
        rebuild(str(family / "merged"), folder=family)
    assert "the merge method 'half' is of the package halving 1.0, which is not installed" in str(
        caught.value
    )
    assert caught.value.hint == "Install it beside hub_magmax: pip install halving==1.0"


def test_lock_of_a_built_in_method_holds_no_plugin(family):
    assert "plugin" not in json.loads(lock(load_recipe(write_recipe(family))).to_json())
    assert METHODS.plugin("average") is None and METHODS.plugin("no such method") is None


def test_package_without_a_version_is_named_all_the_same():
    assert str(Plugin("mine", "", "")) == "package mine" and Plugin("mine", "", "").requirement == "mine"


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Return what makes a script with the method `mine` of a factor, runs it, and forgets it at the end."""
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "own_script.py"

    def run(factor):
        path.write_text(SOURCE.format(factor=factor).replace("half", "mine"))
        sys.modules.pop("own_script", None)
        importlib.invalidate_caches()
        importlib.import_module("own_script")

    yield run
    sys.modules.pop("own_script", None)
    METHODS.registered.pop("mine", None)


def test_a_method_of_a_script_is_used_by_name_in_its_process(own, family):
    own(0.5)
    assert merge_tensors(VECTORS, method="mine").equal(VECTORS.sum(0) * 0.5)
    recipe = load_recipe(write_recipe(family, method={"name": "mine"}))
    locked = lock(recipe)
    assert {**locked.plugin, "code": ""} == {"package": "", "version": "", "code": ""}
    assert len(locked.plugin["code"]) == 64
    made = plan(recipe, locked)
    assert f"of no package, code {locked.plugin['code'][:12]}" in explain(made)
    merge(made)
    assert read_lock(family / "merged" / LOCK_NAME) == locked
    assert rebuild(str(family / "merged"), folder=family).shards


def test_changed_code_of_a_script_is_another_merge(own, family):
    own(0.5)
    recipe = load_recipe(write_recipe(family, method={"name": "mine"}))
    locked = lock(recipe)
    merge(plan(recipe, locked))
    own(0.25)
    assert merge_tensors(VECTORS, method="mine").equal(VECTORS.sum(0) * 0.25)
    with pytest.raises(LockError, match="the code of the method of no package is not what it was"):
        plan(recipe, locked)


def test_rebuilding_elsewhere_says_that_the_method_is_of_no_package(own, family, monkeypatch):
    own(0.5)
    recipe = load_recipe(write_recipe(family, method={"name": "mine"}))
    merge(plan(recipe))
    METHODS.registered.pop("mine")
    with pytest.raises(MissingDependencyError, match="'mine' is of no package: the program that locked it"):
        rebuild(str(family / "merged"), folder=family)
    code, _, err = call("verify", family / "merged", "--rebuild", "--from", family)
    assert code == 1 and "make a package of the method" in err
    code, _, err = call("plan", write_recipe(family, method={"name": "mine"}))
    assert code == 1 and "there is no merge method 'mine'" in err
    assert "by an entry point in the group 'hub_magmax.methods'" in err
    # A package of the same name is another method.
    announced(monkeypatch, lambda v: v[0], "tensor")
    monkeypatch.setitem(vars(METHODS), "plugins", {"mine": METHODS.plugins["strange"]})
    vars(sys.modules[__name__])["strange"].merge_method.__dict__["name"] = "mine"
    with pytest.raises(LockError, match="made with the method of no package, and here is the package soft 1"):
        rebuild(str(family / "merged"), folder=family)


def test_the_text_of_a_function_counts_where_there_is_no_file(monkeypatch):
    def defined(text):
        space = {"__name__": "notebook", "merge_method": merge_method}
        monkeypatch.setitem(sys.modules, "notebook", types.ModuleType("notebook"))
        exec(text, space)
        return METHODS.plugin("cell").code

    cell = "@merge_method('cell', source='me')\ndef cell(v):\n    return v[{}]\n"
    codes = [defined(cell.format(number)) for number in (0, 1, 0)]
    assert codes[0] == codes[2] != codes[1]
    METHODS.registered.pop("cell")


def test_the_name_of_a_built_in_method_is_taken():
    with pytest.raises(ArgumentError, match="'ties' is the name of a built-in merge method"):
        merge_method("ties", source="test")(lambda vectors: vectors[0])


def test_a_package_and_a_script_that_have_the_same_name_are_told(package, monkeypatch):
    package(0.5)
    assert METHODS.get("half") and "half" not in METHODS.registered
    made = merge_method("half", source="test")(lambda vectors: vectors[0])
    with pytest.raises(RecipeError, match=r"this program and the package halving 1\.0 both have"):
        METHODS.get("half")
    assert METHODS.registered.pop("half") is made


def test_an_evaluator_of_a_script_is_used_by_name_too():
    @evaluator("always-right")
    class AlwaysRight:
        """Gives every example full marks."""

        metric, is_share, pipeline_tag = "marks", True, "text-generation"
        model_class, processor_class = "AutoModelForCausalLM", "AutoTokenizer"

        def __init__(self, *, mark: float = 1.0):
            self.mark = mark

    assert make_evaluator("always-right", {"mark": 0.5}).mark == 0.5
    assert "always-right" not in evaluator_names()
    assert EVALUATORS.plugin("always-right").package == ""
    EVALUATORS.registered.pop("always-right")
