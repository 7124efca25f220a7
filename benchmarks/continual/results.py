"""One family's results: measured piece by piece, each kept in a working folder, then condensed to one file.

The working folder has every outcome, so that a changed rule of choice needs no new merges, and a new
method only its own. What is condensed has counts, and is what the tables are made from. Where the working
folder is gone, rows that are stored condensed stay as they are, and so does what a comparison chose: it
would need their outcomes.
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.continual import measuring
from benchmarks.continual.by_task import by_target, parts_of, sums_by_task
from benchmarks.continual.estimating import Weights
from benchmarks.continual.measuring import Bench, Row
from benchmarks.continual.protocol import Protocol
from benchmarks.continual.sources import Family
from hub_magmax.analysis.candidates import Candidate, candidates
from hub_magmax.analysis.tuning import Trial, best
from hub_magmax.evaluation.evaluators import Outcome
from hub_magmax.files import digest, sha256_of, write_text
from hub_magmax.methods import get_method
from hub_magmax.recipe.matching import locked_method
from hub_magmax.recipe.schema import Compare, Method

ROOT = Path(__file__).parents[2]
Report = Callable[[str], None]


#: At the end of the name of a method whose merges are corrected by `react`.
CORRECTED = ", react"

#: Method and preference of a row, by which it is found.
Key = tuple[str, str]


def measure(
    family: Family,
    protocol: Protocol,
    scores: Path,
    *,
    at: str,
    stored: Mapping[str, Any] | None = None,
    only: Sequence[str] = (),
    report: Report = lambda line: None,
) -> dict[str, Any]:
    """Return a family's results.

    Args:
        family: What is measured.
        protocol: How.
        scores: Folder of pieces that are measured already.
        at: Commit that is noted with what is measured now.
        stored: Earlier results. Where checkpoints, targets and estimates are the same, to the last digit,
            only what they lack is measured.
        only: Names of methods to measure now, `react` for the correction; rows of others are there where they
            were measured before. All by default.
        report: Called with the name of each piece before it is measured.
    """
    with Bench(family, protocol) as bench:
        made_from = [_identity(family), [asdict(target) for target in bench.targets]]
        pieces = Pieces(scores / family.name, digest(made_from), at, report)
        weights = _weights(bench, pieces)
        base = pieces.get("base model", {}, lambda: [o.score for o in bench.base_model()])
        facts = _facts(bench, weights, base)
        known = stored if stored and all(stored.get(name) == value for name, value in facts.items()) else {}
        references = _references(bench, pieces, known)
        rows = _all_rows(bench, weights, pieces, known, only)
        rest = _extras(bench, pieces, known)
        compared = _compared(bench, weights, rows, known)
    short = {key: row if isinstance(row, dict) else condensed(bench, row) for key, row in rows.items()}
    commits = sorted(pieces.commits | set(known.get("commits", ())))
    seen = {"num_statistics": family.num_statistics} if family.statistics else {}
    parts = {**parts_of(family.owners, bench.targets, base), "references": references}
    return {**facts, **seen, **parts, "commits": commits, "rows": [*short.values()], **compared, **rest}


def _references(bench: Bench, pieces: Pieces, known: Mapping[str, Any]) -> Any:
    """Return what merges are compared with, by target and task; as it is stored where it is."""
    stored, made_from = known.get("references", {}), {"joint": bench.family.joint is not None}
    if (
        stored
        and made_from["joint"] == ("joint training" in stored)
        and not pieces.has("references", made_from)
    ):
        return stored
    scores = pieces.get("references", made_from, bench.references)
    return {name: by_target(bench.family.owners, bench.targets, own) for name, own in scores.items()}


def _facts(bench: Bench, weights: Mapping[str, Sequence[Weights]], base: Sequence[float]) -> dict[str, Any]:
    """Return what results begin with; two with the same are of the same checkpoints, targets and machine."""
    family, targets = bench.family, bench.targets
    facts = ({"sources": dict(family.sources)} if family.sources else {}) | {
        "family": family.name,
        "num_tasks": len(family.tasks),
        "seed": family.seed,
        "num_train": family.num_train,
        "protocol": asdict(bench.protocol),
        "machine": f"{platform.machine()}, Python {platform.python_version()}, torch {version('torch')}",
        "targets": [
            {"mixture": t.mixture, "tasks": t.tasks, "meta": t.num_meta, "held_out": len(t.held_out)}
            for t in targets
        ],
        "estimates": _estimation_errors(bench, weights),
        "base_model": [float(sum(base[row] for row in t.held_out)) for t in targets],
    }
    found: dict[str, Any] = json.loads(json.dumps(facts))  # tuples are lists, as in stored results
    return found


def _all_rows(
    bench: Bench,
    weights: Mapping[str, Sequence[Weights]],
    pieces: Pieces,
    known: Mapping[str, Any],
    only: Sequence[str] = (),
) -> dict[Key, Row | dict[str, Any]]:
    """Return the rows of all methods; those that are known without their outcomes, as they are stored."""
    stored = {(row["method"], row["preference"]): row for row in known.get("rows", ())}
    found: dict[Key, Row | dict[str, Any]] = {}
    for method in (*measuring.tried_methods(), *measuring.with_statistics(bench.family)):
        is_asked = not only or method.name in only
        found |= _rows(bench, method, weights, pieces, stored, is_asked=is_asked)
    for method in measuring.with_correction(bench.family):
        is_asked = not only or "react" in only
        found |= _rows(bench, method, weights, pieces, stored, corrected=True, is_asked=is_asked)
    return found


# Complex by its comprehensions.
def _compared(
    bench: Bench,
    weights: Mapping[str, Sequence[Weights]],
    rows: Mapping[Key, Row | dict[str, Any]],
    known: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what comparisons choose, and between which methods; those without statistics of data."""
    there = {method for method, _ in rows}
    labels = [Candidate(locked_method(method), "", ()).label for method in measuring.tried_methods()]
    labels = [label for label in labels if label in there]
    measured = {key: row for key, row in rows.items() if isinstance(row, Row)}
    if all(key in measured for key in rows if key[0] in labels):
        return {"compared": labels, "compare": _comparisons(bench, weights, [*measured.values()])}
    before = known.get("compared", [*dict.fromkeys(row["method"] for row in known["rows"])])
    return {"compared": before, "compare": known["compare"]}


