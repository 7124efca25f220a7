"""Each evaluator on a tiny model of its kind whose answers are known."""

import json
import math
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PillowImage
from pydantic import ValidationError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.errors import EvaluationError, MissingDependencyError, RecipeError
from hub_magmax.evaluation.evaluators import (
    Columns,
    Outcome,
    evaluator,
    evaluator_names,
    evaluator_of,
    get_evaluator,
    make_evaluator,
)
from hub_magmax.evaluation.evaluators.loading import LoadedModel, load_model
from hub_magmax.evaluation.scores import Scores, read_scores, write_scores
from hub_magmax.evaluation.scoring import evaluate
from hub_magmax.pipeline import lock
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.registry import EVALUATORS
from tests.families import recipe_values

WORDS = ("[pad]", "</s>", "[unk]", "the", "cat", "dog", "sat", "ran", "red", "blue")


def word_tokenizer() -> PreTrainedTokenizerFast:
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[unk]"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="[pad]", eos_token="</s>", unk_token="[unk]", bos_token="</s>",
        model_max_length=16,
    )  # fmt: skip


def loaded(name: str, folder: Path) -> LoadedModel:
    kind = make_evaluator(name, {"classes": ("red", "blue")} if name.startswith("zero") else {})
    return load_model(ModelPlace(str(folder)), kind.model_class, kind.processor_class, "a test")


def outcomes(name: str, model: LoadedModel, examples: Dataset, batch_size=2, columns=None, **options):
    found = make_evaluator(name, options)
    return found.outcomes(model, found.encode(model, examples, columns or Columns(), batch_size))


@pytest.fixture(scope="module")
def causal(tmp_path_factory) -> Path:
    """A GPT-2 of random weights over ten words."""
    folder = tmp_path_factory.mktemp("causal")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(WORDS), n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def by_hand(model: LoadedModel, tokens: list[int], first: int) -> float:
    """Return the log-probability of the tokens from `first` on, one at a time, without a batch."""
    total = 0.0
    for place in range(first, len(tokens)):
        with torch.no_grad():
            logits = model.network(torch.tensor([tokens[:place]])).logits[0, -1].double()
        total += float(logits[tokens[place]] - logits.logsumexp(0))
    return total


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_log_likelihood_is_that_of_each_text_alone(causal, batch_size):
    model = loaded("log-likelihood", causal)
    texts = ["the cat sat", "the dog", "red cat ran blue dog"]
    found = outcomes("log-likelihood", model, Dataset.from_dict({"text": texts}), batch_size)
    for text, outcome in zip(texts, found, strict=True):
        tokens = [WORDS.index(word) for word in text.split()]
        mean = by_hand(model, tokens, 1) / (len(tokens) - 1)
        assert outcome.score == pytest.approx(mean, abs=1e-5)
        assert outcome.probability == pytest.approx(math.exp(mean), abs=1e-5)


def test_the_likeliest_answer_is_chosen(causal):
    model = loaded("multiple-choice", causal)
    rows = {
        "question": ["the cat", "the dog", "red"],
        "choices": [["sat", "ran"], ["ran blue", "sat"], ["cat", "dog", "blue"]],
        "answer": [0, 1, 2],
    }
    found = outcomes("multiple-choice", model, Dataset.from_dict(rows), columns=Columns(label="answer"))
    for question, choices, answer, outcome in zip(*rows.values(), found, strict=True):
        start = [WORDS.index(word) for word in question.split()]
        scores = [
            by_hand(model, start + [WORDS.index(w) for w in choice.split()], len(start)) for choice in choices
        ]
        assert outcome.score == float(scores.index(max(scores)) == answer)
        shares = np.exp(scores) / np.exp(scores).sum()
        assert outcome.probability == pytest.approx(shares[answer], abs=1e-5)


