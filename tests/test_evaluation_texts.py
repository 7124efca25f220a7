"""Texts that models cannot run on, told by name; and those that padding would change, run one by one."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    T5ForSequenceClassification,
)

from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.evaluators import Columns, make_evaluator
from hub_magmax.evaluation.evaluators.loading import LoadedModel, load_model
from hub_magmax.pipeline import run
from hub_magmax.preference.features import features, load_feature_model
from hub_magmax.recipe.loading import parse_recipe
from tests.families import recipe_values

WORDS = ["<pad>", "</s>", "<unk>", *"abcdefgh"]
SMALL = {
    "vocab_size": len(WORDS), "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 8, "max_position_embeddings": 8, "pad_token_id": 0,
}  # fmt: skip
CLASSIFY, ROWS = "text-classification", {"text": ["a b c", "d e f g h"], "label": [0, 1]}


def tokenizer(*more: str, pads: bool = True, ends: bool = False) -> PreTrainedTokenizerFast:
    words = {word: number for number, word in enumerate([*WORDS, *more])}
    made = Tokenizer(WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if ends:
        made.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    named = {"pad_token": "<pad>"} if pads else {}
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>", **named)


def bert(**changes):
    return BertForSequenceClassification(BertConfig(**SMALL | {"num_labels": 3} | changes))


def llama(made=LlamaForSequenceClassification, **changes):
    named = {"num_labels": 3, "bos_token_id": None, "eos_token_id": 1, "initializer_range": 0.5}
    return made(LlamaConfig(**SMALL | named | changes))


def t5(made=T5ForSequenceClassification, **changes):
    sizes = {"vocab_size": len(WORDS), "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    named = {"eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0, "num_labels": 3}
    return made(T5Config(**sizes | named | changes))


def bart():
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=len(WORDS), d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=8,
            eos_token_id=1, pad_token_id=0, bos_token_id=0, decoder_start_token_id=0, forced_eos_token_id=1,
        )
    )  # fmt: skip


def saved(folder: Path, network, words: PreTrainedTokenizerFast | None) -> ModelPlace:
    network.save_pretrained(folder)
    if words is not None:
        words.save_pretrained(folder)
    return ModelPlace(str(folder))


def loaded(place: ModelPlace, name: str) -> LoadedModel:
    kind = make_evaluator(name, {})
    return load_model(place, kind.model_class, kind.processor_class, "a test")


def answers(model: LoadedModel, name: str, rows, batch_size=4, **options):
    found = make_evaluator(name, options)
    return found.outcomes(model, found.encode(model, Dataset.from_dict(rows), Columns(), batch_size))


def scored(folder, network, words, name=CLASSIFY, rows=ROWS, batch_size=4, **options):
    torch.manual_seed(0)
    return answers(loaded(saved(folder, network(), words), name), name, rows, batch_size, **options)


CHOICES = {"question": ["a b"], "choices": [["c", "new"]], "label": [0]}


def llama_for_texts():
    return llama(LlamaForCausalLM)


def regression():
    return bert(num_labels=1)


NEW, ALONE = tokenizer("new"), {"text": ["a new"], "label": [0]}


@pytest.mark.parametrize(
    ("network", "words", "name", "rows", "match"),
    [
        (t5, tokenizer(), CLASSIFY, ROWS, r"puts no end of text \(token 1\) behind a text"),
        (bert, NEW, CLASSIFY, ALONE, r"token 11 \('new'\).* 11 tokens"),
        (llama_for_texts, NEW, "log-likelihood", ALONE, "token 11"),
        (llama_for_texts, NEW, "multiple-choice", CHOICES, "token 11"),
        (bert, tokenizer(), CLASSIFY, {"text": ["a", ""], "label": [0, 1]}, "the text '' has no tokens"),
        (bert, tokenizer(), CLASSIFY, {"text": ["a", None], "label": [0, 1]}, "None is no text"),
        (bert, tokenizer(), CLASSIFY, {"text": [1, 2], "label": [0, 1]}, "1 is no text"),
        (bert, None, CLASSIFY, ROWS, "there is no tokenizer beside the model"),
        (regression, tokenizer(), CLASSIFY, ALONE, "as of a regression"),
        (
            llama_for_texts,
            tokenizer(),
            "log-likelihood",
            {"text": ["a b", None]},
            "an example has nothing in the column 'text'",
        ),
        (
            lambda: t5(T5ForConditionalGeneration, decoder_start_token_id=None),
            tokenizer(),
            "text-to-text",
            {"text": ["a"], "label": ["b"]},
            r"transformers cannot run it on these examples \(ValueError: `decoder_start_token_id`",
        ),
    ],
)  # fmt: skip
def test_what_a_model_cannot_run_on_is_told(tmp_path, network, words, name, rows, match):
    with pytest.raises(EvaluationError, match=match):
        scored(tmp_path, network, words, name, rows)


def test_files_and_configurations_of_other_shapes_are_told_by_the_tensor(tmp_path):
    place = saved(tmp_path, bert(), tokenizer())
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {"id2label": {"0": "x", "1": "y"}, "label2id": {"x": 0, "y": 1}}
    path.write_text(json.dumps(config))
    with pytest.raises(EvaluationError, match=r"classifier\.bias is \[3\] in its files, and \[2\] by its"):
        loaded(place, CLASSIFY)


LONG = {"text": ["a b c d e f g h a b c d", "a b"], "label": [0, 1]}


@pytest.mark.parametrize(
    ("network", "places"),
    [
        (bert, 8),
        (lambda: RobertaForSequenceClassification(RobertaConfig(**SMALL | {"num_labels": 3})), 7),
        (lambda: GPT2ForSequenceClassification(GPT2Config(**SMALL | {"num_labels": 3})), 8),
        (llama, 8),
    ],
)
def test_texts_are_cut_where_the_models_context_ends_though_the_tokenizer_has_no_limit(
    tmp_path, network, places
):
    long, short = scored(tmp_path, network, tokenizer(), rows=LONG)
    assert (long.is_cut, short.is_cut) == (True, False)
    cut = {"text": [" ".join(LONG["text"][0].split()[:places])], "label": [0]}
    (same,) = answers(loaded(ModelPlace(str(tmp_path)), CLASSIFY), CLASSIFY, cut)
    assert same.probability == pytest.approx(long.probability) and not same.is_cut


def test_long_texts_are_cut_for_models_of_sequences(tmp_path):
    rows = {"text": LONG["text"], "label": ["a", "b"]}
    assert [o.is_cut for o in scored(tmp_path, bart, tokenizer(), "text-to-text", rows)] == [True, False]


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (lambda: llama(pad_token_id=None), tokenizer(pads=False)),
        (lambda: llama(pad_token_id=None), tokenizer()),
        (lambda: llama(pad_token_id=2), tokenizer()),
        (llama, tokenizer()),
        (bert, tokenizer(pads=False)),
        (t5, tokenizer(ends=True)),
    ],
    ids=["none", "tokenizer", "others", "both", "encoder", "ends"],
)
def test_the_size_of_batches_changes_no_answer_whatever_pads(tmp_path, network, words):
    rows = {"text": ["a b c", "d e f g h", "a </s> b", "c"], "label": [0, 1, 2, 0]}
    together = scored(tmp_path, network, words, rows=rows)
    alone = scored(tmp_path, network, words, rows=rows, batch_size=1)
    for one, other in zip(together, alone, strict=True):
        assert one.probability == pytest.approx(other.probability, abs=1e-5)


def test_sequences_are_made_without_a_token_that_pads(tmp_path):
    def network():
        return t5(T5ForConditionalGeneration)

    rows = {"text": ["a b c", "d"], "label": ["a", "b"]}
    assert len(scored(tmp_path, network, tokenizer(pads=False), "text-to-text", rows)) == 2


def test_features_are_those_of_texts_one_by_one_without_a_token_that_pads(tmp_path):
    torch.manual_seed(0)
    place = saved(tmp_path, llama(pad_token_id=None), tokenizer(pads=False))
    model, rows = load_feature_model(place, images=False), Dataset.from_dict(ROWS)
    together = features(model, rows, "text")
    assert together.shape == (2, 8)
    assert together[1] == pytest.approx(features(model, rows.select([1]), "text")[0], abs=1e-6)


def test_a_tokenizer_that_does_not_fit_is_told_before_the_merge(tmp_path):
    torch.manual_seed(0)
    network = bert()
    for name in ("base", "a"):
        saved(tmp_path / name, network, NEW)
        with torch.no_grad():
            network.classifier.weight.add_(0.01)
    Dataset.from_dict({"text": ["a b", "new"], "label": [0, 1]}).to_json(tmp_path / "rows.jsonl")
    evaluation = {"evaluator": CLASSIFY, "tasks": {"a": {"dataset": "./rows.jsonl"}}}
    recipe = parse_recipe(recipe_values(("a",), evaluation=evaluation), folder=tmp_path)
    with pytest.raises(EvaluationError, match="gives the token 11") as found:
        run(recipe)
    assert found.value.problems[0].key == ("evaluation", "tasks", "a")
    assert not list(tmp_path.glob("*.partial")) and not recipe.output_path.exists()
