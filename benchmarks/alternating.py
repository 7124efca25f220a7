"""Measure rounds of tuning and merging (ATM) against one merge and joint training, with as many epochs.

    python -m benchmarks.alternating digits --folder families      # made where they are not there
    python -m benchmarks.alternating definitions --folder families --encoder MODEL --nouns data.noun
    python -m benchmarks.alternating digits --render               # the section of docs/alternating.md again

`benchmarks/wordnet.py` says what MODEL and data.noun are. Every task is trained for the same number of epochs
in all, from the base model: at once, or a share of them in each of K rounds by `hm.alternate`. The preference
acts in each round, or in the last merge of uniform rounds. The checkpoints of the first round depend on K
alone, and are trained once. What was measured is in benchmarks/results/alternating.json and
alternating_definitions.json; the sections are written from that alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

import hub_magmax as hm
from benchmarks.alternating_families import JOINT, Family, Weights, definitions, digits
from benchmarks.page_tables import table
from hub_magmax.evaluation.evaluators.loading import without_bars
from hub_magmax.evaluation.intervals import mean_interval
from hub_magmax.files import write_text

METHODS = ("average", "tunable_magmax", "ties")

#: Weights of the tasks, in their order.
PREFERENCES: Mapping[str, tuple[float, ...]] = {
    "uniform": (0.2,) * 5,
    "skewed": (0.6, 0.2, 0.1, 0.05, 0.05),
}

#: Scaling coefficients of one merge, beside the method's own.
SCALINGS = (0.3, 0.5, 0.7, 1.0, 1.5, 2.0)

#: Uniform rounds, whose last merge is under the skewed preference.
LAST = "skewed, last merge"

#: Part of the results that is no rounds.
AT_ONCE = "at once"

_HERE = Path(__file__).parent
_SECTION = re.compile(r"(?<=<!-- measured -->\n).*?(?=<!-- /measured -->)", re.DOTALL)

Row = dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """Data that rounds are measured on.

    Attributes:
        name: Of the files of its results and its page.
        command: As it stands on the page.
        tasks: In words.
        classes: Of all tasks, in words.
        counts: Numbers of rounds, from one merge to as many as epochs.
    """

    name: str
    command: str
    tasks: str
    classes: str
    counts: tuple[int, ...]

    @property
    def epochs(self) -> int:
        """Of each task, in all rounds together."""
        return self.counts[-1]

    @property
    def results(self) -> Path:
        return _HERE / "results" / f"{self.name}.json"

    @property
    def page(self) -> Path:
        return _HERE.parent / "docs" / f"{self.name}.md"

    @property
    def parts(self) -> Mapping[str, tuple[str, int]]:
        """Method and number of rounds of each part of the results that is measured in rounds."""
        runs = product(self.counts[1:], METHODS)
        return {f"{method}, K = {rounds}": (method, rounds) for rounds, method in runs}

    def stored(self) -> dict[str, Any]:
        """Return what is stored of each seed, by the seed."""
        found: dict[str, Any] = json.loads(self.results.read_text())["seeds"]
        return found


EXPERIMENTS: Mapping[str, Experiment] = {
    "digits": Experiment(
        "alternating",
        "python -m benchmarks.alternating digits",
        "five tasks of two digits each",
        "ten classes",
        (1, 2, 5, 10),
    ),
    "definitions": Experiment(
        "alternating_definitions",
        "python -m benchmarks.alternating definitions",
        "five tasks of four classes of definitions each",
        "twenty classes",
        (1, 2, 5),
    ),
}


def at_once(family: Family, folder: Path) -> Iterator[Row]:
    """Yield the right answers of base model, joint training, and merges of finished checkpoints."""
    yield {"run": "base", "right": family.right(family.base)}
    hm.finetune(family.recipe(folder / JOINT, [JOINT], "average", (1.0,), 1))
    yield {"run": "joint", "right": family.right(_weights(folder / JOINT / "tasks" / JOINT))}
    tasks = _all_weights(family, _first_round(family, folder, 1))
    for method, (preference, weights), scaling in product(METHODS, PREFERENCES.items(), (None, *SCALINGS)):
        row = {"run": "rounds", "method": method, "rounds": 1, "preference": preference}
        row |= {"scaling": scaling} if scaling else {}
        yield row | {"right": family.right(merge_changed(family.base, tasks, method, weights, scaling))}


def in_rounds(family: Family, folder: Path, method: str, rounds: int) -> Iterator[Row]:
    """Yield the right answers of rounds under each preference, and of one in the last merge alone."""
    row = {"run": "rounds", "method": method, "rounds": rounds}
    first = _first_round(family, folder, rounds)
    runs = {preference: folder / f"{rounds}-{method}-{preference}" for preference in PREFERENCES}
    for preference, run in runs.items():
        shutil.copytree(first, run / "merged.rounds" / "1" / "tasks", copy_function=os.link)
        hm.alternate(family.recipe(run, family.tasks, method, PREFERENCES[preference], rounds))
        yield row | {"preference": preference, "right": family.right(_weights(run / "merged"))}
    made = runs["uniform"] / "merged.rounds"
    start = _weights(made / str(rounds - 1) / "model")
    last = _all_weights(family, made / str(rounds) / "tasks")
    merged = merge_changed(start, last, method, PREFERENCES["skewed"], None)
    yield row | {"preference": LAST, "right": family.right(merged)}
    for run in runs.values():
        shutil.rmtree(run)


def _first_round(family: Family, folder: Path, rounds: int) -> Path:
    """Return the folder of the checkpoints of the first round, which are trained if they are not there."""
    run = folder / f"first-{rounds}"
    hm.finetune(family.recipe(run, family.tasks, "average", PREFERENCES["uniform"], rounds))
    return run / "tasks"


def _weights(checkpoint: Path) -> Weights:
    return load_file(checkpoint / "model.safetensors")


def _all_weights(family: Family, folder: Path) -> dict[str, Weights]:
    return {task: _weights(folder / task) for task in family.tasks}


def merge_changed(
    base: Weights, tasks: Mapping[str, Weights], method: str, weights: Sequence[float], scaling: float | None
) -> Weights:
    """Merge the tensors that a task changed, and leave the others as they are."""
    changed = [name for name in base if any(not torch.equal(base[name], own[name]) for own in tasks.values())]
    only = {task: {name: own[name] for name in changed} for task, own in tasks.items()}
    spec = {"name": method} | ({"scaling": scaling} if scaling else {})
    start = {name: base[name] for name in changed}
    return base | hm.merge_state_dicts(start, only, method=spec, preference=[*weights])


def measure(experiment: Experiment, family: Family) -> None:
    """Measure what is not stored yet of a seed, and store each part."""
    path = experiment.results
    with TemporaryDirectory(prefix="alternating_") as runs, without_bars():
        for part in (AT_ONCE, *experiment.parts):
            results = json.loads(path.read_text()) if path.is_file() else {"seeds": {}}
            stored = results["seeds"].setdefault(str(family.seed), {"parts": {}})
            if part in stored["parts"]:
                continue
            place = Path(runs)
            rows = (
                at_once(family, place)
                if part == AT_ONCE
                else in_rounds(family, place, *experiment.parts[part])
            )
            stored["parts"][part] = [*rows]
            stored["sizes"] = family.sizes
            write_text(path, _lines(results))
            print(f"{part}, seed {family.seed}: stored", flush=True)


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


def section(experiment: Experiment, results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the part of the page that is written from results."""
    found, even, counts = Accuracies(results), PREFERENCES["uniform"], experiment.counts
    joint, base = found.of(even, run="joint"), found.of(even, run="base")
    most = counts[-1]
    heads = ["method", *(f"K = {rounds}" for rounds in counts), f"K = {most} over K = 1", "K = 1, best λ"]
    rows = []
    for method in METHODS:
        by_rounds = {k: _run(found, even, method, k, "uniform") for k in counts}
        best = max((_run(found, even, method, 1, "uniform", s) for s in SCALINGS), key=_mean)
        gained = gain(by_rounds[most], by_rounds[1])
        rows.append([f"`{method}`", *map(_spread, by_rounds.values()), gained, _spread(best)])
    words = (
        f"`{experiment.command}`: {experiment.tasks}, {most} epochs of each task in all, {len(joint)} seeds. "
        f"Accuracy in per cent over all {experiment.classes}, mean of the tasks: base model {_spread(base)}, "
        f"joint training on all examples, as often, {_spread(joint)}. ± is the standard deviation over "
        "seeds; differences are paired by seed, with 95 % intervals of Student's t. λ is each method's own, "
        "in the last column the best of six for all seeds in hindsight. A cell is empty where nothing was "
        "measured."
    )
    return "\n".join([words, "", table(heads, rows), *_skewed(found, counts), ""])


