"""Predictions from a history: what is read of finished merges, what is refused, and what is told beside."""

import itertools
import json
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

import hub_magmax as hm
from hub_magmax.analysis.merge_history import FinishedMerge, MergeHistory, base_of, read_history
from hub_magmax.analysis.predicting_merges import predict_merges, read_predictions
from hub_magmax.cli import main
from hub_magmax.errors import OutputError
from hub_magmax.pipeline import lock, run
from hub_magmax.recipe.loading import load_recipe
from hub_magmax.reporting.pair_metrics import MetricValues, PairMetrics
from tests.classifiers import classifier_recipe, write_classifiers
from tests.families import make_tensors, write_checkpoint, write_recipe

TASKS = "abcdef"
EFFECTS = dict(zip(TASKS, (0.1, -0.05, 0.02, 0.0, 0.03, -0.1), strict=True))
#: The locked base model, by its folder's name and the sizes and headers of its files.
BASE = "base 902d833ad154"
NAMES = ("task_vector_cosine_similarity", "task_vector_magnitude_ratio", "subspace_overlap_as_published")


def draw(pair, seed=0):
    return np.random.default_rng([seed, *map(ord, pair)]).uniform(0.2, 0.8, len(NAMES)).tolist()


def merge(tasks, method="average scaling=1.0", base=None, metrics=NAMES, rank=10):
    kept = 0.8 + sum(EFFECTS[task] for task in tasks)
    found = {name: value for name, value in zip(NAMES, draw(tasks), strict=True) if name in metrics}
    found.pop(NAMES[2], None)
    return FinishedMerge(base or BASE, tuple(tasks), method, kept, found, rank)


def history(*merges):
    return MergeHistory(merges, {})


ALL_PAIRS = [merge(pair) for pair in itertools.combinations(TASKS, 2)]


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    for seed, name in enumerate(("base", *"abz")):
        write_checkpoint(folder / name, make_tensors(seed))
    found = lock(load_recipe(write_recipe(folder, names=("a", "b", "z"))))
    files = (replace(found.base_model.files[0], size_bytes=1, header_sha256="1" * 64),)
    return replace(found, base_model=replace(found.base_model, files=files))


def measured(values=None):
    """Return metrics of the pairs of a, b and z."""
    pairs = values or [draw(pair) for pair in ("ab", "az", "bz")]
    rows = zip(*pairs, strict=True)
    found = tuple(MetricValues(name, "", tuple(row)) for name, row in zip(NAMES, rows, strict=True))
    return PairMetrics(found, 10, 1, 1, 0, 0.0)


def test_both_models_predict_side_by_side_and_say_what_they_are_worth(locked):
    found = predict_merges(locked, history(*ALL_PAIRS), measured())
    known, new, *_ = found.predictions
    assert known.tasks == ("a", "b") and known.by_tasks.kept == pytest.approx(known.measured)
    assert new.tasks == ("a", "z") and new.measured is None
    assert new.by_tasks.kept == pytest.approx(0.8 + EFFECTS["a"], abs=0.02)
    assert known.by_metrics.kept is not None
    (footing,) = found.footing
    assert (footing.num_tasks, footing.num_merges) == (2, 15)
    assert footing.by_tasks.r == pytest.approx(1) and footing.by_metrics.error > 0
    assert found.predictions[-1].by_tasks.refusal == "no merge of 3 tasks is in the history"
    text = found.table()
    assert "r of the rest" in text and "all 3" in text
    assert "Refused by tasks, 1 of 4: no merge of 3 tasks is in the history." in text
    assert json.dumps(found.to_dict()) and found.table("csv").count("\n") == 4


def test_published_forms_of_slips_predict_nothing(locked):
    odd = [(*draw(pair)[:2], 1e9) for pair in ("ab", "az", "bz")]
    assert predict_merges(locked, history(*ALL_PAIRS), measured(odd)).predictions == (
        predict_merges(locked, history(*ALL_PAIRS), measured()).predictions
    )


def test_metrics_beyond_the_history_are_refused_with_the_one_that_is_farthest(locked):
    found = predict_merges(locked, history(*ALL_PAIRS), measured([draw("ab"), (0.5, 9.0, 0), draw("bz")]))
    refusal = found.predictions[1].by_metrics.refusal
    assert refusal.startswith(
        "metrics beyond those of the history (task_vector_magnitude_ratio is 9, there 0."
    )
    assert found.predictions[0].by_metrics.kept is not None


@pytest.mark.parametrize(
    ("merges", "refusal"),
    [
        (ALL_PAIRS[:5], "the history has 5 sets of 6 tasks, and 6 of 4 are needed at least"),
        ([merge("ab")] * 20, "the history has 1 set of 2 tasks, and 6 of 4 are needed at least"),
        ([merge(pair) for pair in itertools.combinations("cdef", 2)], "none of the tasks is in the history"),
        ([merge(pair, base="other") for pair in itertools.combinations(TASKS, 2)], "no merge of 2 tasks"),
    ],
)
def test_a_history_that_says_nothing_of_a_pair_is_refused(locked, merges, refusal):
    found = predict_merges(locked, history(*merges), measured())
    assert found.predictions[0].by_tasks.kept is None
    assert found.predictions[0].by_tasks.refusal.startswith(refusal)
    others = len([merge for merge in merges if merge.base_model != BASE])
    assert found.left_out == ({"of another base model": others} if others else {})


