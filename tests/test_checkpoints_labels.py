"""Classifiers whose labels have other orders or names: rows matched by label, or refused; never mixed."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from hub_magmax.checkpoints.config import values_of
from hub_magmax.checkpoints.rows.labels import LabelRows, head_tensors, labels_of
from hub_magmax.checkpoints.source import MemorySource
from hub_magmax.errors import MismatchError
from hub_magmax.merging.execution import merge
from hub_magmax.pipeline import lock, plan, run
from hub_magmax.planning.summary import notices
from hub_magmax.recipe.loading import load_recipe
from tests.families import make_tensors, read_merged, write_checkpoint, write_recipe

SHAPES = {"encoder.0.weight": (16, 8), "classifier.weight": (3, 8), "classifier.bias": (3,)}
LABELS = ("negative", "neutral", "positive")
TURNED = ("positive", "neutral", "negative")


def write(folder, dtype=torch.float32, head="classifier", **labels):
    """Write a family of classifiers whose rows lie as their labels say; return it with rows as in LABELS."""
    shapes = {name.replace("classifier", head): shape for name, shape in SHAPES.items()}
    family = {"base": make_tensors(0, shapes=shapes, dtype=dtype)}
    family |= {
        t: make_tensors(n, base=family["base"], shapes=shapes, dtype=dtype) for n, t in enumerate("abc", 1)
    }
    for name, tensors in family.items():
        names = labels.get(name, LABELS)
        order = [LABELS.index(label) for label in names] if set(names) == set(LABELS) else [0, 1, 2]
        stored = {key: value[order] if key.startswith(head) else value for key, value in tensors.items()}
        write_checkpoint(folder / name, stored)
        config = {"model_type": "test", "id2label": {str(row): label for row, label in enumerate(names)}}
        (folder / name / "config.json").write_text(json.dumps(config))
    return family


def average(family):
    return {
        name: sum(family[task][name].double() for task in "abc") / 3 for name in family["base"] if "." in name
    }


def is_near(found, expected):
    return all(torch.allclose(found[name].double(), value, atol=2e-2) for name, value in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "head", ["classifier", "score", "classification_head.out_proj", "head.fc", "classifier.1"]
)
def test_rows_are_matched_by_label_and_it_is_said(tmp_path, dtype, head):
    family = write(tmp_path, dtype, head, b=TURNED)
    recipe = load_recipe(write_recipe(tmp_path, method={"name": "average"}))
    done = run(recipe)
    assert done.report.notices == (
        "the labels of b are in another order than those of base_model: "
        f"rows of {head}.bias and {head}.weight are matched by label",
    )
    assert is_near(read_merged(tmp_path / "merged"), average(family))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["id2label"]["0"] == "negative"


def test_the_labels_of_the_merged_model_are_those_of_its_files(tmp_path):
    family = write(tmp_path, b=TURNED)
    recipe = load_recipe(write_recipe(tmp_path, method={"name": "average"}, output={"files_from": "b"}))
    run(recipe)
    found, expected = read_merged(tmp_path / "merged"), average(family)
    assert torch.allclose(
        found["classifier.weight"].double(), expected["classifier.weight"].flip(0), atol=1e-5
    )
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["id2label"]["0"] == "positive"


def test_a_copied_head_has_the_rows_of_the_labels_beside_it(tmp_path):
    family = write(tmp_path, b=TURNED)
    rules = [{"match": "classifier.*", "take": "b"}]
    run(load_recipe(write_recipe(tmp_path, tensors=rules)))
    assert torch.equal(
        read_merged(tmp_path / "merged")["classifier.weight"], family["b"]["classifier.weight"]
    )


def test_the_order_is_locked_and_an_older_lock_is_made_again(tmp_path):
    write(tmp_path, b=TURNED)
    recipe = load_recipe(write_recipe(tmp_path))
    locked = lock(recipe)
    assert locked.tasks["b"].label_rows == {"classifier.bias": (2, 1, 0), "classifier.weight": (2, 1, 0)}
    assert "label_rows" not in json.loads(locked.to_json())["tasks"]["a"]
    older = replace(
        locked, tasks={name: replace(task, label_rows=None) for name, task in locked.tasks.items()}
    )
    with pytest.raises(MismatchError, match=r"lock again"):
        merge(plan(recipe, older))
    merge(plan(recipe, older, in_spite_of=["labels:b"]))


OTHER = ("sports", "politics", "weather")


def test_other_labels_are_refused_and_the_step_leads_to_a_right_model(tmp_path):
    family = write(tmp_path, b=OTHER)
    with pytest.raises(MismatchError, match="rows of classifier") as caught:
        run(load_recipe(write_recipe(tmp_path, method={"name": "average"})))
    assert '[{match: "classifier.*", take: base_model}]' in caught.value.what
    rules = [{"match": "classifier.*", "take": "base_model"}]
    done = run(load_recipe(write_recipe(tmp_path, method={"name": "average"}, tensors=rules)))
    assert done.report.notices == ()
    found = read_merged(tmp_path / "merged")
    assert torch.equal(found["classifier.weight"], family["base"]["classifier.weight"])
    assert torch.allclose(found["encoder.0.weight"].double(), average(family)["encoder.0.weight"], atol=1e-5)


def test_orders_that_differ_below_a_base_model_without_names_are_settled_by_whose_files(tmp_path):
    family = write(tmp_path, b=TURNED)
    (tmp_path / "base" / "config.json").write_text(
        json.dumps({"model_type": "test", "id2label": {str(n): f"LABEL_{n}" for n in range(3)}})
    )
    with pytest.raises(MismatchError, match=r"say output\.files_from: a, and they are matched"):
        run(load_recipe(write_recipe(tmp_path, method={"name": "average"})))
    run(load_recipe(write_recipe(tmp_path, method={"name": "average"}, output={"files_from": "a"})))
    assert is_near(read_merged(tmp_path / "merged"), average(family))


SILENT = {
    "the same": LABELS,
    "another spelling": ("NEGATIVE", "Neutral", "positive "),
    "no names": ("LABEL_0", "LABEL_1", "LABEL_2"),
    "numbers": ("0", "1", "2"),
}


@pytest.mark.parametrize("name", SILENT)
def test_labels_that_do_not_contradict_are_not_noted(tmp_path, name):
    write(tmp_path, b=SILENT[name])
    made = plan(load_recipe(write_recipe(tmp_path)))
    assert notices(made) == () and made.lock.tasks["b"].label_rows is None


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"label2id": {"a": 0, "b": 1}}, ("a", "b")),
        ({"id2label": {"0": "a", "2": "b"}}, None),
        ({"id2label": {"0": "a", "1": "a"}}, None),
        ({"id2label": ["a", "b"]}, None),
        ({"id2label": {"x": "a"}}, None),
        ([], None),
        ({}, None),
    ],
)
def test_labels_are_read_where_they_name_every_row(config, expected):
    assert labels_of(values_of(json.dumps(config).encode())) == expected


def test_heads_are_told_from_other_tensors_of_as_many_rows():
    names = {
        "classifier.weight": (3, 8),
        "classifier.bias": (3,),
        "classifier.dense.weight": (3, 3),
        "class_labels_classifier.weight": (4, 8),
        "encoder.layer.0.weight": (3, 8),
        "lm_head.weight": (50, 8),
        "model.layers.0.self_attn.out_proj.weight": (3, 3),
    }
    index = MemorySource.from_tensors({name: torch.zeros(shape) for name, shape in names.items()}).index
    found = head_tensors(index, 3)
    assert set(found) == {"classifier.weight", "classifier.bias", "class_labels_classifier.weight"}


@pytest.mark.parametrize("shape", [(5,), (5, 4), (5, 2, 3)])
def test_any_piece_of_rows_in_another_order_is_read(shape):
    tensor = torch.randn(shape)
    order = (3, 0, 4, 1, 2)
    view = LabelRows(MemorySource.from_tensors({"w": tensor, "v": tensor.clone()}), {"w": order})
    expected = tensor[list(order)].flatten()
    for start in range(len(expected) + 1):
        for stop in range(start, len(expected) + 1):
            assert torch.equal(view.read("w", start, stop), expected[start:stop])
            out = np.empty(stop - start, np.uint32)
            assert torch.equal(view.read_stored("w", start, stop, out).tensor, expected[start:stop])
    assert torch.equal(view.read("v", 0, len(expected)), tensor.flatten())
