"""The published regression, written anew, and tables of the page that are what is stored."""

import itertools
import json

import numpy as np
import pytest

from benchmarks import mergeability
from hub_magmax.analysis.mergeability import as_cases


def test_the_regression_finds_what_metrics_tell_from_any_start():
    rng = np.random.default_rng(0)
    rows = [(pair, rng.standard_normal(2)) for pair in itertools.combinations("abcdef", 2)]
    refit = mergeability.Refit(as_cases([(pair, x, x @ [2.0, 1.0]) for pair, x in rows]), [(0,), (1,), (2,)])
    weights = refit.weights.numpy()
    assert weights.shape == (3, 6, 2)
    assert min(refit.val_r()) > 0.8


def test_agreement_by_hand():
    weights = np.array([[9, 8, 7, 6, 5, 0.1], [9, -8, -7, 0.1, 6, 5]])
    assert mergeability.agreement(weights) == {"top_overlap": 4 / 5, "sign_agreement": 4 / 6}


def test_stored_numbers_are_those_of_the_paper_and_the_page():
    found = json.loads(mergeability.RESULTS.read_text(encoding="utf-8"))
    published = {"v1": (0.467, 0.553), "v4": (0.640, 0.793)}
    for version, shares in published.items():
        own = found["stored"][version]
        assert (own["top_overlap"], own["sign_agreement"]) == pytest.approx(shares, abs=6e-4)
    wanted = {"weight_avg": 0.555, "arithmetic": 0.343, "tsv": 0.572, "isotropic": 0.328}
    assert found["stored"]["v1"]["val_r"] == pytest.approx(wanted, abs=5e-4)
    assert (found["rank_of_metrics"], found["num_metrics"]) == (25, 28)
    assert mergeability.tables(found) in mergeability.PAGE.read_text(encoding="utf-8")
