"""Every registered method against its oracle on every case; a new method joins by one line."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from pydantic import Field
from torch import Tensor

from hub_magmax import methods
from hub_magmax.errors import RecipeError
from hub_magmax.merging.tensors import merge_tensors
from hub_magmax.methods import merge_method, method_names
from hub_magmax.registry import METHODS as REGISTERED
from tests import oracles, oracles_sparse
from tests import oracles_geometry as geometry

Oracle = Callable[[np.ndarray, tuple[float, ...]], "np.ndarray | None"]


@dataclass(frozen=True)
class WithBase:
    """An oracle that takes the base model's values too, and tensors in their own shape."""

    merge: geometry.Merge


def normal(tasks: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(tasks, *shape, generator=torch.Generator().manual_seed(seed))


def _like_bf16(tasks: int, size: int) -> Tensor:
    """Return task vectors of bfloat16 checkpoints: about half zero, and many exactly equal."""
    values = normal(tasks, size, seed=1).bfloat16().float()
    coarse = (values * 4).round() / 4
    return torch.where(normal(tasks, size, seed=2) < 0, 0.0, coarse)


CASES: Mapping[str, Tensor] = {
    "one task": normal(1, 20),
    "two tasks": normal(2, 33),
    "five tasks in a matrix": normal(5, 6, 7),
    "ties and zeros": _like_bf16(4, 200),
    "all zero": torch.zeros(3, 10),
    "all equal": normal(1, 12).repeat(4, 1),
    "one element": normal(3, 1),
    "no dimensions": normal(3),
    "very different scales": normal(3, 50) * torch.tensor([[1e-30], [1.0], [1e30]]),
    "subnormal": normal(3, 50) * 1e-42,
}


def base_of(vectors: Tensor) -> Tensor:
    """Return values of a base model, for methods that need them."""
    return torch.randn(vectors.shape[1:], generator=torch.Generator().manual_seed(9))


def merged(vectors: Tensor, *, method: str, **options: Any) -> Tensor:
    """Merge by any method, those between two models without the others."""
    if method in ARCS and len(vectors) > 2 and "preference" not in options:
        options["preference"] = (0.5, *[0.0] * (len(vectors) - 2), 0.5)
    return merge_tensors(vectors, method=method, base=base_of(vectors), **options)


def preferences(num_tasks: int) -> list[tuple[float, ...]]:
    one_hot = tuple(float(task == num_tasks - 1) for task in range(num_tasks))
    falling = [2.0**-task for task in range(num_tasks)]
    return [(1 / num_tasks,) * num_tasks, tuple(mass / sum(falling) for mass in falling), one_hot]


def average(vectors: np.ndarray, weights: tuple[float, ...]) -> np.ndarray:
    return np.array([math.fsum(np.array(weights) * column) for column in vectors.T])


def average_of(models: np.ndarray, weights: tuple[float, ...]) -> np.ndarray:
    return np.tensordot(np.array(weights), models, axes=1)


def agreement(flattening: float) -> Oracle:
    def oracle(vectors: np.ndarray, weights: tuple[float, ...]) -> np.ndarray:
        flat = [weight**flattening if weight > 0 else 0.0 for weight in weights]
        shares = np.array(flat) / math.fsum(flat)
        merged = []
        for column in vectors.T:
            total, size = math.fsum(shares * column), math.fsum(shares * np.abs(column))
            merged.append(total * abs(total) / size if size else 0.0)
        return np.array(merged)

    return oracle


def multipliers(weights: tuple[float, ...]) -> list[float]:
    return [len(weights) * weight for weight in weights]


def ties(density: float, consensus: str = "mean") -> Oracle:
    def oracle(vectors: np.ndarray, weights: tuple[float, ...]) -> np.ndarray:
        keep = math.ceil(round(density * vectors.shape[1], 9))
        thresholds = [oracles.threshold(vector, keep) for vector in vectors]
        if consensus == "sum":
            return np.array(oracles.ties_sum(vectors, thresholds, multipliers(weights)))
        return np.array(oracles.ties_merge(vectors, thresholds, weights))

    return oracle


def dare(density: float) -> Oracle:
    def oracle(vectors: np.ndarray, weights: tuple[float, ...]) -> np.ndarray:
        return len(weights) * average(oracles.dropped(vectors, density, 0, ""), weights)

    return oracle


def dare_ties(density: float, consensus: str = "mean") -> Oracle:
    def oracle(vectors: np.ndarray, weights: tuple[float, ...]) -> np.ndarray:
        kept = oracles.dropped(vectors, density, 0, "") != 0
        merge, numbers = oracles.ties_merge, [*weights]
        if consensus == "sum":
            merge, numbers = oracles.ties_sum, multipliers(weights)
        merged = merge(np.where(kept, vectors, 0.0), [0.0] * len(vectors), numbers)
        return np.array(merged) / density

    return oracle


def breadcrumbs(density: float, outliers: float, consensus: str | None = None) -> Oracle:
    def oracle(vectors: np.ndarray, weights: tuple[float, ...]) -> np.ndarray:
        masked = np.array([oracles.breadcrumbs(vector, str(density), str(outliers)) for vector in vectors])
        if consensus == "mean":
            return np.array(oracles.ties_merge(masked, [0.0] * len(vectors), weights))
        if consensus == "sum":
            return np.array(oracles.ties_sum(masked, [0.0] * len(vectors), multipliers(weights)))
        return len(weights) * average(masked, weights)

    return oracle


def rescaled(kept: Callable[[np.ndarray], list[float]], how: str) -> Oracle:
    """Return the oracle of what is kept of each vector, multiplied to its sum of magnitudes."""

    def oracle(vectors: np.ndarray, weights: tuple[float, ...]) -> np.ndarray:
        pruned = np.array([oracles_sparse.to_norm(vector, kept(vector)) for vector in vectors])
        if how == "added":
            return len(weights) * average(pruned, weights)
        merge, numbers = oracles.ties_merge, [*weights]
        if how == "sum":
            merge, numbers = oracles.ties_sum, multipliers(weights)
        return np.array(merge(pruned, [0.0] * len(vectors), numbers))

    return oracle


def trimmed(density: float) -> Callable[[np.ndarray], list[float]]:
    def kept(vector: np.ndarray) -> list[float]:
        least = oracles.threshold(vector, math.ceil(round(density * len(vector), 9)))
        return [float(value) if abs(value) >= least else 0.0 for value in vector]

    return kept


def banded(vector: np.ndarray) -> list[float]:
    return oracles.breadcrumbs(vector, "0.3", "0.1")


def ram_plus(epsilon: float, boost: float, limit: float) -> Oracle:
    return lambda vectors, weights: oracles_sparse.ram(vectors, epsilon, weights, boost, limit)


def magmax(vectors: np.ndarray, weights: tuple[float, ...]) -> np.ndarray:
    return vectors[oracles.magmax(vectors), np.arange(vectors.shape[1])]


def single_task(vectors: np.ndarray, weights: tuple[float, ...]) -> np.ndarray:
    return vectors[max(range(len(weights)), key=lambda task: (weights[task], task))]


BANDED = {"density": 0.3, "outliers": 0.1, "rescale": "norm"}
#: Method, its options, and its oracle; None where the result is drawn, optimised or of whole matrices, and
#: tested elsewhere.
METHODS: list[tuple[str, dict[str, Any], Oracle | WithBase | None]] = [
    ("agreement", {}, agreement(0.25)),
    ("agreement", {"flattening": 1.0}, agreement(1.0)),
    ("agreement", {"flattening": 0.0}, agreement(0.0)),
    ("average", {}, average),
    ("task_arithmetic", {}, lambda vectors, weights: len(weights) * average(vectors, weights)),
    ("weighted_sum", {}, average),
    ("weighted_sum", {"total": 1.5}, WithBase(lambda v, w, base: 1.5 * average_of(base + v, w) - base)),
    ("weighted_sum", {"total": -1.0}, WithBase(lambda v, w, base: -average_of(base + v, w) - base)),
    ("slerp", {}, WithBase(geometry.slerp())),
    ("slerp", {"linear_above": 1.0}, WithBase(geometry.slerp(linear_above=1.0))),
    ("slerp", {"t": 0.3, "linear_above": 0.6}, WithBase(geometry.slerp(0.3, 0.6))),
    ("slerp", {"t": 0.0}, WithBase(lambda v, w, base: np.zeros_like(base))),
    ("nuslerp", {}, WithBase(geometry.nuslerp())),
    ("nuslerp", {"of": "models"}, WithBase(geometry.nuslerp("models"))),
    ("nuslerp", {"each": "row"}, WithBase(geometry.nuslerp(each="row"))),
    ("nuslerp", {"each": "column", "of": "models"}, WithBase(geometry.nuslerp("models", "column"))),
    ("multislerp", {}, WithBase(geometry.multislerp())),
    ("multislerp", {"of": "models"}, WithBase(geometry.multislerp("models"))),
    ("karcher", {"max_iter": 100, "tol": 1e-9}, WithBase(geometry.karcher())),
    (
        "karcher",
        {"of": "task_vectors", "max_iter": 100, "tol": 1e-9},
        WithBase(geometry.karcher("task_vectors")),
    ),
    ("model_stock", {}, WithBase(geometry.model_stock())),
    ("model_stock", {"each": "row"}, WithBase(geometry.model_stock("row"))),
    ("model_stock", {"each": "column"}, WithBase(geometry.model_stock("column"))),
    ("arcee_fusion", {}, WithBase(geometry.arcee_fusion)),
    ("ties", {"density": 0.2}, ties(0.2)),
    ("ties", {"density": 1.0}, ties(1.0)),
    ("ties", {"density": 0.4, "consensus": "sum"}, ties(0.4, "sum")),
    ("ties", {"density": 0.3, "rescale": "norm"}, rescaled(trimmed(0.3), "mean")),
    ("ties", {"density": 0.3, "rescale": "norm", "consensus": "sum"}, rescaled(trimmed(0.3), "sum")),
    ("dare", {"density": 0.3}, dare(0.3)),
    ("dare", {"density": 1.0}, dare(1.0)),
    ("dare_ties", {"density": 0.6}, dare_ties(0.6)),
    ("dare_ties", {"density": 1.0}, dare_ties(1.0)),
    ("dare_ties", {"density": 0.6, "consensus": "sum"}, dare_ties(0.6, "sum")),
    ("breadcrumbs", {}, breadcrumbs(0.15, 0.006)),
    ("breadcrumbs", {"density": 0.3, "outliers": 0.1}, breadcrumbs(0.3, 0.1)),
    ("breadcrumbs", {"density": 1.0, "outliers": 0.5}, breadcrumbs(1.0, 0.5)),
    ("breadcrumbs", BANDED, rescaled(banded, "added")),
    ("breadcrumbs_ties", {"density": 0.3, "outliers": 0.1}, breadcrumbs(0.3, 0.1, "mean")),
    ("breadcrumbs_ties", {"density": 0.3, "consensus": "sum"}, breadcrumbs(0.3, 0.006, "sum")),
    ("della", {"density": 0.6, "epsilon": 0.3}, None),
    ("della", {"density": 0.6, "rescale": "norm", "consensus": "sum"}, None),
    ("della_linear", {"density": 0.6, "epsilon": 0.3}, None),
    ("localize_stitch", {"density": 0.3}, lambda v, w: oracles_sparse.localize_stitch(v, "0.3", w)),
    ("localize_stitch", {"density": 1.0}, lambda v, w: oracles_sparse.localize_stitch(v, "1", w)),
    ("sce", {}, lambda v, w: oracles_sparse.sce(v, "1", w)),
    ("sce", {"density": 0.3}, lambda v, w: oracles_sparse.sce(v, "0.3", w)),
    ("sce", {"density": 0.3, "floor": 1.0}, lambda v, w: oracles_sparse.sce(v, "0.3", w, floor=1.0)),
    ("pcb", {}, lambda v, w: oracles_sparse.pcb(v, "0.1", w)),
    ("pcb", {"density": 0.5}, lambda v, w: oracles_sparse.pcb(v, "0.5", w)),
    ("ram", {}, lambda v, w: oracles_sparse.ram(v, 1e-5, w)),
    ("ram", {"epsilon": 0.5}, lambda v, w: oracles_sparse.ram(v, 0.5, w)),
    ("ram_plus", {"epsilon": 1.0}, ram_plus(1.0, 0.1, 0.2)),
    ("ram_plus", {"epsilon": 0.75, "boost": 2.0, "boost_limit": 9.0}, ram_plus(0.75, 2.0, 9.0)),
    ("nearswap", {"limit": 0.5}, lambda v, w: oracles_sparse.nearswap(v, 0.5, w)),
    ("single_task", {}, single_task),
    ("last_task", {}, lambda vectors, weights: vectors[-1]),
    ("magmax", {}, magmax),
    ("random_mix", {}, None),
    *((name, {}, None) for name in ("tsv", "iso_c", "iso_cts", "cart", "wudi", "actmat", "opcm")),
    ("tunable_magmax", {"selection": "algorithm-1"}, None),
    ("tunable_magmax", {"selection": "top-n"}, None),
]
#: With these options a method leaves nothing out.
WHOLE: dict[str, dict[str, Any]] = {
    "ties": {"density": 1.0},
    "dare": {"density": 1.0},
    "dare_ties": {"density": 1.0},
    "breadcrumbs": {"density": 1.0, "outliers": 0.0},
    "breadcrumbs_ties": {"density": 1.0, "outliers": 0.0},
    "della": {"density": 1.0},
    "della_linear": {"density": 1.0},
    "localize_stitch": {"density": 1.0},
    "ram": {"epsilon": 0.0},
    "ram_plus": {"epsilon": 0.0, "boost": 0.0},
    "nearswap": {"limit": 1e38},
}
#: These go from one model to another.
ARCS = {"slerp", "nuslerp"}
#: All preference for one task returns its vector.
ONE_HOT = {
    "agreement", "average", "weighted_sum", "single_task", "random_mix", "tunable_magmax",
    "slerp", "nuslerp", "multislerp", "karcher", "model_stock",
    "tsv", "cart", "wudi", "actmat", "opcm",
}  # fmt: skip
SELECTING = {"single_task", "last_task", "magmax", "random_mix", "tunable_magmax"}


def test_every_method_is_in_the_table():
    without_data = {name for name in REGISTERED.built_in if methods.get_method(name).statistics is None}
    assert {name for name, _, _ in METHODS} == without_data  # the others: tests/test_data_statistics.py


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("name", "options", "oracle"), [pytest.param(*m, id=f"{m[0]} {m[1]}") for m in METHODS if m[2]]
)
def test_method_agrees_with_its_oracle(case, name, options, oracle):
    vectors, base = CASES[case], base_of(CASES[case])
    flat = vectors.reshape(len(vectors), -1).numpy().astype(np.float64)
    # 1e-44 is a few of the smallest steps of float32.
    tolerance = 1e-6 * float(vectors.abs().max()) + 1e-44
    for weights in preferences(len(vectors)):
        if name in ARCS and np.count_nonzero(weights) > 2:
            with pytest.raises(
                RecipeError, match=r"at most 2 .* multislerp, karcher, model_stock and average take more"
            ):
                merged(vectors, preference=weights, method=name, **options)
            continue
        found = merged(vectors, preference=weights, method=name, **options).double()
        if isinstance(oracle, WithBase):
            expected = oracle.merge(vectors.double().numpy(), weights, base.double().numpy())
            # Of whole models no more can be told than they hold.
            atol = max(tolerance, 3e-7 * float(base.abs().max()) if name != "model_stock" else 0)
        else:
            expected, atol = oracle(flat, weights), tolerance
        expected = torch.from_numpy(np.asarray(expected)).reshape(base.shape)
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=atol)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("name", "options"), [m[:2] for m in METHODS if m[0] in SELECTING], ids=str)
def test_selected_elements_come_from_a_task_unchanged(case, name, options):
    vectors = CASES[case]
    for weights in preferences(len(vectors)):
        found = merge_tensors(vectors, preference=weights, method=name, **options)
        assert (found == vectors).any(dim=0).all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("name", "options"),
    [m[:2] for m in METHODS if m[0] in ONE_HOT and not {"total", "t"} & m[1].keys()],
    ids=str,
)
def test_one_hot_preference_returns_that_task_bit_for_bit(case, name, options):
    vectors = CASES[case]
    for task in range(len(vectors)):
        weights = tuple(float(t == task) for t in range(len(vectors)))
        assert merged(vectors, preference=weights, method=name, **options).equal(vectors[task])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["localize_stitch", "ram", "ram_plus", "nearswap"])
