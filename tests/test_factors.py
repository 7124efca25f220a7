"""Methods of whole matrices on adapters: by their factors, against the same on whole task vectors."""

import json

import pytest
import torch

from hub_magmax.checkpoints.adapters.adapter import AdapterSource
from hub_magmax.errors import ArgumentError
from hub_magmax.merging.execution import merge
from hub_magmax.methods import get_method, merge_method
from hub_magmax.methods.factors import Factors, in_coordinates
from hub_magmax.pipeline import plan
from tests.families import read_merged, write_checkpoint
from tests.test_adapting import FAMILIES, merged_adapter, recipe_of, write_tasks
from tests.test_checkpoints_adapter import write_adapter
from tests.test_matrix_methods import METHODS, ONCE, RETURNING, normal, one_hot, preferences

EVERY = [pytest.param(name, options, id=f"{name} {options}") for name, options, _ in METHODS]
every_method = pytest.mark.parametrize(("name", "options"), EVERY)


def products(*ranks: int, rows: int = 20, columns: int = 30, seed: int = 0) -> list[Factors]:
    sides = ((rows, rank, columns) for rank in ranks)
    return [
        Factors(normal(1, r, k, seed=seed + number)[0], normal(1, k, c, seed=seed + 100 + number)[0])
        for number, (r, k, c) in enumerate(sides)
    ]


def sharing_inputs() -> list[Factors]:
    """Adapters that were trained with one frozen A."""
    first, second, third = products(3, 3, 3)
    return [first, Factors(second.left, first.right), Factors(third.left, first.right)]


#: Factors of the tasks of one matrix.
CASES = {
    "ranks": products(4, 4, 4),
    "ranks apart": products(1, 6, 2),
    "tall": products(3, 3, 3, rows=40, columns=12),
    "more ranks than columns": products(5, 5, 5, columns=12),
    "one A": sharing_inputs(),
    "one task has none": products(4, 0, 4),
    "scales apart": [
        Factors(one.left * s, one.right) for one, s in zip(products(3, 3, 3), (0.1, 1, 9), strict=True)
    ],
}


def call(name, options, vectors, weights, sides):
    """Return what a method's function gives for the tasks with a weight."""
    tasks = [task for task, weight in enumerate(weights) if weight]
    numbers = tuple(weights[task] for task in tasks)
    supplied = {"preference": numbers, "multipliers": tuple(len(weights) * number for number in numbers)}
    method = get_method(name)
    given = {key: value for key, value in supplied.items() if key in method.supplied}
    return method.function(vectors[tasks], sides=sides, **given, **options)


@every_method
@pytest.mark.parametrize("case", CASES)
def test_coordinates_of_factors_give_what_whole_matrices_give(case, name, options):
    factors = CASES[case]
    found = in_coordinates(factors)
    whole = found.left @ found.small.double() @ found.right.T
    for one, vector in zip(factors, whole, strict=True):
        torch.testing.assert_close(vector, one.left.double() @ one.right.double(), rtol=0, atol=1e-5)
    assert max(found.small.shape[1:]) <= max(12, sum(one.left.shape[1] for one in factors))
    for weights in [*preferences(3), one_hot(2, 3)]:
        sides = tuple(whole.shape[1:])
        expected = call(name, options, whole, weights, sides).double()
        small = call(name, options, found.small, weights, sides).double()
        merged = found.left @ small @ found.right.T
        torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_coordinates_by_hand():
    first = Factors(torch.tensor([[3.0], [0], [4]]), torch.tensor([[0.0, 2]]))
    second = Factors(torch.tensor([[0.0], [1], [0]]), torch.tensor([[0.0, 1]]))
    found = in_coordinates([first, second])
    # Rows (3, 0, 4) / 5 and (0, 1, 0), and the second column alone: ten of the first, one of the second.
    assert found.small.abs()[:, :, 0].tolist() == [[10.0, 0.0], [0.0, 1.0]]
    torch.testing.assert_close(found.left.abs(), torch.tensor([[0.6, 0], [0, 1], [0.8, 0]]).double())


def whole_weights(folder, to, method, **changes):
    return merged_adapter(folder, method=method, output={"format": "weights", "path": to}, **changes)


def without_factors(monkeypatch):
    monkeypatch.setattr(AdapterSource, "factors", lambda self, name, base: None)


@pytest.mark.parametrize(("name", "options"), ONCE, ids=str)
@pytest.mark.parametrize(("family", "adapters"), [("t5", "each"), ("clip", "sequence")])
def test_whole_weights_agree_with_those_of_whole_task_vectors(
    tmp_path, monkeypatch, family, adapters, name, options
):
    base, _ = write_tasks(tmp_path, family)
    preference = {"weights": {"a": 0.5, "b": 0.3, "c": 0.2}}
    changes = {"method": {"name": name, **options}, "adapters": adapters, "preference": preference}
    found = read_merged(whole_weights(tmp_path, "found", **changes))
    without_factors(monkeypatch)
    expected = read_merged(whole_weights(tmp_path, "expected", **changes))
    for tensor, values in expected.items():
        size = float((values - base[tensor]).abs().max())
        torch.testing.assert_close(found[tensor], values, rtol=0, atol=1e-5 * size + 1e-7)
    assert any(not found[tensor].equal(base[tensor]) for tensor in base)


@pytest.mark.parametrize("name", sorted(RETURNING))
def test_all_preference_on_one_adapter_adds_it_bit_for_bit(tmp_path, name):
    write_tasks(tmp_path)
    changes = {"preference": {"weights": {"b": 1.0}}}
    found = whole_weights(tmp_path, "found", name, **changes)
    expected = read_merged(whole_weights(tmp_path, "expected", "average", **changes))
    assert all(values.equal(expected[tensor]) for tensor, values in read_merged(found).items())


def test_a_whole_checkpoint_among_the_tasks_is_merged_by_whole_vectors(tmp_path, monkeypatch):
    base, _ = write_tasks(tmp_path, names="ab")
    write_checkpoint(tmp_path / "c", {name: values + 0.1 for name, values in base.items()})
    found = whole_weights(tmp_path, "found", "tsv")
    without_factors(monkeypatch)
    assert read_sums(found) == read_sums(whole_weights(tmp_path, "expected", "tsv"))


def read_sums(folder):
    return {shard["sha256"] for shard in json.loads((folder / "merge_report.json").read_text())["shards"]}


def test_chunks_and_threads_change_no_byte(tmp_path, monkeypatch):
    write_tasks(tmp_path)
    shards = []
    for number, (threads, chunk) in enumerate([(1, None), (2, 100), (2, 1000)]):
        monkeypatch.setattr("hub_magmax.merging.execution.num_threads", lambda threads=threads: threads)
        recipe = recipe_of(tmp_path, method="wudi", output={"format": "weights", "path": f"out{number}"})
        shards.append(merge(plan(recipe), chunk_elements=chunk).shards)
    assert shards[0] == shards[1] == shards[2]


def test_sides_are_for_methods_of_matrices_alone():
    with pytest.raises(ArgumentError, match="sides is for the form matrix, not for 'tensor'"):

        @merge_method("sided", source="a test")
        def sided(task_vectors, *, sides):
            return task_vectors[0]
