"""Every method of whole matrices against its oracle, by hand, and by its properties; one line each."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hub_magmax.errors import OutputError, RecipeError
from hub_magmax.fleet.rebuilding import rebuild
from hub_magmax.kernels.device import Device
from hub_magmax.merging.execution import merge
from hub_magmax.merging.tensors import merge_tensors
from hub_magmax.methods import get_method
from hub_magmax.methods.matrices import Matrices, matrices_in
from hub_magmax.pipeline import lock, plan
from hub_magmax.recipe.loading import load_recipe
from hub_magmax.registry import METHODS as REGISTERED
from tests import oracles_matrix as oracles
from tests.families import accepted, read_merged, write_checkpoint, write_recipe
from tests.test_methods import normal

Oracle = Callable[[np.ndarray, tuple[float, ...]], np.ndarray]


#: Task vectors of matrices.
CASES: Mapping[str, Tensor] = {
    "square": normal(3, 12, 12),
    "wide": normal(4, 9, 30),
    "tall": normal(4, 30, 9),
    "of low rank": normal(3, 20, 2) @ normal(3, 2, 16, seed=1),
    "twice the same": normal(2, 8, 10)[[0, 1, 0]],
    "one is zero": normal(3, 8, 10) * torch.tensor([1.0, 0.0, 1.0])[:, None, None],
    "all zero": torch.zeros(3, 8, 10),
    "scales apart": normal(3, 10, 10) * torch.tensor([1e-2, 1.0, 1e2])[:, None, None],
    "tiny numbers": normal(3, 10, 10) * 1e-30,
    "fewer directions than tasks": normal(5, 3, 20),
}
#: Method, its options, and its oracle.
METHODS: list[tuple[str, dict[str, Any], Oracle]] = [
    ("tsv", {}, oracles.tsv),
    ("iso_c", {}, oracles.iso_c),
    ("iso_cts", {}, oracles.iso_cts(0.8)),
    ("iso_cts", {"common": 0.0}, oracles.iso_cts(0.0)),
    ("cart", {}, oracles.cart(0.12, 2.0)),
    ("cart", {"rank": 0.5, "spread": 0.7}, oracles.cart(0.5, 0.7)),
    ("wudi", {}, oracles.wudi()),
    ("wudi", {"share": 0.65, "time": 3.0}, oracles.wudi(0.65, 3.0)),
    ("actmat", {}, oracles.actmat(1e-4)),
    ("actmat", {"ridge": 0.3}, oracles.actmat(0.3)),
    ("opcm", {}, oracles.opcm(0.5)),
    ("opcm", {"share": 0.9}, oracles.opcm(0.9)),
]
#: With all preference on one task they return its vector.
RETURNING = {"tsv", "cart", "wudi", "actmat", "opcm"}


def preferences(num_tasks: int) -> list[tuple[float, ...]]:
    falling = [2.0**-task for task in range(num_tasks)]
    without = (0.0, *[1 / (num_tasks - 1)] * (num_tasks - 1))
    return [(1 / num_tasks,) * num_tasks, tuple(mass / sum(falling) for mass in falling), without]


def test_every_method_of_whole_matrices_is_in_the_table():
    of_matrices = {n for n in REGISTERED.built_in if get_method(n).form == "matrix"}
    assert {m[0] for m in METHODS} == {n for n in of_matrices if get_method(n).statistics is None}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("name", "options", "oracle"), [pytest.param(*m, id=f"{m[0]} {m[1]}") for m in METHODS]
)
def test_method_agrees_with_its_oracle(case, name, options, oracle):
    vectors = CASES[case]
    for weights in [*preferences(len(vectors)), one_hot(1, len(vectors))]:
        found = merge_tensors(vectors, preference=weights, method=name, **options)
        expected = torch.from_numpy(oracle(vectors.double().numpy(), weights))
        size = float(expected.abs().max())
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6 * size)


def one_hot(task: int, num_tasks: int) -> tuple[float, ...]:
    return tuple(float(t == task) for t in range(num_tasks))


#: Every method once.
ONCE = list({name: (name, options) for name, options, _ in reversed(METHODS)}.values())
every_method = pytest.mark.parametrize(("name", "options"), [m[:2] for m in METHODS], ids=str)


@pytest.mark.parametrize("name", sorted(RETURNING))
@pytest.mark.parametrize("case", CASES)
def test_all_preference_on_one_task_returns_its_vector_bit_for_bit(case, name):
    vectors = CASES[case]
    for task in range(len(vectors)):
        found = merge_tensors(vectors, preference=one_hot(task, len(vectors)), method=name)
        assert found.equal(vectors[task])


@every_method
def test_a_task_without_weight_is_as_if_it_were_not_there(name, options):
    vectors = normal(4, 10, 14)
    found = merge_tensors(vectors, preference=(0.5, 0.0, 0.25, 0.25), method=name, **options)
    others = merge_tensors(vectors[[0, 2, 3]], preference=(0.5, 0.25, 0.25), method=name, **options)
    assert found.equal(others)


@every_method
def test_rotations_of_rows_and_columns_rotate_what_is_merged(name, options):
    vectors = normal(3, 12, 20).double()
    left, right = (torch.linalg.qr(normal(1, n, n, seed=n)[0].double())[0] for n in (12, 20))
    found = merge_tensors(vectors.float(), method=name, **options).double()
    turned = merge_tensors((left @ vectors @ right).float(), method=name, **options).double()
    torch.testing.assert_close(turned, left @ found @ right, rtol=0, atol=1e-5 * float(found.abs().max()))


@every_method
def test_a_convolution_is_a_matrix_and_experts_are_several(name, options):
    vectors = normal(3, 6, 4, 2, 2)
    found = merge_tensors(vectors, method=name, **options)
    as_matrix = merge_tensors(vectors.reshape(3, 6, 16), method=name, **options)
    assert found.equal(as_matrix.view(6, 4, 2, 2))
    stacked = merge_tensors(vectors[..., 0], method=name, name="mlp.experts.down_proj", **options)
    for expert in range(6):
        alone = merge_tensors(vectors[:, expert, :, :, 0], method=name, **options)
        assert stacked[expert].equal(alone)


@every_method
@pytest.mark.parametrize(
    ("tensor", "shape"),
    [
        ("layer.bias", (12,)),
        ("scale", ()),
        ("classifier.weight", (1, 12)),
        ("model.embed_tokens.weight", (9, 12)),
        ("lm_head.weight", (9, 12)),
    ],
)
def test_what_is_no_matrix_is_averaged(name, options, tensor, shape):
    vectors, weights = normal(3, *shape), (0.5, 0.3, 0.2)
    found = merge_tensors(vectors, preference=weights, method=name, name=tensor, **options)
    assert found.equal(merge_tensors(vectors, preference=weights, method="average"))


@pytest.mark.parametrize(
    ("name", "shape", "found"),
    [
        ("layers.0.mlp.up_proj.weight", (8, 4), Matrices(1, 8, 4)),
        ("embeddings.patch_embedding.weight", (8, 3, 2, 2), Matrices(1, 8, 12)),
        ("vision.patch_embed.proj.weight", (8, 12), Matrices(1, 8, 12)),
        ("model.layers.3.mlp.experts.gate_up_proj", (4, 8, 6), Matrices(4, 8, 6)),
        ("model.layers.3.mlp.experts.1.w1.weight", (8, 6), Matrices(1, 8, 6)),
        ("conv1.weight", (8, 3, 5), Matrices(1, 8, 15)),
        ("embeddings.position_embeddings", (1, 197, 8), None),
        ("vision_model.embeddings.position_embedding.weight", (197, 8), None),
        ("transformer.wte.weight", (50, 8), None),
        ("shared.weight", (50, 8), None),
        ("gpt_neox.embed_out.weight", (50, 8), None),
        ("conv.weight", (8, 1, 1), None),
        ("w", (8,), None),
    ],
)
def test_matrices_are_told_by_shape_and_name(name, shape, found):
    assert matrices_in(name, shape) == found


def test_tsv_by_hand():
    # Left directions at 30 and 60 degrees become those at 0 and 90; right ones are at right angles already.
    half, root = 0.5, 3**0.5 / 2
    first = 3 * torch.tensor([[root, 0.0], [half, 0.0]])
    second = 2 * torch.tensor([[0.0, half], [0.0, root]])
    found = merge_tensors(torch.stack([first, second]), method="tsv")
    torch.testing.assert_close(found, torch.tensor([[3.0, 0.0], [0.0, 2.0]]))
    # Of four directions the first task gives three and the second one, whose 9 counts a third.
    vectors = torch.stack([torch.diag(torch.tensor(d)) for d in ((4.0, 3, 2, 1), (0, 0, 0, 9.0))])
    found = merge_tensors(vectors, preference=(0.75, 0.25), method="tsv")
    torch.testing.assert_close(found, torch.diag(torch.tensor([4.0, 3, 2, 3])))


def test_tsv_of_a_direction_that_two_tasks_share_has_it_once():
    vector = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    found = merge_tensors(torch.stack([vector, vector]), method="tsv")
    torch.testing.assert_close(found, vector)


def of(*rows: list[float]) -> Tensor:
    return torch.tensor(rows)


def diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float32))


#: Method, options, preference, task vectors, and what is merged of them.
BY_HAND: list[tuple[str, dict[str, Any], tuple[float, ...] | None, list[Tensor], Tensor]] = [
    # The sum has the singular values 3 and 1, whose mean is 2.
    ("iso_c", {}, None, [diagonal(3, 0), diagonal(0, 1)], diagonal(2, 2)),
    # A weight of a third of the other: 3 and a third, on average 5/3.
    ("iso_c", {}, (0.75, 0.25), [diagonal(3, 0), diagonal(0, 1)], diagonal(5 / 3, 5 / 3)),
    # Two of four directions are those of the sum, 8 and 6. The third one cancels in the sum, and is the first
    # task's own; the second task's is the fourth. The mean of 8, 6, 1 and 4 is 4.75.
    (
        "iso_cts",
        {"common": 0.5},
        None,
        [diagonal(8, 0, 1, 0), diagonal(0, 6, -1, 4)],
        diagonal(4.75, 4.75, 4.75, 4.75),
    ),
    # The mean is 2, 2, 3; beside it the strongest directions have 4, 4 and 6, which count twice.
    (
        "cart",
        {},
        None,
        [diagonal(6, 0, 0), diagonal(0, 6, 0), diagonal(0, 0, 9)],
        diagonal(10, 10, 15),
    ),
    # Tasks with other inputs do not meet.
    ("wudi", {}, None, [diagonal(2, 0), diagonal(0, 3)], diagonal(2, 3)),
    # Two tasks with the same input, each by its own norm: half of both.
    ("wudi", {}, None, [of([2.0, 0], [0, 0]), of([0.0, 0], [1, 0])], of([1.0, 0], [0.5, 0])),
    # The eigenvalue is 2: after a time of ln 2 / 2 half of the way from the sum is done.
    (
        "wudi",
        {"time": float(np.log(2) / 2)},
        None,
        [of([2.0, 0], [0, 0]), of([0.0, 0], [1, 0])],
        of([1.5, 0], [0.75, 0]),
    ),
    # Here the first one counts four times as much, by the square of its norm: (8, 1) / 5.
    ("actmat", {"ridge": 0.0}, None, [of([2.0, 0], [0, 0]), of([0.0, 0], [1, 0])], of([1.6, 0], [0.2, 0])),
    # Weights of 1 to 4 make up for that.
    (
        "actmat",
        {"ridge": 0.0},
        (0.2, 0.8),
        [of([2.0, 0], [0, 0]), of([0.0, 0], [1, 0])],
        of([1.0, 0], [0.5, 0]),
    ),
    # The 5 lies along the direction that the first task has, and goes. The norms 2 and 6 are 4 on average.
    (
        "opcm",
        {},
        None,
        [diagonal(2, 0), of([5.0, 1], [1, 3])],
        of([2.0, 1], [1, 3]) * 4 / 15**0.5,
    ),
]


@pytest.mark.parametrize(("name", "options", "weights", "vectors", "expected"), BY_HAND)
def test_methods_by_hand(name, options, weights, vectors, expected):
    found = merge_tensors(torch.stack(vectors), preference=weights, method=name, **options)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_the_order_of_the_tasks_counts_for_opcm_alone():
    vectors = normal(3, 8, 10)
    for name in (method[0] for method in METHODS):
        found, turned = (merge_tensors(v, method=name) for v in (vectors, vectors.flip(0)))
        assert torch.allclose(found, turned, atol=1e-5) is (name != "opcm")


def test_coefficients_of_any_sign_multiply_what_opcm_adds():
    vectors = normal(2, 8, 10)
    method = get_method("opcm").function
    method = partial(method, sides=(8, 10))
    added, taken_away = (method(vectors, multipliers=(1.0, sign)) for sign in (1.0, -1.0))
    negated = method(vectors * torch.tensor([1.0, -1.0])[:, None, None], multipliers=(1.0, 1.0))
    torch.testing.assert_close(taken_away, negated)
    assert not taken_away.allclose(added)
    assert method(vectors[:1], multipliers=(-2.0,)).allclose(-vectors[0])


def test_equal_singular_values_are_what_isotropic_methods_give():
    vectors = normal(3, 8, 12)
    for name in ("iso_c", "iso_cts"):
        strengths = torch.linalg.svdvals(merge_tensors(vectors, method=name))
        torch.testing.assert_close(strengths, strengths.mean().expand(8), rtol=1e-5, atol=0)


def test_wudi_leaves_least_interference_where_all_directions_count():
    vectors = normal(4, 6, 10)

    def interference(merged: Tensor) -> float:
        return sum(float(((merged - v) @ v.T).square().sum() / v.square().sum()) for v in vectors.double())

    found = merge_tensors(vectors, method="wudi", share=1.0).double()
    least = interference(found)
    for seed in range(5):
        assert interference(found + 0.01 * normal(1, 6, 10, seed=seed)[0]) > least
    assert least < min(interference(v) for v in (*vectors.double(), vectors.sum(0).double()))


FAMILY_SHAPES = {
    "embed.weight": (20, 12),
    "layer.weight": (16, 12),
    "layer.bias": (16,),
    "out.weight": (12, 16),
}


@pytest.fixture
def family(tmp_path):
    """Checkpoints whose matrices differ in every element."""
    base = {name: normal(*shape, seed=1) for name, shape in FAMILY_SHAPES.items()}
    for number, name in enumerate(("base", "a", "b", "c")):
        moved = {n: t + 0.1 * (number > 0) * normal(*t.shape, seed=10 * number) for n, t in base.items()}
        write_checkpoint(tmp_path / name, moved)
    return tmp_path


def merged(family, to="merged", method="tsv", backend=None, **output):
    weights = {"weights": {"a": 0.5, "b": 0.3, "c": 0.2}}
    recipe = load_recipe(
        write_recipe(family, method=method, preference=weights, output={"path": to, **output})
    )
    return merge(accepted(plan(recipe, lock(recipe))), backend=backend)


@pytest.mark.parametrize(("name", "options"), ONCE, ids=str)
def test_a_device_gives_what_the_cpu_gives(family, name, options):
    merged(family, "plain", {"name": name, **options})
    merged(family, "on_device", {"name": name, **options}, Device(device=torch.device("cpu")))
    plain, on_device = (read_merged(family / to) for to in ("plain", "on_device"))
    for tensor, values in plain.items():
        torch.testing.assert_close(on_device[tensor], values, rtol=0, atol=1e-6)


def test_a_device_without_float64_leaves_matrices_to_the_cpu(monkeypatch):
    monkeypatch.setattr("hub_magmax.kernels.device.WITHOUT_FLOAT64", ("meta",))
    seen = []
    Device(device=torch.device("meta")).of_matrices(seen.append, torch.ones(2, 3, 3))
    assert seen[0].device.type == "cpu"


def test_a_device_without_memory_is_one_sentence():
    def too_much(vectors: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(RecipeError, match="cpu has not the memory that 2 matrices of 3 x 4 take") as caught:
        Device(device=torch.device("cpu")).of_matrices(too_much, torch.ones(2, 3, 4))
    assert "Leave out the device" in caught.value.hint


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_no_byte(family, monkeypatch, threads):
    monkeypatch.setattr("hub_magmax.planning.budget.num_threads", lambda: threads)
    first = merged(family, "first")
    monkeypatch.setattr("hub_magmax.planning.budget.num_threads", lambda: 3 - threads)
    assert merged(family, "second").shards == first.shards


def test_the_lock_says_that_bytes_are_of_one_machine(family):
    merged(family)
    assert json.loads((family / "merged" / "recipe.lock.json").read_text())["is_portable"] is False
    merged(family, "other", method="average")
    assert "is_portable" not in json.loads((family / "other" / "recipe.lock.json").read_text())


def rebuilt_after(family, monkeypatch, change):
    """Merge again as another machine would, whose last bits differ."""
    merged(family)
    method = get_method("tsv")
    function = method.function

    def differing(vectors, **options):
        return change(function(vectors, **options))

    monkeypatch.setattr("hub_magmax.methods.spectral.tsv.merge_method", replace(method, function=differing))
    return rebuild(str(family / "merged"), folder=family)


def with_first(merged, step):
    changed = merged.clone()
    changed[0, 0] += step
    return changed


def test_last_bits_of_another_machine_are_accepted(family, monkeypatch):
    before = rebuilt_after(family, monkeypatch, lambda merged: merged)
    assert before.shards == merged(family, "same").shards
    again = rebuilt_after(family, monkeypatch, lambda merged: with_first(merged, 1e-7))
    assert again.shards != before.shards


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda merged: with_first(merged, 1e-5), "element 0 is not what"),
        (lambda merged: merged + 1e-7, "more than one element in 100"),
    ],
    ids=["one element", "all elements"],
)
def test_more_than_last_bits_are_told(family, monkeypatch, change, told):
    with pytest.raises(OutputError, match=told):
        rebuilt_after(family, monkeypatch, change)