def test_one_hot_preference_returns_what_is_kept_of_that_task_bit_for_bit(case, name):
    vectors = CASES[case]
    for task in range(len(vectors)):
        weights = tuple(float(t == task) for t in range(len(vectors)))
        assert merge_tensors(vectors, preference=weights, method=name, **WHOLE[name]).equal(vectors[task])


@pytest.mark.parametrize(
    ("name", "options"),
    [m[:2] for m in METHODS if m[0] not in ("arcee_fusion", "pcb") and not {"total", "t"} & m[1].keys()],
    ids=str,
)
def test_single_task_is_returned_unchanged(name, options):
    vectors = CASES["one task"]
    assert merged(vectors, method=name, **options | WHOLE.get(name, {})).equal(vectors[0])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("dare", "task_arithmetic"),
        ("breadcrumbs", "task_arithmetic"),
        ("dare_ties", "ties"),
        ("breadcrumbs_ties", "ties"),
        ("della_linear", "task_arithmetic"),
        ("nearswap", "average"),
        ("ram", "localize_stitch"),
        ("ram_plus", "localize_stitch"),
    ],
)
def test_methods_that_leave_nothing_out_are_others_bit_for_bit(case, name, other):
    vectors = CASES[case]
    for weights in preferences(len(vectors)):
        found = merge_tensors(vectors, preference=weights, method=name, **WHOLE[name])
        expected = merge_tensors(vectors, preference=weights, method=other, **WHOLE.get(other, {}))
        assert found.view(torch.int32).equal(expected.view(torch.int32))


