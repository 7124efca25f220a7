"""Fits of the generalized Pareto distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import genpareto

from hub_magmax.evaluation.generalized_pareto import (
    ParetoFits,
    anderson_darling,
    fit_pareto,
    goodness_of_fit,
)


def _drawn(shape: float, size: int = 600, seed: int = 0) -> np.ndarray:
    return genpareto.rvs(shape, scale=2.5, size=size, random_state=np.random.default_rng(seed))


@pytest.mark.parametrize("shape", [-0.4, -0.1, 0.0, 0.2, 0.6, 1.2])
def test_no_other_pair_of_numbers_is_as_likely(shape):
    excesses = _drawn(shape)
    fit = fit_pareto(excesses[None])
    own = genpareto.logpdf(excesses, fit.shape[0], scale=fit.scale[0]).sum()
    c, _, scale = genpareto.fit(excesses, floc=0)
    assert own >= genpareto.logpdf(excesses, c, scale=scale).sum() - 1e-9
    assert abs(fit.shape[0] - c) < 1e-3


def test_a_fit_does_not_depend_on_its_neighbours_nor_on_the_unit():
    rows = np.stack([_drawn(0.3, seed=1), _drawn(-0.2, seed=2)])
    both = fit_pareto(rows)
    for number, row in enumerate(rows):
        alone = fit_pareto(1000 * row[None])
        assert alone.shape[0] == pytest.approx(both.shape[number], abs=1e-7)
        assert alone.scale[0] == pytest.approx(1000 * both.scale[number], rel=1e-6)


def test_two_excesses_of_one_and_three_by_hand():
    """At an exponential distribution with the mean 2 the likelihood of both is exp(-2) / 4."""
    fits = ParetoFits(np.array([0.0]), np.array([2.0]))
    assert fits.survival(np.array([[1.0, 3.0]]))[0] == pytest.approx([math.exp(-0.5), math.exp(-1.5)])
    heavy = ParetoFits(np.array([1.0]), np.array([2.0]))
    assert heavy.survival(np.array([[1.0, 3.0]]))[0] == pytest.approx([2 / 3, 2 / 5])


@pytest.mark.parametrize("shape", [-0.3, 0.0, 0.7])
def test_draws_have_the_distribution_of_the_fit(shape):
    fits = ParetoFits(np.array([shape]), np.array([2.0]))
    drawn = fits.draw(20_000, seed=5)
    assert drawn.min() >= 0
    ranks = np.sort(fits.survival(drawn)[0])
    assert np.abs(ranks - (np.arange(20_000) + 0.5) / 20_000).max() < 0.02


def test_the_statistic_is_that_of_its_definition():
    excesses = _drawn(0.2, size=25)
    fit = fit_pareto(excesses[None])
    below = genpareto.cdf(np.sort(excesses), fit.shape[0], scale=fit.scale[0])
    n = len(below)
    terms = [(2 * i - 1) * (math.log(below[i - 1]) + math.log(1 - below[n - i])) for i in range(1, n + 1)]
    assert anderson_darling(excesses[None], fit)[0] == pytest.approx(-n - sum(terms) / n)


def test_p_values_of_fitting_samples_are_spread_evenly():
    found = [goodness_of_fit(_drawn(0.2, size=80, seed=seed), 59, seed) for seed in range(120)]
    assert 0.4 < np.mean(found) < 0.6
    assert np.mean(np.asarray(found) <= 0.05) < 0.12


def test_another_family_does_not_fit():
    generator = np.random.default_rng(3)
    bumps = np.concatenate([generator.normal(5, 0.2, 400), generator.exponential(1, 400)])
    assert goodness_of_fit(bumps, 99, seed=0) == 0.01
