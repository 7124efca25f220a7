"""The table of rounds against one merge: worked by hand on two seeds, and what the page says."""

import pytest

from benchmarks import alternating

ROW = {"run": "rounds", "method": "average", "preference": "uniform"}


def result(*rows):
    return {"sizes": [10, 20, 10, 10, 10], "parts": {"some": [*rows]}}


RESULTS = {
    "0": result(
        ROW | {"rounds": 1, "right": [5, 10, 5, 5, 5]}, ROW | {"rounds": 10, "right": [10, 10, 5, 5, 5]}
    ),
    "1": result(
        ROW | {"rounds": 1, "right": [5, 10, 5, 5, 5]}, ROW | {"rounds": 10, "right": [10, 20, 5, 5, 5]}
    ),
}


def test_accuracy_is_the_mean_over_tasks_by_their_weights():
    table = alternating.Accuracies(RESULTS)
    even, first = (0.2,) * 5, (1.0, 0, 0, 0, 0)
    assert table.of(even, **ROW, rounds=10) == {"0": pytest.approx(60), "1": pytest.approx(70)}
    assert table.of(first, **ROW, rounds=10) == {"0": pytest.approx(100), "1": pytest.approx(100)}
    assert table.of(even, **ROW, rounds=10, scaling=0.5) == {}


def test_a_gain_is_paired_by_seed():
    # By hand: differences 10 and 20 have the mean 15 and the standard error 5; t is 12.706 for one degree.
    assert alternating.gain({"0": 60, "1": 70}, {"0": 50, "1": 50, "2": 0}) == "+15.0 [-48.5, +78.5]"
    assert alternating.gain({"0": 60}, {"0": 50}) == ""


def test_seeds_that_are_not_finished_are_left_out():
    more = {**RESULTS, "2": {"sizes": [10], "parts": {}}}
    assert [*alternating.whole_seeds(more)] == ["0", "1"]


@pytest.mark.parametrize("name", ["digits"])
def test_the_section_of_the_page_is_what_is_stored(name):
    experiment = alternating.EXPERIMENTS[name]
    results = alternating.whole_seeds(experiment.stored())
    assert len(results) >= 2
    assert alternating.section(experiment, results) in experiment.page.read_text(encoding="utf-8")