@pytest.mark.parametrize(("name", "options"), [m[:2] for m in METHODS if "total" not in m[1]], ids=str)
def test_zero_task_vectors_give_zero(name, options):
    assert not merged(CASES["all zero"], method=name, **options).any()


@pytest.mark.parametrize("shape", [(0,), (3, 0)], ids=str)
@pytest.mark.parametrize(("name", "options"), [m[:2] for m in METHODS], ids=str)
def test_a_tensor_without_elements_stays_empty(name, options, shape):
    found = merged(torch.empty(2, *shape), method=name, **options)
    assert (found.shape, found.dtype) == (shape, torch.float32)


def test_seed_and_name_decide_a_draw_and_nothing_else_does():
    vectors = CASES["ties and zeros"]

    def draw(**changes: Any) -> Tensor:
        return merge_tensors(vectors, method="random_mix", **changes)

    assert draw(seed=1, name="w").equal(draw(seed=1, name="w"))
    assert not draw(seed=1, name="w").equal(draw(seed=2, name="w"))
    assert not draw(seed=1, name="w").equal(draw(seed=1, name="v"))


@pytest.mark.parametrize("name", method_names())
def test_method_says_what_it_does_with_the_preference(name):
    text = methods.get_method(name).function.__doc__
    assert "preference" in text.lower()
    assert methods.get_method(name).summary.endswith(".")