def test_answers_of_different_lengths_can_be_compared_by_token(causal):
    model = loaded("multiple-choice", causal)
    rows = Dataset.from_dict({"question": ["the"], "choices": [["cat", "dog sat ran"]], "label": ["cat"]})
    (total,) = outcomes("multiple-choice", model, rows)
    (mean,) = outcomes("multiple-choice", model, rows, per_token=True)
    short, long = by_hand(model, [3, 4], 1), by_hand(model, [3, 5, 6, 7], 1)
    assert total.probability == pytest.approx(1 / (1 + math.exp(long - short)), abs=1e-5)
    assert mean.probability == pytest.approx(1 / (1 + math.exp(long / 3 - short)), abs=1e-5)


def test_label_that_is_none_of_the_answers_is_refused(causal):
    rows = Dataset.from_dict({"question": ["the"], "choices": [["cat", "dog"]], "label": [2]})
    with pytest.raises(EvaluationError, match="the label 2 is none of the answers"):
        outcomes("multiple-choice", loaded("multiple-choice", causal), rows)


@pytest.fixture(scope="module")
def seq2seq(tmp_path_factory) -> Path:
    """A T5 of random weights that answers with words, never with an empty text."""
    folder = tmp_path_factory.mktemp("seq2seq")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(WORDS), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    model.generation_config.suppress_tokens = [0, 1, 2]
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def test_exact_match_of_the_greedy_answer(seq2seq):
    model = loaded("text-to-text", seq2seq)
    encoded = model.processor(["the cat"], return_tensors="pt")
    answer = model.processor.batch_decode(
        model.network.generate(**encoded, max_new_tokens=2, do_sample=False), skip_special_tokens=True
    )[0]
    assert answer.strip()
    rows = {"text": ["the cat"] * 3, "label": [f"  {answer.upper()} ", answer + " x", "cat cat cat"]}
    found = outcomes("text-to-text", model, Dataset.from_dict(rows), batch_size=1, max_new_tokens=2)
    assert [outcome.score for outcome in found] == [1.0, 0.0, 0.0]
    assert all(outcome.probability is None for outcome in found)


def test_numbered_labels_are_compared_by_their_names(seq2seq):
    model = loaded("text-to-text", seq2seq)
    encoded = model.processor(["the cat"], return_tensors="pt")
    generated = model.network.generate(**encoded, max_new_tokens=1, do_sample=False)
    answer = model.processor.batch_decode(generated, skip_special_tokens=True)[0]
    features = Features({"text": Value("string"), "label": ClassLabel(names=["other", answer])})
    rows = Dataset.from_dict({"text": ["the cat"] * 2, "label": [1, 0]}, features=features)
    found = outcomes("text-to-text", model, rows, batch_size=1, max_new_tokens=1)
    assert [outcome.score for outcome in found] == [1.0, 0.0]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A CLIP of random weights for images of 8 by 8."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(1)
    config = CLIPConfig(
        text_config={"vocab_size": len(WORDS), "hidden_size": 8, "intermediate_size": 8,
                     "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16,
                     "eos_token_id": 1},
        vision_config={"image_size": 8, "patch_size": 4, "hidden_size": 8, "intermediate_size": 8,
                       "num_hidden_layers": 1, "num_attention_heads": 2},
        projection_dim=8,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    size = {"height": 8, "width": 8}
    images = CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)
    CLIPProcessor(image_processor=images, tokenizer=word_tokenizer()).save_pretrained(folder)
    return folder


def pictures() -> Dataset:
    rng = np.random.default_rng(0)
    images = [PillowImage.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)) for _ in range(5)]
    features = Features({"image": Image(), "label": ClassLabel(names=["blue", "red"])})
    return Dataset.from_dict({"image": images, "label": [0, 1, 0, 1, 0]}, features=features)


