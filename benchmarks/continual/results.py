"""One family's results: measured piece by piece, each kept in a working folder, then condensed to one file.

The working folder has every outcome, so that a changed rule of choice needs no new merges, and a new
method only its own. What is condensed has counts, and is what the tables are made from.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.continual import measuring
from benchmarks.continual.estimating import Weights
from benchmarks.continual.measuring import Bench, Row
from benchmarks.continual.protocol import Protocol
from benchmarks.continual.sources import Family
from hub_magmax.analysis.candidates import Candidate, candidates
from hub_magmax.analysis.tuning import Trial, best
from hub_magmax.evaluation.evaluators import Outcome
from hub_magmax.files import digest, write_text
from hub_magmax.recipe.matching import locked_method
from hub_magmax.recipe.schema import Compare, Method

ROOT = Path(__file__).parents[2]
Report = Callable[[str], None]


def measure(
    family: Family, protocol: Protocol, scores: Path, *, at: str, report: Report = lambda line: None
) -> dict[str, Any]:
    """Return a family's results.

    Args:
        family: What is measured.
        protocol: How.
        scores: Folder of pieces that are measured already.
        at: Commit that is noted with what is measured now.
        report: Called with the name of each piece before it is measured.
    """
    with Bench(family, protocol) as bench:
        made_from = [_identity(family), [asdict(target) for target in bench.targets]]
        pieces = Pieces(scores / family.name, digest(made_from), at, report)
        weights = _weights(bench, pieces)
        rows = [row for method in measuring.tried_methods() for row in _rows(bench, method, weights, pieces)]
        base = pieces.get("base model", {}, lambda: [o.score for o in bench.base_model()])
        rest = _extras(bench, pieces)
    return {
        "family": family.name,
        "num_tasks": len(family.tasks),
        "seed": family.seed,
        "num_train": family.num_train,
        "protocol": asdict(protocol),
        "commits": sorted(pieces.commits),
        "machine": f"{platform.machine()}, Python {platform.python_version()}, torch {_torch_version()}",
        "targets": [
            {"mixture": t.mixture, "tasks": t.tasks, "meta": t.num_meta, "held_out": len(t.held_out)}
            for t in bench.targets
        ],
        "estimates": _estimation_errors(bench, weights),
        "base_model": [float(sum(base[row] for row in t.held_out)) for t in bench.targets],
        "rows": [_condensed(bench, row) for row in rows],
        "compare": _comparisons(bench, weights, rows),
        **rest,
    }


class Pieces:
    """Measured pieces in a folder, each with what it was measured for.

    Attributes:
        commits: At which the pieces that were asked for were measured.
    """

    def __init__(self, folder: Path, identity: str, at: str, report: Report) -> None:
        self._folder, self._identity, self._at, self._report = folder, identity, at, report
        self.commits: set[str] = set()

    def get(self, name: str, made_from: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """Return a piece, measured now unless it is there and was made from the same."""
        path = self._folder / f"{name}.json"
        identity = digest([self._identity, dict(made_from)])
        stored = json.loads(path.read_text()) if path.is_file() else {}
        if stored.get("identity") != identity:
            self._report(f"{self._folder.name}: {name}")
            value = json.loads(json.dumps(make()))
            stored = {"identity": identity, "commit": self._at, "value": value}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(stored) + "\n")
        self.commits.add(stored["commit"])
        return stored["value"]


def commit() -> str:
    """Return the commit of this checkout, with a plus sign where the code differs from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "hub_magmax", "benchmarks/continual")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if changed else "")


def _torch_version() -> str:
    import torch

    return torch.__version__