def test_default_scaling_is_that_of_the_papers():
    scalings = {name: methods.get_method(name).scaling for name in REGISTERED.built_in}
    half = dict.fromkeys(("magmax", "tunable_magmax"), 0.5)
    added = dict.fromkeys(("task_arithmetic", "dare", "breadcrumbs", "della_linear"), 0.3)
    assert scalings == dict.fromkeys(scalings, 1.0) | half | added | {"agreement": 0.6}


def test_agreement_by_hand():
    # The roots of 0.8 and 0.2 are as 2 to 1: weights 2/3 and 1/3. First 2 + 1 = 3, all of it kept. Then
    # 2 − 1 = 1, a third of 3; and 2 − 2, nothing.
    vectors = torch.tensor([[3.0, 3.0, 3.0], [3.0, -3.0, -6.0], [5.0, 5.0, 5.0]])
    found = merge_tensors(vectors, preference=(0.8, 0.2, 0.0), method="agreement", flattening=0.5)
    torch.testing.assert_close(found, torch.tensor([3.0, 1 / 3, 0.0]), rtol=1e-6, atol=1e-6)


def test_elected_sums_by_hand():
    # Kept of the first task are 4 and -3, of the second -5 and 2, of the third 6 and 1; multiplied by 1.5, .9
    # and .6: 6, -4.5 + 3.6, -4.5, 1.8 + .6.
    vectors = torch.tensor([[4.0, 1.0, -3.0, 0.0], [0.0, 1.0, -5.0, 2.0], [0.0, 6.0, 0.0, 1.0]])
    call = {"preference": (0.5, 0.3, 0.2), "method": "ties", "density": 0.5}
    found = merge_tensors(vectors, consensus="sum", **call)
    torch.testing.assert_close(found, torch.tensor([6.0, 3.6, -9.0, 2.4]))
    # The same tasks agree under the mean, which divides by their weights.
    mean = merge_tensors(vectors, consensus="mean", **call)
    torch.testing.assert_close(mean, torch.tensor([4.0, 6.0, -3.75, 1.6]))


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
@pytest.mark.parametrize("case", CASES)
def test_sum_of_equal_multiples_is_the_mean_times_the_number_of_tasks_that_agree(method, case):
    vectors = CASES[case]
    found, mean = (
        merge_tensors(vectors, method=method, density=1.0, consensus=consensus)
        for consensus in ("sum", "mean")
    )
    agreeing = (vectors.sign() == mean.sign()).sum(dim=0)
    torch.testing.assert_close(found, torch.where(mean != 0, agreeing * mean, 0.0), rtol=2e-6, atol=1e-44)


