"""Methods give the weights that are recorded; `python -m benchmarks.golden` checks all of them."""

import copy

import pytest

from benchmarks import golden, golden_cases
from hub_magmax.methods import method_names

#: Every method from folders, and each kind of source, output and backend by one method at least.
CHOSEN = (
    "*source=folder backend=compiled",
    "t* scope=tensor source=folder backend=eager",
    "dare* source=folder backend=tensors",
    "magmax source=hub backend=compiled",
    "tunable_magmax/top-n scope=* source=large backend=eager",
    "breadcrumbs scope=tensor source=sharded backend=eager",
    "dare source=many backend=eager",
    "dare_ties source=token_rows backend=*",
    "ties scope=model source=adapter backend=*",
    "average source=adapter output=adapter backend=eager",
    "average source=adapter_sequence backend=memory",
    "agreement source=adapter_forms backend=*",
    "task_arithmetic source=rules backend=compiled",
    "random_mix source=folder output=*",
    "tsv",
    "wudi source=folder backend=*",
    "* source=statistics backend=*",
)


@pytest.fixture
def merger(tmp_path, hub):
    return golden.Merger(tmp_path, hub)


def test_every_built_in_method_is_recorded():
    recorded = (
        *golden_cases.METHODS.values(),
        *golden_cases.ALIKE.values(),
        *golden_cases.OF_MATRICES.values(),
        *golden_cases.OF_DATA.values(),
    )
    assert {method["name"] for method in recorded} == set(method_names())


def test_every_case_is_recorded_and_nothing_else():
    assert {case.key for case in golden_cases.cases()} == golden.load()["merges"].keys()


@pytest.mark.parametrize("pattern", CHOSEN)
def test_weights_are_those_that_are_recorded(pattern, merger):
    found = golden.run([pattern], merger, lambda line: None)
    assert found and golden.unequal(found) == [] and golden.differences(found, golden.load()) == []


def test_differences_are_told(merger):
    key = "magmax source=folder backend=eager"
    found = golden.run([key], merger, lambda line: None)
    (entry,) = found.values()
    changed, stored = copy.deepcopy(entry), golden.load()

    def told(**merges):
        return golden.differences(found, {**stored, "merges": {key: changed} | merges}, [key, *merges])

    assert told() == []
    changed["files"]["model.safetensors"] = "0"
    assert told() == [f"files differ, weights do not: {key}"]
    changed["weights"] = "0"
    assert told(gone={}) == [f"weights differ: {key}", "not merged any more: gone"]
    assert golden.differences(found, {**stored, "merges": {}}) == [f"not stored: {key}"]


def test_backends_that_do_not_agree_are_told():
    cases = [golden_cases.Case("magmax", {}, "folder", "", backend) for backend in ("eager", "compiled")]
    assert golden.unequal({case: {"weights": "1"} for case in cases}) == []
    (line,) = golden.unequal({case: {"weights": str(number)} for number, case in enumerate(cases)})
    assert all(case.key in line for case in cases)


def test_merges_of_two_processors_are_not_recorded_together(monkeypatch):
    monkeypatch.setattr(golden, "processor", lambda: "another")
    monkeypatch.setattr(golden, "store", None)
    with pytest.raises(SystemExit, match="record them all, without --only"):
        golden.record({}, ["ties"])