def _identity(family: Family) -> list[Any]:
    """Return what tells checkpoints and data of one name apart."""
    if family.identity:
        return [family.name, list(family.tasks), family.owners.tolist(), family.identity]
    files = [
        file for place in (family.base_model, *family.tasks.values()) for file in place.glob("*.safetensors")
    ]
    hashes = []
    for path in sorted(files):
        with path.open("rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    return [family.name, list(family.tasks), family.owners.tolist(), hashes]


def _weights(bench: Bench, pieces: Pieces) -> dict[str, list[Weights]]:
    """Return the weights of every target by kind of preference."""
    kinds = ["uniform", *bench.family.kinds]

    def estimate(kind: str) -> list[Weights]:
        return [bench.estimator.weights(kind, target, target.meta) for target in bench.targets]

    return {
        kind: [
            tuple(row)
            for row in pieces.get(
                f"weights, {kind}", {"train": bench.family.num_train}, lambda kind=kind: estimate(kind)
            )
        ]
        for kind in kinds
    }


def _rows(
    bench: Bench, method: Method, weights: Mapping[str, Sequence[Weights]], pieces: Pieces
) -> list[Row]:
    """Return a method under each preference; without the published estimate for any but Tunable MAGMAX."""
    found = []
    for kind, given in weights.items():
        ignored = kind != "uniform" and not measuring.uses_preference(method)
        filled = locked_method(method)
        if ignored or (kind.endswith("published") and filled != locked_method(measuring.TUNABLE)):
            continue
        label = Candidate(filled, kind, given[0]).label
        stored = pieces.get(
            f"{label}, {kind}",
            {"method": filled, "weights": given, "scalings": bench.protocol.scalings},
            lambda kind=kind, given=given: _packed(bench, bench.row(method, kind, given)),
        )
        found.append(_unpacked(bench, method, label, kind, given, stored))
    return found


def _packed(bench: Bench, row: Row) -> list[list[list[list[float | None]]]]:
    """Return scores, and probabilities and margins on the meta sample, by target and scaling coefficient."""

    def packed(trial: Trial, num_meta: int) -> list[list[float | None]]:
        meta = trial.outcomes[:num_meta]
        unused = [None] * (len(trial.outcomes) - num_meta)
        probabilities, margins = [o.probability for o in meta], [o.margin for o in meta]
        return [[o.score for o in trial.outcomes], [*probabilities, *unused], [*margins, *unused]]

    return [
        [packed(trial, target.num_meta) for trial in trials]
        for target, trials in zip(bench.targets, row.trials, strict=True)
    ]


def _unpacked(
    bench: Bench, method: Method, label: str, kind: str, weights: Sequence[Weights], stored: Any
) -> Row:
    filled, scalings = locked_method(method), bench.protocol.scalings
    return Row(
        label,
        kind,
        tuple(
            tuple(
                Trial(
                    Candidate(filled | {"scaling": scaling}, kind, own),
                    tuple(map(Outcome, *packed)),
                )
                for scaling, packed in zip(scalings, by_scaling, strict=True)
            )
            for own, by_scaling in zip(weights, stored, strict=True)
        ),
    )


def _extras(bench: Bench, pieces: Pieces) -> dict[str, Any]:
    """Return the ablations, all of them at the fixed scaling coefficient."""
    two = (measuring.TUNABLE, measuring.AVERAGE)
    kinds = [kind for kind in bench.family.kinds if kind in ("labels", "transport")]
    made: dict[str, Callable[[], Any]] = {
        "schedules": lambda: measuring.schedules(bench, two),
        "numbers_of_tasks": lambda: measuring.numbers_of_tasks(bench, (*two, measuring.MAGMAX)),
        "sample_sizes": lambda: measuring.sample_sizes(bench, two, kinds),
    }
    made_from = {"protocol": asdict(bench.protocol), "train": bench.family.num_train}
    return {name: pieces.get(name, made_from, make) for name, make in made.items()}


def _estimation_errors(bench: Bench, weights: Mapping[str, Sequence[Weights]]) -> dict[str, list[float]]:
    """Return, by kind, the sum of absolute differences of each target's weights from its shares."""
    shares = [np.array(target.shares(bench.num_tasks)) for target in bench.targets]
    return {
        kind: [float(np.abs(np.array(own) - true).sum()) for own, true in zip(found, shares, strict=True)]
        for kind, found in weights.items()
    }


def _condensed(bench: Bench, row: Row) -> dict[str, Any]:
    """Return the scores on held-out examples, and which coefficient the meta sample chooses."""
    right, chosen = [], []
    for target, trials in zip(bench.targets, row.trials, strict=True):
        on_meta = [measuring.picked(trial, range(target.num_meta)) for trial in trials]
        chosen.append(on_meta.index(best(on_meta)))
        right.append([_held_out(trial, target.num_meta) for trial in trials])
    return {"method": row.label, "preference": row.kind, "right": right, "chosen": chosen}


def _held_out(trial: Trial, num_meta: int) -> float:
    return sum(outcome.score for outcome in trial.outcomes[num_meta:])


def _comparisons(
    bench: Bench, weights: Mapping[str, Sequence[Weights]], rows: Sequence[Row]
) -> dict[str, list[dict[str, Any]]]:
    """Return, by the recipe's preference, what a comparison chooses for every target on its meta sample."""
    tried = Compare(methods=tuple(measuring.tried_methods()), scaling=bench.protocol.scalings)
    by_name = {(row.label, row.kind): row for row in rows}
    found: dict[str, list[dict[str, Any]]] = {}
    for kind in bench.family.kinds:
        if kind.endswith("published"):
            continue
        for number, target in enumerate(bench.targets):
            given = {kind: weights[kind][number], "uniform": bench.uniform}
            trials = {
                _name(candidate): _trial(by_name, candidate, number)
                for candidate in candidates(tried, measuring.FIRST, given)
                if candidate.method["scaling"] in bench.protocol.scalings
            }
            on_meta = [measuring.picked(trial, range(target.num_meta)) for trial in trials.values()]
            name = list(trials)[on_meta.index(best(on_meta))]
            chosen = dict(zip(("method", "preference", "scaling"), name, strict=True))
            found.setdefault(kind, []).append(chosen | {"right": _held_out(trials[name], target.num_meta)})
    return found


def _name(candidate: Candidate) -> tuple[str, str, float]:
    """Return method, preference and scaling coefficient, as rows name them."""
    uses = measuring.uses_preference(Method(name=candidate.method["name"]))
    return candidate.label, candidate.preference if uses else "uniform", float(candidate.method["scaling"])


def _trial(by_name: Mapping[tuple[str, str], Row], candidate: Candidate, target: int) -> Trial:
    label, kind, scaling = _name(candidate)
    trials = by_name[label, kind].trials[target]
    outcomes = next(t.outcomes for t in trials if t.candidate.method["scaling"] == scaling)
    return Trial(candidate, outcomes)
