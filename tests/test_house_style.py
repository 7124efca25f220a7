"""First lines of modules: each names what the module holds, and is no riddle."""

import ast
from pathlib import Path

import hub_magmax

RIDDLES = ("What", "Where", "Which", "Whose", "How", "Why")


def test_the_first_line_of_every_module_begins_with_a_name():
    folder = Path(hub_magmax.__file__).parent
    parsed = {path: ast.parse(path.read_text(encoding="utf-8")) for path in folder.rglob("*.py")}
    first = {path: (ast.get_docstring(module) or "").split("\n")[0] for path, module in parsed.items()}
    assert [path for path, line in first.items() if not line or line.startswith(RIDDLES)] == []
