import math

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given
from hypothesis import strategies as st

from hub_magmax.errors import EvaluationError, RecipeError
from hub_magmax.preference import resolve_preference
from hub_magmax.preference.explicit import normalise
from hub_magmax.preference.labels import preference_from_labels
from hub_magmax.recipe.loading import parse_recipe
from tests.families import recipe_values


def weights(preference: object, tasks: tuple[str, ...] = ("a", "b", "c")) -> dict[str, float]:
    recipe = parse_recipe(recipe_values(tasks, preference=preference) if preference else recipe_values(tasks))
    return dict(resolve_preference(recipe).weights)


def test_no_preference_is_uniform():
    assert weights(None) == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})


def test_weights_keep_their_decimal_value_and_unnamed_tasks_get_nothing():
    assert weights({"weights": {"c": 0.29, "a": 0.71}}) == {"a": 0.71, "b": 0.0, "c": 0.29}


def test_geometric_by_hand():
    assert weights({"geometric": {"ratio": 2}}) == pytest.approx({"a": 1 / 7, "b": 2 / 7, "c": 4 / 7})


def test_linear_by_hand():
    assert weights({"linear": {"ratio": 3}}) == pytest.approx({"a": 1 / 6, "b": 2 / 6, "c": 3 / 6})


def test_power_by_hand():
    assert weights({"power": {"exponent": 2}}) == pytest.approx({"a": 1 / 14, "b": 4 / 14, "c": 9 / 14})


@pytest.mark.parametrize(
    "kind", [{"geometric": {"ratio": 1}}, {"linear": {"ratio": 1}}, {"power": {"exponent": 0}}]
)
def test_neutral_coefficient_is_uniform(kind):
    assert weights(kind) == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})


@given(
    st.sampled_from(["geometric", "linear", "power"]),
    st.floats(-300, 300),
    st.integers(1, 64),
)
def test_every_schedule_is_a_preference(kind, exponent, num_tasks):
    coefficient = exponent if kind == "power" else math.exp(exponent)
    key = "exponent" if kind == "power" else "ratio"
    found = weights({kind: {key: coefficient}}, tuple(f"t{i}" for i in range(num_tasks)))
    assert math.fsum(found.values()) == pytest.approx(1)
    assert all(weight >= 0 for weight in found.values())


@pytest.mark.parametrize("masses", [[0.0, 0.0], [-1.0, 2.0], [math.nan, 1.0], [math.inf, 1.0]])
def test_masses_that_are_no_preference_are_refused(masses):
    with pytest.raises(RecipeError, match="cannot be made into a preference"):
        normalise(masses)


def test_labels_by_hand():
    found = preference_from_labels([0, 0, 0, 1, 2, 9], {"a": [0, 1], "b": [2], "c": [3]})
    assert found == {"a": 0.8, "b": 0.2, "c": 0.0}


@given(st.lists(st.integers(0, 9), min_size=1))
def test_label_shares_sum_to_one_whatever_the_order(labels):
    classes = {"a": [0, 1, 2], "b": [3, 4, 5, 6], "c": [7, 8, 9]}
    found = preference_from_labels(labels, classes)
    assert math.fsum(found.values()) == pytest.approx(1)
    assert preference_from_labels(sorted(labels), classes) == found


def test_a_class_of_two_tasks_is_refused():
    with pytest.raises(RecipeError, match="class 1 belongs to a and to b"):
        preference_from_labels([1], {"a": [0, 1], "b": [1]})


def test_labels_of_no_task_are_refused():
    with pytest.raises(RecipeError, match="none of the 2 target labels"):
        preference_from_labels([7, 8], {"a": [0], "b": [1]})


@pytest.fixture
def target(tmp_path):
    names = ["zero", "one", "two", "three"]
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    rows = Dataset.from_dict({"text": ["x"] * 10, "label": [0] * 8 + [2] + [3]}, features=features)
    rows.to_parquet(str(tmp_path / "target.parquet"))
    return tmp_path


def labels_recipe(folder, classes, **data):
    spec = {"target": {"dataset": "target.parquet"} | data, "classes": classes}
    return parse_recipe(recipe_values(("a", "b"), preference={"labels": spec}), folder=folder)


def test_labels_from_a_file_by_class_name_and_number(target):
    found = resolve_preference(labels_recipe(target, {"a": ["zero", "one"], "b": [2]}))
    assert found.weights == pytest.approx({"a": 8 / 9, "b": 1 / 9})
    assert found.explanation["examples"] == 10
    assert found.explanation["examples_of_no_task"] == 1
    assert found.data_fingerprint is not None


def test_fingerprint_follows_the_examples(target):
    first = resolve_preference(labels_recipe(target, {"a": [0], "b": [2]}))
    again = resolve_preference(labels_recipe(target, {"a": [0], "b": [2]}))
    fewer = resolve_preference(labels_recipe(target, {"a": [0], "b": [2]}, split="train[:9]"))
    assert first == again
    assert first.data_fingerprint != fewer.data_fingerprint


def test_unknown_class_name_is_refused_with_the_nearest(target):
    with pytest.raises(RecipeError, match="Did you mean 'three'"):
        resolve_preference(labels_recipe(target, {"a": ["tree"]}))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"label_column": "lable"}, "no column 'lable'"),
        ({"dataset": "./none.parquet"}, "no such file or folder"),
        ({"split": "train[5:5]"}, "no data"),
    ],
)
def test_data_that_cannot_be_used_is_refused(target, data, reason):
    with pytest.raises(EvaluationError, match=reason):
        resolve_preference(labels_recipe(target, {"a": [0]}, **data))
