"""Gain of numbers by block over one number: both searched on held-out digits, with as many tries.

    python -m benchmarks.blocks FOLDER              print it, for what `hub-magmax quickstart` made
    python -m benchmarks.blocks FOLDER --seeds 0 1  for these draws of the examples that choose
    python -m benchmarks.blocks FOLDER --write      and store it in benchmarks/results/blocks.json

Task vectors are added (`task_arithmetic`), each times a coefficient: one for all, or another one by block, by
task, or both. Nelder and Mead's method looks for the coefficients by the mean log-likelihood of 100 examples
of all ten digits; the others are scored. With `--write`, stored draws that are not made anew stay.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from scipy.optimize import minimize

from benchmarks.continual.scoring import RefilledModel
from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.evaluation.data import load_examples
from hub_magmax.evaluation.evaluators import Outcome, columns_of, get_evaluator
from hub_magmax.evaluation.evaluators.loading import load_model
from hub_magmax.recipe.values import Data

RESULTS = Path(__file__).parent / "results" / "blocks.json"

TASKS = ("zero-one", "two-three", "four-five", "six-seven", "eight-nine")
NUM_TASKS, NUM_BLOCKS = len(TASKS), 3
#: Groups of tensors: before the blocks, each block, and after them.
GROUPS = ("vit.embeddings.*", *(f"vit.encoder.layer.{block}.*" for block in range(NUM_BLOCKS)), "*")
BUDGET, NUM_CHOOSING, START, STEP = 60, 100, 0.2, 0.1

#: How many numbers are searched, and the coefficients of each group and task that they stand for.
FORMS: Mapping[str, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {
    "one": (1, lambda found: np.full((len(GROUPS), NUM_TASKS), found[0])),
    "line over the blocks": (2, lambda found: np.repeat(_line(*found)[:, None], NUM_TASKS, 1)),
    "by block": (len(GROUPS), lambda found: np.repeat(found[:, None], NUM_TASKS, 1)),
    "by task": (NUM_TASKS, lambda found: np.repeat(found[None], len(GROUPS), 0)),
    "by block and task": (len(GROUPS) * NUM_TASKS, lambda found: found.reshape(len(GROUPS), NUM_TASKS)),
}


def _line(first: float, last: float) -> np.ndarray:
    """Return a number for each group, linear over the blocks, as LiNeS has it."""
    return np.array([first, *np.linspace(first, last, NUM_BLOCKS), last])


class Bench:
    """Checkpoints of a family, merged by addition, and a model that takes what comes out."""

    def __init__(self, folder: Path) -> None:
        self.base = load_file(folder / "checkpoints" / "base" / "model.safetensors")
        tasks = [load_file(folder / "checkpoints" / name / "model.safetensors") for name in TASKS]
        self.vectors = {
            name: torch.stack([task[name] - base for task in tasks]) for name, base in self.base.items()
        }
        self.groups = {
            name: next(number for number, match in enumerate(GROUPS) if fnmatchcase(name, match))
            for name in self.base
        }
        self.evaluator = get_evaluator("image-classification").make()
        place = ModelPlace(str(folder / "checkpoints" / "base"))
        kinds = self.evaluator.model_class, self.evaluator.processor_class
        self.model = RefilledModel(load_model(place, *kinds, "image-classification"))
        self.data = Data(dataset=str(folder / "data" / "all"))
        self.examples = load_examples(self.data, folder, labelled=True)

    def batches(self, chosen: Sequence[int]) -> list[Any]:
        columns = columns_of(self.data)
        return list(
            self.evaluator.encode(self.model.loaded, self.examples.select(chosen), columns, NUM_CHOOSING)
        )

    def outcomes(self, coefficients: np.ndarray, batches: Sequence[Any]) -> Sequence[Outcome]:
        """Return what the model of these coefficients, "groups tasks", does on encoded examples."""
        rows = torch.from_numpy(coefficients.astype(np.float32))
        merged = {
            name: base + torch.tensordot(rows[self.groups[name]], self.vectors[name], 1)
            for name, base in self.base.items()
        }
        return self.evaluator.outcomes(self.model.with_weights(merged), batches)


def searched(bench: Bench, form: str, seed: int) -> dict[str, Any]:
    """Look for the numbers of one form on a draw of the examples, and score them on the others."""
    size, coefficients_of = FORMS[form]
    order = np.random.default_rng(seed).permutation(len(bench.examples)).tolist()
    choosing, others = bench.batches(order[:NUM_CHOOSING]), bench.batches(order[NUM_CHOOSING:])
    tried: list[tuple[float, np.ndarray]] = []

    def loss(numbers: np.ndarray) -> float:
        found = bench.outcomes(coefficients_of(numbers), choosing)
        value = -math.fsum(math.log(max(o.probability or 0.0, 1e-12)) for o in found) / len(found)
        tried.append((value, numbers.copy()))
        return value

    corners = START + STEP * np.vstack([np.zeros(size), np.eye(size)])
    minimize(
        loss, corners[0], method="Nelder-Mead",
        options={"initial_simplex": corners, "maxfev": BUDGET, "adaptive": size > NUM_TASKS},
    )  # fmt: skip
    value, numbers = min(tried, key=lambda pair: pair[0])
    scores = [outcome.score for outcome in bench.outcomes(coefficients_of(numbers), others)]
    return {
        "form": form, "seed": seed, "tries": len(tried), "numbers": numbers.round(4).tolist(),
        "log_likelihood": round(-value, 4), "accuracy": round(100 * statistics.fmean(scores), 2),
    }  # fmt: skip


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return mean and standard deviation of the accuracy of each form over the draws, in per cent."""
    found = {form: [row["accuracy"] for row in rows if row["form"] == form] for form in FORMS}
    return {
        form: (round(statistics.fmean(values), 1), round(statistics.stdev(values), 1) if values[1:] else 0.0)
        for form, values in found.items()
        if values
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--write", action="store_true", help="store the numbers")
    options = parser.parse_args()
    rows = []
    bench = Bench(options.folder.absolute())
    for seed in options.seeds:
        for form in FORMS:
            rows.append(searched(bench, form, seed))
            print(json.dumps(rows[-1]), flush=True)
    if options.write:
        stored = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
        rows += [row for row in stored if row["seed"] not in options.seeds]
        rows.sort(key=lambda row: (row["seed"], list(FORMS).index(row["form"])))
        RESULTS.write_text(json.dumps(rows, indent=2) + "\n")
    print(json.dumps(means(rows)))


if __name__ == "__main__":
    main()