def test_zero_shot_classes_are_directions_of_the_text_tower(clip):
    classes, templates = ("red", "blue"), ("the {}", "{} cat ran")
    model, rows = loaded("zero-shot-image-classification", clip), pictures()
    found = outcomes(
        "zero-shot-image-classification", model, rows, classes=classes, templates=templates, batch_size=2
    )
    head = []
    for name in classes:
        vectors = []
        for template in templates:
            encoded = model.processor(text=[template.format(name)], return_tensors="pt", padding=True)
            with torch.no_grad():
                vector = model.network.get_text_features(**encoded).pooler_output[0].double()
            vectors.append(vector / vector.norm())
        mean = torch.stack(vectors).mean(0)
        head.append(mean / mean.norm())
    for image, label, outcome in zip(rows["image"], rows["label"], found, strict=True):
        with torch.no_grad():
            encoded = model.processor(images=[image], return_tensors="pt")
            seen = model.network.get_image_features(**encoded).pooler_output[0].double()
        logits = torch.stack(head) @ (seen / seen.norm()) * model.network.logit_scale.detach().double().exp()
        wanted = classes.index(["blue", "red"][label])
        assert outcome.score == float(int(logits.argmax()) == wanted)
        assert outcome.probability == pytest.approx(float(logits.softmax(0)[wanted]), abs=1e-4)


def test_zero_shot_class_of_the_data_has_to_be_named(clip):
    model = loaded("zero-shot-image-classification", clip)
    with pytest.raises(EvaluationError, match="no class 'blue'"):
        outcomes("zero-shot-image-classification", model, pictures(), classes=("red", "green"))


def test_other_weights_in_the_same_model_give_what_the_other_folder_gives(causal, tmp_path):
    torch.manual_seed(9)
    other = GPT2LMHeadModel(GPT2Config.from_pretrained(causal))
    other.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    from safetensors.torch import load_file

    rows = Dataset.from_dict({"text": ["the cat sat", "the dog"]})
    model = loaded("log-likelihood", causal)
    replaced = model.with_weights(load_file(tmp_path / "model.safetensors"))
    expected = outcomes("log-likelihood", loaded("log-likelihood", tmp_path), rows)
    assert outcomes("log-likelihood", replaced, rows) == expected
    assert outcomes("log-likelihood", model, rows) != expected


def test_log_likelihoods_reach_the_scores_with_an_interval_of_their_own(causal, tmp_path):
    Dataset.from_dict({"text": ["the cat sat", "the dog", "red cat"]}).to_json(tmp_path / "rows.jsonl")
    tasks = {"a": {"dataset": str(tmp_path / "rows.jsonl")}}
    values = recipe_values(("a",), evaluation={"evaluator": "log-likelihood", "tasks": tasks})
    values |= {"base_model": str(causal), "tasks": [{"name": "a", "model": str(causal)}]}
    recipe = parse_recipe(values, folder=tmp_path)
    scores = evaluate(recipe, lock(recipe), causal)
    found = scores.get("merged", "a")
    assert not scores.is_share and found.low < found.value < found.high < 0
    mean, sd = np.mean(found.outcomes), np.std(found.outcomes, ddof=1)
    assert found.high - mean == pytest.approx(4.302653 * sd / math.sqrt(3))  # t with two degrees of freedom


def scored(causal, folder, name, **options):
    """Return the scores of one task on two texts, for a model that is its own base and merge."""
    Dataset.from_dict({"text": ["ab ab", "abcd abcd"]}).to_json(folder / "rows.jsonl")
    tasks = {"a": {"dataset": str(folder / "rows.jsonl")}}
    values = recipe_values(("a",), evaluation={"evaluator": {"name": name, **options}, "tasks": tasks})
    values |= {"base_model": str(causal), "tasks": [{"name": "a", "model": str(causal)}]}
    recipe = parse_recipe(values, folder=folder)
    return evaluate(recipe, lock(recipe), causal)


def test_scores_say_their_unit_and_direction(causal, tmp_path):
    scores = scored(causal, tmp_path, "log-likelihood")
    assert (scores.unit, scores.higher_is_better) == ("nats per token", True)
    assert scores.table().endswith("\n\nlog-likelihood in nats per token; higher is better")
    write_scores(scores, tmp_path)
    assert read_scores(tmp_path) == scores
    accuracy = Scores("accuracy", "image-classification", (), {})
    assert accuracy.legend == "accuracy, a share from 0 to 1; higher is better"
    assert "unit" not in json.loads(accuracy.to_json())  # older files have none, and keep their digests