class Pieces:
    """Measured pieces in a folder, each with what it was measured for.

    Attributes:
        commits: At which the pieces that were asked for were measured.
    """

    def __init__(self, folder: Path, identity: str, at: str, report: Report) -> None:
        self._folder, self._identity, self._at, self._report = folder, identity, at, report
        self.commits: set[str] = set()

    def has(self, name: str, made_from: Mapping[str, Any]) -> bool:
        """Say whether a piece is there, and was made from the same."""
        return self._stored(name).get("identity") == digest([self._identity, dict(made_from)])

    def get(self, name: str, made_from: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """Return a piece, measured now unless it is there and was made from the same."""
        path, stored = self._path(name), self._stored(name)
        identity = digest([self._identity, dict(made_from)])
        if stored.get("identity") != identity:
            self._report(f"{self._folder.name}: {name}")
            value = json.loads(json.dumps(make()))
            stored = {"identity": identity, "commit": self._at, "value": value}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(stored) + "\n")
        self.commits.add(stored["commit"])
        return stored["value"]

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _stored(self, name: str) -> dict[str, Any]:
        path = self._path(name)
        found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        return found


def commit() -> str:
    """Return the commit of this checkout, with a plus sign where the code differs from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "hub_magmax", "benchmarks/continual")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if changed else "")


def _identity(family: Family) -> list[Any]:
    """Return what tells checkpoints and data of one name apart."""
    if family.identity:
        return [family.name, list(family.tasks), family.owners.tolist(), family.identity]
    files = [
        file for place in (family.base_model, *family.tasks.values()) for file in place.glob("*.safetensors")
    ]
    hashes = [sha256_of(path) for path in sorted(files)]
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
    bench: Bench,
    method: Method,
    weights: Mapping[str, Sequence[Weights]],
    pieces: Pieces,
    stored: Mapping[Key, dict[str, Any]],
    *,
    corrected: bool = False,
    is_asked: bool = True,
) -> dict[Key, Row | dict[str, Any]]:
    """Return a method under each preference, where it was measured before or is asked for."""
    found: dict[Key, Row | dict[str, Any]] = {}
    for kind, given in weights.items():
        filled = locked_method(method)
        if not measuring.is_tried(bench.family, method, kind, corrected=corrected):
            continue
        label = Candidate(filled, kind, given[0]).label + (CORRECTED if corrected else "")
        name, made_from = f"{label}, {kind}", _row_made_from(bench, method, given, corrected=corrected)
        if (label, kind) in stored and not pieces.has(name, made_from):
            found[label, kind] = stored[label, kind]
            continue
        if not is_asked and not pieces.has(name, made_from):
            continue
        packed = pieces.get(
            name,
            made_from,
            lambda kind=kind, given=given: _packed(
                bench, bench.row(method, kind, given, corrected=corrected)
            ),
        )
        found[label, kind] = _unpacked(bench, method, label, kind, given, packed)
    return found


def _row_made_from(
    bench: Bench, method: Method, weights: Sequence[Weights], *, corrected: bool
) -> dict[str, Any]:
    made_from = {"method": locked_method(method), "weights": weights, "scalings": bench.protocol.scalings}
    if get_method(method.name).statistics is None and not corrected:
        return made_from
    return made_from | {"num_statistics": bench.family.num_statistics, "corrected": corrected}


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


def _extras(bench: Bench, pieces: Pieces, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ablations at the fixed scaling coefficient, as they are stored where they are."""
    two = (measuring.TUNABLE, measuring.AVERAGE)
    kinds = [kind for kind in bench.family.kinds if kind in ("labels", "transport")]
    made: dict[str, Callable[[], Any]] = {
        "schedules": lambda: measuring.schedules(bench, two),
        "numbers_of_tasks": lambda: measuring.numbers_of_tasks(bench, (*two, measuring.MAGMAX)),
        "sample_sizes": lambda: measuring.sample_sizes(bench, (*two, measuring.AGREEMENT), kinds),
    }
    made_from = {"protocol": asdict(bench.protocol), "train": bench.family.num_train}
    return {
        name: known[name]
        if name in known and not pieces.has(name, made_from)
        else pieces.get(name, made_from, make)
        for name, make in made.items()
    }


