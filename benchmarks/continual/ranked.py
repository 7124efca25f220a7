"""The tables of docs/experiments.md: claims with their tests, and methods by rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.continual.claims import BEST, CLAIMS, CONFIRMED_ON, WITH_DATA, Claim
from benchmarks.continual.formats import difference, probability, spread
from benchmarks.continual.verdicts import NOT_IN_FULL
from benchmarks.page_tables import table

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
    """Return the claims with their verdicts, for the data sets that test them."""
    tested = {part: tables for part, tables in parts.items() if part[0] in CONFIRMED_ON}
    if not tested:
        return "No results of data that test the claims are stored.\n"
    body = [
        [
            claim.sentence,
            _accuracy_of(claim),
            *(_verdict(tables["claims"][row]) for tables in tested.values()),
        ]
        for row, claim in enumerate(CLAIMS)
    ]
    counts = [_counted(*part, own["claims"]) for part, own in tested.items()]
    heads = ["claim", "accuracy of", *(f"{data}, T = {number}" for data, number in tested)]
    return table(heads, body, left=2) + "".join(f"\n{line}\n" for line in counts)


def tests_table(rows: Sequence[Mapping[str, Any]], data: str) -> str:
    """Return the tests of all claims on one data set and number of tasks, with effect sizes."""
    heads = ["claim", "accuracy of", "points ahead", "Cohen's d", "p, corrected"]
    body = [
        [claim.sentence, _accuracy_of(claim), *_numbers(row)]
        for claim, row in zip(CLAIMS, rows, strict=True)
        if "difference" in row
    ]
    if data in CONFIRMED_ON:
        heads.append("verdict")
        found = (row["verdict"] for row in rows if "difference" in row)
        body = [[*cells, verdict] for cells, verdict in zip(body, found, strict=True)]
    return table(heads, body, left=2)


def _accuracy_of(claim: Claim) -> str:
    return "the worst task" if claim.measure == "worst" else "all tasks"


def _counted(data: str, number: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return how many claims data confirm."""
    kinds = ("confirmed", "refuted", "undecided", NOT_IN_FULL, "not measured")
    counts = {kind: sum(row["verdict"] == kind for row in rows) for kind in kinds}
    return f"{data}, T = {number}: {', '.join(f'{count} {kind}' for kind, count in counts.items())}."


def _verdict(row: Mapping[str, Any]) -> str:
    """Return points with their interval, the corrected p-value, and the verdict."""
    if "difference" not in row:
        return str(row["verdict"])
    p = f", p {probability(row['holm'])}" if row["holm"] is not None else ""
    return f"{difference(row)}{p}: **{row['verdict']}**"


def _numbers(row: Mapping[str, Any]) -> list[str]:
    """Return points with the rival that was found in hindsight, effect size, and corrected p-value."""
    points, effect = difference(row), ""
    if next(claim for claim in CLAIMS if claim.id == row["id"]).behind.method == BEST:
        of = "" if row["verdict"] != NOT_IN_FULL else f", best of {row['num_rivals']} measured"
        points += f" to {_rival(*row['rival'])}{of}"
    if row["effect"] is not None and row["verdict"] != NOT_IN_FULL:
        low, high = row["effect_interval"]
        effect = f"{row['effect']:.1f} [{low:.1f}, {high:.1f}]"
    return [points, effect, "" if row["holm"] is None else probability(row["holm"])]


def _rival(method: str, preference: str, way: str) -> str:
    return f"`{method}`, {preference}, {'λ tuned' if way == 'tuned' else 'λ fixed in hindsight'}"


# Complex only by count: a comprehension for each axis of the table.
def ranked_table(rows: Sequence[Mapping[str, Any]], kind: str, *, best_only: bool = False) -> str:
    """Return accuracy with λ tuned, methods by rank.

    Args:
        rows: Of the main table.
        kind: The preference beside `uniform`.
        best_only: Leave out of each family all but its best method, and what is best in a column.
    """
    found = _by_method(rows, kind)
    columns = [(measure, own) for measure in ("mean", "worst") for own in ("uniform", kind)]
    has_worst = any("worst" in row for row in rows if row["preference"])
    columns = columns if has_worst else columns[:2]
    tops = {column: _top(found, *column) for column in columns}
    body = [["", "", row["method"], *_reference_cells(row, columns)] for row in rows if not row["preference"]]
    seen: set[str] = set()
    for family, rank, method in ranks(rows, kind):
        cells = [_cell(found[method], *column, tops[column]) for column in columns]
        if not best_only or family not in seen or any(cell.startswith("**") for cell in cells):
            body.append([str(rank), family, method, *cells])
        seen.add(family)
    heads = [("worst task: " if measure == "worst" else "") + own for measure, own in columns]
    first = "best of the family" if best_only else "method"
    return table([f"rank of {len(found)}", "family", first, *heads], body, left=3)


def _by_method(rows: Sequence[Mapping[str, Any]], kind: str) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Return the rows of every method by their preference."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if row["preference"] in ("uniform", kind):
            found.setdefault(row["method"], {})[row["preference"]] = row
    return found


def ranks(rows: Sequence[Mapping[str, Any]], kind: str) -> list[tuple[str, int, str]]:
    """Return family, rank and name of every method, by the better of `uniform` and another preference."""
    best: dict[str, float] = {}
    for row in rows:
        if row["preference"] in ("uniform", kind):
            best[row["method"]] = max(row["tuned"][0], best.get(row["method"], 0.0))
    order = sorted(best, key=lambda method: -best[method])
    return [(family_of(method), rank, method) for rank, method in enumerate(order, 1)]


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
