"""Rules that were tried: their special cases, a case by hand, and the page from what is stored."""

import pytest
import torch

from benchmarks.continual import tried
from hub_magmax.errors import RecipeError
from hub_magmax.merging.tensors import merge_tensors
from hub_magmax.methods import method_names
from hub_magmax.recipe.matching import locked_method
from tests.test_methods import CASES, preferences

MEAN = {"flattening": 1.0, "lowering": 0.0}

#: Cases of magnitudes that float32 can square.
USUAL = [case for case in CASES if case not in ("very different scales", "subnormal")]


@pytest.mark.parametrize("case", USUAL)
@pytest.mark.parametrize(
    ("options", "method"),
    [
        (MEAN, {"method": "average"}),
        ({}, {"method": "agreement"}),
        (tried.TIES, {"method": "ties"}),
        (tried.TIES | {"density": 0.5}, {"method": "ties", "density": 0.5}),
    ],
    ids=lambda value: str(value.get("method", "")),
)
def test_between_has_three_methods_as_special_cases(options, method, case):
    vectors = CASES[case]
    for preference in preferences(len(vectors)):
        found = merge_tensors(vectors, method="tried_between", preference=preference, **options)
        expected = merge_tensors(vectors, preference=preference, **method)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_between_by_hand():
    vectors = torch.tensor([[4.0, 4.0, 0.0], [2.0, -2.0, -2.0]])
    given = {"method": "tried_between", "preference": (0.5, 0.5)}
    assert merge_tensors(vectors, **given).tolist() == pytest.approx([3, 1 / 3, -1])
    # Only the first task is on the larger side of the second element, and only the second one has the third.
    assert merge_tensors(vectors, **given, restoring=1.0).tolist() == pytest.approx([3, 2 / 3, -2])
    assert merge_tensors(vectors, **given, opposing=0.0, lowering=0.0).tolist() == [3, 2, -1]
    one_length = merge_tensors(vectors, **given, lengths=1.0, lowering=0.0)
    norms = vectors.norm(dim=1)
    expected = (vectors / norms[:, None]).mean(0) * norms.mean()
    torch.testing.assert_close(one_length, expected)


@pytest.mark.parametrize("case", USUAL)
def test_half_is_the_mean_of_two_methods(case):
    vectors = CASES[case]
    for preference in preferences(len(vectors)):
        found, *parts = (
            merge_tensors(vectors, method=method, preference=preference)
            for method in ("tried_half", "agreement", "ties")
        )
        torch.testing.assert_close(found, sum(parts) / 2, rtol=1e-5, atol=1e-6)


def test_projections_are_those_of_every_task_with_a_weight():
    vectors = torch.randn(3, 4, 50, generator=torch.Generator().manual_seed(0))
    merged = merge_tensors(vectors, method="tried_projections", preference=(0.8, 0.2, 0.0))
    for vector in vectors[:2]:
        assert float((merged * vector).sum()) == pytest.approx(float(vector.square().sum()), rel=1e-4)
    zeros = merge_tensors(torch.zeros(2, 5), method="tried_projections", preference=(0.5, 0.5))
    assert not zeros.any()


@pytest.mark.parametrize("words", tried.RULES)
def test_a_preference_for_one_task_returns_its_vector_unless_it_is_trimmed(words):
    vectors = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    method = locked_method(tried.RULES[words])
    options = {key: value for key, value in method.items() if key not in ("name", "scaling")}
    found = merge_tensors(vectors, method=method["name"], preference=(0.0, 1.0, 0.0), **options)
    is_whole = found == pytest.approx(vectors[1], abs=1e-5)
    is_trimmed = words.startswith("`ties`") or "half `ties`" in words or "trimmed" in words
    assert is_whole != is_trimmed


def test_what_was_tried_is_no_method_of_the_package():
    assert not any(name.startswith("tried") for name in method_names())
    with pytest.raises(RecipeError, match="density"):
        merge_tensors(torch.ones(2, 3), method="tried_between", density=0.0)


def test_page_is_what_the_stored_results_give():
    assert tried.PAGE.read_text(encoding="utf-8") == tried.page(tried.read())
