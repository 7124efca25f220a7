"""Measure rounds of tuning and merging (ATM) against one merge and joint training, with as many epochs.

    python -m benchmarks.alternating --folder families      # digits, made where they are not there
    python -m benchmarks.alternating --render               # the section of docs/alternating.md again

Every task is trained for ten epochs in all, from the base model: at once, or a tenth to a half of them in
each of K rounds by `hm.alternate`. The preference acts in each round, or in the last merge of uniform rounds.
What was measured is in benchmarks/results/alternating.json; the section is written from that alone.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

import hub_magmax as hm
from benchmarks.continual.scoring import RefilledModel
from benchmarks.page_tables import table
from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.evaluation.evaluators import get_evaluator
from hub_magmax.evaluation.evaluators.loading import load_model
from hub_magmax.evaluation.intervals import mean_interval
from hub_magmax.files import write_text
from hub_magmax.quickstart import DigitsFamily, make_family
from hub_magmax.quickstart.digits import Examples, load_examples, prepare
from hub_magmax.quickstart.settings import DEFAULTS
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.recipe.schema import Recipe

RESULTS = Path(__file__).parent / "results" / "alternating.json"
PAGE = Path(__file__).parents[1] / "docs" / "alternating.md"

#: Epochs of each task, in all rounds together.
BUDGET = 10
METHODS = ("average", "tunable_magmax", "ties")

#: Numbers of rounds by method, beside one merge.
ROUNDS: Mapping[str, tuple[int, ...]] = {"average": (2, 5, 10), "tunable_magmax": (10,), "ties": (10,)}

#: Weights of the tasks, in their order.
PREFERENCES: Mapping[str, tuple[float, ...]] = {
    "uniform": (0.2,) * 5,
    "skewed": (0.6, 0.2, 0.1, 0.05, 0.05),
}

#: Scaling coefficients of one merge, beside the method's own.
SCALINGS = (0.3, 0.5, 0.7, 1.0, 1.5, 2.0)

#: Uniform rounds, whose last merge is under the skewed preference.
LAST = "skewed, last merge"

#: All numbers of rounds.
COUNTS = (1, 2, 5, BUDGET)

_SECTION = re.compile(r"(?<=<!-- measured -->\n).*?(?=<!-- /measured -->)", re.DOTALL)

Weights = dict[str, Tensor]
Row = dict[str, Any]


@dataclass(frozen=True)
class Digits:
    """One family of digits, with what the runs of it share.

    Attributes:
        family: Its base model and data.
        seed: Its seed, and that of every run.
        test: Images that no model is trained on.
        model: Takes the weights of any of its models.
    """

    family: DigitsFamily
    seed: int
    test: Examples
    model: RefilledModel

    @classmethod
    def make(cls, folder: Path, seed: int) -> Digits:
        """Make the family in a folder if it is not there."""
        family = make_family(folder / f"digits-{seed}", seed=seed, report=print)
        test = prepare(load_examples(), family.classes, DEFAULTS, seed).test
        kind = get_evaluator("image-classification").make()
        loaded = load_model(
            ModelPlace(str(family.base_model)), kind.model_class, kind.processor_class, "alternating"
        )
        return cls(family, seed, test, RefilledModel(loaded))

    @property
    def sizes(self) -> list[int]:
        """Test images of each task."""
        return [len(self.test.of(digits).labels) for digits in self.family.classes.values()]

    def right(self, weights: Weights) -> list[int]:
        """Return how many test images of each task a model answers well, over all ten classes."""
        network = self.model.with_weights(weights).network
        parts = [self.test.of(digits) for digits in self.family.classes.values()]
        with torch.inference_mode():
            found = [(network(pixel_values=part.images).logits.argmax(1) == part.labels) for part in parts]
        return [int(one.sum()) for one in found]

    def recipe(
        self, run: Path, data: Mapping[str, str], method: str, weights: Sequence[float], rounds: int
    ) -> Recipe:
        """Return a recipe of rounds whose checkpoints and model are in the folder `run`."""
        task = DEFAULTS.task
        run.mkdir(parents=True, exist_ok=True)
        training = {
            "order": "from_base",
            "data": {
                name: {"dataset": str((self.family.data / part).absolute())} for name, part in data.items()
            },
            "evaluator": "image-classification",
            "epochs": BUDGET / rounds,
            "batch_size": task.batch_size,
            "learning_rate": task.learning_rate,
            "label_smoothing": task.label_smoothing,
            "frozen": ["classifier.*"],
            "checkpoint_every": 10_000,
            "alternate": {"rounds": rounds},
        }
        values = {
            "schema": 1,
            "base_model": str(self.family.base_model.absolute()),
            "tasks": [{"name": name, "model": f"./tasks/{name}"} for name in data],
            "training": training,
            "method": method,
            "preference": {"weights": dict(zip(data, weights, strict=True))},
            "output": {"path": "./merged"},
            "seed": self.seed,
        }
        return parse_recipe(values, folder=run)


def at_once(digits: Digits, folder: Path) -> Iterator[Row]:
    """Yield the right answers of base model, joint training, and merges of finished checkpoints."""
    names = list(digits.family.tasks)
    yield {"run": "base", "right": digits.right(_weights(digits.family.base_model))}
    hm.finetune(digits.recipe(folder / "joint", {"joint": "all"}, "average", (1.0,), 1))
    yield {"run": "joint", "right": digits.right(_weights(folder / "joint" / "tasks" / "joint"))}
    each = dict(zip(names, names, strict=True))
    hm.finetune(digits.recipe(folder / "each", each, "average", PREFERENCES["uniform"], 1))
    base = _weights(digits.family.base_model)
    tasks = {name: _weights(folder / "each" / "tasks" / name) for name in names}
    for method, (preference, weights), scaling in product(METHODS, PREFERENCES.items(), (None, *SCALINGS)):
        row = {"run": "rounds", "method": method, "rounds": 1, "preference": preference}
        row |= {"scaling": scaling} if scaling else {}
        yield row | {"right": digits.right(_merged(base, tasks, method, weights, scaling))}


def in_rounds(digits: Digits, folder: Path, method: str) -> Iterator[Row]:
    """Yield the right answers of rounds under each preference, and of one in the last merge alone."""
    each = dict(zip(digits.family.tasks, digits.family.tasks, strict=True))
    for rounds in ROUNDS[method]:
        row = {"run": "rounds", "method": method, "rounds": rounds}
        for preference, weights in PREFERENCES.items():
            run = folder / f"{rounds}-{preference}"
            hm.alternate(digits.recipe(run, each, method, weights, rounds))
            yield row | {"preference": preference, "right": digits.right(_weights(run / "merged"))}
        made = folder / f"{rounds}-uniform" / "merged.rounds"
        start = _weights(made / str(rounds - 1) / "model")
        last = {name: _weights(made / str(rounds) / "tasks" / name) for name in each}
        merged = _merged(start, last, method, PREFERENCES["skewed"], None)
        yield row | {"preference": LAST, "right": digits.right(merged)}


def _weights(checkpoint: Path) -> Weights:
    return load_file(checkpoint / "model.safetensors")


def _merged(
    base: Weights, tasks: Mapping[str, Weights], method: str, weights: Sequence[float], scaling: float | None
) -> Weights:
    spec = {"name": method} | ({"scaling": scaling} if scaling else {})
    return hm.merge_state_dicts(base, tasks, method=spec, preference=[*weights])


def measure(folder: Path, seeds: Sequence[int]) -> None:
    """Measure what is not stored yet, one method after the other, and store it."""
    for part in ("at once", *METHODS):
        for seed in seeds:
            results = {"seeds": {}} if not RESULTS.is_file() else json.loads(RESULTS.read_text())
            stored = results["seeds"].setdefault(str(seed), {"parts": {}})
            if part in stored["parts"]:
                continue
            digits = Digits.make(folder, seed)
            with TemporaryDirectory(prefix="alternating_") as runs:
                place = Path(runs)
                rows = at_once(digits, place) if part == "at once" else in_rounds(digits, place, part)
                stored["parts"][part] = [*rows]
            stored["sizes"] = digits.sizes
            write_text(RESULTS, _lines(results))
            print(f"{part}, seed {seed}: stored", flush=True)


def _lines(results: Mapping[str, Any]) -> str:
    """Return JSON with one line for each run."""
    text = re.sub(r"\n {12,}", " ", json.dumps(results, indent=2))
    return re.sub(r"\n {10}\}", " }", text) + "\n"


class Accuracies:
    """Accuracies of the stored runs, in per cent.

    Args:
        results: By seed: `sizes` of the tasks, and `parts` of rows as they are yielded.
    """

    def __init__(self, results: Mapping[str, Mapping[str, Any]]) -> None:
        self._results = results

    def of(self, weights: Sequence[float], **wanted: Any) -> dict[str, float]:
        """Return the mean over tasks, by their weights, of the runs that agree with `wanted`, by seed."""
        asked = [wanted.get(key) for key in _KEYS]
        found = {}
        for seed, result in self._results.items():
            for row in chain.from_iterable(result["parts"].values()):
                if [row.get(key) for key in _KEYS] == asked:
                    shares = np.array(row["right"]) / np.array(result["sizes"])
                    found[seed] = 100 * float(np.dot(weights, shares))
        return found


_KEYS = ("run", "method", "rounds", "preference", "scaling")


def section(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the part of the page that is written from results."""
    found, even = Accuracies(results), PREFERENCES["uniform"]
    joint, base = found.of(even, run="joint"), found.of(even, run="base")
    heads = ["method", *(f"K = {rounds}" for rounds in COUNTS), f"K = {BUDGET} over K = 1"]
    rows = []
    for method in METHODS:
        by_rounds = {k: _run(found, even, method, k, "uniform") for k in COUNTS}
        best = max((_run(found, even, method, 1, "uniform", s) for s in SCALINGS), key=_mean)
        gained = gain(by_rounds[BUDGET], by_rounds[1])
        rows.append([f"`{method}`", *map(_spread, by_rounds.values()), gained, _spread(best)])
    words = (
        f"`python -m benchmarks.alternating`: five tasks of two digits each, {BUDGET} epochs of each task in "
        f"all, {len(joint)} seeds. Accuracy in per cent over all ten classes, mean of the tasks: base model "
        f"{_spread(base)}, joint training on all examples, as often, {_spread(joint)}. ± is the standard "
        "deviation over seeds; differences are paired by seed, with 95 % intervals of Student's t. λ is each "
        "method's own, in the last column the best of six for all seeds in hindsight. A cell is empty where "
        "nothing was measured."
    )
    return "\n".join([words, "", table([*heads, "K = 1, best λ"], rows), *_skewed(found), ""])