def harness(monkeypatch, samples, directions=()):
    """Put a package in the place of lm-eval that returns `samples` and remembers its arguments."""
    seen = {}

    def simple_evaluate(**arguments):
        seen.update(arguments)
        if isinstance(samples, Exception):
            raise samples
        task = arguments["tasks"][0]
        return {"samples": {task: samples}, "higher_is_better": {task: dict(directions)}}

    package, models, huggingface = (ModuleType(name) for name in ("lm_eval", "models", "huggingface"))
    package.simple_evaluate, huggingface.HFLM = simple_evaluate, SimpleNamespace
    names = ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface")
    for name, module in zip(names, (package, models, huggingface), strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    return seen


MODEL = LoadedModel(SimpleNamespace(device="cpu"), "tokenizer", "model")


def test_tasks_of_the_harness_bring_their_own_examples(monkeypatch):
    seen = harness(monkeypatch, [{"acc": 1, "metrics": ["acc"]}, {"acc": 0.0, "metrics": ["acc"]}])
    found = make_evaluator("lm-eval", {"num_fewshot": 2, "limit": 2})
    outcomes = found.outcomes(MODEL, found.encode(MODEL, "sciq", Columns(), 8))
    assert outcomes == [Outcome(1.0), Outcome(0.0)]
    assert (seen["tasks"], seen["num_fewshot"], seen["limit"]) == (["sciq"], 2, 2)
    assert (seen["model"].batch_size, found.metric) == (8, "acc")


def test_measure_that_the_task_does_not_have_is_refused(monkeypatch):
    harness(monkeypatch, [{"acc": 1, "metrics": ["acc"]}])
    found = make_evaluator("lm-eval", {"measure": "f1"})
    with pytest.raises(EvaluationError, match=r"does not measure 'f1'.*one of acc"):
        found.outcomes(MODEL, [("sciq", 8)])


def test_measure_of_the_harness_of_which_less_is_better_is_refused(monkeypatch):
    harness(monkeypatch, [{"ter": 0.2}], {"ter": False, "chrf": True})
    with pytest.raises(EvaluationError, match=r"lower values of 'ter' are better.*one of chrf"):
        make_evaluator("lm-eval", {"measure": "ter"}).outcomes(MODEL, [("wmt", 8)])


def test_task_that_the_harness_does_not_have_is_one_sentence(monkeypatch):
    harness(monkeypatch, KeyError("sciqq"))
    with pytest.raises(EvaluationError, match="lm-eval cannot run the task"):
        make_evaluator("lm-eval", {}).outcomes(MODEL, [("sciqq", 8)])


def test_missing_harness_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "hub-magmax\[lm-eval\]"'):
        make_evaluator("lm-eval", {}).outcomes(MODEL, [("sciq", 8)])


@evaluator("length")
class Length:
    """Texts to their length: what another package may add."""

    metric, is_share, pipeline_tag = "length", False, "text-generation"
    model_class, processor_class = "AutoModelForCausalLM", "AutoTokenizer"
    labelled = False

    def __init__(self, *, factor: float = 1.0) -> None:
        self.factor = factor

    def encode(self, model, examples, columns, batch_size):
        yield examples["text"]

    def outcomes(self, model, batches):
        return [Outcome(self.factor * len(text)) for texts in batches for text in texts]


def test_plugin_is_an_evaluator_like_any_other(monkeypatch, causal, tmp_path):
    point = EntryPoint("length", f"{__name__}:Length", "hub_magmax.evaluators")
    monkeypatch.setitem(vars(EVALUATORS), "plugins", {"length": point})
    assert evaluator_names()[-1] == "length"
    assert scored(causal, tmp_path, "length", factor=2).get("merged", "a").outcomes == (10.0, 18.0)
    monkeypatch.setattr(Length, "higher_is_better", False, raising=False)
    with pytest.raises(EvaluationError, match=r"lower values of 'length'.*return the negative"):
        scored(causal, tmp_path, "length")


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("image-clasification", "did you mean 'image-classification'|Did you mean 'image-classification'"),
        ({"name": "text-to-text", "max_tokens": 3}, "no option 'max_tokens'; did you mean 'max_new_tokens'"),
        ({"name": "zero-shot-image-classification"}, "'classes' is required"),
        ({"name": "zero-shot-image-classification", "classes": ["one"]}, "at least 2"),
    ],
)
def test_wrong_evaluators_are_reported_with_the_recipe(written, problem):
    evaluation = {"evaluator": written, "tasks": {}}
    with pytest.raises(RecipeError, match=problem):
        parse_recipe(recipe_values(("a",), evaluation=evaluation))