def _skewed(found: Accuracies, counts: Sequence[int]) -> Iterator[str]:
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
        for rounds in counts:
            none, each = (_run(found, weights, method, rounds, name) for name in ("uniform", "skewed"))
            if not none:
                continue
            last = _run(found, weights, method, rounds, LAST)
            cells = [_spread(none), _spread(each), _spread(last)]
            gains = [gain(last or each, none), gain(each, last), gain(last, one)]
            rows.append([f"`{method}`", str(rounds), *cells, *gains])
        best = max((_run(found, weights, method, 1, "skewed", s) for s in SCALINGS), key=_mean)
        tuned.append(f"`{method}` {_spread(best)}")
    yield table([*heads, "last (K = 1: only) over none", "each over last", "last over one merge"], rows)
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


def render(experiment: Experiment) -> None:
    """Write the section of the page from the seeds that are stored whole."""
    whole = whole_seeds(experiment.stored())
    experiment.page.write_text(
        _SECTION.sub(lambda _: section(experiment, whole), experiment.page.read_text())
    )


def whole_seeds(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the results of the seeds of which every part is stored that is stored of any seed."""
    parts = {part for result in results.values() for part in result["parts"]}
    return {seed: result for seed, result in results.items() if parts <= {*result["parts"]}}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.alternating",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("data", choices=EXPERIMENTS)
    parser.add_argument("--folder", type=Path, default=Path("families"), help="families of checkpoints")
    parser.add_argument("--encoder", type=Path, help="for definitions")
    parser.add_argument("--nouns", type=Path, help="for definitions")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--render", action="store_true", help="write the page from the stored results alone")
    options = parser.parse_args()
    experiment = EXPERIMENTS[options.data]
    for seed in [] if options.render else options.seeds:
        if options.data == "digits":
            family = digits(options.folder, seed, experiment.epochs)
        else:
            family = definitions(options.folder, seed, experiment.epochs, options.encoder, options.nouns)
        measure(experiment, family)
    render(experiment)


if __name__ == "__main__":
    main()
