"""The experiments on families small enough for a few seconds: draws by hand, tables by hand, bytes twice."""

import json
from dataclasses import replace
from fractions import Fraction
from importlib import import_module

import numpy as np
import pytest
import torch

from benchmarks.continual import __main__ as main
from benchmarks.continual import measuring, pages
from benchmarks.continual.measuring import Bench
from benchmarks.continual.protocol import MIXTURES, Protocol, Target, draw_subsets, draw_targets
from benchmarks.continual.results import measure
from benchmarks.continual.scoring import RefilledModel, Scorer
from benchmarks.continual.sources import digits
from benchmarks.continual.tables import make_tables, regrets
from hub_magmax.analysis.candidates import Candidate
from hub_magmax.analysis.tuning import CandidateScorer
from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.evaluation.evaluators import get_evaluator
from hub_magmax.evaluation.evaluators.loading import load_model
from hub_magmax.methods import method_names
from hub_magmax.pipeline import run
from hub_magmax.quickstart import Settings, Training
from hub_magmax.recipe.loading import updated
from hub_magmax.recipe.matching import locked_method
from hub_magmax.recipe.schema import Method

SETTINGS = Settings(
    hidden_size=12,
    num_layers=1,
    pretext=Training(epochs=1, learning_rate=1e-3, batch_size=512),
    supervised=Training(epochs=8, learning_rate=3e-3, batch_size=64),
    task=Training(epochs=1, learning_rate=3e-3, batch_size=64, label_smoothing=0.05),
)
PROTOCOL = Protocol(
    mixtures=((1, 1), (3, 1)),
    draws=1,
    largest=40,
    scalings=(0.5, 1.0),
    ratios=(0.5, 2.0),
    sizes=(1, 5),
    subsets=1,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("experiments")


@pytest.fixture(scope="module")
def family(folder):
    made = digits(folder, 2, 0, settings=SETTINGS)
    few = {task: data.model_copy(update={"split": "train[:20]"}) for task, data in made.statistics.items()}
    return replace(made, statistics=few, num_statistics=20)


@pytest.fixture(scope="module")
def result(family, folder):
    return measure(family, PROTOCOL, folder / "scores", at="here")


# Twelve test examples: rows 0 to 4 of task 0, 5 to 8 of task 1, 9 to 11 of task 2.
OWNERS = np.repeat([0, 1, 2], [5, 4, 3])


def test_a_target_is_as_large_as_its_scarcest_part_allows():
    targets = draw_targets(OWNERS, Protocol(mixtures=((2, 1),), draws=20), seed=3)
    for target in targets:
        first, second = target.tasks
        # Of five, four and three examples, two parts are 2, 2 and 1 units of two; one part is 5, 4 or 3.
        units = min((5, 4, 3)[first] // 2, (5, 4, 3)[second])
        assert [OWNERS[list(target.rows)].tolist().count(t) for t in (first, second)] == [2 * units, units]
        assert len(set(target.rows)) == 3 * units
    assert {target.tasks for target in targets} == {(a, b) for a in range(3) for b in range(3) if a != b}


def test_a_target_is_no_larger_than_told():
    (target,) = draw_targets(
        np.repeat([0, 1], 100), Protocol(mixtures=((4, 1),), draws=1, largest=52), seed=0
    )
    assert len(target.rows) == 50
    assert target.num_meta == 5
    assert (*target.meta, *target.held_out) == target.rows


def test_every_mixture_has_the_shares_of_the_protocol():
    wanted = [(0.5, 0.5), (0.8, 0.2), (1 / 3, 1 / 3, 1 / 3), (0.4, 0.4, 0.2), (0.6, 0.2, 0.2)]
    assert [tuple(float(Fraction(part, sum(m))) for part in m) for m in MIXTURES] == wanted
    targets = draw_targets(np.repeat(np.arange(5), 107), Protocol(), seed=0)
    assert [target.mixture for target in targets] == [mixture for mixture in MIXTURES for _ in range(5)]
    for target in targets:
        counts = np.bincount(np.repeat(np.arange(5), 107)[list(target.rows)], minlength=5)
        assert counts / counts.sum() == pytest.approx(target.shares(5))


def test_the_same_seed_draws_the_same_targets_and_another_seed_others():
    owners = np.repeat(np.arange(4), 30)
    assert draw_targets(owners, Protocol(), 1) == draw_targets(owners, Protocol(), 1)
    assert draw_targets(owners, Protocol(), 1) != draw_targets(owners, Protocol(), 2)


def test_subsets_of_every_size_are_drawn_without_repetition():
    found = draw_subsets(4, Protocol(subsets=3), seed=0)
    assert [len(subset) for subset in found] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4]
    assert len(set(found)) == len(found)


def test_every_registered_method_is_measured_with_every_preference_it_uses(result):
    keys = {(row["method"], row["preference"]) for row in result["rows"]}
    names = {method.split(" ")[0] for method, _ in keys}
    assert names == {*method_names(), "average,"} - {*measuring.OF_TWO}
    assert {kind for method, kind in keys if method == "average, react"} == {"uniform", "labels", "transport"}
    assert {kind for method, kind in keys if method == "magmax"} == {"uniform"}
    assert {kind for method, kind in keys if method == "average"} == {"uniform", "labels", "transport"}
    assert ("tunable_magmax algorithm-1", "transport, published") in keys
    assert ("tunable_magmax top-n", "labels") in keys


def test_a_row_is_what_compare_finds_for_each_target(family):
    check_row(family, PROTOCOL, measuring.TUNABLE)


def check_row(family, protocol, method):
    """Check that a row of a method under the preference from labels is what `compare` finds."""
    with Bench(family, protocol) as bench:
        weights = [bench.estimator.weights("labels", target, target.meta) for target in bench.targets]
        row = bench.row(method, "labels", weights)
        recipe = measuring.recipe_of(family)
        from hub_magmax.pipeline import lock

        with CandidateScorer(recipe, lock(recipe)) as scorer:
            for target, own, trials in zip(bench.targets, weights, row.trials, strict=True):
                values = locked_method(method)
                tried = [Candidate(values | {"scaling": s}, "given", own) for s in protocol.scalings]
                batches = scorer.encode(family.test.select(target.rows), family.columns)
                # Probabilities depend on the batch in their last digits.
                for mine, theirs in zip(trials, scorer.run(tried, batches), strict=True):
                    assert [o.score for o in mine.outcomes] == [o.score for o in theirs.outcomes]
                    mine_p, their_p = ([o.probability for o in t.outcomes] for t in (mine, theirs))
                    assert mine_p == pytest.approx(their_p, abs=1e-5)


def test_targets_that_share_weights_score_as_they_would_alone(family):
    with Bench(family, PROTOCOL) as bench:
        shared = bench.row(measuring.AVERAGE, "uniform", [bench.uniform] * len(bench.targets))
        for number, trials in enumerate(shared.trials):
            alone = bench.fixed(measuring.AVERAGE, bench.uniform, number)
            assert [o.score for o in trials[0].outcomes] == [o.score for o in alone.outcomes]


def test_a_refilled_model_answers_like_a_loaded_one(family):
    from safetensors.torch import load_file

    loaded = load_model(
        ModelPlace(str(family.base_model)), "AutoModelForImageClassification", "AutoImageProcessor", "tests"
    )
    refilled = RefilledModel(loaded)
    images = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    for place in family.tasks.values():
        weights = load_file(place / "model.safetensors")
        with torch.inference_mode():
            mine, other = (m.with_weights(weights).network for m in (refilled, loaded))
            logits, wanted = (m(pixel_values=images).logits for m in (mine, other))
        held = mine.state_dict()
        assert all(torch.equal(held[name], tensor) for name, tensor in other.state_dict().items())
        # Not to the bit: matrix products round by how their operands lie in memory, and files lie anyhow.
        assert torch.allclose(logits, wanted, rtol=1e-5, atol=1e-5)


def test_the_same_seed_gives_the_same_bytes(family, tmp_path, monkeypatch):
    few = [Method(name=name) for name in ("agreement", "average", "random_mix")]
    monkeypatch.setattr(measuring, "tried_methods", lambda: [*few, measuring.TUNABLE, measuring.TOP_N])
    family = replace(family, statistics={})
    stored = []
    for name in ("first", "second"):
        measured = measure(family, PROTOCOL, tmp_path / f"scores of {name}", at="here")
        stored.append(pages.store("digits", "--data digits", measured, tmp_path / name).read_bytes())
    assert stored[0] == stored[1]
    texts = []
    for name in ("first", "second"):
        page = tmp_path / f"page of {name}" / "experiments.md"
        page.parent.mkdir()
        texts.append(pages.render(tmp_path / name, page))
    assert texts[0] == texts[1]
    tables = [(tmp_path / name / "digits" / "tables.json").read_bytes() for name in ("first", "second")]
    assert tables[0] == tables[1]


def test_what_is_measured_is_not_measured_again_unless_it_was_made_from_other_things(family, result, folder):
    lines = []
    assert measure(family, PROTOCOL, folder / "scores", at="later", report=lines.append) == result
    assert lines == []
    changed = Protocol(**{**vars(PROTOCOL), "ratios": (1.0,)})
    measure(family, changed, folder / "scores", at="later", report=lines.append)
    assert [line.split(": ")[1] for line in lines] == ["schedules", "numbers_of_tasks", "sample_sizes"]


def test_stored_rows_are_kept_and_what_they_lack_is_measured(family, result, tmp_path):
    stored = json.loads(json.dumps(result))
    stored["rows"] = [row for row in stored["rows"] if row["method"] not in ("fisher", "average, react")]
    lines = []
    found = measure(family, PROTOCOL, tmp_path, at="later", stored=stored, report=lines.append)
    assert found == result | {"commits": ["here", "later"]}
    kinds = ["uniform", "labels", "transport"]
    asked = [line.split(": ")[1] for line in lines]
    assert asked == [
        *(f"weights, {kind}" for kind in (*kinds, "transport, published")),
        "base model",
        *(f"fisher, {kind}" for kind in kinds),
        *(f"average, react, {kind}" for kind in kinds),
    ]


def test_stored_rows_of_other_checkpoints_are_measured_again(family, result, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "tried_methods", lambda: [measuring.TUNABLE])
    stored = result | {"base_model": [0.0] * len(result["base_model"])}
    lines = []
    family = replace(family, statistics={})
    found = measure(family, PROTOCOL, tmp_path, at="later", stored=stored, report=lines.append)
    assert "t2s0: tunable_magmax algorithm-1, labels" in lines
    assert found["commits"] == ["later"] and found["compared"] == ["tunable_magmax algorithm-1"]


def test_a_comparison_that_was_made_stays_one_between_the_methods_it_had(family, result, tmp_path):
    stored = json.loads(json.dumps(result))
    stored["rows"] = [row for row in stored["rows"] if row["method"] != "average"]
    del stored["compared"]
    found = measure(family, PROTOCOL, tmp_path, at="later", stored=stored)
    assert found["rows"] == result["rows"] and found["compare"] == result["compare"]
    assert "average" not in found["compared"] and "ties" in found["compared"]


@pytest.mark.parametrize(
    ("method", "correction"),
    [("regmean", None), ("regmean_plusplus", None), ("fisher", None), ("average", "react")],
)
def test_merges_with_statistics_in_memory_are_those_of_files(family, tmp_path, method, correction):
    weights = (0.75, 0.25)
    recipe = measuring.recipe_of(family)
    evaluation = recipe.to_dict()["evaluation"]
    tasks = [
        {"name": task, "model": str(place), "statistics": str(tmp_path / task)}
        for task, place in family.tasks.items()
    ]
    data = {task: one.model_dump(exclude_none=True) for task, one in family.statistics.items()}
    changes = {
        "tasks": tasks,
        "method": {"name": method, "scaling": 1.0},
        "preference": {"weights": dict(zip(family.tasks, weights, strict=True))},
        "statistics": {"data": data, "batch_size": evaluation["batch_size"]},
        "evaluation": None,
        "output": {"path": str(tmp_path / "merged")},
    }
    changes["statistics"]["evaluator"] = "image-classification"
    output = run(updated(recipe, changes | ({"correction": correction} if correction else {}))).output
    with Scorer(recipe, family.statistics) as scorer:
        batches = scorer.encode(family.test, family.columns)
        (trial,) = scorer.trials(
            Method(name=method), [1.0], weights, batches, corrected=correction is not None
        )
        kinds = "AutoModelForImageClassification", "AutoImageProcessor"
        wanted = (
            get_evaluator("image-classification")
            .make()
            .outcomes(load_model(ModelPlace(str(output)), *kinds, "tests"), batches)
        )
    assert [o.score for o in trial.outcomes] == [o.score for o in wanted]
    assert [o.probability for o in trial.outcomes] == pytest.approx([o.probability for o in wanted], abs=1e-5)


def test_regret_is_about_the_methods_that_were_compared():
    ours, other = ("tunable_magmax algorithm-1", "labels"), ("fisher", "labels")
    rows = {ours: [[8, 6], [16, 18]], other: [[10, 10], [20, 20]]}
    compared = {"compared": ["tunable_magmax algorithm-1"]}
    (row,) = regrets([_handmade(0, rows) | compared])["labels"]["seeds"]
    assert row["best"] == pytest.approx(0.8)
    (row,) = regrets([_handmade(0, rows)])["labels"]["seeds"]
    assert row["best"] == 1.0


def _handmade(seed: int, rows: dict[tuple[str, str], list[list[int]]], chosen: int = 0) -> dict:
    return {
        "num_tasks": 2,
        "num_train": 10,
        "seed": seed,
        "protocol": {"scalings": [0.5, 1.0], "fixed": 0.5},
        "targets": [{"meta": 1, "held_out": 10}, {"meta": 2, "held_out": 20}],
        "estimates": {"labels": [0.1, 0.3]},
        "base_model": [5, 10],
        "rows": [
            {"method": method, "preference": kind, "right": right, "chosen": [chosen, 1]}
            for (method, kind), right in rows.items()
        ],
        "compare": {"labels": [{"right": 6}, {"right": 16}]},
        "schedules": [],
        "numbers_of_tasks": [],
        "sample_sizes": [],
    }


def test_the_tables_of_a_handmade_result():
    ours, other = ("tunable_magmax algorithm-1", "labels"), ("average", "uniform")
    results = [
        _handmade(0, {ours: [[8, 6], [16, 18]], other: [[5, 7], [12, 10]]}),
        _handmade(1, {ours: [[6, 6], [12, 13]], other: [[5, 7], [10, 10]]}),
    ]
    tables = make_tables(results)
    base, mine, average = tables["main_table"]["2"]
    assert base["fixed"] == pytest.approx([0.5, 0.0])
    # Seed 0: 8 of 10 and 16 of 20; seed 1: 6 of 10 and 12 of 20.
    assert mine["fixed"] == pytest.approx([0.7, 0.2 / 2**0.5])
    # λ = 0.5 for the first target, λ = 1 for the second: (.8 + .9) / 2 and (.6 + .65) / 2.
    assert mine["tuned"] == pytest.approx([0.7375, 0.225 / 2**0.5])
    # The mean over both seeds is .7 at λ = 0.5 and .6875 at λ = 1.
    assert mine["hindsight_scaling"] == 0.5
    assert average["hindsight"][0] == pytest.approx(0.6)
    (test,) = tables["paired_tests"]["2"]
    assert test["fixed"]["difference"] == pytest.approx(0.7 - (0.55 + 0.5) / 2)
    regret = regrets(results)["labels"]
    # Chosen: (.6 + .8) / 2. Best fixed: .8 for seed 0, .625 at λ = 1 for seed 1.
    assert [row["regret"] for row in regret["seeds"]] == pytest.approx([0.1, -0.075])
    assert regret["regret"] == pytest.approx(0.0125)


def test_the_known_shares_are_a_preference():
    target = Target((3, 1, 1), (4, 0, 2), (1, 2, 3, 4, 5), 1)
    assert target.shares(5) == (0.2, 0.0, 0.2, 0.0, 0.6)


def test_processes_of_their_own_can_import_what_they_do():
    # They cannot import the module that was run as a program.
    for function in (main.measure_job, main.packaged_family, main.Progress):
        assert not function.__module__.endswith("__main__")
        assert getattr(import_module(function.__module__), function.__name__) is function
