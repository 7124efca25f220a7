"""Recovery of planted mixtures by estimates. Targets of digits, four fifths of one task, one of another.

    python -m benchmarks.planted quickstart            # a folder that `hub-magmax quickstart` made
    python -m benchmarks.planted new-folder --seed 3   # makes one

Prints, for each kind and size of the target sample, in how many draws the two right tasks rank first,
and the mean estimate of their shares. The features are computed once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.evaluation.data import load_examples
from hub_magmax.preference.comparison import compare_samples
from hub_magmax.preference.distance import uniform_shares
from hub_magmax.preference.features import features, load_feature_model
from hub_magmax.preference.labels import preference_from_labels
from hub_magmax.preference.mixture import Space
from hub_magmax.quickstart import make_family
from hub_magmax.recipe.preferences import Cosine, DistanceEstimate, Mmd, Transport
from hub_magmax.recipe.values import Data

MIXTURE = (0.8, 0.2)

_NOWHERE = {"target": {"dataset": "-"}, "train": {}}
KINDS: Mapping[str, DistanceEstimate] = {
    "transport": Transport.model_validate(_NOWHERE),
    "transport, base model's features": Transport.model_validate(_NOWHERE | {"features": "base_model"}),
    "transport, not whitened": Transport.model_validate(_NOWHERE | {"whiten": False}),
    "transport, separate": Transport.model_validate(_NOWHERE | {"fit": "separate"}),
    "mmd": Mmd.model_validate(_NOWHERE),
    "mmd, base model's features": Mmd.model_validate(_NOWHERE | {"features": "base_model"}),
    "mmd, not whitened": Mmd.model_validate(_NOWHERE | {"whiten": False}),
    "mmd, separate": Mmd.model_validate(_NOWHERE | {"fit": "separate"}),
    "cosine": Cosine.model_validate(_NOWHERE),
}


class PlantedTargets:
    """Features of every example of a digits benchmark, under every model, to draw targets from."""

    def __init__(self, folder: Path, num_tasks: int = 5, seed: int = 0) -> None:
        family = make_family(folder, num_tasks=num_tasks, seed=seed)
        self.tasks = tuple(family.tasks)
        self.classes = family.classes
        splits = {
            (split, task): load_examples(Data(dataset=str(family.data / task), split=split), Path())
            for split in ("train", "test")
            for task in self.tasks
        }
        self.labels = {task: np.array(splits["test", task]["label"]) for task in self.tasks}
        self.features: dict[str, dict[tuple[str, str], np.ndarray]] = {}
        for name, place in {"base_model": family.base_model, **family.tasks}.items():
            model = load_feature_model(ModelPlace(str(place)), images=True)
            self.features[name] = {key: features(model, part, "image") for key, part in splits.items()}

    def spaces(self, names: tuple[str, ...], picked: Mapping[str, np.ndarray]) -> list[Space]:
        """Return both samples under the models `names`, the target being the picked test examples."""
        return [
            Space(
                tuple(self.features[name]["train", task] for task in self.tasks),
                np.concatenate([self.features[name]["test", task][rows] for task, rows in picked.items()]),
            )
            for name in names
        ]

    def draws(self, size: int, count: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
        """Yield targets: rows of the test examples of two tasks, the larger part first."""
        rng = np.random.default_rng(seed)
        pairs = list(itertools.permutations(self.tasks, 2))
        for _ in range(count):
            counts = [round(share * size) for share in MIXTURE]
            pair = pairs[rng.integers(len(pairs))]
            yield {
                task: rng.choice(len(self.labels[task]), num, replace=False)
                for task, num in zip(pair, counts, strict=True)
            }


def measure(
    targets: PlantedTargets, size: int, count: int, seed: int, kinds: Iterable[str] = tuple(KINDS)
) -> dict[str, dict[str, float]]:
    """Return, by kind, how often the two right tasks rank first, and their mean estimated shares."""
    found: dict[str, list[tuple[bool, float, float]]] = {}
    for picked in targets.draws(size, count, seed):
        for kind, spec in ((kind, KINDS[kind]) for kind in kinds):
            names = targets.tasks if spec.features == "tasks" else ("base_model",)
            draws = compare_samples(spec, targets.spaces(names, picked), uniform_shares(size)).draws
            found.setdefault(kind, []).append(_outcome(targets, picked, draws[0]))
        labels = np.concatenate([targets.labels[task][rows] for task, rows in picked.items()]).tolist()
        shares = preference_from_labels(labels, targets.classes)
        found.setdefault("labels", []).append(_outcome(targets, picked, np.array(list(shares.values()))))
    return {
        kind: dict(
            zip(("both_first", "first", "second"), np.mean(rows, axis=0).round(3).tolist(), strict=True)
        )
        for kind, rows in found.items()
    }


def _outcome(
    targets: PlantedTargets, picked: Mapping[str, np.ndarray], weights: np.ndarray
) -> tuple[bool, float, float]:
    right = [targets.tasks.index(task) for task in picked]
    best = np.argsort(-weights, kind="stable")[:2]
    return set(best.tolist()) == set(right), float(weights[right[0]]), float(weights[right[1]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="the digits benchmark; made there if it is not")
    parser.add_argument("--draws", type=int, default=50)
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=tuple(KINDS))
    parser.add_argument("--sizes", type=int, nargs="+", default=[20, 50, 100])
    parser.add_argument("--seed", type=int, default=0, help="of the benchmark and of the draws")
    parser.add_argument("--json", type=Path, help="store the table there as well")
    arguments = parser.parse_args()
    targets = PlantedTargets(arguments.folder, seed=arguments.seed)
    table = {
        size: measure(targets, size, arguments.draws, arguments.seed, arguments.kinds)
        for size in arguments.sizes
    }
    print(f"{arguments.draws} draws, mixture {MIXTURE}, {platform.machine()}, numpy {np.__version__}")
    print(f"{'kind':<34}{'target':>8}{'both first':>12}{'share 1':>10}{'share 2':>10}")
    for size, rows in table.items():
        for kind, row in rows.items():
            print(f"{kind:<34}{size:>8}{row['both_first']:>12.2f}{row['first']:>10.3f}{row['second']:>10.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
