"""Limits of the source code as a whole: layout, circles of imports, sizes, complexity, private names.

`known_violations.json` lists the code that breaks a limit today. The list may only become shorter: what is
mended must leave it. `python -m tests.test_architecture` writes it again.
"""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests import architecture
from tests.architecture import Function, Module

ROOT = Path(__file__).parents[1]
KNOWN = Path(__file__).parent / "known_violations.json"

#: Whose imports are looked at for circles and private names, and whose modules and functions have limits.
EVERYTHING, LIMITED = ("hub_magmax", "benchmarks", "tests"), ("hub_magmax.", "benchmarks.")
#: Folders of hub_magmax, its files besides `__init__` and `__main__`, and layers of its contract of imports.
MAX_PACKAGES, MAX_MODULES, MAX_LAYERS = 15, 9, 10
#: Lines of one module, and of hub_magmax altogether.
MAX_LINES, MAX_TOTAL_LINES = 400, 22_000
#: Of a function, besides `self` and `cls`; more where it is compiled, by one of these decorators.
MAX_PARAMETERS, MAX_COMPILED_PARAMETERS = 8, 14
COMPILED = ("compiled", "inlined", "jit", "njit")
#: Above it a comment on the line of `def`, or on the line before, says why.
MAX_COMPLEXITY = 10
#: Who may ask whether loops are compiled, and where a checkpoint comes from.
KERNELS = ("hub_magmax/kernels/",)
LOCATIONS = ("hub_magmax/checkpoints/", "hub_magmax/hub.py", "hub_magmax/publishing/")
#: Functions elsewhere, as `file: function`, that read a `repo_id` only to write it out as data.
WRITTEN_OUT = frozenset(
    {
        "hub_magmax/merging/adapters.py: adapter_config",
        "hub_magmax/recipe/lockfile.py: LockedSource.label",
        "hub_magmax/reporting/front_matter.py: hub_id",
        "hub_magmax/training/adapters.py: TrainedAdapter.write",
    }
)

Modules = Mapping[str, Module]
#: What breaks a limit: what it is known by, and a sentence.
Violations = Mapping[str, str]


def circles_of_modules(found: Modules) -> Violations:
    """No module imports itself by way of others."""
    return _named(architecture.circles(architecture.graph(found)))


def circles_of_packages(found: Modules) -> Violations:
    """No sub-package of hub_magmax, or module beside them, imports itself by way of others."""
    return _named(architecture.circles(architecture.of_parts(architecture.graph(found), "hub_magmax")))


def _named(paths: list[list[str]]) -> Violations:
    return {" -> ".join(path): " imports ".join(path) for path in paths}


def layout(found: Modules) -> Violations:
    """The package has few parts and few layers, and its contract counts imports for types."""
    inside = [module for module in _in_package(found) if module.file.count("/") == 1]
    packages = {module.file.split("/")[1] for module in _in_package(found) if module.file.count("/") > 1}
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = [len(contract["layers"]) for contract in linter["contracts"] if contract["type"] == "layers"]
    lines = [module.num_lines for module in _in_package(found)]
    counted = {
        "packages": (len(packages), MAX_PACKAGES),
        "modules": (sum(not Path(module.file).name.startswith("__") for module in inside), MAX_MODULES),
        "layers": (max(layers), MAX_LAYERS),
        "lines": (sum(lines), MAX_TOTAL_LINES),
        "contracts without imports for types": (int(linter.get("exclude_type_checking_imports", False)), 0),
    }
    return {
        name: f"{count:,} {name}, {most:,} at most" for name, (count, most) in counted.items() if count > most
    }


def order_of_layers(found: Modules) -> Violations:
    """In a line of the contract, the left one imports the right one and not the other way round."""
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    places = [part for layer in linter["contracts"][0]["layers"] for part in re.split(" [:|] ", layer)]
    edges = architecture.of_parts(architecture.graph(found), "hub_magmax")
    return {
        f"{upper} -> {lower}": f"{lower} imports {upper}, which stands left of it or above"
        for place, upper in enumerate(places)
        for lower in places[place + 1 :]
        if upper in edges.get(lower, ())
    }


def _in_package(found: Modules) -> Iterator[Module]:
    return (module for module in found.values() if module.file.startswith("hub_magmax/"))


def _limited(found: Modules) -> Iterator[Module]:
    return (module for module in found.values() if f"{module.name}.".startswith(LIMITED))


def long_modules(found: Modules) -> Violations:
    """No module is long."""
    long = (module for module in _limited(found) if module.num_lines > MAX_LINES)
    return {module.file: f"{module.file} has {module.num_lines} lines" for module in long}