def _skewed(found: Accuracies) -> Iterator[str]:
    """Yield the lines about rounds under a preference."""
    weights, tuned, rows = PREFERENCES["skewed"], [], []
    shown = " / ".join(f"{weight:g}" for weight in weights)
    yield (
        f"Accuracy weighted by a preference of {shown}; joint training, which has none, "
        f"{_spread(found.of(weights, run='joint'))}:\n"
    )
    heads = ("method", "K", "no preference", "in each round", "in the last merge")
    for method in METHODS:
        one = _run(found, weights, method, 1, "skewed")
        for rounds in (1, *ROUNDS[method]):
            none, each = (_run(found, weights, method, rounds, name) for name in ("uniform", "skewed"))
            last = _run(found, weights, method, rounds, LAST)
            cells = [_spread(none), _spread(each), _spread(last), gain(each, last), gain(last, one)]
            rows.append([f"`{method}`", str(rounds), *cells])
        best = max((_run(found, weights, method, 1, "skewed", s) for s in SCALINGS), key=_mean)
        tuned.append(f"`{method}` {_spread(best)}")
    yield table([*heads, "each over last", "last over one merge"], rows)
    yield f"One merge under the preference, with the best λ in hindsight: {', '.join(tuned)}."


def _run(
    found: Accuracies,
    weights: Sequence[float],
    method: str,
    rounds: int,
    preference: str,
    scaling: float | None = None,
) -> dict[str, float]:
    wanted = {"method": method, "rounds": rounds, "preference": preference, "scaling": scaling}
    return found.of(weights, run="rounds", **wanted)


def _mean(values: Mapping[str, float]) -> float:
    return float(np.mean([*values.values()]))


def _spread(values: Mapping[str, float]) -> str:
    """Return mean and standard deviation over seeds; nothing where nothing was measured."""
    found = [*values.values()]
    return f"{np.mean(found):.1f} ± {np.std(found, ddof=1):.1f}" if len(found) > 1 else ""


def gain(values: Mapping[str, float], others: Mapping[str, float]) -> str:
    """Return the mean difference over the seeds that both have, and its interval."""
    found = [values[seed] - others[seed] for seed in values if seed in others]
    if len(found) < 2:
        return ""
    low, high = mean_interval(found, is_share=False)
    return f"{np.mean(found):+.1f} [{low:+.1f}, {high:+.1f}]"


def render() -> None:
    """Write the section of the page from what is stored."""
    results = json.loads(RESULTS.read_text())["seeds"]
    PAGE.write_text(_SECTION.sub(lambda _: section(results), PAGE.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.alternating",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, default=Path("families"), help="families of digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--render", action="store_true", help="write the page from the stored results alone")
    options = parser.parse_args()
    if not options.render:
        measure(options.folder, options.seeds)
    render()


if __name__ == "__main__":
    main()
