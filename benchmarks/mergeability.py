"""The published numbers of arXiv:2601.22285 again, and how far they depend on seeds.

    python -m benchmarks.mergeability FOLDER --write    # seconds; FOLDER: a clone of the authors' repository
    python -m benchmarks.mergeability --render          # the tables of docs/mergeability.md again

The repository is Rose-STL-Lab/demystifying-mergeability at commit 3d699e5, the last one with results; numbers
are read from it, and none of its code runs. Coefficients that it stores give the published agreement of
methods; the regression is written anew from its description, for several seeds; and both models of
`predict-merge` are fitted on the same merges.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.page_tables import replace_tables, table
from hub_magmax.analysis.mergeability import (
    Cases,
    additive,
    as_cases,
    correlation,
    leave_tasks_out,
    left_after_additive,
    ridge,
)
from hub_magmax.files import write_text

RESULTS = Path(__file__).parent / "results" / "mergeability.json"
PAGE = Path(__file__).parents[1] / "docs" / "mergeability.md"

#: Methods by their folder, and what the page calls them; those of the first version, and of the fourth.
METHODS = {
    "weight_avg": "average", "arithmetic": "task arithmetic", "tsv": "TSV", "isotropic": "Iso-C",
    "ties": "TIES", "dare": "DARE",
}  # fmt: skip
VERSIONS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "v1": (
        "metric_linear_optimization_og/loto_cv_no_leakage(MAIN)",
        ("weight_avg", "arithmetic", "tsv", "isotropic"),
    ),
    "v4": (
        "metric_linear_optimization_v2/vit-b-16_AdamW/loto_cv_l1_lambda1.0",
        ("weight_avg", "arithmetic", "tsv", "ties", "dare"),
    ),
}

#: A metric that is the mean of two others, and no part of the published table.
_TWICE = "right_subspace_overlap"

#: Of the published regression: steps, learning rate, steps without progress, and what counts as progress.
NUM_STEPS, LEARNING_RATE, PATIENCE, PROGRESS = 1000, 0.01, 50, 1e-4
SEEDS = range(10)
_NUM_TOP = 5


def read_cases(results: Path, method: str) -> Cases:
    """Return the pairs of which all metrics and an accuracy are stored; kept is the mean accuracy."""
    found = json.loads((results / "mergeability/ViT-B-16_AdamW/pairwise_metrics_N20.json").read_text())
    names = [name for name in found["metrics"] if name != _TWICE]
    summary = f"ViT-B-16_AdamW/{method}/all_pairwise_summary_N20.json"
    scores = json.loads((results / summary).read_text())
    rows = []
    for one, other in combinations(range(found["n_datasets"]), 2):
        pair = (found["datasets"][one], found["datasets"][other])
        metrics = [found["metrics"][name]["matrix"][one][other] for name in names]
        score = scores.get("__".join(pair), {})
        if None not in metrics and "avg" in score:  # a few failed
            rows.append((pair, metrics, score["avg"][0]["acc/test/avg"]))
    return as_cases(rows)


def stored(results: Path, version: str) -> dict[str, Any]:
    """Return what stored coefficients say: correlations by method, the agreement of methods, and weights.

    A weight is the mean over methods, beside the number of methods for which the metric is among the five
    largest.
    """
    place, methods = VERSIONS[version]
    found = {
        name: json.loads((results / place / f"{name}_loto_results.json").read_text()) for name in methods
    }
    means = [
        {key: value for key, value in one["average_coefficients"].items() if key != _TWICE}
        for one in found.values()
    ]
    names = sorted(means[0])
    weights = np.array([[one[name] for name in names] for one in means])
    return {
        "weights": _weights(names, weights),
        "val_r": {name: one["per_fold_stats"]["val_r_mean"] for name, one in found.items()},
        **agreement(weights),
    }


def agreement(weights: np.ndarray) -> dict[str, float]:
    """Return how far methods, in rows, agree about metrics: on the five largest, and on signs."""
    top = [_top(row) for row in weights]
    pairs = list(combinations(range(len(weights)), 2))
    return {
        "top_overlap": float(np.mean([len(top[a] & top[b]) / _NUM_TOP for a, b in pairs])),
        "sign_agreement": float(
            np.mean([(np.sign(weights[a]) == np.sign(weights[b])).mean() for a, b in pairs])
        ),
    }


def _weights(names: Sequence[str], weights: np.ndarray) -> dict[str, tuple[float, int]]:
    num_top = Counter(number for row in weights for number in _top(row))
    means = np.round(weights.mean(0), 6).tolist()
    return {name: (means[number], num_top[number]) for number, name in enumerate(names)}


def _top(row: np.ndarray) -> set[int]:
    """Return the numbers of the metrics with the largest weights."""
    return {*np.argsort(-np.abs(row))[:_NUM_TOP].tolist()}


class Refit:
    """The published regression of one method, for all tasks left out and all seeds at once.

    Coefficients that maximise Pearson's r of the training pairs by Adam, from random ones; they are divided
    by their sum before every step. Metrics are scaled to -1 … 1 over the training pairs.
    """

    def __init__(self, cases: Cases, seeds: Sequence[Sequence[int]]) -> None:
        self._cases = cases
        folds = cases.members.T.astype(bool)  # "tasks pairs": those left out
        low = np.array([cases.metrics[~out].min(0) for out in folds])
        width = np.array([np.ptp(cases.metrics[~out], axis=0) for out in folds])
        scaled = 2 * (cases.metrics - low[:, None]) / np.where(width > 0, width, 1)[:, None] - 1
        self._metrics = torch.from_numpy(scaled)
        self._trained = torch.from_numpy(~folds).double()
        self._folds = folds
        drawn = [np.random.default_rng(seed).standard_normal((len(folds), scaled.shape[2])) for seed in seeds]
        self.weights = self._fitted(torch.from_numpy(np.array(drawn)))

    def _fitted(self, start: Tensor) -> Tensor:
        """Return coefficients, "seeds tasks metrics", each as it was when it stopped."""
        weights = start.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([weights], lr=LEARNING_RATE)
        best = torch.full(start.shape[:2], np.inf, dtype=torch.float64)
        waited, result = torch.zeros(start.shape[:2]), start.clone()
        running = torch.ones(start.shape[:2], dtype=torch.bool)
        for _ in range(NUM_STEPS):
            optimizer.zero_grad()
            losses = -self._correlations(weights)
            losses.sum().backward()
            with torch.no_grad():
                weights /= weights.sum(-1, keepdim=True) + 1e-8
            optimizer.step()
            result[running] = weights.detach()[running]
            better = losses.detach() < best - PROGRESS
            best = torch.where(better, losses.detach(), best)
            waited = torch.where(better, 0, waited + 1)
            running &= waited < PATIENCE
            if not running.any():
                break
        return result

    def _correlations(self, weights: Tensor) -> Tensor:
        predicted = torch.einsum("fpm,sfm->sfp", self._metrics, weights)
        wanted = torch.from_numpy(self._cases.kept).expand_as(self._trained)
        return _pearson(predicted, wanted, self._trained)

    def val_r(self) -> list[float]:
        """Return by seed the mean over tasks of the correlation for the pairs of a task left out."""
        predicted = torch.einsum("fpm,sfm->sfp", self._metrics, self.weights).numpy()
        return [
            float(
                np.mean(
                    [
                        correlation(row[out], self._cases.kept[out]) or 0.0
                        for row, out in zip(one, self._folds, strict=True)
                    ]
                )
            )
            for one in predicted
        ]


def _pearson(one: Tensor, other: Tensor, counts: Tensor) -> Tensor:
    """Return correlations along the last axis, of the entries that count."""
    total = counts.sum(-1, keepdim=True)
    a = (one - (one * counts).sum(-1, keepdim=True) / total) * counts
    b = (other - (other * counts).sum(-1, keepdim=True) / total) * counts
    found: Tensor = (a * b).sum(-1) / ((a**2).sum(-1) * (b**2).sum(-1)).sqrt().add(1e-8)
    return found


def models(cases: Cases) -> dict[str, Any]:
    """Return what both models of `predict-merge` are worth on the published merges."""
    by_tasks, by_metrics = leave_tasks_out(cases, additive), leave_tasks_out(cases, ridge)
    rest = cases.kept - additive(cases)(cases)
    return {
        "pairs": len(cases.kept),
        "additive_r": by_tasks.r,
        "additive_error": by_tasks.error,
        "ridge_r": by_metrics.r,
        "ridge_error": by_metrics.error,
        "additive_share": 1 - float(rest.var() / cases.kept.var()),
        "rest_r": left_after_additive(cases),
    }


def measure(folder: Path) -> dict[str, Any]:
    """Return everything that the tables tell."""
    torch.set_num_threads(1)
    results = folder / "results"
    cases = {method: read_cases(results, method) for method in METHODS}
    metrics = cases["weight_avg"].metrics
    standard = (metrics - metrics.mean(0)) / metrics.std(0)
    refits = {
        method: Refit(cases[method], [(seed, number) for seed in SEEDS])
        for number, method in enumerate(VERSIONS["v1"][1])
    }
    means = np.array([refit.weights.mean(1).numpy() for refit in refits.values()])  # "methods seeds metrics"
    return {
        "stored": {version: stored(results, version) for version in VERSIONS},
        "models": {method: models(found) for method, found in cases.items()},
        "refitted": {
            "val_r": {method: refit.val_r() for method, refit in refits.items()},
            "agreement": [agreement(means[:, seed]) for seed in range(len(SEEDS))],
        },
        "num_metrics": metrics.shape[1],
        "rank_of_metrics": int(np.linalg.matrix_rank(standard, tol=1e-6 * np.linalg.norm(standard, 2))),
    }


# Complex only by count: two tables, one row after the other.
def tables(found: Mapping[str, Any]) -> str:
    """Return the tables of the page."""
    refitted, versions = found["refitted"], found["stored"]
    rows = []
    for version, name in (("v1", "first version, four methods"), ("v4", "fourth version, five methods")):
        shares = (versions[version][key] for key in ("top_overlap", "sign_agreement"))
        rows.append([f"{name}: from stored coefficients", *(f"{100 * share:.1f} %" for share in shares)])
    ends = (
        _ends([100 * one[key] for one in refitted["agreement"]], ".1f", " %")
        for key in ("top_overlap", "sign_agreement")
    )
    num_seeds = len(refitted["agreement"])
    rows.append([f"first version, fitted again from {num_seeds} seeds", *ends])
    agreed = table(("published agreement of methods", "five largest", "signs"), rows)
    head = ("method", "r, published", f"r, {num_seeds} seeds", "r, ridge", "r, by tasks")
    more = ("error, ridge", "error, by tasks", "share of tasks", "r of the rest")
    rows = []
    for method, name in METHODS.items():
        own = found["models"][method]
        published = [v["val_r"][method] for v in versions.values() if method in v["val_r"]]
        seeds = refitted["val_r"].get(method)
        cells = [
            name,
            f"{published[0]:.3f}",
            _ends(seeds, ".2f", "") if seeds else "",
            *(f"{own[key]:.3f}" for key in ("ridge_r", "additive_r", "ridge_error", "additive_error")),
            f"{100 * own['additive_share']:.1f} %",
            f"{own['rest_r']:.2f}",
        ]
        rows.append(cells)
    return f"{agreed}\n{table((*head, *more), rows)}"


def _ends(values: Sequence[float], form: str, unit: str) -> str:
    return f"{min(values):{form}} to {max(values):{form}}{unit}"


def render() -> None:
    """Write the tables into the page, in place of those that are there."""
    found = tables(json.loads(RESULTS.read_text(encoding="utf-8")))
    replace_tables(PAGE, r"\| published agreement.*\n(\|.*\n)+\n(\|.*\n)+", found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="clone of the authors' repository")
    parser.add_argument("--write", action="store_true", help="store the numbers")
    parser.add_argument("--render", action="store_true", help="write the tables from the stored numbers")
    options = parser.parse_args()
    if options.folder:
        found = measure(options.folder)
        print(tables(found))
        if options.write:
            write_text(RESULTS, json.dumps(found, indent=1) + "\n")
    if options.render:
        render()


if __name__ == "__main__":
    main()