def test_every_evaluator_says_what_it_does_and_is_found():
    for name in evaluator_names():
        assert get_evaluator(name).summary.endswith(".")
    with pytest.raises(ValidationError):
        make_evaluator("text-to-text", {"max_new_tokens": 0})


def test_recipes_store_evaluators_with_their_options():
    evaluation = {"evaluator": {"name": "text-to-text", "prefix": "classify: "}, "tasks": {}}
    recipe = parse_recipe(recipe_values(("a",), evaluation=evaluation))
    assert json.loads(json.dumps(recipe.to_dict()))["evaluation"]["evaluator"] == evaluation["evaluator"]
    assert evaluator_of(recipe.evaluation).prefix == "classify: "


def losses(name: str, model: LoadedModel, examples: Dataset, smoothing=0.0, columns=None, **options):
    found = make_evaluator(name, options)
    (batch,) = found.encode(model, examples, columns or Columns(), len(examples))
    return found.losses(model, batch, smoothing)


def test_losses_to_train_by_are_minus_the_logarithms_of_the_scored_probabilities(causal, clip):
    model, rows = (
        loaded("log-likelihood", causal),
        Dataset.from_dict({"text": ["the cat sat", "red dog ran the"]}),
    )
    found = losses("log-likelihood", model, rows)
    scores = [outcome.score for outcome in outcomes("log-likelihood", model, rows)]
    assert found.tolist() == pytest.approx([-score for score in scores], abs=1e-5)
    model, rows = loaded("zero-shot-image-classification", clip), pictures()
    options = {"classes": ("red", "blue"), "templates": ("{} cat ran",)}
    found = losses("zero-shot-image-classification", model, rows, **options)
    scored = outcomes("zero-shot-image-classification", model, rows, **options)
    assert found.tolist() == pytest.approx([-math.log(one.probability) for one in scored], abs=1e-5)
    found.sum().backward()
    assert model.network.visual_projection.weight.grad.abs().sum() > 0
    assert model.network.text_projection.weight.grad is None


def test_a_question_trains_its_right_answer_alone(causal):
    model = loaded("multiple-choice", causal)
    rows = Dataset.from_dict(
        {"question": ["the", "red"], "choices": [["cat", "dog sat ran"]] * 2, "label": [1, 0]}
    )
    found = losses("multiple-choice", model, rows)
    assert found.tolist() == pytest.approx(
        [-by_hand(model, [3, 5, 6, 7], 1) / 3, -by_hand(model, [8, 4], 1)], abs=1e-5
    )


def test_smoothing_spreads_a_share_of_the_target_over_all_answers(causal):
    model, rows = loaded("log-likelihood", causal), Dataset.from_dict({"text": ["the cat"]})
    with torch.no_grad():
        chances = model.network(torch.tensor([[3]])).logits[0, 0].log_softmax(0)
    expected = -0.8 * chances[4] - 0.2 * chances.mean()
    assert losses("log-likelihood", model, rows, 0.2).item() == pytest.approx(expected.item(), abs=1e-6)


def test_a_text_to_text_model_trains_the_tokens_of_the_answer(seq2seq):
    model = loaded("text-to-text", seq2seq)
    rows = Dataset.from_dict({"text": ["the cat", "red"], "label": ["sat", "dog ran"]})
    found = losses("text-to-text", model, rows)
    for text, answer, loss in zip(rows["text"], rows["label"], found.tolist(), strict=True):
        encoded, wanted = (model.processor(words, return_tensors="pt") for words in (text, answer))
        assert loss == pytest.approx(
            model.network(**encoded, labels=wanted["input_ids"]).loss.item(), abs=1e-5
        )
