"""Choices by a history of our own: by hand, and the table of the page that is what is stored."""

import itertools
import json

import numpy as np
import pytest

from benchmarks import pair_history
from hub_magmax.analysis.mergeability import additive, ridge

PAIRS = list(itertools.combinations("abcde", 2))


def family(kept):
    """Return a family of which each pair keeps, by every method, what is given; one metric tells it."""
    rows = []
    for pair in PAIRS:
        values = {name: kept(pair, number) for number, name in enumerate(pair_history.METHODS)}
        rows.append(
            {"tasks": pair, "kept": values, "metrics": {"told": kept(pair, 0), "x_as_published": 1e9}}
        )
    return {"family": "made-up", "pairs": rows}


def test_the_best_method_of_others_loses_what_single_pairs_differ_by():
    def kept(pair, number):
        """The first method is best by .1, but of the pair of a and b, where the second is best by .5."""
        return 0.8 if number == 0 else 1.3 if number == 1 and pair == ("a", "b") else 0.7

    history = pair_history.History(family(kept))
    fixed = history.predicted(pair_history.mean_of_others)
    assert history.lost_by_method(fixed) == pytest.approx(100 * 0.5 / 10)
    assert history.lost_by_method(history.kept) == history.lost_by_partner(history.kept) == 0


def test_partners_are_found_by_effects_of_tasks_and_by_a_metric_that_tells():
    effects = dict(zip("abcde", (0.0, 0.01, 0.03, 0.06, 0.1), strict=True))
    history = pair_history.History(family(lambda pair, number: 0.5 + sum(effects[task] for task in pair)))
    by_tasks, by_metrics = history.predicted(additive), history.predicted(ridge)
    assert by_tasks == pytest.approx(history.kept)
    assert history.lost_by_partner(by_tasks) == pytest.approx(0, abs=1e-9)
    assert history.lost_by_partner(by_metrics) == pytest.approx(0, abs=1e-9)
    assert history.lost_by_partner(-history.kept) > 5
    assert np.corrcoef(by_metrics[:, 0], history.kept[:, 0])[0, 1] > 0.99


def test_the_table_of_the_page_is_what_is_stored():
    found = json.loads(pair_history.RESULTS.read_text(encoding="utf-8"))
    assert all(len(row["pairs"]) == 10 for row in found)
    assert pair_history.table(found) in pair_history.PAGE.read_text(encoding="utf-8")