def test_stitching_by_hand():
    # Half of each stay: 4 and -3; -5 and 2; 6 and 1. The first two elements are one task's, the third is the
    # mean of -3 and -5 under 5 to 3, the last that of 2 and 1 under 3 to 2.
    vectors = torch.tensor([[4.0, 1.0, -3.0, 0.0], [0.0, 1.0, -5.0, 2.0], [0.0, 6.0, 0.0, 1.0]])
    found = merge_tensors(vectors, preference=(0.5, 0.3, 0.2), method="localize_stitch", density=0.5)
    torch.testing.assert_close(found, torch.tensor([4.0, 6.0, -3.75, 1.6]))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("density", [1.0, 0.2])
def test_one_task_differs_from_no_other_and_comes_out_whole(case, density):
    vectors = CASES[case]
    for task in range(len(vectors)):
        weights = tuple(float(t == task) for t in range(len(vectors)))
        found = merge_tensors(vectors, preference=weights, method="sce", density=density)
        torch.testing.assert_close(found, vectors[task], rtol=1e-6, atol=1e-44)


def test_sce_by_hand():
    # Of the differences 2, 2, 5, 1 and 0 between two tasks the larger half of the four that are there is
    # selected, and what equals it: the first three elements. Their squares sum to 9 + 16 + 4 and 1 + 4 + 9.
    vectors = torch.tensor([[3.0, 4.0, 2.0, 1.0, 7.0], [1.0, 2.0, -3.0, 2.0, 7.0]])
    found = merge_tensors(vectors, method="sce", density=0.5)
    first, second = 29 / 43, 14 / 43
    expected = [3 * first + second, 4 * first + 2 * second, -3.0, 0.0, 0.0]
    torch.testing.assert_close(found, torch.tensor(expected))
    # With votes of 3 to 1 the third element elects the first task's sign.
    found = merge_tensors(vectors, method="sce", density=0.5, preference=(0.75, 0.25))
    first, second = 87 / 101, 14 / 101
    expected = [3 * first + second, 4 * first + 2 * second, 2.0, 0.0, 0.0]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_sce_weighs_by_preference_where_mean_squares_sum_to_less_than_the_floor():
    # Of the three elements that are selected the squares sum to 43; divided by five elements that is 8.6.
    vectors = torch.tensor([[3.0, 4.0, 2.0, 1.0, 7.0], [1.0, 2.0, -3.0, 2.0, 7.0]])
    below = merge_tensors(vectors, method="sce", density=0.5, floor=8.7)
    torch.testing.assert_close(below, torch.tensor([2.0, 3.0, -3.0, 0.0, 0.0]))
    above = merge_tensors(vectors, method="sce", density=0.5, floor=8.5)
    assert above.equal(merge_tensors(vectors, method="sce", density=0.5))


