"""The table of rounds against one merge: worked by hand on two seeds, and what the page says."""

import pytest
import torch

import hub_magmax as hm
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


@pytest.mark.parametrize("method", alternating.METHODS)
def test_tensors_that_no_task_changed_are_left_out_without_effect(method):
    base = {"head": torch.randn(3, 40), "learned": torch.randn(5, 40), "other": torch.randn(7)}
    tasks = {
        name: base | {key: base[key] + torch.randn(base[key].shape) for key in ("learned", "other")}
        for name in "ab"
    }
    found = alternating.merge_changed(base, tasks, method, (0.7, 0.3), 0.5)
    whole = hm.merge_state_dicts(base, tasks, method={"name": method, "scaling": 0.5}, preference=[0.7, 0.3])
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_seeds_that_are_not_finished_are_left_out():
    more = {**RESULTS, "2": {"sizes": [10], "parts": {}}}
    assert [*alternating.whole_seeds(more)] == ["0", "1"]


@pytest.mark.parametrize("experiment", alternating.EXPERIMENTS.values(), ids=alternating.EXPERIMENTS)
def test_the_section_of_the_page_is_what_is_stored(experiment):
    results = alternating.whole_seeds(experiment.stored())
    assert len(results) >= 5
    assert alternating.section(experiment, results) in experiment.page.read_text(encoding="utf-8")
