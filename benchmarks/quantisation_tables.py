"""Tables of docs/quantisation.md, from the stored results of `benchmarks.quantisation`."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from benchmarks.page_tables import table
from hub_magmax.evaluation.intervals import mean_interval
from hub_magmax.files import write_text

RESULTS = Path(__file__).parent / "results" / "quantisation"
PAGE = Path(__file__).parents[1] / "docs" / "quantisation.md"

#: Results of one data set: a value for each seed.
Results = Sequence[Mapping[str, Any]]
Row = Mapping[str, Any]

BITS = (4, 3, 2)


def stored() -> dict[str, Results]:
    """Return what is stored, by data set."""
    paths = sorted(RESULTS.glob("*.json"), reverse=True)
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def all_tables(results: Mapping[str, Results]) -> dict[str, str]:
    """Return every table by its name in the page."""
    return {"accuracy": accuracies(results), "gains": gains(results), "claims": claims(results)}


def render() -> None:
    """Write the tables into the page, in place of those that are there."""
    text = PAGE.read_text(encoding="utf-8")
    for name, found in all_tables(stored()).items():
        head, mark, rest = text.partition(f"<!-- {name} -->\n")
        assert mark, f"the page has a place for {name}"
        text = head + mark + found + re.sub(r"\A(\|.*\n)*", "", rest)
    write_text(PAGE, text)


def accuracies(results: Mapping[str, Results]) -> str:
    """Return accuracies: mean and standard deviation over the receivers of all seeds."""
    head = ["data, bits", "whole", "rounded", "vector, λ = 1", "vector, λ chosen", "GPTQ", "own training"]
    rows = []
    for data, found in results.items():
        for bits in BITS:
            alone = [by_receiver(found, bits, key) for key in ("whole", "rounded")]
            pairs = [by_receiver(found, bits, key, "pairs") for key in ("one", "tuned")]
            others = [by_receiver(found, bits, key) for key in ("gptq", "own")]
            rows.append([f"{data}, {bits}", *map(spread, [*alone, *pairs, *others])])
    return table(head, rows)


def gains(results: Mapping[str, Results]) -> str:
    """Return what vectors gain over rounding alone, in points, and in how many pairs."""
    head = [
        "data, bits", "λ = 1", "better, equal, worse", "λ = -0.5", "λ chosen", "chosen < 0, = 0, > 0",
        "ahead of GPTQ", "under GPTQ, λ = 1", "cosine", "rank correlation of cosine and gain",
    ]  # fmt: skip
    rows = []
    for data, found in results.items():
        for bits in BITS:
            pairs = pairs_of(found, bits)
            rows.append([
                f"{data}, {bits}",
                interval(gain_of(found, bits, "one", "pairs")),
                counted([pair["one"] - pair["rounded"] for pair in pairs]),
                interval(gain_of(found, bits, "minus", "pairs")),
                interval(gain_of(found, bits, "tuned", "pairs")),
                ", ".join(reversed(counted([pair["scaling"] for pair in pairs]).split(", "))),
                f"{sum(pair['one'] > pair['alone_gptq'] for pair in pairs)} of {len(pairs)}",
                interval(gain_of(found, bits, "gptq", "pairs", "gptq")),
                f"{statistics.fmean(pair['cosine'] for pair in pairs):.3f}",
                correlation(found, bits),
            ])  # fmt: skip
    return table(head, rows)


def pairs_of(results: Results, bits: int) -> list[Row]:
    """Return all pairs, with what their receiver does by rounding alone and by GPTQ, and the seed."""
    found = []
    for result in results:
        alone = {row["task"]: row for row in result["alone"] if row["bits"] == bits}
        for pair in result["pairs"]:
            if pair["bits"] == bits:
                own = alone[pair["task"]]
                also = {"rounded": own["rounded"], "alone_gptq": own["gptq"], "seed": result["seed"]}
                found.append({**pair, **also})
    return found


def by_receiver(results: Results, bits: int, key: str, part: str = "alone") -> list[float]:
    """Return a value of each receiver of each seed, in per cent; of pairs the mean over its donors."""
    return [
        100 * statistics.fmean(row[key] for row in result[part] if (row["bits"], row["task"]) == (bits, task))
        for result in results
        for task in dict.fromkeys(row["task"] for row in result["alone"])
    ]


def gain_of(results: Results, bits: int, key: str, part: str, to: str = "rounded") -> list[float]:
    """Return how far each receiver of each seed is ahead of what it does alone, in points."""
    both = by_receiver(results, bits, key, part), by_receiver(results, bits, to)
    return [one - other for one, other in zip(*both, strict=True)]


def correlation(results: Results, bits: int) -> str:
    """Return the rank correlation of cosine and gain at λ = 1 over the pairs of each seed."""
    found = []
    for result in results:
        pairs = [pair for pair in pairs_of(results, bits) if pair["seed"] == result["seed"]]
        cosines, gained = [p["cosine"] for p in pairs], [p["one"] - p["rounded"] for p in pairs]
        if len(pairs) > 2 and len(set(gained)) > 1:
            found.append(float(spearmanr(cosines, gained).statistic))
    return interval(found, 2) if found else ""


def spread(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation}"


def interval(values: Sequence[float], digits: int = 1) -> str:
    """Return a mean with its 95 % interval by Student's t."""
    text = f"{statistics.fmean(values):+.{digits}f}"
    if len(values) < 2:
        return text
    low, high = mean_interval(values, is_share=False)
    return f"{text} ({low:+.{digits}f} to {high:+.{digits}f})"