def _estimation_errors(bench: Bench, weights: Mapping[str, Sequence[Weights]]) -> dict[str, list[float]]:
    """Return, by kind, the sum of absolute differences of each target's weights from its shares."""
    shares = [np.array(target.shares(bench.num_tasks)) for target in bench.targets]
    return {
        kind: [float(np.abs(np.array(own) - true).sum()) for own, true in zip(found, shares, strict=True)]
        for kind, found in weights.items()
    }


def condensed(bench: Bench, row: Row) -> dict[str, Any]:
    """Return scores on held-out examples, those of each task too, and the coefficient of the meta sample."""
    right, chosen, by_task = [], [], []
    for target, trials in zip(bench.targets, row.trials, strict=True):
        on_meta = [measuring.picked(trial, range(target.num_meta)) for trial in trials]
        chosen.append(on_meta.index(best(on_meta)))
        right.append([_held_out(trial, target.num_meta) for trial in trials])
        scores = [[o.score for o in trial.outcomes[target.num_meta :]] for trial in trials]
        by_task.append([sums_by_task(bench.family.owners, target, own) for own in scores])
    found = {"method": row.label, "preference": row.kind, "right": right, "chosen": chosen}
    return found | {"right_by_task": by_task}


def _held_out(trial: Trial, num_meta: int) -> float:
    return sum(outcome.score for outcome in trial.outcomes[num_meta:])


def _comparisons(
    bench: Bench, weights: Mapping[str, Sequence[Weights]], rows: Sequence[Row]
) -> dict[str, list[dict[str, Any]]]:
    """Return, by the recipe's preference, what a comparison chooses for every target on its meta sample.

    It chooses between rows that are measured.
    """
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
                if candidate.method["scaling"] in bench.protocol.scalings and _name(candidate)[:2] in by_name
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
