"""Learning sequences of images and texts with models of a few thousand weights, and data sets on disk."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file

from benchmarks.continual import measuring
from benchmarks.continual.learning import Course, learn_sequence, text_learner
from benchmarks.continual.protocol import Protocol
from benchmarks.continual.results import measure
from benchmarks.continual.sequences import IMAGES, LANGUAGE, image_family, text_family
from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.errors import EvaluationError, OutputError

COURSE = Course(epochs=1, batch_size=8, learning_rate=1e-2)
PROTOCOL = Protocol(
    mixtures=((1, 1),), draws=1, scalings=(0.5,), ratios=(1.0,), sizes=(1,), subsets=1, largest=12
)
WORDS = ("first", "second", "good", "bad", "topic", "mood", "text", "cat", "dog", "red", "blue", "green")


@pytest.fixture(autouse=True)
def _accelerate_as_it_was():
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def _tokenizer(folder, **special):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "</s>", "<unk>", ".", ":", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", **special
    )
    wrapped.save_pretrained(folder)


@pytest.fixture
def few_methods(monkeypatch):
    """Two methods in place of every one, which tests of digits measure."""
    monkeypatch.setattr(measuring, "tried_methods", lambda: [measuring.AVERAGE, measuring.TUNABLE])


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=tower | {"vocab_size": 40, "eos_token_id": 1, "max_position_embeddings": 12},
        vision_config=tower | {"image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    _tokenizer(folder, model_max_length=12)
    side = {"height": 8, "width": 8}
    prepare = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "size": side,
        "crop_size": side,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(prepare))
    return ModelPlace(str(folder))


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("t5")
    config = T5Config(
        vocab_size=40,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    _tokenizer(folder)
    return ModelPlace(str(folder))


@pytest.fixture(scope="module")
def renditions(tmp_path_factory):
    """Forty images in four classes; labels are texts with underscores, and there is a test split only."""
    from datasets import Dataset, Features, Image, Value
    from PIL import Image as Picture

    folder = tmp_path_factory.mktemp("renditions")
    rng = np.random.default_rng(0)
    names = ("great_blue", "dark_red", "green", "wide_grey")
    rows = {
        "image": [
            Picture.fromarray(rng.integers(60 * (n % 4), 60 * (n % 4) + 60, (8, 8, 3), dtype=np.uint8))
            for n in range(40)
        ],
        "class_name": [names[n % 4] for n in range(40)],
    }
    features = Features({"image": Image(), "class_name": Value("string")})
    Dataset.from_dict(rows, features).to_parquet(folder / "test.parquet")
    return IMAGES["imagenet-r"].at(str(folder))


@pytest.fixture
def sequence(tmp_path):
    """Two data sets of texts: labels with names, and labels whose answers the sequence names."""
    from datasets import ClassLabel, Dataset, Features, Value

    text = {"text": ["cat red", "dog blue"] * 6}
    named = Features({"text": Value("string"), "label": ClassLabel(names=["first", "second"])})
    for split in ("train", "test"):
        for name, features in (("topics", named), ("moods", None)):
            path = tmp_path / name / f"{split}.parquet"
            path.parent.mkdir(exist_ok=True)
            Dataset.from_dict(text | {"label": [0, 1] * 6}, features).to_parquet(path)
    path = tmp_path / "two.yaml"
    path.write_text(
        "train_examples: 8\ntest_examples: 12\nmax_new_tokens: 2\ntasks:\n"
        f"  - {{name: topic, dataset: {tmp_path}/topics, inputs: [text]}}\n"
        f"  - {{name: mood, dataset: {tmp_path}/moods, inputs: [text], answers: [bad, good]}}\n"
    )
    return path


def _weights(place):
    return load_file(place / "model.safetensors")


def test_images_are_learned_with_the_text_tower_as_it_was(clip, renditions, tmp_path):
    family = image_family(renditions, tmp_path, 2, 0, model=clip, course=COURSE)
    base, *learned = map(_weights, (family.base_model, *family.tasks.values()))
    for before, after in ((base, learned[0]), (learned[0], learned[1])):
        moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
        assert moved == {"vision_model", "visual_projection"}
    assert family.evaluator["classes"] == ["dark red", "great blue", "green", "wide grey"]
    assert sorted(sum(family.classes.values(), ())) == [0, 1, 2, 3]
    # A fifth of forty is tested, the rest learned, and no image is both.
    assert (len(family.test), sum(map(len, family.train.values()))) == (8, 32)
    shown = [image.tobytes() for part in (family.test, *family.train.values()) for image in part["image"]]
    assert len(set(shown)) == 40
    for task, (name, members) in enumerate(family.classes.items()):
        assert {*family.train[name]["class_name"]} <= {*members}
        assert {*np.array(family.test["class_name"])[family.owners == task]} <= {*members}


@pytest.mark.usefixtures("few_methods")
def test_images_are_measured_like_digits(clip, renditions, tmp_path):
    family = image_family(renditions, tmp_path, 2, 0, model=clip, course=COURSE)
    result = measure(family, PROTOCOL, tmp_path / "scores", at="here")
    assert {row["preference"] for row in result["rows"]} == {
        "uniform",
        "labels",
        "transport",
        "transport, published",
    }


def test_a_run_that_stopped_goes_on_with_the_same_bytes(clip, renditions, tmp_path):
    whole = image_family(renditions, tmp_path / "whole", 2, 0, model=clip, course=COURSE)
    lines = []
    stopped = image_family(renditions, tmp_path / "stopped", 2, 0, model=clip, course=COURSE)
    last = list(stopped.tasks.values())[-1]
    for file in last.iterdir():
        file.unlink()
    last.rename(last.with_name(last.name + ".partial"))
    again = image_family(
        renditions, tmp_path / "stopped", 2, 0, model=clip, course=COURSE, report=lines.append
    )
    assert lines == ["task-02: learned"]
    for mine, wanted in zip(again.tasks.values(), whole.tasks.values(), strict=True):
        assert (mine / "model.safetensors").read_bytes() == (wanted / "model.safetensors").read_bytes()


def test_a_folder_of_other_settings_is_refused(clip, renditions, tmp_path):
    image_family(renditions, tmp_path, 1, 0, model=clip, course=COURSE)
    with pytest.raises(OutputError, match="other settings"):
        image_family(renditions, tmp_path, 1, 0, model=clip, course=Course())


def test_more_tasks_than_classes_are_refused(clip, renditions, tmp_path):
    with pytest.raises(EvaluationError, match="4 classes cannot be divided into 5 tasks"):
        image_family(renditions, tmp_path, 5, 0, model=clip, course=COURSE)


@pytest.mark.usefixtures("few_methods")
def test_texts_are_learned_and_measured_under_the_known_shares(t5, sequence, tmp_path):
    family = text_family(sequence, tmp_path, 0, model=t5, learner=text_learner(), course=COURSE)
    assert family.test[0] == {"text": "topic\ntext: cat red", "label": "first"}
    assert {*np.array(family.test["label"])[family.owners == 1]} == {"good", "bad"}
    result = measure(family, PROTOCOL, tmp_path / "scores", at="here")
    assert {row["preference"] for row in result["rows"]} == {"uniform", "known"}
    assert result["sample_sizes"] == []
    assert list(result["compare"]) == ["known"]


def test_adapters_leave_whole_checkpoints_that_differ_by_products_of_their_rank(t5, sequence, tmp_path):
    learner, course = text_learner(2), replace(COURSE, epochs=4)
    family = text_family(sequence, tmp_path, 0, model=t5, learner=learner, course=course)
    base, *learned = map(_weights, (family.base_model, *family.tasks.values()))
    assert set(base) == set(learned[0])
    moved = {name for name in base if not torch.equal(base[name], learned[-1][name])}
    assert moved == {name for name in base if name.rsplit(".", 2)[-2] in ("q", "v")}
    for number, after in enumerate(learned, 1):
        for name in moved:
            # One product of rank 2 more for each task.
            assert torch.linalg.matrix_rank(after[name] - base[name], atol=1e-6) == 2 * number


def test_learning_teaches_what_it_is_shown(t5, sequence, tmp_path):
    from benchmarks.continual.sequences import labelled_texts

    task = {
        "name": "mood",
        "dataset": str(tmp_path / "moods"),
        "inputs": ["text"],
        "answers": ["bad", "good"],
    }
    examples = labelled_texts(task, "train", 8, 0, tmp_path)
    course = Course(epochs=60, batch_size=8, learning_rate=3e-2)
    _, learned = learn_sequence(text_learner(), t5, {"mood": examples}, tmp_path / "c", course=course, seed=0)
    from hub_magmax.evaluation.evaluators.generation import TextToText
    from hub_magmax.evaluation.evaluators.loading import load_model
    from hub_magmax.evaluation.evaluators.registry import Columns

    kind = TextToText(max_new_tokens=2)
    model = load_model(ModelPlace(str(learned["mood"])), kind.model_class, kind.processor_class, "tests")
    outcomes = kind.outcomes(model, list(kind.encode(model, examples, Columns(), 8)))
    assert all(outcome.score == 1 for outcome in outcomes)


@pytest.mark.parametrize(("name", "number"), [("four", 4), ("fifteen", 15)])
def test_the_shipped_sequences_name_so_many_data_sets(name, number):
    import yaml

    listed = yaml.safe_load((LANGUAGE / f"{name}.yaml").read_text())
    assert len({task["name"] for task in listed["tasks"]}) == number
    allowed = {"name", "dataset", "config", "inputs", "label", "train", "test", "answers"}
    assert all(set(task) <= allowed for task in listed["tasks"])
    assert all(isinstance(answer, str) for task in listed["tasks"] for answer in task.get("answers", ()))