def test_pcb_by_hand():
    # The sums of both tasks are 4, -1, 1 and 1. The first task claims elements 0, 2 and 3, of magnitudes
    # 3, 2 and 1, which are 1, .5 and 0 on the way from the smallest to the largest; the second one 0 and
    # 1, of magnitudes 1 and 3.
    vectors = torch.tensor([[3.0, 2.0, 2.0, 1.0], [1.0, -3.0, -1.0, 0.0]])
    found = merge_tensors(vectors, method="pcb", density=0.75)
    first = [math.tanh(12), math.exp(2 * (0.25 - 1)) * math.tanh(2), math.exp(-2) * math.tanh(1)]
    second = [math.exp(2 * (1 / 9 - 1)) * math.tanh(4), math.tanh(3), 0.0]
    # The third largest score of each task counts as 0, and the largest as 1; of the second task it is that
    # of two elements which it does not claim.
    mine = (first[1] - first[2]) / (first[0] - first[2])
    shares = 1.0, second[0] / second[1]
    expected = [(3 * shares[0] + 1 * shares[1]) / sum(shares), -3.0, 2.0, 0.0]
    assert 0 < mine < 1
    torch.testing.assert_close(found, torch.tensor(expected))


def test_pcb_of_one_task_is_what_it_keeps():
    vectors = CASES["two tasks"]
    found = merge_tensors(vectors, method="pcb", density=0.5, preference=(0.0, 1.0))
    kept = (
        vectors[1].abs() > vectors[1].abs().sort(descending=True).values[16]
    )  # the last of 17 weighs nothing
    assert found.equal(torch.where(kept, vectors[1], 0.0))


def test_ram_by_hand():
    # Above 1 in magnitude are 4 and -3; -5 and 2; 6. Elements 0, 1 and 3 are one task's, element 2 is shared.
    # The first task owns one and shares one, so it is boosted by 1 + 2 · min(1, .75), and so is the second
    # one; the third task shares nothing.
    vectors = torch.tensor([[4.0, 1.0, -3.0, 0.0], [0.0, 1.0, -5.0, 2.0], [0.0, 6.0, 0.0, 1.0]])
    call = {"preference": (0.5, 0.3, 0.2), "epsilon": 1.0}
    found = merge_tensors(vectors, method="ram", **call)
    torch.testing.assert_close(found, torch.tensor([4.0, 6.0, -3.75, 2.0]))
    found = merge_tensors(vectors, method="ram_plus", boost=2.0, boost_limit=0.75, **call)
    torch.testing.assert_close(found, torch.tensor([10.0, 6.0, -3.75, 5.0]))


def test_what_equals_epsilon_is_unchanged_and_what_is_above_it_is_not():
    above = np.nextafter(np.float32(0.1), np.float32(1))
    vectors = torch.tensor([[0.1, float(above), -float(above), 0.0]])
    assert merge_tensors(vectors, method="ram", epsilon=0.1).tolist()[1:] == vectors[0, 1:].tolist()
    exact = float(np.float32(0.1))  # which is above .1
    assert merge_tensors(vectors, method="ram", epsilon=exact).tolist()[0] == 0


def test_nearswap_by_hand():
    vectors = torch.tensor([[0.5, -3.0, 2.0, 0.0], [1.0, 1.0, -4.0, 0.0]])
    found = merge_tensors(vectors, preference=(0.25, 0.75), method="nearswap", limit=(1.0, 2.0))
    assert found.tolist() == [0.25 * 0.5 + 0.75, -0.25 + 0.75, 0.25 - 1.5, 0.0]


