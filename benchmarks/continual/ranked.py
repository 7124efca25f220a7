"""The tables of docs/experiments.md: claims with their tests, and methods ranked within their families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.continual.claims import BEST, CLAIMS, CONFIRMED_ON, WITH_DATA
from benchmarks.continual.formats import difference, probability, spread, table
from benchmarks.continual.verdicts import NOT_IN_FULL

#: Methods by family; those that are in none come last.
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "selection": ("tunable_magmax", "magmax", "random_mix", "single_task", "last_task"),
    "means": ("average", "weighted_sum", "task_arithmetic", "multislerp", "karcher", "model_stock"),
    "sparse": ("ties", "dare", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear"),
    "element-wise": (
        "agreement",
        "sce",
        "pcb",
        "localize_stitch",
        "ram",
        "ram_plus",
        "arcee_fusion",
        "nearswap",
    ),
    "spectral": ("tsv", "iso_c", "iso_cts", "cart"),
    "covariance": ("wudi", "actmat"),
    "continual": ("opcm",),
    "with training examples": WITH_DATA,
}

#: Tables of one data set and number of tasks, by both.
Parts = Mapping[tuple[str, str], Mapping[str, Any]]


def family_of(label: str) -> str:
    """Return the family of a method by its label; corrected methods see training examples."""
    name = label.split(" ", maxsplit=1)[0]
    if name.endswith(","):
        return "with training examples"
    return next((family for family, names in FAMILIES.items() if name in names), "others")


def claims_table(parts: Parts) -> str:
    """Return the claims, with their tests on each data set."""
    heads = ["claim", "accuracy of"]
    for data, number in parts:
        heads.append(f"{data}, T = {number}" + ("" if data in CONFIRMED_ON else " (exploratory)"))
    body = [
        [
            claim.sentence,
            "the worst task" if claim.measure == "worst" else "all tasks",
            *(_verdict(tables["claims"][row], data in CONFIRMED_ON) for (data, _), tables in parts.items()),
        ]
        for row, claim in enumerate(CLAIMS)
    ]
    counts = [_counted(data, number, own["claims"]) for (data, number), own in parts.items()]
    return table(heads, body, left=2) + "".join(f"\n{line}\n" for line in counts if line)


def _counted(data: str, number: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return how many claims data confirm; nothing of those on which they are explored."""
    if data not in CONFIRMED_ON:
        return ""
    kinds = ("confirmed", "refuted", "undecided", NOT_IN_FULL, "not measured")
    counts = {kind: sum(row["verdict"] == kind for row in rows) for kind in kinds}
    return f"{data}, T = {number}: {', '.join(f'{count} {kind}' for kind, count in counts.items())}."


def _verdict(row: Mapping[str, Any], is_confirming: bool) -> str:
    if "difference" not in row:
        return "not measured"
    shown, is_full = difference(row), row["verdict"] != NOT_IN_FULL
    if row["effect"] is not None and is_full:
        low, high = row["effect_interval"]
        shown += f"; d {row['effect']:.1f} [{low:.1f}, {high:.1f}]"
    if row["holm"] is not None:
        shown += f"; p {probability(row['holm'])}"
    claim = next(claim for claim in CLAIMS if claim.id == row["id"])
    if claim.behind.method == BEST:
        shown += "; it is " if is_full else f"; best of {row['num_rivals']} measured: "
        shown += _rival(*row["rival"])
    return f"{shown}: **{row['verdict']}**" if is_confirming else shown


def _rival(method: str, preference: str, way: str) -> str:
    return f"`{method}`, {preference}, {'λ tuned' if way == 'tuned' else 'λ fixed in hindsight'}"


# Complex only by count: a comprehension for each axis of the table.
def ranked_table(rows: Sequence[Mapping[str, Any]], kind: str) -> str:
    """Return accuracy with λ tuned, families by their best method, methods by rank.

    Args:
        rows: Of the main table.
        kind: The preference beside `uniform`.
    """
    found = _by_method(rows, kind)
    columns = [(measure, own) for measure in ("mean", "worst") for own in ("uniform", kind)]
    has_worst = any("worst" in row for row in rows if row["preference"])
    columns = columns if has_worst else columns[:2]
    tops = {column: _top(found, *column) for column in columns}
    body = [["", "", row["method"], *_reference_cells(row, columns)] for row in rows if not row["preference"]]
    for family, rank, method in _ranks(found):
        cells = [_cell(found[method], *column, tops[column]) for column in columns]
        body.append([family, str(rank), method, *cells])
    heads = [("worst task: " if measure == "worst" else "") + own for measure, own in columns]
    return table(["family", "rank", "method", *heads], body, left=3)


def _by_method(rows: Sequence[Mapping[str, Any]], kind: str) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Return the rows of every method by their preference."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if row["preference"] in ("uniform", kind):
            found.setdefault(row["method"], {})[row["preference"]] = row
    return found


def _ranks(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[tuple[str, int, str]]:
    """Return family, rank and name of every method: families by their best one, and methods by rank."""
    best = {method: max(row["tuned"][0] for row in own.values()) for method, own in found.items()}
    order = sorted(found, key=lambda method: -best[method])
    families = list(dict.fromkeys(map(family_of, order)))
    ranked = [(family_of(method), rank, method) for rank, method in enumerate(order, 1)]
    return sorted(ranked, key=lambda one: (families.index(one[0]), one[1]))


def _values(row: Mapping[str, Any] | None, measure: str) -> Sequence[float] | None:
    if row is None:
        return None
    found: Mapping[str, Sequence[float]] = row if measure == "mean" else row.get("worst", {})
    return found.get("tuned")


def _top(found: Mapping[str, Mapping[str, Mapping[str, Any]]], measure: str, kind: str) -> float:
    values = [_values(own.get(kind), measure) for own in found.values()]
    return max((value[0] for value in values if value), default=float("nan"))


def _cell(own: Mapping[str, Mapping[str, Any]], measure: str, kind: str, top: float) -> str:
    values = _values(own.get(kind), measure)
    if not values:
        return ""
    return f"**{spread(values)}**" if values[0] == top else spread(values)


def _reference_cells(row: Mapping[str, Any], columns: Sequence[tuple[str, str]]) -> list[str]:
    """Return the accuracy of what is no merge in the columns of `uniform`: it has no preference."""
    known = {"mean": row["fixed"], "worst": row.get("worst", {}).get("fixed")}
    return [spread(known[measure]) if own == "uniform" and known[measure] else "" for measure, own in columns]