def _functions(found: Modules) -> Iterator[tuple[str, Module, str, Function]]:
    for module in _limited(found):
        for name, function in module.functions.items():
            yield f"{module.file}: {name}", module, name, function


def many_parameters(found: Modules) -> Violations:
    """No function has many parameters."""
    problems = {}
    for place, module, name, function in _functions(found):
        compiled = architecture.is_decorated(module, name, COMPILED)
        count = architecture.num_parameters(function)
        if count > (MAX_COMPILED_PARAMETERS if compiled else MAX_PARAMETERS):
            problems[place] = f"{module.file}:{function.lineno}: {name} has {count} parameters"
    return problems


def complex_functions(found: Modules) -> Violations:
    """No function is complex without a comment that says why."""
    problems = {}
    for place, module, name, function in _functions(found):
        count = architecture.complexity(function)
        if count > MAX_COMPLEXITY and not architecture.has_reason(module, function):
            problems[place] = f"{module.file}:{function.lineno}: {name} has a complexity of {count}"
    return problems


def private_names(found: Modules) -> Violations:
    """No module takes a private name of another, and no test replaces one."""
    problems = {}
    for module in found.values():
        names = architecture.private_names_used(module, found)
        if module.name.startswith("tests."):
            names |= architecture.private_names_patched(module, found)
        problems |= {f"{module.file}: {name}": f"{module.file} uses {name}" for name in names}
    return problems


def compiled_or_not(found: Modules) -> Violations:
    """Only kernels know whether loops are compiled."""
    outside = (module for module in _in_package(found) if not module.file.startswith(KERNELS))
    return {m.file: f"{m.file} says is_compiled" for m in outside if "is_compiled" in m.text}


def where_checkpoints_are(found: Modules) -> Violations:
    """Only checkpoints, the Hub's client and publishing ask where a checkpoint comes from."""
    problems = {}
    for place, module, name, function in _functions(found):
        inside = not module.file.startswith("hub_magmax/") or module.file.startswith(LOCATIONS)
        if not inside and place not in WRITTEN_OUT and any(map(_asks, architecture.own_nodes(function))):
            problems[place] = f"{module.file}:{function.lineno}: {name} asks where a checkpoint comes from"
    return problems


def _asks(node: ast.AST) -> bool:
    """Say whether a repository's name is read, or the class of a source asked for."""
    match node:
        case ast.Attribute(attr="repo_id", ctx=ast.Load()):
            return True
        case ast.Call(func=ast.Name(id="isinstance"), args=[_, kind]):
            return "Source" in ast.unparse(kind)
    return False


CHECKS: tuple[Callable[[Modules], Violations], ...] = (
    circles_of_modules,
    circles_of_packages,
    order_of_layers,
    layout,
    long_modules,
    many_parameters,
    complex_functions,
    private_names,
    compiled_or_not,
    where_checkpoints_are,
)


@pytest.fixture(scope="module")
def found() -> Modules:
    return architecture.modules(ROOT, EVERYTHING)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_nothing_breaks_a_limit_but_what_is_known_to(check, found):
    known = json.loads(KNOWN.read_text()).get(check.__name__, []) if KNOWN.is_file() else []
    problems = check(found)
    new = [problems[name] for name in sorted(problems.keys() - set(known))]
    assert not new, f"{check.__doc__}\n" + "\n".join(new)
    gone = sorted(set(known) - problems.keys())
    assert not gone, "mended, so write it again by `python -m tests.test_architecture`:\n" + "\n".join(gone)


# The measurements themselves, on code written for them.


def written(folder: Path, texts: Mapping[str, str]) -> dict[str, Module]:
    """Write modules of a package `p`, by their names without it, and return what is found there."""
    for name, text in {"__init__": "", **texts}.items():
        path = folder / "p" / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return architecture.modules(folder, ["p"])


@pytest.mark.parametrize(
    "back",
    [
        "import p.a",
        "from p import a",
        "from p.a import x",
        "from .a import x",
        "from . import a as other",
        "def f():\n    from p.a import x",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.a import x",
    ],
)
def test_a_circle_is_found_however_it_is_imported(tmp_path, back):
    found = written(tmp_path, {"a": "from p.b import y", "b": back, "c": "import p.a"})
    assert architecture.circles(architecture.graph(found)) == [["p.a", "p.b", "p.a"]]


def test_the_shortest_circle_is_named_and_a_tree_has_none():
    edges = {"a": ["b", "d"], "b": ["c"], "c": ["a"], "d": ["a"], "e": ["a", "f"], "f": []}
    assert architecture.circles(edges) == [["a", "d", "a"]]
    assert architecture.circles({**edges, "c": [], "d": []}) == []
    assert architecture.circles({"a": ["a"]}) == [["a", "a"]]


