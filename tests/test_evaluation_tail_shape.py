"""Comparison of tails, and the gates of a claim about their shape."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from hub_magmax.errors import EvaluationError, HubMagmaxError
from hub_magmax.evaluation import resampling, tail_gates
from hub_magmax.evaluation.intervals import resampled_ranks
from hub_magmax.evaluation.resampling import Falling, resampled
from hub_magmax.evaluation.tail_gates import Gates, ShapeProtocol, on_logit_scale
from hub_magmax.evaluation.tail_shape import TailComparison, compare_tails

#: Gates of small samples: wide margins, and differences of shapes that a hundred exceedances show.
LOOSE = ShapeProtocol(mean_margin=5, tail_margin=50, quantile=0.8, shape_margin=0.5, shape_change=0.4)


def _gate(found: TailComparison, name: str) -> tail_gates.Gate:
    return next(gate for gate in found.gates if gate.name == name)


def _with_tail(shape: float, size: int, seed: int) -> np.ndarray:
    """Return evenly spread scores below 0, and above it a tenth with a tail of this shape and the mean 1."""
    ranks = np.random.default_rng(seed).permutation(size) + 0.5
    above = ranks / size * 10
    tail = np.expm1(-shape * np.log(np.minimum(above, 1))) / shape * (1 - shape)
    return np.where(above < 1, tail, 1 / 9 - above / 9)


def test_the_power_formula_gives_the_numbers_of_the_paper():
    assert ShapeProtocol().num_needed(0, 0) == 1570
    assert replace(ShapeProtocol(), shape_margin=0.1772).num_needed(0, 0) == 500
    assert ShapeProtocol().num_needed(-0.99, -0.5) == math.ceil(0.5 * 784.888)
    assert ShapeProtocol().num_needed(0.5, 0) == math.ceil((1.5**2 + 1) * 784.888)


def test_a_sample_is_never_claimed_to_differ_from_itself():
    sample = np.random.default_rng(0).exponential(size=2000)
    for paired in (False, True):
        found = compare_tails(sample, sample, paired=paired)
        assert found.failed is not None
        assert found.verdict.startswith("REFUSED")
    loose = compare_tails(sample, sample, protocol=LOOSE)
    assert loose.failed is not None
    assert loose.failed.name == "difference of shapes"
    assert loose.difference == pytest.approx((0, *loose.difference[1:]))


def test_two_thousand_examples_have_too_few_exceedances_for_the_default():
    """The illusion of the paper's pilot: of a hundred exceedances, equal shapes seem .28 apart."""
    generator = np.random.default_rng(1)
    one, other = generator.exponential(size=(2, 2000))
    found = compare_tails(one, other, protocol=ShapeProtocol(tail_margin=1.0))
    assert found.failed is not None
    assert found.failed.name == "number of exceedances"
    assert found.samples[0].num_exceedances == 100
    assert "100 and 100" in found.failed.found
    assert "examples of each" in found.failed.advice


def test_a_heavier_tail_of_the_same_mean_and_cvar_is_claimed():
    protocol = ShapeProtocol(quantile=0.9, shape_margin=0.15)
    heavy, light = (_with_tail(shape, 20_000, seed=4) for shape in (0.4, 0.05))
    found = compare_tails(heavy, light, names=("heavy", "light"), protocol=protocol)
    assert found.failed is None, found.verdict
    assert "the tail of heavy is heavier than that of light" in found.verdict
    value, low, high = found.difference
    assert value == pytest.approx(0.35, abs=0.03)
    assert 0 < low < value < high


@pytest.mark.slow
def test_samples_of_one_distribution_pass_less_than_once_in_twenty():
    generator = np.random.default_rng(7)
    protocol = replace(LOOSE, shape_margin=0.7)
    pairs = (tuple(generator.exponential(size=(2, 300))) for _ in range(80))
    passed = [all(gate.is_passed for gate in Gates(pair, None, False, protocol, 0).look()) for pair in pairs]
    assert sum(passed) < 4


