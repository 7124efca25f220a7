"""Verdicts on the claims, for one data set: differences, tests over seeds, Holm's correction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.continual import measuring
from benchmarks.continual.claims import BEST, CLAIMS, LEVEL, WITH_DATA, Claim, Measure, Side
from benchmarks.continual.rows import Key, Results, by_seed, is_measured, keys, mean, preference_of
from benchmarks.continual.significance import holm, paired
from hub_magmax.analysis.candidates import Candidate
from hub_magmax.methods import method_names
from hub_magmax.recipe.matching import locked_method

#: Verdict on a method against the best of its rivals where some of them were not measured.
NOT_IN_FULL = "not measured in full"


def verdicts(parts: Mapping[int, Results]) -> dict[int, list[dict[str, Any]]]:
    """Return, for each number of tasks, the tests of all claims in their order.

    Holm's correction is over all claims and all numbers of tasks, measured or not. The best of rivals that
    were not all measured is no test of a claim about all of them: it has no corrected p-value.

    Args:
        parts: Families by their number of tasks.
    """
    rows = {number: [_tested(results, claim) for claim in CLAIMS] for number, results in parts.items()}
    every = [row for part in rows.values() for row in part]
    tests = [row for row in every if row.get("p") is not None and row["verdict"] != NOT_IN_FULL]
    corrected = holm([test["p"] for test in tests], len(CLAIMS) * len(parts))
    for test, p in zip(tests, corrected, strict=True):
        test["holm"] = p
        test["verdict"] = _verdict(test["difference"], p)
    return rows


def _verdict(difference: float, p: float) -> str:
    if p >= LEVEL:
        return "undecided"
    return "confirmed" if difference > 0 else "refuted"


def _tested(results: Results, claim: Claim) -> dict[str, Any]:
    row: dict[str, Any] = {"id": claim.id, "measure": claim.measure, "verdict": "not measured"}
    ahead = _key(results, claim.ahead)
    if not is_measured(results, ahead, claim.measure):
        return row
    ours = by_seed(results, ahead, claim.ahead.way, claim.measure)
    if claim.behind.method == BEST:
        rival, way = best_rival(results, claim.ahead.method, claim.measure)
    else:
        rival, way = _key(results, claim.behind), claim.behind.way
    if not is_measured(results, rival, claim.measure):
        return row
    theirs = by_seed(results, rival, way, claim.measure)
    test = paired([one - other for one, other in zip(ours, theirs, strict=True)])
    undecided = {"verdict": "undecided", "holm": None}  # until the correction, and without a p-value
    row |= undecided | test.to_dict() | {"rival": [*rival, way]}
    return row | (_of_all(results, claim) if claim.behind.method == BEST else {})


def _of_all(results: Results, claim: Claim) -> dict[str, Any]:
    """Return how many rivals were measured, and the verdict where some were not."""
    measured, missing = measured_rivals(results, claim.ahead.method, claim.measure)
    return {"num_rivals": len(measured)} | ({"verdict": NOT_IN_FULL} if missing else {})


def _key(results: Results, side: Side) -> Key:
    """Return the row of a side, with the preference that stands for labels in these data."""
    return side.method, preference_of(results) if side.preference == "labels" else side.preference


def best_rival(results: Results, method: str, measure: Measure) -> tuple[Key, str]:
    """Return the row, and the source of its λ, with the highest mean over seeds of a measure.

    It is found on the scored examples themselves, among the methods that see no training examples; the
    method that it is a rival of is left out under every preference.
    """
    rivals = [key for key in _blind_rows(results, measure) if key[0] != method]
    found = [(key, way) for key in rivals for way in ("tuned", "hindsight")]
    nobody = (BEST, ""), "hindsight"
    return max(found, key=lambda one: mean(by_seed(results, one[0], one[1], measure)), default=nobody)


def measured_rivals(results: Results, method: str, measure: Measure) -> tuple[list[str], list[str]]:
    """Return the labels of a method's rivals without training examples that were measured, and of the others.

    Rivals are all that the experiments try; measured are those with a row under no preference and, where
    they use one, under that which stands for labels.
    """
    known, kind = _blind_rows(results, measure), preference_of(results)
    measured: list[str] = []
    missing: list[str] = []
    for tried in measuring.tried_methods():
        label = Candidate(locked_method(tried), "", ()).label
        kinds = {"uniform", kind} if measuring.uses_preference(tried) else {"uniform"}
        if label != method and is_blind_to_data(label):
            (measured if all((label, own) in known for own in kinds) else missing).append(label)
    return measured, missing


def _blind_rows(results: Results, measure: Measure) -> list[Key]:
    """Return the rows of methods that see no training examples."""
    return [key for key in keys(results) if is_blind_to_data(key[0]) and is_measured(results, key, measure)]


def is_blind_to_data(label: str) -> bool:
    """Say whether a label is that of a method of this package that sees no training examples."""
    name = label.split(" ", maxsplit=1)[0]
    return name in method_names() and name not in WITH_DATA
