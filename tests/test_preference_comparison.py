import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Picture
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.errors import EvaluationError, RecipeError
from hub_magmax.evaluation.data import fingerprint
from hub_magmax.evaluation.evaluators import Outcome
from hub_magmax.preference import resolve_preference
from hub_magmax.preference.features import FeatureModel, features, find_head, load_feature_model
from hub_magmax.recipe.loading import parse_recipe, updated
from hub_magmax.recipe.lockfile import LockedSource
from hub_magmax.recipe.preferences import Preference
from tests.families import recipe_values

KINDS = [
    {"transport": {}},
    {"transport": {"fit": "separate"}},
    {"mmd": {}},
    {"mmd": {"fit": "separate"}},
    {"cosine": {}},
]
TASKS = ("dark", "light")


def images(brightness, num, seed):
    rng = np.random.default_rng(seed)
    pixels = np.clip(rng.normal(brightness, 30, (num, 8, 8)), 0, 255).astype(np.uint8)
    return [Picture.fromarray(image) for image in pixels]


def write_images(path, pictures, **columns):
    kinds = {"image": Image()} | {name: Value("int64") for name in columns}
    Dataset.from_dict({"image": pictures} | columns, features=Features(kinds)).to_parquet(str(path))


def tiny_vit(seed):
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=4,
    )
    return ViTForImageClassification(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model and two checkpoints with random weights, and pictures that are dark or light."""
    place = tmp_path_factory.mktemp("comparison")
    for seed, name in enumerate(("base", *TASKS)):
        tiny_vit(seed).save_pretrained(place / name)
        size = {"height": 8, "width": 8}
        ViTImageProcessor(size=size, image_mean=[0.5], image_std=[0.5]).save_pretrained(place / name)
    write_images(place / "dark.parquet", images(60, 40, 0))
    write_images(place / "light.parquet", images(200, 40, 1))
    target = images(60, 40, 2) + images(200, 10, 3)
    write_images(place / "target.parquet", target, label=[0] * 40 + [1] * 10)
    write_images(place / "unlabelled.parquet", target)
    return place


def comparison_recipe(folder, preference, **changes):
    spec = {
        "target": {"dataset": "target.parquet"},
        "train": {task: {"dataset": f"{task}.parquet", "split": "train"} for task in TASKS},
    }
    ((kind, options),) = preference.items()
    return parse_recipe(recipe_values(TASKS, preference={kind: spec | options}) | changes, folder=folder)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_comparison_prefers_the_task_that_makes_up_most_of_the_target(folder, kind):
    found = resolve_preference(comparison_recipe(folder, kind))
    assert found.weights["dark"] > found.weights["light"]
    assert sum(found.weights.values()) == pytest.approx(1)
    for task, (low, high) in found.explanation["intervals"].items():
        assert low - 1e-4 <= found.weights[task] <= high + 1e-4
    assert found.explanation["target_examples"] == 50
    assert found.explanation["train_examples"] == {"dark": 40, "light": 40}
    ((name, options),) = kind.items()
    mixes = name != "cosine" and options.get("fit") != "separate"
    facts = {"farther_than_mixture"} if mixes else {"distances", "similarities"}
    assert {"farther_than_mixture", "distances", "similarities"} & found.explanation.keys() == facts
    farther = found.explanation["farther_than_mixture" if mixes else "distances"]
    assert farther["dark"] < farther["light"]
    assert json.loads(json.dumps(found.explanation, allow_nan=False)) == found.explanation


@pytest.mark.parametrize("kind", ["transport", "mmd"])
@pytest.mark.parametrize("seen_by", ["tasks", "base_model"])
def test_a_mixture_of_separable_data_is_recovered(folder, kind, seen_by):
    found = resolve_preference(comparison_recipe(folder, {kind: {"features": seen_by}}))
    assert found.weights == pytest.approx({"dark": 0.8, "light": 0.2}, abs=0.05)
    low, high = found.explanation["intervals"]["light"]
    assert 0.05 < low < 0.2 < high < 0.4


def test_an_estimate_is_the_same_every_time_and_follows_the_seed(folder):
    recipe = comparison_recipe(folder, {"mmd": {"samples": 20}})
    found = resolve_preference(recipe)
    assert found == resolve_preference(recipe)
    assert found.explanation == resolve_preference(recipe).explanation
    assert found.explanation["target_examples"] == 20
    assert found.data_fingerprint != resolve_preference(updated(recipe, {"seed": 1})).data_fingerprint


def test_labels_are_needed_only_for_a_holdout(folder):
    unlabelled = {"dataset": "unlabelled.parquet"}
    without = resolve_preference(comparison_recipe(folder, {"mmd": {"target": unlabelled}}))
    assert without.weights == resolve_preference(comparison_recipe(folder, {"mmd": {}})).weights
    with pytest.raises(EvaluationError, match="no column 'label'"):
        resolve_preference(comparison_recipe(folder, {"mmd": {"target": unlabelled, "holdout": 0.2}}))


def test_a_comparison_that_loses_on_the_holdout_gives_way(folder):
    def scorer(examples, data, num_tried):
        return lambda weights: [Outcome(float(weights["dark"] <= 0.5))] * len(examples)

    found = resolve_preference(comparison_recipe(folder, {"mmd": {"holdout": 0.2}}), scorer=scorer)
    assert dict(found.weights) == {"dark": 0.5, "light": 0.5}
    assert found.explanation["target_examples"] == 40


@pytest.mark.parametrize("part", ["target", "train"])
def test_the_fingerprint_covers_target_and_training_data(folder, part):
    fewer = {"target": {"dataset": "target.parquet", "split": "train[:45]"}}
    if part == "train":
        fewer = {"train": {t: {"dataset": f"{t}.parquet", "split": "train[:30]"} for t in TASKS}}
    first = resolve_preference(comparison_recipe(folder, {"cosine": {}}))
    second = resolve_preference(comparison_recipe(folder, {"cosine": fewer}))
    assert first.data_fingerprint != second.data_fingerprint


def test_the_fingerprint_follows_pixels_and_not_files():
    pictures = images(100, 3, 0)
    kinds = Features({"image": Image()})
    made = Dataset.from_dict({"image": pictures}, features=kinds)
    again = Dataset.from_dict({"image": [picture.copy() for picture in pictures]}, features=kinds)
    other = Dataset.from_dict({"image": pictures[::-1]}, features=kinds)
    assert fingerprint(made, ["image"]) == fingerprint(again, ["image"]) != fingerprint(other, ["image"])


@pytest.mark.parametrize("part", ["target", "train"])
def test_samples_that_are_too_small_are_refused(folder, part):
    few = {"dataset": "dark.parquet", "split": "train[:4]"}
    changes = {"target": few} if part == "target" else {"train": dict.fromkeys(TASKS, few)}
    with pytest.raises(EvaluationError, match=rf"preference.transport.{part}.*4 examples cannot say"):
        resolve_preference(comparison_recipe(folder, {"transport": changes}))


def test_features_are_what_the_classifier_reads(folder):
    model = load_feature_model(ModelPlace(str(folder / "dark")), images=True)
    pictures = images(100, 70, 5)  # more than one batch
    examples = Dataset.from_dict({"image": pictures}, features=Features({"image": Image()}))
    found = features(model, examples, "image")
    (encoded,) = model.encode(pictures)
    with torch.inference_mode():
        states = model.network.vit(**encoded).last_hidden_state[:, 0]
        logits = model.network(**encoded).logits
    assert found.shape == (70, 16)
    assert found == pytest.approx(states.double().numpy(), abs=1e-5)
    classifier = model.network.classifier
    by_hand = (
        found @ classifier.weight.detach().double().numpy().T + classifier.bias.detach().double().numpy()
    )
    assert by_hand == pytest.approx(logits.double().numpy(), abs=1e-5)


SMALL = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_labels": 3,
}


@pytest.mark.parametrize(
    ("network", "pooled"),
    [
        (BertForSequenceClassification(BertConfig(**SMALL)), lambda n, x: n.bert(**x).pooler_output),
        (
            RobertaForSequenceClassification(RobertaConfig(**SMALL, max_position_embeddings=20)),
            lambda n, x: torch.tanh(n.classifier.dense(n.roberta(**x).last_hidden_state[:, 0])),
        ),
        (
            GPT2ForSequenceClassification(
                GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, num_labels=3, pad_token_id=1)
            ),
            lambda n, x: n.transformer(**x).last_hidden_state[:, :2].mean(1),
        ),
    ],
    ids=["bert", "roberta", "gpt2"],
)
def test_features_of_texts_whatever_the_architecture(network, pooled):
    network.eval()
    batch = {"input_ids": torch.tensor([[5, 6, 1, 1]]), "attention_mask": torch.tensor([[1, 1, 0, 0]])}
    model = FeatureModel(network, find_head(network, "x"), lambda texts: [batch], "x")
    with torch.inference_mode():
        wanted = pooled(network, batch)
    assert features(model, Dataset.from_dict({"text": ["any"]}), "text") == pytest.approx(
        wanted.double().numpy(), abs=1e-5
    )


def test_a_text_model_is_loaded_with_its_tokenizer(tmp_path):
    BertForSequenceClassification(BertConfig(**SMALL)).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"])
    )
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    model = load_feature_model(ModelPlace(str(tmp_path)), images=False)
    found = features(model, Dataset.from_dict({"text": ["good", "bad good", "good"]}), "text")
    assert found.shape == (3, 16)
    assert found[0] == pytest.approx(found[2], abs=1e-6)


def test_a_model_without_a_linear_head_is_refused(folder):
    network = tiny_vit(0)
    network.classifier = torch.nn.Identity()
    with pytest.raises(EvaluationError, match="no linear layer with one output per class"):
        find_head(network, "x")


def test_a_folder_that_is_no_classification_model_is_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EvaluationError, match="cannot be loaded for comparing features"):
        load_feature_model(ModelPlace(str(tmp_path)), images=True)


def test_features_of_pinned_checkpoints_come_from_the_pinned_commit(folder, monkeypatch):
    places = []

    def remember(place, *, images):
        places.append(place)
        return load_feature_model(ModelPlace(str(folder / "base")), images=images)

    monkeypatch.setattr("hub_magmax.preference.comparison.load_feature_model", remember)
    models = [{"name": task, "model": f"me/{task}@main"} for task in TASKS]
    recipe = comparison_recipe(folder, {"cosine": {}}, tasks=models)
    pinned = {task: LockedSource(f"me/{task}@main", "hub", f"me/{task}", "c" * 40, ()) for task in TASKS}
    resolve_preference(recipe, sources=pinned)
    resolve_preference(recipe)
    assert places == [
        *(ModelPlace(f"me/{task}", "c" * 40) for task in TASKS),
        *(ModelPlace(f"me/{task}", "main") for task in TASKS),
    ]


def test_the_published_settings_are_the_defaults():
    data = {"target": {"dataset": "x"}, "train": {}}
    transport, mmd, cosine = (
        Preference.model_validate({kind: data}).spec for kind in ("transport", "mmd", "cosine")
    )
    assert (transport.samples, transport.regularisation, transport.temperature) == (500, 0.1, 0.01)
    assert (mmd.temperature, cosine.temperature) == (0.01, 0.02)
    assert (transport.strength, transport.towards, transport.holdout) == (0, None, None)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"train": {"drak": {"dataset": "x"}}}, "there is no task 'drak'; did you mean 'dark'"),
        ({"train": {"dark": {"dataset": "x"}}}, "there is no data for light"),
        ({"towards": {"ligth": 1.0}}, "there is no task 'ligth'; did you mean 'light'"),
        ({"towards": {"light": 0.5}}, "the weights sum to 0.5, expected 1"),
        ({"towards": "unifrom"}, "'unifrom' should be uniform, or a weight"),
        ({"strength": 1.5}, "should be at most 1"),
        ({"holdout": 1}, "holdout"),
        ({"holdout": {"share": 0.2, "if_wrose": "prior"}}, "did you mean 'if_worse'"),
        ({"regularization": 0.1}, "did you mean 'regularisation'"),
        ({"regularisation": 0}, "should be at least 0.001"),
        ({"temperature": 0}, "should be above 0"),
        ({"samples": 4}, "should be at least 5"),
        ({"fit": "mix"}, "fit"),
    ],
)
def test_what_is_wrong_with_an_estimate_is_found_in_the_recipe(folder, options, problem):
    with pytest.raises(RecipeError) as caught:
        comparison_recipe(folder, {"transport": options})
    assert problem in str(caught.value)


@pytest.mark.parametrize("towards", ["uniform", {"dark": 0.25, "light": 0.75}])
def test_an_estimate_survives_being_written_and_read(folder, towards):
    recipe = comparison_recipe(
        folder, {"transport": {"towards": towards, "strength": 0.2, "holdout": {"share": 0.3}}}
    )
    assert parse_recipe(recipe.to_dict(), folder=folder) == recipe
    assert comparison_recipe(folder, {"mmd": {"holdout": 0.3}}) == comparison_recipe(
        folder, {"mmd": {"holdout": {"share": 0.3, "if_worse": "prior"}}}
    )


def test_only_estimates_say_that_they_are():
    data = {"target": {"dataset": "x"}}
    kinds = [{"labels": data | {"classes": {}}}]
    kinds += [{kind: data | {"train": {}}} for kind in ("transport", "mmd", "cosine")]
    assert all(Preference.model_validate(kind).is_estimated for kind in kinds)
    assert not Preference.model_validate({"weights": {"a": 1.0}}).is_estimated