def test_scores_that_saturate_are_refused_with_their_bounds_and_without():
    scores = 1 / (1 + np.exp(-8 * np.random.default_rng(0).normal(size=5000)))
    for bounds in ((0.0, 1.0), None):
        found = compare_tails(scores, scores[::-1], bounds=bounds)
        assert found.failed is not None
        assert found.failed.name == "ends of the scale"
    with_ends = np.append(np.linspace(0.1, 0.9, 200), 1.0)
    found = compare_tails(with_ends, with_ends, bounds=(0, 1))
    assert "logits are infinite" in found.gates[0].found
    assert found.samples[0].shape is None


def test_bounded_scores_are_compared_as_logits_and_told_as_they_are():
    generator = np.random.default_rng(2)
    logits = generator.normal(-3, 0.5, size=(2, 3000))
    shares = 1 / (1 + np.exp(-logits))
    found = compare_tails(*shares, bounds=(0, 1))
    assert found.samples[0].mean == pytest.approx(shares[0].mean())
    plain = compare_tails(*logits)
    told = _gate(plain, "equivalent means").found.replace("difference is", "difference of logits is")
    assert _gate(found, "equivalent means").found == told
    value, low, high = found.differences["mean"]
    assert value == pytest.approx(shares[0].mean() - shares[1].mean())
    assert low < value < high
    assert on_logit_scale(np.array([-0.5]), (-1, 1)) == pytest.approx([math.log(1 / 3)])


@pytest.mark.parametrize(("bounds", "num_drawings"), [(None, 2), ((-9, 9), 4)])
def test_resamples_are_drawn_once_for_gates_and_for_what_is_told(monkeypatch, bounds, num_drawings):
    drawn = []
    draw = resampling.resampled_ranks
    monkeypatch.setattr(resampling, "resampled_ranks", lambda *asked: drawn.append(asked) or draw(*asked))
    one, other = np.random.default_rng(2).normal(size=(2, 2000))
    found = compare_tails(one, other, bounds=bounds, protocol=ShapeProtocol(mean_margin=9))
    assert _gate(found, "equivalent CVaR").is_passed is not None
    assert len(drawn) == num_drawings  # of each sample, as it is and as logits


def test_different_means_are_told_as_what_they_are():
    generator = np.random.default_rng(3)
    found = compare_tails(generator.normal(0, 1, 2000), generator.normal(1, 1, 2000))
    assert found.failed is not None
    assert found.failed.name == "equivalent means"
    assert "say that" in found.failed.advice
    assert {gate.is_passed for gate in found.gates[2:]} == {None}


def test_pairs_narrow_the_interval_where_scores_go_together():
    generator = np.random.default_rng(5)
    common = generator.normal(size=500)
    one, other = common + 0.1 * generator.normal(size=(2, 500))
    apart, paired = (compare_tails(one, other, paired=paired) for paired in (False, True))
    assert _gate(apart, "equivalent means").is_passed is False
    assert _gate(paired, "equivalent CVaR").is_passed is True


def test_one_threshold_is_not_enough():
    """Shapes that change along the tail: exponential at first, and far heavier in its last part."""
    generator = np.random.default_rng(6)
    sample = generator.exponential(size=8000)
    sample[sample > 3.6] = 3.6 + 3 * generator.pareto(1.2, size=int((sample > 3.6).sum()))
    found = compare_tails(
        sample,
        sample,
        protocol=replace(LOOSE, quantile=0.95, least_fit=1e-9, tail_margin=99, shape_change=0.05),
    )
    assert found.failed is not None
    assert found.failed.name == "stability over thresholds"


@pytest.mark.parametrize(("size", "share"), [(33, 0.1), (400, 0.05), (400, 1.0)])
def test_resamples_have_the_means_and_the_largest_values_of_the_drawn_examples(size, share):
    samples = np.random.default_rng(0).normal(size=(2, size)).round(1)  # with equal values
    (found,) = resampled(samples, 3, 7, share)
    (ranks,) = resampled_ranks(size, 3, 7)
    for own, drawn in zip(found, samples[:, ranks], strict=True):
        assert own.means == pytest.approx(drawn.mean(axis=1))
        falling = -np.sort(-drawn, axis=1)
        assert (own.largest == falling[:, : math.ceil(round(share * size, 9)) + 1]).all()


