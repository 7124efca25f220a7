"""Metrics of pairs of task vectors: against whole decompositions, by hand, and by what changes none."""

import json
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import hub_magmax as hm
from hub_magmax.analysis import pair_sums
from hub_magmax.analysis.pair_sums import cost_of_directions, measure_pairs
from hub_magmax.cli import main
from hub_magmax.errors import ArgumentError, NonFiniteError, RecipeError
from hub_magmax.kernels.compiled.backend import Compiled
from hub_magmax.kernels.products import BLOCK
from hub_magmax.kernels.reference import Reference
from hub_magmax.pipeline import lock, plan
from hub_magmax.recipe.loading import load_recipe
from hub_magmax.reporting.diagnosis import read_diagnosis
from hub_magmax.reporting.pair_metrics import METRICS, Gram, effective_rank
from tests import oracles_pairs as oracles
from tests.families import write_checkpoint, write_recipe

SHAPES = {"layers.0.weight": (16, 9), "layers.1.weight": (7, 12), "layers.1.bias": (12,), "norm": (3, 2, 2)}
TASKS = ("a", "b", "c")


def draw(seed, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def family(tmp_path):
    """Write a base model and three checkpoints, of which the first two share a part of their changes."""
    base, shared = draw(0), draw(9)
    changes = {task: draw(seed) for seed, task in enumerate(TASKS, 1)}
    for task in "ab":
        changes[task] = {name: value + shared[name] for name, value in changes[task].items()}
    return write(tmp_path, base, changes)


def write(folder, base, changes):
    """Write checkpoints that differ from the base model by changes; return the plan, and these."""
    write_checkpoint(folder / "base", base)
    found = {}
    for task, change in changes.items():
        tensors = {name: base[name] + 0.1 * change[name] for name in base}
        write_checkpoint(folder / task, tensors)
        found[task] = {name: (tensors[name] - base[name]).double().numpy() for name in base}
    recipe = load_recipe(write_recipe(folder, names=tuple(changes)))
    return plan(recipe, lock(recipe)), found


def test_metrics_of_weights_agree_with_whole_decompositions(family):
    planned, changes = family
    found = measure_pairs(planned, rank=3).pairs(TASKS)
    for (one, other), metrics in found.items():
        a, b = changes[one], changes[other]
        rank = oracles.layerwise(a, b)
        expected = {
            **oracles.of_vectors(oracles.flat(a), oracles.flat(b)),
            "layerwise_effective_rank": rank,
            "layerwise_effective_rank_mergeability_score": min(max(2 - rank, 0), 1),
            **oracles.of_matrices(a, b, 3),
        }
        assert metrics == pytest.approx(expected, rel=1e-6)
    assert found["a", "b"]["subspace_overlap"] > found["a", "c"]["subspace_overlap"]


def test_there_are_the_28_of_the_paper_and_seven_published_forms():
    names = [metric.name for metric in METRICS]
    published = [metric.name for metric in METRICS if metric.is_as_published]
    assert len(names) == len(set(names)) == 35 and len(published) == 7
    assert {name.removesuffix("_as_published") for name in published} < set(names)


def test_two_vectors_worked_by_hand(tmp_path):
    base = {"w": torch.zeros(2, 2)}
    changes = {"a": {"w": torch.tensor([[30.0, 0], [0, 0]])}, "b": {"w": torch.tensor([[0.0, 0], [0, 40]])}}
    planned, _ = write(tmp_path, base, changes)
    (found,) = measure_pairs(planned, rank=1).pairs("ab").values()
    shares = np.array([4, 3]) / 7
    rank = np.exp(-(shares * np.log(shares)).sum())
    expected = {
        "task_vector_cosine_similarity": 0, "task_vector_l2_distance": 5, "task_vector_dot_product": 0,
        "weight_space_angle": 90, "task_vector_magnitude_ratio": 0.75, "effective_rank": rank,
        "effective_rank_mergeability_score": 2 - rank, "stable_rank": 49 / 25, "spectral_gap": 0.25,
        "singular_value_ratio": 0.75, "layerwise_effective_rank": rank,
        "layerwise_effective_rank_mergeability_score": 2 - rank, "singular_value_overlap": 1,
    }  # fmt: skip
    assert found == pytest.approx(found | expected, abs=1e-6)
    assert {found[name] for name in set(found) - set(expected)} == {0}, "other rows, other columns"


def test_a_copy_overlaps_wholly_and_the_published_form_of_it_does_not(tmp_path):
    change = draw(3)
    planned, _ = write(tmp_path, draw(0), {"a": change, "b": change})
    (found,) = measure_pairs(planned, rank=4).pairs("ab").values()
    assert found["subspace_overlap_as_published"] == pytest.approx(1 / np.sqrt(4))
    overlaps = {name: value for name, value in found.items() if "overlap" in name and "published" not in name}
    assert overlaps == pytest.approx(dict.fromkeys(overlaps, 1.0))
    assert found["effective_rank"] == pytest.approx(1, abs=1e-3)
    assert found["task_vector_magnitude_ratio"] == 1


def test_longer_task_vectors_change_lengths_alone_and_order_changes_nothing(tmp_path, family):
    planned, _ = family
    found = measure_pairs(planned, rank=2).pairs(TASKS)["a", "c"]
    folder = tmp_path / "again"
    folder.mkdir()
    base, shared = draw(0), draw(9)
    longer = {"c": draw(3), "a": {name: value + shared[name] for name, value in draw(1).items()}}
    longer = {task: {name: 4 * value for name, value in change.items()} for task, change in longer.items()}
    again = measure_pairs(write(folder, base, longer)[0], rank=2).pairs(("c", "a"))["c", "a"]
    scales = {"task_vector_l2_distance": 4, "task_vector_dot_product": 16}
    assert again == pytest.approx({name: scales.get(name, 1) * value for name, value in found.items()}, 1e-4)


def test_near_copies_keep_the_smaller_singular_value():
    rng = np.random.default_rng(0)
    a = rng.standard_normal(1000)
    b = a + 1e-5 * rng.standard_normal(1000)
    products = np.array([[a @ a, a @ b], [b @ a, b @ b]])
    assert effective_rank(Gram.of(products))[0, 1] == pytest.approx(oracles.rank_of(a, b), rel=1e-6)


def test_what_a_task_leaves_alone_counts_for_no_pair_of_its(tmp_path):
    base, changes = draw(0), {"a": draw(1), "b": draw(2)}
    changes["b"]["layers.0.weight"].zero_()
    planned, found = write(tmp_path, base, changes)
    (metrics,) = measure_pairs(planned, rank=3).pairs("ab").values()
    del found["a"]["layers.0.weight"], found["b"]["layers.0.weight"]
    expected = oracles.of_matrices(found["a"], found["b"], 3)
    assert metrics == pytest.approx(metrics | expected, rel=1e-6)
    assert metrics["layerwise_effective_rank"] == pytest.approx(oracles.layerwise(found["a"], found["b"]))


def test_unchanged_checkpoints_give_numbers_and_no_warning(tmp_path):
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    planned, _ = write(tmp_path, draw(0), {"a": zeros, "b": zeros, "c": draw(1)})
    values = [value for found in measure_pairs(planned).metrics for value in found.values]
    assert np.isfinite(values).all()


def test_the_weakest_directions_of_a_low_rank_change_are_those_that_are_there(tmp_path):
    shapes = {"w": (12, 10)}
    right = torch.linalg.qr(torch.randn(10, 4, generator=torch.Generator().manual_seed(1))).Q
    left = draw(2, {"w": (12, 4)})["w"]
    changes = {"a": {"w": left[:, :2] @ right[:, :2].T}, "b": {"w": left[:, 2:] @ right[:, :2].T}}
    (found,) = measure_pairs(write(tmp_path, draw(0, shapes), changes)[0], rank=8).pairs("ab").values()
    assert found["right_subspace_overlap_bottom_k"] == pytest.approx(1, abs=1e-4)


def test_without_directions_there_are_no_metrics_of_subspaces(family):
    planned, _ = family
    found = measure_pairs(planned, rank=0)
    assert (len(found.metrics), found.num_matrices) == (12, 0)
    assert cost_of_directions(planned, 0) == ""
    said = cost_of_directions(planned, 10)
    assert said.startswith("singular directions of 2 matrices of 3 tasks: about 0 s and ")
    assert said.endswith(" of memory; --rank 0 leaves them out")


def test_a_nan_is_refused_wherever_it_is(tmp_path):
    changes = {"a": draw(1), "b": draw(2)}
    changes["b"]["norm"][2, 1, 1] = torch.nan
    with pytest.raises(NonFiniteError, match="element 11 is nan"):
        measure_pairs(write(tmp_path, draw(0), changes)[0])


def test_chunks_threads_and_backends_change_no_bit(tmp_path, monkeypatch):
    shapes = {"large": (300, 200), "small": (7, 3)}
    planned, _ = write(tmp_path, draw(0, shapes), {task: draw(n, shapes) for n, task in enumerate(TASKS, 1)})
    found = [measure_pairs(planned, rank=0)]
    for backend in (Reference(), Compiled()):
        monkeypatch.setattr(pair_sums, "choose_backend", lambda count, own=backend: own)
        for threads in (1, 3):
            monkeypatch.setattr(pair_sums, "threads_of", lambda plan, own=threads: own)
            monkeypatch.setattr(pair_sums, "CHUNK_ELEMENTS", BLOCK * threads)
            found.append(measure_pairs(planned, rank=0))
    assert len({one.metrics for one in found}) == 1


def test_one_task_has_no_pair(tmp_path):
    planned, _ = write(tmp_path, draw(0), {"a": draw(1)})
    with pytest.raises(RecipeError, match="metrics are of pairs"):
        measure_pairs(planned)


def test_the_verb_stores_what_it_measures_and_python_measures_the_same(tmp_path, family):
    recipe = tmp_path / "recipe.yaml"
    words = ["diagnose", str(recipe), "--metrics", "--rank", "3"]
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert done.exit_code == 0 and "right_subspace_overlap_top_k" in done.stdout
    assert "singular directions of 2 matrices of 3 tasks" in done.stderr
    stored = read_diagnosis(tmp_path / "recipe.diagnosis.json")
    done_bytes = []

    @contextmanager
    def progress(total, doing, unit):
        counted = []
        yield counted.append
        done_bytes.append((doing, total, sum(counted)))

    again = hm.diagnose(recipe, rank=3, progress=progress)
    assert [(doing, count) for doing, _, count in done_bytes] == [
        (doing, total) for doing, total, _ in done_bytes
    ]
    assert [doing for doing, *_ in done_bytes] == ["diagnosing", "reading pairs of tasks"]
    assert stored.metrics is not None and again.metrics is not None
    assert replace(stored.metrics, seconds=0) == replace(again.metrics, seconds=0)
    assert again.table("markdown").count("\n| :---") == 3
    (tmp_path / "recipe.diagnosis.json").write_text(json.dumps({"metrics": {}} | json.loads("{}")))
    with pytest.raises(hm.HubMagmaxError, match="not a diagnosis"):
        read_diagnosis(tmp_path / "recipe.diagnosis.json")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rank": -1}, "rank is -1. Expected a number from 0"),
        ({"rank": 0, "examples": -1}, "examples is -1. Expected a number from 0"),
        ({"examples": 5}, "examples is 5, and without a rank no pair is measured"),
    ],
)
def test_numbers_that_measure_nothing_are_refused(options, told):
    with pytest.raises(hm.HubMagmaxError) as caught:
        hm.diagnose("nowhere.yaml", **options)
    assert isinstance(caught.value, ArgumentError) and told in str(caught.value)


@pytest.mark.parametrize("option", ["--rank", "--examples"])
def test_options_of_metrics_are_refused_without_metrics(option):
    done = CliRunner().invoke(main, ["diagnose", "nowhere.yaml", option, "10"])
    assert done.exit_code == 2 and "add --metrics." in done.stderr and option in done.stderr