def test_metrics_that_were_measured_otherwise_are_not_fitted(locked):
    odd = [merge(pair, metrics=NAMES[:1], rank=3) for pair in ("ab", "cd")]
    found = predict_merges(locked, history(*odd, *ALL_PAIRS), measured())
    assert found.left_out == {"from the fit by metrics, as theirs are not of --rank 10 --examples 0": 2}
    (footing,) = found.footing
    assert footing.num_merges == 17, "they count by tasks"
    assert [told.by_metrics for told in found.predictions] == (
        [told.by_metrics for told in predict_merges(locked, history(*ALL_PAIRS), measured()).predictions]
    )
    none = [merge(pair, rank=0) for pair in itertools.combinations(TASKS, 2)]
    assert not predict_merges(locked, history(*none), measured()).left_out, "directions are absent, not other"


def test_folders_of_other_names_or_shapes_are_other_base_models(locked):
    base = locked.base_model
    (file,) = base.files
    others = [
        replace(base, reference="./large"),
        replace(base, files=(replace(file, header_sha256="0" * 64),)),
    ]
    hashed = replace(base, files=(replace(file, sha256="1" * 64),))
    assert len({base_of(replace(locked, base_model=one)) for one in (base, *others, hashed)}) == 4
    moved = replace(base, reference="/elsewhere/base")
    assert base_of(replace(locked, base_model=moved)) == base_of(locked) == BASE


def test_without_metrics_only_tasks_predict(locked):
    merges = [merge(pair, metrics=()) for pair in itertools.combinations(TASKS, 2)]
    for found in (predict_merges(locked, history(*merges), measured()),
                  predict_merges(locked, history(*ALL_PAIRS), None)):  # fmt: skip
        assert found.predictions[0].by_tasks.kept is not None
        assert "diagnose the merges with --metrics" in found.predictions[0].by_metrics.refusal
        assert found.footing[0].by_metrics is found.footing[0].rest_r is None


def test_methods_are_told_apart_by_their_options(locked):
    other = [merge(pair, method="ties scaling=0.3") for pair in itertools.combinations(TASKS, 2)]
    found = predict_merges(locked, history(*ALL_PAIRS, *other), measured())
    assert [footing.method for footing in found.footing] == ["average scaling=1.0", "ties scaling=0.3"]
    assert [prediction.method for prediction in found.predictions[:2]] == (
        ["average scaling=1.0", "ties scaling=0.3"]
    )


def test_a_finished_merge_is_read_with_its_metrics(tmp_path):
    write_classifiers(tmp_path, {"base": [0, 0, 1], "a": [5, 0, 0], "b": [0, 1, 0]})
    rows = {"dataset": "./rows.parquet"}
    evaluation = {"evaluator": "image-classification", "tasks": {"a": rows, "b": rows}}
    for name, more in {"even": {}, "uneven": {"preference": {"weights": {"a": 0.9, "b": 0.1}}}}.items():
        values = classifier_recipe(evaluation=evaluation, method="average", output={"path": name}, **more)
        (tmp_path / f"{name}.yaml").write_text(json.dumps(values))
        run(load_recipe(tmp_path / f"{name}.yaml"))
    words = ["diagnose", str(tmp_path / "even.yaml"), "--metrics", "--rank", "2", "--examples", "2"]
    assert CliRunner().invoke(main, words, catch_exceptions=False).exit_code == 0
    found = read_history(tmp_path)
    (read,) = found.merges
    assert read.tasks == ("a", "b") and read.method.startswith("average scaling=")
    # The merged model answers cat, as a does: all of 6 of 10; b's own has 3 of 10, and the merge twice that.
    assert read.kept == pytest.approx((1 + 2) / 2)
    assert len(read.metrics) == 28 and (read.rank, read.num_examples) == (2, 2)
    assert read.base_model.startswith("base ")
    assert found.left_out == {"of unequal weights": 1}
    again = tmp_path / "even.yaml"
    words = ["predict-merge", str(again), "--history", str(tmp_path), "--rank", "2", "--examples", "2"]
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert done.exit_code == 0 and "predictions.json" in done.stdout
    stored = read_predictions(tmp_path / "even" / "predictions.json")
    units = []

    @contextmanager
    def progress(total, doing, unit):
        units.append(unit)
        yield lambda count: None

    predicted = hm.predict_merge(again, tmp_path, rank=2, examples=2, progress=progress)
    assert predicted == stored and {"pairs", "bytes"} <= {*units}
    assert predicted.to_frame()["measured"].tolist() == [pytest.approx(1.5)]
    assert "r of the rest" in predicted._repr_html_()
    with pytest.raises(hm.HubMagmaxError, match="rank is -1"):
        hm.predict_merge(again, tmp_path, rank=-1)


def test_a_folder_without_merges_is_refused(tmp_path):
    with pytest.raises(OutputError, match=r"no finished merge is in it or below it"):
        read_history(tmp_path)


def test_the_history_is_read_before_the_recipe_is_locked(tmp_path):
    (tmp_path / "recipe.yaml").write_text(json.dumps(classifier_recipe()))  # its checkpoints are not there
    words = ["predict-merge", str(tmp_path / "recipe.yaml"), "--history", str(tmp_path)]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 1 and "no finished merge is in it" in done.stderr