def test_a_resample_with_few_of_the_largest_values_goes_on_with_the_next():
    values = np.arange(1000.0)
    counts = np.zeros((1, 1000), np.int64)
    counts[0, :3] = 500, 499, 1
    assert Falling(values, 0.002).drawn(counts).largest.tolist() == [[2, 1, 1]]


def test_results_are_plain_values_and_a_table():
    sample = np.random.default_rng(0).exponential(size=200)
    found = compare_tails(sample, sample + 1, names=("a", "b"))
    values = found.to_dict()
    assert values["claimed"] is False
    assert values["refused_by"] == "equivalent means"
    assert [own["name"] for own in values["samples"]] == ["a", "b"]
    assert "equivalent means: FAILED" in str(found)
    assert len(found.to_frame()) == 2
    assert compare_tails(sample, sample + 1, names=("a", "b")) == found


@pytest.mark.parametrize(
    ("first", "options", "told"),
    [
        ([1.0] * 19, {}, "there are 19 scores"),
        ([1.0] * 30 + [math.nan], {}, "score 30 is nan"),
        (["a"] * 30, {}, "no numbers"),
        ([[1.0]] * 30, {}, "no numbers in a row"),
        ([2.0] * 30, {"bounds": (0, 1)}, "reach from 2 to 2"),
        ([0.5] * 30, {"bounds": (1, 0)}, "the bounds are 1 and 0"),
        ([0.5] * 30, {"bounds": (0, math.inf)}, "the bounds are 0 and inf"),
        ([0.5] * 29 + [-1e300], {}, "whose square is no number"),
        ([0.5] * 30, {"bounds": (0, "x")}, "bounds are no numbers"),
        ([0.5] * 30, {"names": ["a"]}, "there are 1 names"),
        ([0.5] * 31, {"paired": True}, "no pairs"),
    ],
)
def test_samples_that_cannot_be_compared_are_refused(first, options, told):
    with pytest.raises(HubMagmaxError, match=told):
        compare_tails(first, [0.5] * 30, **options)


@pytest.mark.parametrize(
    "values", [{"mean_margin": 0}, {"tail_margin": math.nan}, {"shape_margin": -1}, {"quantile": 0.99}]
)
def test_thresholds_that_say_nothing_are_refused(values):
    with pytest.raises(EvaluationError, match="tails"):
        ShapeProtocol(**values)


@pytest.mark.parametrize("sample", [[0.0] * 40, [0.0] * 39 + [1.0], [0.0, 1.0] * 20])
def test_samples_without_a_tail_are_refused_and_told(sample):
    found = compare_tails(sample, sample)
    assert found.failed is not None
    assert math.isfinite(found.samples[0].mean)


def test_columns_of_the_csv_do_not_depend_on_the_scores():
    rng, tables = np.random.default_rng(0), []
    for num in (20, 60, 2000):
        scores = rng.normal(size=num)
        found = compare_tails(scores.tolist(), scores.tolist())
        tables.append(found)
        assert found.as_table().to_frame().columns.tolist()[:5] == [
            "sample",
            "examples",
            "mean",
            "mean low",
            "mean high",
        ]
    heads = {found.table("csv").splitlines()[0] for found in tables}
    assert heads == {
        "sample,examples,mean,mean low,mean high,CVaR 0.9,CVaR 0.9 low,CVaR 0.9 high,CVaR 0.95,CVaR 0.95 low,"
        "CVaR 0.95 high,CVaR 0.99,CVaR 0.99 low,CVaR 0.99 high,above"
    }
    assert ",,,," in tables[0].table("csv"), "empty where there are too few"
    assert len(tables[0].table().splitlines()[0].split()) == len(["sample", "examples", "mean", "above"]) + 6
