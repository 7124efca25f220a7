"""Statistics of whole models that a lock makes: refusals before any work, and examples without labels."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image
from PIL import Image as PillowImage
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessor,
)

from hub_magmax.checkpoints.names.model_classes import tied_head
from hub_magmax.errors import CheckpointError, EvaluationError
from hub_magmax.merging.correcting import correction_of
from hub_magmax.merging.execution import merge
from hub_magmax.merging.in_memory import InMemoryMerger
from hub_magmax.methods.corrections import times
from hub_magmax.pipeline import lock, plan
from hub_magmax.recipe.loading import parse_recipe
from tests.families import accepted, read_merged, recipe_values
from tests.test_evaluation_texts import SMALL, tokenizer

TEXTS, IMAGES = "rows.jsonl", "rows.parquet"
PICTURES = ViTImageProcessor(size={"height": 16, "width": 16})


def llama(**changes):
    named = {"bos_token_id": None, "eos_token_id": 1, "initializer_range": 0.5}
    return LlamaForCausalLM(LlamaConfig(**SMALL | named | changes))


def bert(**changes):
    return BertForSequenceClassification(BertConfig(**SMALL | {"num_labels": 3} | changes))


def resnet():
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    )


def written(folder: Path, network, reader) -> Path:
    """Write a base model and two tasks near to it, and examples without labels."""
    for name in ("base", "a", "b"):
        network.save_pretrained(folder / name)
        reader.save_pretrained(folder / name)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    Dataset.from_dict({"text": ["a b c", "d e", "f g h a", "b d f"]}).to_json(folder / TEXTS)
    noise = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), dtype=np.uint8)
    pictures = {"image": [PillowImage.fromarray(one) for one in noise]}
    Dataset.from_dict(pictures, features=Features({"image": Image()})).to_parquet(str(folder / IMAGES))
    return folder


def recipe_of(folder: Path, evaluator: str, rows: str, method="average", **changes):
    data = {name: {"dataset": f"./{rows}", "split": "train"} for name in "ab"}
    tasks = [{"name": n, "model": f"./{n}", "statistics": f"./statistics/{n}"} for n in "ab"]
    values = {"tasks": tasks, "method": method, "statistics": {"evaluator": evaluator, "data": data}}
    return parse_recipe(recipe_values(("a", "b"), **values | changes), folder=folder)


@pytest.fixture
def tied(tmp_path):
    torch.manual_seed(0)
    return written(tmp_path, llama(tie_word_embeddings=True), tokenizer())


@pytest.mark.parametrize("method", ["average", "regmean"])
@pytest.mark.parametrize("is_stored", [False, True], ids=["once", "twice"])
def test_tied_heads_are_refused_before_anything_is_run_or_merged(tied, monkeypatch, is_stored, method):
    if is_stored:
        for name in ("base", "a", "b"):
            path = tied / name / "model.safetensors"
            found = load_file(path)
            found["lm_head.weight"] = found["model.embed_tokens.weight"].clone()
            save_file(found, path, metadata={"format": "pt"})
    monkeypatch.setattr("hub_magmax.evaluation.models.load_model", None)
    monkeypatch.setattr(InMemoryMerger, "merge", None)
    with pytest.raises(EvaluationError, match=r"its head is tied to 'model\.embed_tokens\.weight'") as found:
        lock(recipe_of(tied, "log-likelihood", TEXTS, method, correction="react"))
    assert found.value.problems[0].key == ("correction",)
    assert str(found.value).startswith("./base: no correction can be folded into this model")
    assert not (tied / "statistics").exists()


def test_heads_that_are_known_to_be_tied_are_those_for_tokens():
    config = llama(tie_word_embeddings=True).config.to_dict()
    tie = ("lm_head.weight", "model.embed_tokens.weight")
    assert tied_head(config, "AutoModelForCausalLM") == tie
    assert tied_head(config, "AutoModelForSequenceClassification") is None
    assert tied_head(config | {"tie_word_embeddings": False}, "AutoModelForCausalLM") is None
    assert tied_head({"model_type": "none of transformers"}, "AutoModelForCausalLM") is None


def test_a_model_without_a_head_is_told_before_it_is_merged(tmp_path, monkeypatch):
    def refuse(model, *args):
        raise EvaluationError("no head", where=model.name)

    folder = written(tmp_path, bert(), tokenizer())
    monkeypatch.setattr("hub_magmax.evaluation.statistics_making.find_head", refuse)
    monkeypatch.setattr(InMemoryMerger, "merge", None)
    with pytest.raises(EvaluationError, match="no head") as found:
        lock(recipe_of(folder, "text-classification", TEXTS, correction="react"))
    assert found.value.where == str(folder / "base")


@pytest.mark.parametrize(
    ("method", "evaluator", "rows", "key", "match"),
    [
        ("regmean", "log-likelihood", "other.jsonl", ("statistics", "data", "b", "input_column"), "'text'"),
        ("fisher", "text-to-text", TEXTS, ("statistics", "evaluator"), "tells no log-likelihoods"),
    ],
)
def test_what_cannot_be_made_of_one_task_is_told_before_any_is(
    tmp_path, monkeypatch, method, evaluator, rows, key, match
):
    folder = written(tmp_path, llama(), tokenizer())
    Dataset.from_dict({"words": ["a b"]}).to_json(folder / "other.jsonl")
    texts = {"dataset": f"./{TEXTS}", "split": "train", "label_column": "text"}
    data = {"a": texts, "b": texts | {"dataset": f"./{rows}"}}
    monkeypatch.setattr("hub_magmax.evaluation.models.load_model", None)
    with pytest.raises(EvaluationError, match=match) as found:
        lock(recipe_of(folder, evaluator, TEXTS, method, statistics={"evaluator": evaluator, "data": data}))
    assert found.value.problems[0].key == key


@pytest.mark.parametrize(
    ("network", "reader", "evaluator", "rows", "head"),
    [
        (resnet, PICTURES, "image-classification", IMAGES, "classifier.1"),
        (bert, tokenizer(), "text-classification", TEXTS, "classifier"),
        (lambda: bert(num_labels=1), tokenizer(), "text-classification", TEXTS, "classifier"),
    ],
    ids=["resnet", "bert", "regression"],
)  # fmt: skip
def test_corrections_take_examples_without_labels(tmp_path, network, reader, evaluator, rows, head):
    torch.manual_seed(0)
    folder = written(tmp_path, network(), reader)
    recipe = recipe_of(folder, evaluator, rows, correction="react", output={"path": "merged"})
    locked = lock(recipe)
    assert locked.correction["tensor"] == f"{head}.weight"
    merge(accepted(plan(recipe, locked)))
    plain = recipe.model_copy(update={"correction": None})
    with InMemoryMerger(plain, locked) as merger:
        uncorrected = merger.merge(locked.method, locked.weights).weights(locked.method["scaling"])
    expected = torch.cat([*times(uncorrected[f"{head}.weight"], correction_of(recipe, locked))])
    found = read_merged(folder / "merged")[f"{head}.weight"]
    assert found.equal(expected) and not found.equal(uncorrected[f"{head}.weight"])


@pytest.mark.parametrize("method", ["regmean", "regmean_plusplus", "fisher"])
def test_statistics_of_classifiers_take_examples_without_labels(tmp_path, method):
    torch.manual_seed(0)
    folder = written(tmp_path, bert(), tokenizer())
    recipe = recipe_of(folder, "text-classification", TEXTS, method)
    assert len(accepted(plan(recipe, lock(recipe))).by_statistics) > 5


def test_a_regression_has_no_answers_to_take_fisher_information_of(tmp_path):
    folder = written(tmp_path, bert(num_labels=1), tokenizer())
    with pytest.raises(EvaluationError, match="one output, as of a regression"):
        lock(recipe_of(folder, "text-classification", TEXTS, "fisher"))


@pytest.mark.parametrize("damage", ["cut", "cut in its header", "empty", "no safetensors", "another kind"])
@pytest.mark.parametrize("has_data", [True, False])
def test_damaged_statistics_are_made_again(tmp_path, damage, has_data):
    torch.manual_seed(0)
    folder = written(tmp_path, bert(), tokenizer())
    first = lock(recipe := recipe_of(folder, "text-classification", TEXTS, "regmean"))
    path = folder / "statistics" / "b" / "gram.safetensors"
    content = path.read_bytes()
    other = folder / "base" / "model.safetensors"
    path.write_bytes(
        {
            "cut": content[:-100],
            "cut in its header": content[:100],
            "empty": b"",
            "no safetensors": json.dumps({"a": 1}).encode() * 9,
            "another kind": other.read_bytes(),
        }[damage]
    )
    asked = recipe if has_data else recipe.model_copy(update={"statistics": None})
    with pytest.raises(CheckpointError) as found:
        lock(asked)
    again = "Remove the file, so that `hub-magmax lock` makes it again."
    assert found.value.hint == (again if has_data else "Bring it again from where it was made.")
    assert found.value.problems[0].key == ("tasks", 1, "statistics")
    path.unlink()
    assert lock(recipe).digest == first.digest