def test_a_circle_of_packages_needs_no_circle_of_modules(tmp_path):
    texts = {"q.one": "import p.r.one", "r.one": "", "r.two": "import p.q.two", "q.two": ""}
    edges = architecture.graph(written(tmp_path, texts))
    assert architecture.circles(edges) == []
    assert architecture.circles(architecture.of_parts(edges, "p")) == [["p.q", "p.r", "p.q"]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def f(): return 1", 1),
        ("def f(x):\n if x and y or z: pass\n elif y: pass\n else: pass", 5),
        ("def f(x):\n for y in x:\n  while y: pass\n else: pass", 4),
        ("def f(x): return [y if y else 0 for y in x if y for z in y]", 5),
        ("def f():\n try: pass\n except A: pass\n except B: pass\n else: pass", 4),
        ("def f(x):\n match x:\n  case 1: pass\n  case 2: pass\n  case _: pass", 3),
        ("def f(x):\n assert x\n return lambda: x", 3),
        ("def f(x):\n def g():\n  if x: pass\n if x: pass", 2),
    ],
)
def test_complexity_is_one_and_the_number_of_decisions(text, expected):
    assert architecture.complexity(Module("p.py", "p", text).functions["f"]) == expected


def test_parameters_of_all_kinds_are_counted_but_not_the_object_itself():
    text = "class A:\n def f(self, a, /, b, *c, d=1, **e): pass\ndef g(): pass"
    functions = Module("p.py", "p", text).functions
    assert [architecture.num_parameters(functions[name]) for name in ("A.f", "g")] == [5, 0]


def test_compiled_functions_are_known_by_their_decorators_and_those_inside_them():
    text = "@x.jit(cache=True)\ndef f():\n def g(): pass\n@cache\ndef h(): pass\n@compiled\ndef k(): pass"
    module = Module("p.py", "p", text)
    compiled = [name for name in module.functions if architecture.is_decorated(module, name, COMPILED)]
    assert compiled == ["f", "f.g", "k"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# Why.\ndef f(): pass", True),
        ("def f():  # why\n pass", True),
        ("# Why.\n@cache\ndef f(): pass", True),
        ("@cache\n# Why.\ndef f(): pass", True),
        ("# Of something else.\n\ndef f(): pass", False),
        ("def f():  # noqa: C901\n pass", False),
        ("def f():\n '''# text'''", False),
    ],
)
def test_a_reason_is_a_comment_at_the_def(text, expected):
    module = Module("p.py", "p", text)
    assert architecture.has_reason(module, module.functions["f"]) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from p.a import _x", {"p.a._x"}),
        ("from p import a as b\nb._x + b.y + b.__name__", {"p.a._x"}),
        ("import p.a\np.a._x", {"p.a._x"}),
        ("from p.a import __version__, y\ny._x", set()),
        ("from elsewhere import _x", set()),
    ],
)
def test_private_names_of_other_modules_are_found(tmp_path, text, expected):
    found = written(tmp_path, {"a": "_x = y = 1", "b": text})
    assert architecture.private_names_used(found["p.b"], found) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from p import a\nmonkeypatch.setattr(a, '_x', 1)", {"p.a._x"}),
        ("from p.a import A\nmonkeypatch.setattr(A, '_x', 1)", {"p.a.A._x"}),
        ("monkeypatch.setattr('p.a._x', 1)", {"p.a._x"}),
        ("with monkeypatch.context() as patch: patch.delattr(thing, '_x')", {"thing._x"}),
        ("mock.patch('p.a._x')", {"p.a._x"}),
        ("monkeypatch.setattr(a, 'x', 1)\nmonkeypatch.setenv('_X', '1')\nsetattr(a, name, 1)", set()),
    ],
)
def test_private_names_that_are_replaced_are_found(tmp_path, text, expected):
    found = written(tmp_path, {"a": "", "b": text})
    assert architecture.private_names_patched(found["p.b"], found) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def f(x): return x.repo_id", True),
        ("def f(x): return isinstance(x, HubSource)", True),
        ("def f(x): return isinstance(x, (int, a.LocalSource | None))", True),
        ("def f(x): return g(repo_id=x), {'repo_id': x}, isinstance(x, int)", False),
        ("def f():\n def g(x): return x.repo_id", False),
    ],
)
def test_questions_for_the_place_of_a_checkpoint_are_found(text, expected):
    function = Module("p.py", "p", text).functions["f"]
    assert any(map(_asks, architecture.own_nodes(function))) is expected


if __name__ == "__main__":
    everything = architecture.modules(ROOT, EVERYTHING)
    problems = {check.__name__: sorted(check(everything)) for check in CHECKS}
    KNOWN.write_text(json.dumps(problems, indent=2) + "\n")
