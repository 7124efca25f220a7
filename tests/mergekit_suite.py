"""Conformance suite: mergekit's configurations imported, merged, and compared with mergekit's results.

    python -m tests.mergekit_suite FOLDER [WORK]

FOLDER holds `NN-name.yml`, `expected.json` (the right verdict by line, and digests of mergekit's results),
`make_models.py` and `check.py`. Prints the verdicts of each line that are not the expected ones, and what
`check.py` says about the merged weights. Exit code 1 where a verdict claims more than is right, or weights
differ. Names of configurations after WORK select some.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hub_magmax.checkpoints.model_facts import CheckpointFacts
from hub_magmax.pipeline import lock, plan, run
from hub_magmax.recipe.importing.findings import Finding
from hub_magmax.recipe.importing.other_tools import import_text
from hub_magmax.recipe.importing.translation import Imported
from hub_magmax.recipe.loading import parse_recipe

#: Verdicts from the best to the worst.
ORDER = ("exact", "rounding", "in expectation", "not representable", "refused")

#: Merges of a configuration that draws.
SEEDS = 8


def in_folders(text: str, hub: Mapping[str, Any]) -> str:
    """Return a configuration with folders in place of ids on the Hub."""
    for name, folder in hub["folders"].items():
        text = text.replace(name, folder)
    revision = hub["revision"]
    return text.replace(f"@{revision}", "").replace(f", revision: {revision}", "")


def judged(findings: Sequence[Finding], elements: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return (`more`, `less`, `same` or `further`, text) for each expected verdict.

    `further` is what has a counterpart, and was not expected to: `check.py` says whether weights are right.
    """
    return [_judged(findings, element) for element in elements]


def _judged(findings: Sequence[Finding], element: Mapping[str, Any]) -> tuple[str, str]:
    wanted = element["verdict"]
    here = [one for one in findings if one.line == element["line"]]
    verdicts = [one.verdict for one in here if one.verdict in ORDER]
    worst = max(verdicts, key=ORDER.index, default="nothing")
    is_warned = any(one.verdict == "warning" for one in here)
    found = f"{worst}{' and a warning' if is_warned else ''}"
    said = f"line {element['line']} {element['text']}: {found}, not {wanted}"
    if wanted == "warning":
        return ("same" if is_warned else "less" if worst in ORDER[3:] else "more"), said
    if worst == "nothing":
        return "less", said
    if wanted == "not representable" and ORDER.index(worst) < ORDER.index(wanted):
        return "further", said
    if wanted in verdicts and worst == wanted:
        return "same", said
    return ("more" if ORDER.index(worst) < ORDER.index(wanted) else "less"), said


def merge(imported: Imported, folder: Path, output: Path, seed: int = 0) -> None:
    """Merge an imported recipe."""
    values = dict(imported.recipe or {})
    values |= {"seed": seed, "output": {**values["output"], "path": str(output)}}
    recipe = parse_recipe(values, folder=folder)
    found = plan(recipe, lock(recipe)).findings
    run(recipe, in_spite_of=[one.name for one in found])


def main(folder: Path, work: Path, only: Sequence[str] = ()) -> int:
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    models, results = work / "models", work / "results"
    subprocess.run([sys.executable, folder / "make_models.py", models], check=True)
    counts = {"same": 0, "less": 0, "more": 0, "further": 0}
    for name, wanted in expected["configs"].items():
        if only and not name.startswith(tuple(only)):
            continue
        text = in_folders((folder / f"{name}.yml").read_text(encoding="utf-8"), expected["hub"])
        imported = import_text(text, name, CheckpointFacts(models, models))
        found = judged(imported.findings, wanted["elements"])
        for state, _ in found:
            counts[state] += 1
        if imported.recipe is not None:
            seeds = range(SEEDS if "draws" in wanted else 1)
            for seed in seeds:
                merge(
                    imported, models, results / name / str(seed) if len(seeds) > 1 else results / name, seed
                )
        differs = "" if imported.verdict == wanted["verdict"] else f", not {wanted['verdict']}"
        print(f"{name}: {imported.verdict}{differs}")
        for state, said in found:
            if state != "same":
                print(f"    {state.upper() if state == 'more' else state}: {said}")
    print(", ".join(f"{count} verdicts {state}" for state, count in counts.items()), flush=True)
    done = subprocess.run([sys.executable, folder / "check.py", models, results], check=False)
    return int(bool(counts["more"] or done.returncode))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory(prefix="mergekit_suite_") as temporary:
        place = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(temporary)
        sys.exit(main(Path(sys.argv[1]), place, sys.argv[3:]))