def counted(values: Sequence[float]) -> str:
    """Return how many values are above, at and below zero."""
    signs = [sum(value > 0 for value in values), sum(value == 0 for value in values)]
    return f"{signs[0]}, {signs[1]}, {len(values) - sum(signs)}"


def claims(results: Mapping[str, Results]) -> str:
    """Return published numbers beside ours."""

    def of_each(bits: int, cell: Callable[[Results, int], str]) -> str:
        return "; ".join(f"{data} {cell(found, bits)}" for data, found in results.items())

    def won(found: Results, bits: int, key: str, to: str) -> str:
        pairs = pairs_of(found, bits)
        return f"{sum(pair[key] > pair[to] for pair in pairs)} of {len(pairs)}"

    def failing(found: Results, bits: int) -> str:
        failed = [pair["scaling"] for pair in pairs_of(found, bits) if pair["one"] < pair["rounded"]]
        return f"{len(failed)} fail: {sum(0 < s < 1 for s in failed)}, {sum(s < 0 for s in failed)}, " + (
            f"{sum(s == 0 for s in failed)}"
        )

    def gain(key: str, part: str = "pairs", to: str = "rounded") -> Callable[[Results, int], str]:
        return lambda found, bits: interval(gain_of(found, bits, key, part, to))

    def alone(key: str) -> Callable[[Results, int], str]:
        return gain(key, "alone")

    def wins(key: str, to: str) -> Callable[[Results, int], str]:
        return lambda found, bits: won(found, bits, key, to)

    same = "the same, 2 bits"
    rows = [
        ("own training gains, 3 bits", "+45.3", of_each(3, alone("own"))),
        ("the same, 4 bits", "+1.1", of_each(4, alone("own"))),
        ("vector gains, λ = 1, 3 bits", "+9.7", of_each(3, gain("one"))),
        (same, "", of_each(2, gain("one"))),
        ("pairs in which it gains, 3 bits", "354 of 462", of_each(3, wins("one", "rounded"))),
        (same, "", of_each(2, wins("one", "rounded"))),
        ("GPTQ gains, 3 bits", "+57.2", of_each(3, alone("gptq"))),
        (same, "", of_each(2, alone("gptq"))),
        ("vector ahead of GPTQ, 3 bits", "of AWQ: 0 of 462", of_each(3, wins("one", "alone_gptq"))),
        (same, "", of_each(2, wins("one", "alone_gptq"))),
        ("vector under GPTQ, λ = 1, 3 bits", "-3.2", of_each(3, gain("gptq", "pairs", "gptq"))),
        ("pairs in which it gains there, 3 bits", "43 of 462", of_each(3, wins("gptq", "alone_gptq"))),
        (
            "pairs that fail at λ = 1: λ in (0, 1), < 0, = 0; 3 bits",
            "93 fail: 54, 29, 7",
            of_each(3, failing),
        ),
        (same, "", of_each(2, failing)),
    ]
    return table(["claim", "published", "here"], rows)