def test_breadcrumbs_by_hand():
    # Of ten magnitudes 10 is removed, and of the rest the three largest stay: 9, 8, 7. In the second task 5
    # is removed as well as kept, since it ties with the largest kept one, and 2 ties with the smallest.
    first = [1.0, -10.0, 9.0, 2.0, -8.0, 3.0, 7.0, 4.0, -5.0, 6.0]
    second = [5.0, -5.0, 2.0, 3.0, -2.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    found = merge_tensors(
        torch.tensor([first, second]),
        preference=(0.25, 0.75),
        method="breadcrumbs",
        density=0.3,
        outliers=0.1,
    )
    kept = [0.0, 0.0, 9.0, 0.0, -8.0, 0.0, 7.0, 0.0, 0.0, 0.0], [5.0, -5.0, 2.0, 3.0, -2.0, 0, 0, 0, 0, 0]
    assert found.tolist() == [0.5 * one + 1.5 * other for one, other in zip(*kept, strict=True)]


@pytest.mark.parametrize(
    ("density", "outliers", "count"), [(0.15, 0.006, 150), (0.07, 0.07, 70), (0.0001, 0, 1), (0.9, 0.29, 710)]
)
def test_breadcrumbs_keep_the_share_of_the_elements_that_was_written(density, outliers, count):
    vectors = normal(2, 1000)
    for task in range(2):
        weights = tuple(float(t == task) for t in range(2))
        found = merge_tensors(
            vectors, preference=weights, method="breadcrumbs", density=density, outliers=outliers
        )
        magnitudes = vectors[task].abs().sort(descending=True).values
        removed = math.floor(round(1000 * outliers, 9))
        assert found.count_nonzero() == count
        assert found.abs().sort(descending=True).values[:count].equal(2 * magnitudes[removed:][:count])


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"method": "magmx"}, "there is no merge method"),
        ({"method": "ties", "density": 0}, "greater than 0"),
        ({"method": "dare", "density": 0}, "greater than 0"),
        ({"method": "dare", "density": math.nan}, "finite"),
        ({"method": "dare_ties", "density": 1.1}, "less than or equal to 1"),
        ({"method": "dare_ties", "outliers": 0.1}, "outliers"),
        ({"method": "breadcrumbs", "density": 0}, "greater than 0"),
        ({"method": "breadcrumbs", "outliers": -0.1}, "greater than or equal to 0"),
        ({"method": "breadcrumbs", "outliers": 1}, "less than 1"),
        ({"method": "magmax", "density": 0.5}, "density"),
        ({"method": "nearswap", "limit": 0.0}, "greater than 0"),
        ({"method": "ram", "epsilon": -1.0}, "greater than or equal to 0"),
        ({"method": "ram_plus", "boost": math.inf}, "finite"),
        ({"preference": (0.5, 0.5)}, "2 weights for 4 tasks"),
        ({"preference": (0.5, 0.5, 0.5, 0.5)}, "sum to"),
        ({"preference": (0.5, 0.5, 0.5, -0.5)}, "-0.5"),
        ({"method": "average", "preference": (0.5, 0.5, 0.5, 0.5)}, "sum to"),
        ({"method": "average", "preference": (math.nan, 0.5, 0.5, 0.0)}, "nan"),
    ],
    ids=str,
)
def test_wrong_calls_are_refused(call, reason):
    with pytest.raises(RecipeError, match=reason):
        merge_tensors(CASES["ties and zeros"], **call)


@merge_method("median", source="baseline", scaling=0.7)
def median(task_vectors: Tensor, *, quantile: Annotated[float, Field(ge=0, le=1)] = 0.5) -> Tensor:
    """Take the median of the tasks. Ignores the preference."""
    return task_vectors.quantile(quantile, dim=0)


@merge_method("clipped", source="baseline", form="elementwise")
def clipped(task_vectors: Tensor, *, preference: tuple[float, ...], limit: float) -> Tensor:
    """Average by preference, then clip."""
    return (task_vectors * torch.tensor(preference)[:, None]).sum(0).clamp(-limit, limit)


@merge_method("fading", source="baseline", form="linear")
def fading(num_tasks: int, *, preference: tuple[float, ...], rate: float = 0.5) -> list[float]:
    """Weigh earlier tasks less, and all by preference."""
    return [weight * rate ** (num_tasks - number) for number, weight in enumerate(preference, 1)]


@pytest.fixture
def plugins(monkeypatch):
    names = "median", "clipped", "fading"
    points = {name: EntryPoint(name, f"{__name__}:{name}", REGISTERED.group) for name in names}
    monkeypatch.setitem(vars(REGISTERED), "plugins", points)


def test_plugin_sees_whole_tensors_and_its_options_are_checked(plugins):
    vectors = CASES["five tasks in a matrix"]
    assert merge_tensors(vectors, method="median").equal(vectors.quantile(0.5, dim=0))
    assert methods.get_method("median").scaling == 0.7
    assert not methods.get_method("median").uses_preference
    with pytest.raises(RecipeError, match="less than or equal to 1"):
        merge_tensors(vectors, method="median", quantile=2)


