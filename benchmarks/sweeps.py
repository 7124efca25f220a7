"""Front found by the adaptive sweep: sixty tries against a lattice of three hundred, on digits.

    python -m benchmarks.sweeps FOLDER ...           print it for families that `hub-magmax quickstart` made
    python -m benchmarks.sweeps FOLDER ... --write   and store it in benchmarks/results/sweeps.json

Hypervolumes are told above two references: the base model's scores, which is what the search maximises, and
zero on every task. Above zero a few hundred points of a curved front leave gaps that only more points close,
whichever way they are chosen.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hub_magmax.analysis.sweeping import sweep, sweepable
from hub_magmax.pipeline import lock
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.recipe.schema import Recipe
from hub_magmax.reporting.pareto import hypervolume
from hub_magmax.reporting.tradeoff_surface import Surface

RESULTS = Path(__file__).parent / "results" / "sweeps.json"

#: Three of the quickstart's five tasks, and methods with their scaling coefficients.
TASKS = ("zero-one", "four-five", "eight-nine")
METHODS = ({"name": "tunable_magmax", "scaling": 0.5}, {"name": "average", "scaling": 1.0})
BUDGET, DENSE = 60, 300


def recipe_of(folder: Path, method: dict[str, Any], walk: str, budget: int) -> Recipe:
    values = {
        "base_model": "./checkpoints/base",
        "tasks": [{"name": name, "model": f"./checkpoints/{name}"} for name in TASKS],
        "method": method,
        "evaluation": {"tasks": {name: {"dataset": f"./data/{name}"} for name in TASKS}},
        "sweep": {"walk": walk, "budget": budget},
    }
    return parse_recipe(values, folder=folder)


def swept(recipe: Recipe) -> Surface:
    return sweep(recipe, lock(sweepable(recipe)))


def compared(folder: Path, method: dict[str, Any]) -> dict[str, Any]:
    found = swept(recipe_of(folder, method, "adaptive", BUDGET))
    dense = swept(recipe_of(folder, method, "grid", DENSE))
    even = swept(recipe_of(folder, method, "grid", BUDGET))
    floor = [score.value for score in dense.base_model]

    def share(surface: Surface, reference: Sequence[float]) -> float:
        return round(hypervolume(surface.values, reference) / hypervolume(dense.values, reference), 4)

    return {
        "method": method["name"],
        "tries": {"adaptive": len(found.points), "even": len(even.points), "dense": len(dense.points)},
        "adaptive_above_base": share(found, floor),
        "even_above_base": share(even, floor),
        "adaptive_above_zero": share(found, (0.0,) * 3),
        "even_above_zero": share(even, (0.0,) * 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help="store the numbers")
    options = parser.parse_args()
    rows = []
    for number, folder in enumerate(options.folders):
        for method in METHODS:
            rows.append({"family": number, **compared(folder, method)})
            print(json.dumps(rows[-1]), flush=True)
    if options.write:
        RESULTS.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
