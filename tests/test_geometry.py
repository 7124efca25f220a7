"""Methods of lengths and angles: by hand, beside mergekit's numbers, and in files."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hub_magmax import registry
from hub_magmax.errors import RecipeError
from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.merging.execution import merge
from hub_magmax.merging.tensors import merge_tensors, tensor_rule
from hub_magmax.methods.chunks import ArrayChunks
from hub_magmax.options import locked_options
from hub_magmax.pipeline import plan
from hub_magmax.recipe.loading import load_recipe
from tests.families import SHAPES, write_recipe

ONES = [[1.0, 0.0], [0.0, 1.0]]


def merged(vectors, base=None, preference=None, **options):
    vectors = torch.tensor(vectors)
    below = None if base is None else torch.tensor(base)
    return merge_tensors(vectors, base=below, preference=preference, **options)


def model(vectors, base, **options):
    """The merged model, where `merged` is the merged task vector."""
    return (torch.tensor(base) + merged(vectors, base, **options)).tolist()


@pytest.mark.parametrize(
    ("t", "expected"),
    [
        (0.0, [2.0, 0.0]),
        (1 / 3, [2 * math.sqrt(0.75), 0.75]),
        (0.5, [2 * math.sqrt(0.5), 1.5 * math.sqrt(0.5)]),
    ],
)
def test_slerp_goes_from_the_base_model_to_the_task(t, expected):
    # From (2, 0) to (0, 1.5), at right angles: times the sines of what is left and of what is gone.
    found = model([[-2.0, 1.5]], [2.0, 0.0], method="slerp", t=t)
    assert found == pytest.approx(expected, abs=1e-6)


def test_slerp_goes_between_two_tasks_as_far_as_the_preference_says():
    tasks = torch.tensor(ONES) - torch.tensor([3.0, 3.0])
    found = model(tasks.tolist(), [3.0, 3.0], preference=(0.75, 0.25), method="slerp")
    angle = 0.25 * math.pi / 2
    assert found == pytest.approx([math.cos(angle), math.sin(angle)], abs=1e-6)
    # And from the base model, at 45 degrees, half of the way there.
    found = model(tasks.tolist(), [3.0, 3.0], preference=(1.0, 0.0), method="slerp", t=0.5)
    share = math.sin(math.pi / 8) / math.sin(math.pi / 4)
    assert found == pytest.approx([share * (3 + 1), share * 3], abs=1e-6)


@pytest.mark.parametrize(
    ("one", "other"), [([1.0, 0.0], [-1.0, 0.0]), ([1.0, 0.0], [2.0, 0.0]), ([0.0, 0.0], [2.0, 1.0])]
)
@pytest.mark.parametrize("options", [{"method": "slerp"}, {"method": "nuslerp", "of": "models"}], ids=str)
def test_opposite_parallel_and_empty_vectors_go_straight(one, other, options):
    found = model([one, other], [0.0, 0.0], preference=(0.25, 0.75), **options)
    assert found == pytest.approx([0.25 * a + 0.75 * b for a, b in zip(one, other, strict=True)])


def test_cosine_above_which_slerp_goes_straight():
    vectors = [[1.0, 0.0], [math.cos(0.1), math.sin(0.1)]]
    straight = [(1 + math.cos(0.1)) / 2, math.sin(0.1) / 2]
    arc = [math.cos(0.05), math.sin(0.05)]
    for above, expected in ((0.99, straight), (0.9999, arc)):
        found = model(vectors, [0.0, 0.0], method="slerp", linear_above=above)
        assert found == pytest.approx(expected, abs=1e-7)


def test_multislerp_keeps_the_mean_length():
    # Directions (1, 0) and (0, 1) with weights 0.8 and 0.2, so (4, 1) / √17; lengths 3 and 5, so 3.4.
    found = merged([[3.0, 0.0], [0.0, 5.0]], preference=(0.8, 0.2), method="multislerp").tolist()
    assert found == pytest.approx([3.4 * 4 / math.sqrt(17), 3.4 / math.sqrt(17)])


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_directions_that_cancel_give_the_mean_of_the_vectors(method):
    found = merged([[4.0, 0.0], [-1.0, 0.0]], method=method, of="task_vectors")
    assert found.tolist() == [1.5, 0.0]


def test_karcher_mean_on_a_circle_is_the_mean_angle():
    angles, weights = (0.0, 0.3, 1.5), (0.5, 0.2, 0.3)
    points = [[2 * math.cos(angle), 2 * math.sin(angle)] for angle in angles]
    mean = sum(angle * weight for angle, weight in zip(angles, weights, strict=True))
    call = {"preference": weights, "of": "task_vectors"}
    found = merged(points, method="karcher", **call).tolist()
    assert found == pytest.approx([2 * math.cos(mean), 2 * math.sin(mean)], abs=1e-6)
    assert found != pytest.approx(merged(points, method="multislerp", **call).tolist(), abs=0.01)


def test_karcher_mean_takes_steps_until_they_are_short():
    vectors = torch.randn(3, 4, generator=torch.Generator().manual_seed(8))
    call = {"method": "karcher", "of": "task_vectors", "preference": (0.5, 0.3, 0.2)}
    end = merge_tensors(vectors, max_iter=200, tol=1e-12, **call)
    distances = [
        float((merge_tensors(vectors, **options, **call) - end).norm())
        for options in (
            {"tol": 0.5},
            {"max_iter": 1},
            {"tol": 1e-3},
            {"max_iter": 3},
            {"max_iter": 50, "tol": 1e-7},
        )
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 1e-3 and distances[-1] < 1e-5
    # A step that would be shorter is not taken: of two vectors the first one would be the last.
    two = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    start = merge_tensors(two, method="multislerp", preference=(0.8, 0.2))
    found = merge_tensors(two, method="karcher", of="task_vectors", preference=(0.8, 0.2), tol=0.9)
    assert torch.equal(found, start)


def test_karcher_mean_of_two_is_half_the_arc():
    vectors = torch.randn(2, 50, generator=torch.Generator().manual_seed(3))
    vectors[1] *= vectors[0].norm() / vectors[1].norm()
    arc = merge_tensors(vectors, method="nuslerp")
    torch.testing.assert_close(merge_tensors(vectors, method="karcher", of="task_vectors"), arc)
    torch.testing.assert_close(merge_tensors(vectors, method="multislerp"), arc)


@pytest.mark.parametrize(("zeros", "left"), [("line", 0.5), ("right_angle", 0.5**0.5)])
def test_half_way_to_a_vector_of_zeros(zeros, left):
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    found = merge_tensors(vectors, method="nuslerp", zeros=zeros)
    torch.testing.assert_close(found, left * vectors[0])
    assert not merge_tensors(0 * vectors, method="nuslerp", zeros=zeros).any()
    # Locks from before there was this option stay what they were.
    assert ("zeros" in locked_options(registry.METHODS.get("nuslerp"), {"zeros": zeros})) == (zeros != "line")


@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
def test_between_models_of_one_length_every_model_has_it(t):
    models = torch.nn.functional.normalize(torch.randn(3, 99, generator=torch.Generator().manual_seed(1)))
    base, *tasks = models
    found = merge_tensors(torch.stack(tasks) - base, base=base, preference=(t, 1 - t), method="slerp", t=0.7)
    assert float((base + found).norm()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("vectors", "preference", "ratio"),
    [
        (ONES, None, 0),  # nothing in common
        ([[1.0, 0.0], [3.0, 0.0]], None, 1),  # all in common, whatever their lengths
        ([[1.0, 0.0], [-1.0, 0.1]], None, 0),  # they disagree
        ([[2.0, 0.0], [0.5, math.sqrt(0.75)]], None, 2 * 0.5 / 1.5),  # 60 degrees
        ([[2.0, 0.0], [0.5, math.sqrt(0.75)]], (0.75, 0.25), 0.5 / (0.625 + 0.375 * 0.5)),
        ([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]], None, 3 * (1 / 3) / (1 + 2 / 3)),  # one stays where it was
        ([[1e-20, 0.0], [0.5e-20, math.sqrt(0.75) * 1e-20]], None, 2 / 3),  # lengths do not matter
    ],
)
def test_model_stock_by_hand(vectors, preference, ratio):
    found = merged(vectors, preference=preference, method="model_stock")
    mean = merged(vectors, preference=preference, method="average")
    torch.testing.assert_close(found, ratio * mean)


@pytest.mark.parametrize(
    ("vectors", "options", "ratio"),
    [
        ([[1.0, 0.0], [-0.5, math.sqrt(0.75)]], {}, 0),
        ([[1.0, 0.0], [-0.5, math.sqrt(0.75)]], {"backwards": True}, -1 / 0.5),
        ([[1.0, 0.0], [-1.0, 0.0]], {"backwards": True}, 0),  # there it has no limit
        ([[1e-4, 0.0], [0.5e-4, math.sqrt(0.75) * 1e-4]], {"floor": 1e-6}, 0.01 / 1.005),
        ([[2.0, 0.0], [0.5, math.sqrt(0.75)]], {"floor": 1e-6, "backwards": True}, 1 / 1.5),
    ],
)
def test_model_stock_goes_backwards_and_has_a_floor_where_it_is_told_to(vectors, options, ratio):
    found = merged(vectors, method="model_stock", **options)
    torch.testing.assert_close(found, ratio * merged(vectors, method="average"))


def test_model_stock_finds_what_is_common_below_noise():
    """The multiple of the mean that is nearest to the common vector."""
    generator = torch.Generator().manual_seed(5)
    common = torch.randn(20_000, generator=generator)
    vectors = common + 1.5 * torch.randn(4, 20_000, generator=generator)
    for preference in ((0.25,) * 4, (0.4, 0.3, 0.2, 0.1)):
        call = {"preference": preference}
        mean = merge_tensors(vectors, method="average", **call)
        nearest = float((mean @ common) / (mean @ mean))
        found = merge_tensors(vectors, method="model_stock", **call)
        torch.testing.assert_close(found, nearest * mean, rtol=0.03, atol=1e-3)


def test_rows_have_angles_of_their_own():
    vectors = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    found = merge_tensors(vectors, method="model_stock", each="row")
    assert found.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    columns = merge_tensors(vectors, method="nuslerp", each="column")
    share = math.sin(math.pi / 8) / math.sin(math.pi / 4)  # of (1, 1) and (1, 0); (0, 0) has no angle
    torch.testing.assert_close(columns, torch.tensor([[2 * share, 0.0], [share, 0.5]]))


def test_weighted_sum_by_hand():
    # 1.2 times the mean of (3, 1) and (1, 0), less the base model's (1, 1).
    found = merged([[2.0, 0.0], [0.0, -1.0]], [1.0, 1.0], method="weighted_sum", total=1.2)
    assert found.tolist() == pytest.approx([1.2 * 2 - 1, 1.2 * 0.5 - 1])


def test_arcee_fusion_by_hand():
    # One row, so one divergence for all: by size the quartiles of 0 1 2 3 4 are 1, 2 and 3, and the median
    # plus three is above all but the outlier.
    base = [0.0, 0.0, 0.0, 0.0, 0.0]
    assert merged([[0.0, 1.0, -2.0, 3.0, 4.0]], base, method="arcee_fusion").tolist() == [0, 0, 0, 0, 0]
    found = merged([[0.0, 1.0, -2.0, 3.0, -9.0]], base, method="arcee_fusion")
    assert found.tolist() == [0, 0, 0, 0, -9]
    # A row that moves as a whole has the same softmax, so 0 0 0 0 1 1.5 2 9 times the other one's divergence:
    # quartiles of 0, 0 and 1.5, and 2.25 is the least.
    rows = [[[5.0, 5.0, 5.0, 5.0], [9.0, 1.0, 2.0, 1.5]]]
    found = merged(rows, [[0.0] * 4] * 2, method="arcee_fusion")
    assert found.tolist() == [[0, 0, 0, 0], [9, 0, 0, 0]]
    both = [[[0.0, 1.0, 2.0, 3.0, 9.0]], [[0.0, 1.0, 2.0, 3.0, -9.0]]]
    found = merged(both, [base], preference=(0.75, 0.25), method="arcee_fusion")
    assert found.tolist() == [[0, 0, 0, 0, 0.5 * 9]]


@pytest.mark.parametrize("method", ["slerp", "karcher", "weighted_sum", "arcee_fusion"])
def test_methods_of_whole_models_say_that_they_need_the_base_model(method):
    options = {"total": 2.0} if method == "weighted_sum" else {}
    with pytest.raises(RecipeError, match=r"need.? the base model's values.* Expected base="):
        merged(ONES, method=method, **options)


def pattern(step, modulus, scale):
    values = (torch.arange(20) * step % modulus - modulus // 2) / scale
    return values.float().view(4, 5)


PLACES = [0, 6, 13, 19]
#: At these places of patterns, the merged models of mergekit 0.1.5 (`merge_tensors`, float32).
MERGEKIT = {
    "slerp, t 0.35": (
        {"method": "slerp", "t": 0.35}, (1.0,), [-0.6600471, -0.2614156, 0.4474627, -0.5485771],
    ),
    "nuslerp without a base": (
        {"method": "nuslerp", "of": "models"}, (0.6, 0.4), [-0.8751336, -0.1091218, 0.423867, -0.65689],
    ),
    "nuslerp": ({"method": "nuslerp"}, (0.6, 0.4), [-0.9244471, -0.05180195, 0.4152341, -0.6626735]),
    "nuslerp, flatten false": (
        {"method": "nuslerp", "each": "row"}, (0.6, 0.4), [-0.9271699, -0.0575529, 0.4159628, -0.6553166],
    ),
    "nuslerp, row_wise": (
        {"method": "nuslerp", "each": "column"}, (0.6, 0.4),
        [-0.8580682, -0.1010467, 0.4216881, -0.9135807],
    ),
    "multislerp": (
        {"method": "multislerp"}, (0.5, 0.3, 0.2), [-0.9517307, -0.1065779, 0.3813116, -0.6227566],
    ),
    "multislerp without a base": (
        {"method": "multislerp", "of": "models"}, (0.5, 0.3, 0.2),
        [-0.8603138, -0.1721164, 0.395456, -0.6400824],
    ),
    "karcher, tol 1e-7": (
        {"method": "karcher", "max_iter": 50, "tol": 1e-7}, None,
        [-0.8564562, -0.1978491, 0.3292829, -0.6662009],
    ),
    "model_stock": ({"method": "model_stock"}, None, [-0.6480423, -0.268018, 0.3544698, -0.5898736]),
    # In the last row the cosines' mean is below zero, where we stay at the base model.
    "model_stock, filter_wise": (
        {"method": "model_stock", "each": "row"}, None, [-0.7471495, -0.2859184, 0.3746692],
    ),
    "arcee_fusion": ({"method": "arcee_fusion"}, (1.0,), [-0.5625, -0.3125, 0.375, -0.5625]),
    "linear, normalize false": (
        {"method": "weighted_sum", "total": 1.2}, (0.5, 0.5), [-1.03125, -0.1125, 0.45, -0.80625],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MERGEKIT)
def test_merged_models_are_those_of_mergekit(case):
    options, preference, expected = MERGEKIT[case]
    base = pattern(7, 19, 16)
    steps = ((5, 17), (11, 23), (3, 13))[: len(preference or (1, 1, 1))]
    vectors = torch.stack([base + pattern(*step, 32) - base for step in steps])
    found = base + merge_tensors(vectors, base=base, preference=preference, **options)
    assert found.flatten()[PLACES].tolist()[: len(expected)] == pytest.approx(expected, abs=2e-6)


def weights_of(vectors, base, preference, **method):
    """What a rule multiplies the base model and the task vectors by."""
    chunks = ArrayChunks(vectors, base=base)
    described = {"scaling": 1.0, **method}
    rule = tensor_rule(chunks, tuple(base.shape), described, preference, CounterGenerator(0, "w"))
    return [float(weight) for weight in rule.per_task[0]]


@pytest.mark.parametrize("step", [1e-2, 1e-4])
def test_small_steps_leave_the_exact_arc(step):
    """What rounds away in float32, and mostly in a cosine of float64: the base model's own share."""
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(4000, generator=generator)
    vector = step * torch.randn(1, 4000, generator=generator)
    wide = [values.double().numpy().astype(np.longdouble) for values in (base, base + vector[0].double())]
    one, other = (values / np.sqrt((values**2).sum()) for values in wide)
    angle = 2 * np.arctan2(np.sqrt(((one - other) ** 2).sum()), np.sqrt(((one + other) ** 2).sum()))
    shares = [float(np.sin(part * angle) / np.sin(angle)) for part in (0.7, 0.3)]
    found = weights_of(vector, base, (1.0,), name="slerp", t=0.3, linear_above=1.0)
    excess = float(np.sin(np.longdouble(0.7) * angle) / np.sin(angle) + shares[1] - 1)
    assert found == pytest.approx([excess, shares[1]], rel=1e-6)
    assert 0 < found[0] < step**2  # a straight line would have none


METHODS = [
    {"name": "slerp", "t": 0.4, "linear_above": 1.0},
    {"name": "nuslerp", "each": "row"},
    {"name": "multislerp", "of": "models"},
    {"name": "karcher"},
    {"name": "model_stock"},
    {"name": "arcee_fusion"},
    {"name": "weighted_sum", "total": 0.9},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["name"])
def test_files_merge_to_what_their_tensors_do(family, method):
    two = {"weights": {"a": 0.75, "b": 0.25}}
    recipe = write_recipe(family, method=method, preference=two)
    merge(plan(load_recipe(recipe)))
    base, a, b, found = (load_file(family / n / "model.safetensors") for n in ("base", "a", "b", "merged"))
    options = {key: value for key, value in method.items() if key != "name"}
    for name in SHAPES:
        below = base[name]
        vectors = torch.stack([task[name] - below for task in (a, b)])
        update = merge_tensors(vectors, base=below, preference=(0.75, 0.25), method=method["name"], **options)
        expected = torch.where(update == 0, below, below + update)
        assert found[name].equal(expected), name