def test_elementwise_plugin_gets_the_preference_and_requires_what_has_no_default(plugins):
    vectors = CASES["ties and zeros"]
    found = merge_tensors(vectors, method="clipped", preference=(0.7, 0.1, 0.1, 0.1), limit=0.1)
    assert found.abs().max() <= 0.1
    with pytest.raises(RecipeError, match="limit: Field required"):
        merge_tensors(vectors, method="clipped")


def test_plugins_are_listed_after_the_built_in_methods(plugins):
    assert method_names()[-3:] == ("clipped", "fading", "median")


def test_linear_plugin_adds_the_task_vectors_times_its_coefficients(plugins):
    vectors = CASES["two tasks"]
    assert methods.get_method("fading").coefficients(2, (0.25, 0.75), {"rate": 0.5}) == (0.125, 0.75)
    found = merge_tensors(vectors, method="fading", preference=(0.25, 0.75))
    assert found.equal(0.125 * vectors[0] + 0.75 * vectors[1])


def test_built_in_methods_that_add_task_vectors_are_linear():
    assert methods.linear_names() == ("average", "task_arithmetic")
    assert methods.get_method("task_arithmetic").coefficients(2, (0.25, 0.75), {}) == (0.5, 1.5)
    with pytest.raises(RecipeError, match=r"method ties: the method is not linear\. Expected average, task"):
        methods.get_method("ties").coefficients(2, (0.5, 0.5), {"density": 0.2})


@pytest.mark.parametrize("wrong", [[1.0], [1.0, math.inf], ["x", 1.0], 3.0], ids=str)
def test_linear_method_that_gives_anything_but_a_number_per_task_is_refused(wrong):
    def strange(num_tasks: int) -> list[float]:
        """Ignores the preference."""
        return wrong

    method = merge_method("strange", source="test", form="linear")(strange).merge_method
    with pytest.raises(RecipeError, match=r"plug-in strange \(of no package\): the method (returned|failed)"):
        method.coefficients(2, (0.5, 0.5), {})


def test_annotations_kept_as_text_are_understood():
    def method(task_vectors: "Tensor", *, limit: "Annotated[float, Field(gt=0)]" = 1.0) -> "Tensor":
        """Ignores the preference."""
        return task_vectors

    found = merge_method("kept_as_text", source="test")(method).merge_method
    assert methods.check_options(found, {}) == {"limit": 1.0}
    with pytest.raises(ValueError, match="greater than 0"):
        methods.check_options(found, {"limit": 0})


def test_plugin_that_cannot_be_imported_is_one_sentence(monkeypatch):
    point = EntryPoint("gone", "no_such_package:gone", REGISTERED.group)
    monkeypatch.setitem(vars(REGISTERED), "plugins", {"gone": point})
    with pytest.raises(RecipeError, match="cannot be imported"):
        methods.get_method("gone")


def test_entry_point_that_is_no_method_is_refused(monkeypatch):
    point = EntryPoint("preferences", f"{__name__}:preferences", REGISTERED.group)
    monkeypatch.setitem(vars(REGISTERED), "plugins", {"preferences": point})
    with pytest.raises(RecipeError, match="is not a merge method of that name"):
        methods.get_method("preferences")


def test_method_that_fails_names_itself_and_the_tensor(monkeypatch):
    def broken(task_vectors: Tensor) -> Tensor:
        """Ignores the preference."""
        raise ZeroDivisionError("by hand")

    method = merge_method("broken", source="test")(broken).merge_method
    monkeypatch.setattr(methods, "get_method", lambda name: method)
    with pytest.raises(
        RecipeError, match=r"plug-in broken .*, tensor 'w': the method failed \(ZeroDivisionError"
    ):
        merge_tensors(CASES["two tasks"], method="broken", name="w")


@pytest.mark.parametrize(
    "wrong",
    [lambda v: v[0, :1], lambda v: v.numpy(), lambda v: v[0].double()],
    ids=["another shape", "numpy", "float64"],
)
def test_method_that_returns_something_else_is_refused(monkeypatch, wrong):
    def strange(task_vectors: Tensor) -> Tensor:
        """Ignores the preference."""
        return wrong(task_vectors)

    method = merge_method("strange", source="test")(strange).merge_method
    monkeypatch.setattr(methods, "get_method", lambda name: method)
    with pytest.raises(RecipeError, match="the method returned"):
        merge_tensors(CASES["two tasks"], method="strange")


def test_wrong_declarations_fail_at_once():
    with pytest.raises(ValueError, match="form 'elementwis' is not one of"):
        merge_method("typo", source="test", form="elementwis")

    def unannotated(task_vectors, *, limit=1):
        return task_vectors

    with pytest.raises(ValueError, match="option 'limit' needs an annotation"):
        merge_method("unannotated", source="test")(unannotated)
