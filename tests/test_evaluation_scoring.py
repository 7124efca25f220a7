import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PillowImage
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
)

from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.evaluators import columns_of, make_evaluator
from hub_magmax.evaluation.evaluators.loading import load_model
from hub_magmax.evaluation.intervals import wilson_interval
from hub_magmax.evaluation.scores import Scores, read_scores, write_scores
from hub_magmax.evaluation.scoring import evaluate
from hub_magmax.pipeline import lock
from hub_magmax.recipe.loading import parse_recipe, updated
from tests.classifiers import write_classifiers
from tests.families import recipe_values

CLASSES = ["cat", "dog", "emu"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT that always says `emu`, and ten images of which four are."""
    folder = tmp_path_factory.mktemp("images")
    write_classifiers(folder, dict.fromkeys(("base", "a", "b"), (0.0, 0.0, 1.0)))
    pictures = [PillowImage.fromarray(np.full((8, 8, 3), i, dtype=np.uint8)) for i in range(10)]
    # The data set numbers its classes otherwise than the model: names decide.
    features = Features({"image": Image(), "label": ClassLabel(names=["emu", "cat", "dog"])})
    rows = Dataset.from_dict({"image": pictures, "label": [0] * 4 + [1] * 6}, features=features)
    rows.to_parquet(str(folder / "rows.parquet"))
    return folder


def image_recipe(folder: Path, **data: object):
    tasks = {name: {"dataset": "./rows.parquet", **data} for name in "ab"}
    values = recipe_values(
        ("a", "b"), evaluation={"evaluator": "image-classification", "tasks": tasks, "batch_size": 3}
    )
    return parse_recipe(values, folder=folder)


def test_accuracy_is_the_share_of_right_answers_by_class_name(images):
    recipe = image_recipe(images)
    scores = evaluate(recipe, lock(recipe), images / "a")
    assert {(score.model, score.task) for score in scores.scores} == {
        (model, task) for model in ("base_model", "a", "b", "merged") for task in "ab"
    }
    assert all((score.value, score.num_examples) == (0.4, 10) for score in scores.scores)
    described = dict(scores.data["a"])
    assert described.pop("fingerprint").startswith("sha256:")
    assert described == {"dataset": "./rows.parquet", "split": "test", "examples": 10}
    assert scores.get("a", "b").outcomes == (1.0,) * 4 + (0.0,) * 6


def test_guards_and_rounded_weights_are_scored_where_they_say_something(images):
    recipe = image_recipe(images)
    spec = recipe.to_dict()["evaluation"] | {
        "quantized": ["int4", "int2", "int4"],
        "guard": {"general": {"dataset": "./rows.parquet", "split": "test[:5]"}},
    }
    recipe = updated(recipe, {"evaluation": spec})
    locked = lock(recipe)
    scores = evaluate(recipe, locked, images / "a")
    found = {model: [s.task for s in scores.scores if s.model == model] for model in
             ("base_model", "a", "b", "merged", "merged:int4", "merged:int2")}  # fmt: skip
    with_guard, without = ["a", "b", "general"], ["a", "b"]
    assert list(found.values()) == [with_guard, without, without, with_guard, without, without]
    assert len(scores.scores) == sum(map(len, found.values()))
    assert scores.data["general"]["examples"] == 5
    # Only the class that a model always answers counts in this one, and rounding leaves it.
    assert scores.get("merged:int2", "a").value == 0.4
    others = evaluate(recipe, locked, "", models={"x": ModelPlace(str(images / "a"))})
    assert [s.task for s in others.scores] == list(others.data) == without


def test_probabilities_are_kept_beside_the_scores(images, tmp_path):
    recipe = image_recipe(images)
    scores = evaluate(recipe, lock(recipe), images / "a")
    right, wrong = round(np.e / (2 + np.e), 6), round(1 / (2 + np.e), 6)
    assert scores.get("a", "a").probabilities == pytest.approx((right,) * 4 + (wrong,) * 6)
    write_scores(scores, tmp_path)
    assert read_scores(tmp_path).get("a", "a").probabilities == scores.get("a", "a").probabilities


def test_the_margin_does_not_change_what_is_measured(images):
    recipe = image_recipe(images)
    spec = recipe.to_dict()["evaluation"]
    wider = updated(recipe, {"evaluation": spec | {"margin": 0.5}})
    guarded = updated(recipe, {"evaluation": spec | {"guard": {"general": {"dataset": "./rows.parquet"}}}})
    assert wider.evaluation.digest == recipe.evaluation.digest != guarded.evaluation.digest


def test_outcomes_are_one_number_per_example_whatever_the_batch(images):
    evaluator = make_evaluator("image-classification", {})
    kinds = evaluator.model_class, evaluator.processor_class
    model = load_model(ModelPlace(str(images / "a")), *kinds, "a test")
    recipe = image_recipe(images)
    from hub_magmax.evaluation.data import load_examples

    data = recipe.evaluation.tasks["a"]
    examples = load_examples(data, images)
    for batch_size in (1, 4, 64):
        batches = evaluator.encode(model, examples, columns_of(data), batch_size)
        outcomes = evaluator.outcomes(model, batches)
        assert [outcome.score for outcome in outcomes] == [1.0] * 4 + [0.0] * 6
        # Two logits of 0 and one of 1: the softmax by hand.
        right, wrong = np.e / (2 + np.e), 1 / (2 + np.e)
        assert [o.probability for o in outcomes] == pytest.approx([right] * 4 + [wrong] * 6)


def test_scores_survive_their_file(images, tmp_path):
    recipe = image_recipe(images)
    scores = evaluate(recipe, lock(recipe), images / "a")
    write_scores(scores, tmp_path)
    assert read_scores(tmp_path) == scores
    assert json.loads(scores.to_json())["digest"] == scores.digest
    changed = replace(scores, scores=(replace(scores.scores[0], value=0.5), *scores.scores[1:]))
    assert changed.digest != scores.digest


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"digest": "x", "scores": [{"model": 1}]}'])
def test_file_that_holds_no_scores_is_refused(tmp_path, text):
    (tmp_path / "scores.json").write_text(text)
    (tmp_path / "outcomes.json").write_text("[]")
    with pytest.raises(EvaluationError, match="do not hold scores"):
        read_scores(tmp_path)


def test_scores_that_were_changed_by_hand_are_refused(images, tmp_path):
    recipe = image_recipe(images)
    write_scores(evaluate(recipe, lock(recipe), images / "a"), tmp_path)
    path = tmp_path / "outcomes.json"
    path.write_text(path.read_text().replace("[0.0,", "[1.0,", 1).replace("[1.0,", "[0.0,", 1))
    with pytest.raises(EvaluationError, match="one of the files was changed"):
        read_scores(tmp_path)


def test_text_classification(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]
    config = BertConfig(
        vocab_size=len(words), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 1.0]))
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    for name in ("base", "a"):
        model.save_pretrained(tmp_path / name)
        BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / name)
    features = Features({"text": Value("string"), "label": Value("int64")})
    rows = Dataset.from_dict({"text": ["good", "bad bad", "good bad"], "label": [1, 0, 1]}, features=features)
    rows.to_csv(str(tmp_path / "rows.csv"), index=False)
    spec = {"evaluator": "text-classification", "tasks": {"a": {"dataset": "./rows.csv"}}}
    recipe = parse_recipe(recipe_values(("a",), evaluation=spec), folder=tmp_path)
    scores = evaluate(recipe, lock(recipe), tmp_path / "a")
    assert [score.value for score in scores.scores] == pytest.approx([2 / 3] * 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"input_column": "picture"}, "no column 'picture'"),
        ({"label_column": "class"}, "no column 'class'"),
        ({"dataset": "./none.parquet"}, "there is no such file or folder"),
        ({"split": "nonsense"}, "cannot be loaded"),
    ],
)
def test_data_that_cannot_be_scored_is_refused(images, data, reason):
    recipe = image_recipe(images, **data)
    with pytest.raises(EvaluationError, match=reason):
        evaluate(recipe, lock(recipe), images / "a")


def test_model_that_cannot_be_loaded_is_refused(images, tmp_path):
    recipe = image_recipe(images)
    with pytest.raises(EvaluationError, match="cannot be loaded for image-classification"):
        evaluate(recipe, lock(recipe), tmp_path)


def test_classes_that_the_model_does_not_know_are_refused(images, tmp_path):
    features = Features({"image": Image(), "label": ClassLabel(names=["yak"])})
    picture = PillowImage.fromarray(np.zeros((8, 8, 3), dtype=np.uint8))
    rows = Dataset.from_dict({"image": [picture], "label": [0]}, features=features)
    rows.to_parquet(str(tmp_path / "yaks.parquet"))
    recipe = image_recipe(images, dataset=str(tmp_path / "yaks.parquet"))
    with pytest.raises(EvaluationError, match="the model has no class 'yak'"):
        evaluate(recipe, lock(recipe), images / "a")


def test_recipe_without_evaluation_says_what_to_add(images):
    recipe = parse_recipe(recipe_values(("a", "b")), folder=images)
    with pytest.raises(EvaluationError, match="nothing to measure"):
        evaluate(recipe, lock(recipe), images / "a")


def test_wilson_interval_by_hand():
    # z = 1.959964: centre (8 + z²/2)/(10 + z²) = .7166, half-width .2264 (Wilson 1927).
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


@given(st.integers(1, 500), st.data())
def test_interval_holds_the_value_and_stays_between_zero_and_one(trials, data):
    successes = data.draw(st.integers(0, trials))
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= successes / trials + 1e-12
    assert successes / trials - 1e-12 <= high <= 1


def test_unmeasured_score_is_none():
    assert Scores("accuracy", "x", (), {}).get("merged", "a") is None
