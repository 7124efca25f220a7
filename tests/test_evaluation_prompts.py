"""Prompts and answers of language models, against plain scripts with transformers."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.errors import EvaluationError, LockError, RecipeError
from hub_magmax.evaluation.data import check_local_data, data_of, load_examples, pin_local_data
from hub_magmax.evaluation.evaluators import (
    Columns,
    columns_of,
    described_examples,
    described_inputs,
    make_evaluator,
)
from hub_magmax.evaluation.evaluators.likelihoods import Row, log_likelihoods
from hub_magmax.evaluation.evaluators.loading import load_model
from hub_magmax.evaluation.scores import read_scores, write_scores
from hub_magmax.evaluation.scoring import evaluate
from hub_magmax.pipeline import lock
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.recipe.values import Data
from tests.families import recipe_values
from tests.tiny_llama import CHAT, write_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(folder):
    return load_model(ModelPlace(str(folder)), "AutoModelForCausalLM", "AutoTokenizer", "a test")


def by_hand(folder, before: str, answer: str, *, per_token: bool = False) -> float:
    """Return the log-probability of `answer` after `before`, token by token, as a script would do it."""
    network, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    alone, both = words(before)["input_ids"], words(before + answer)["input_ids"]
    assert both[: len(alone)] == alone
    with torch.no_grad():
        logits = network(torch.tensor([both])).logits[0].double().log_softmax(-1)
    found = [float(logits[place - 1, both[place]]) for place in range(len(alone), len(both))]
    return sum(found) / (len(found) if per_token else 1)


def run(model, name, rows, data=None, **options):
    found = make_evaluator(name, options)
    columns = columns_of(data) if data else Columns()
    return found.outcomes(model, list(found.encode(model, Dataset.from_dict(rows), columns, 2)))


def written(folder, rows, **keys):
    """Return examples as they are loaded, and how the recipe names them."""
    Dataset.from_dict(rows).to_json(folder / "rows.jsonl")
    data = Data(dataset=str(folder / "rows.jsonl"), **keys)
    return load_examples(data, folder, labelled=False), data


def test_after_a_prompt_only_the_answer_counts(folder, model):
    rows = {"question": ["was it good?", "odd"], "text": [" good or bad", "an odd film"]}
    data = Data(dataset="x", prompt_column="question")
    found = run(model, "log-likelihood", rows, data)
    expected = [
        by_hand(folder, "was it good?", " good or bad", per_token=True),
        by_hand(folder, "odd", " an odd film", per_token=True),
    ]
    assert [outcome.score for outcome in found] == pytest.approx(expected, abs=1e-6)


def test_choices_that_bring_their_space_are_taken_as_they_are(folder, model):
    plain = {"question": ["the film was", "answer:"], "choices": [["good", "bad"], ["odd", "a bad one"]]}
    spaced = plain | {"choices": [[" good", " bad"], [" odd", " a bad one"]]}
    label = {"label": [0, 1]}
    found = run(model, "multiple-choice", spaced | label)
    assert run(model, "multiple-choice", plain | label) == found
    for question, choices, right, outcome in zip(*spaced.values(), [0, 1], found, strict=True):
        scores = torch.tensor([by_hand(folder, question, choice) for choice in choices]).double()
        assert outcome.probability == pytest.approx(float(scores.softmax(0)[right]), abs=1e-6)
        assert outcome.score == float(int(scores.argmax()) == right)
    # A prompt may bring the white space as well, and then nothing is inserted either.
    ended = spaced | label | {"question": ["the film was ", "answer: "], "choices": plain["choices"]}
    assert run(model, "multiple-choice", ended) == found


@pytest.mark.parametrize(
    ("options", "inserted", "said"),
    [
        ({"delimiter": ""}, "", "nothing between prompt and answer"),
        ({"delimiter": "\n"}, "\n", "'\\n' between prompt and answer"),
        ({}, " ", "a space between prompt and answer, where neither has white space there"),
    ],
)
def test_what_goes_between_can_be_written_and_is_said(folder, model, options, inserted, said):
    rows = {"question": ["the film"], "choices": [["good", "bad"]], "label": ["bad"]}
    (outcome,) = run(model, "multiple-choice", rows, **options)
    scores = torch.tensor([by_hand(folder, "the film", inserted + choice) for choice in ("good", "bad")])
    assert outcome.probability == pytest.approx(float(scores.softmax(0)[1]), abs=1e-5)
    assert make_evaluator("multiple-choice", options).describe_inputs() == {"joint": said}


def test_multiple_choice_says_what_decides_from_where_and_between_how_many(tmp_path):
    rows = {"question": ["a", "b"], "choices": [["x", "y"], ["x", "y", "z"]], "label": [0, 1]}
    examples, data = written(tmp_path, rows)
    kind = make_evaluator("multiple-choice", {})
    assert described_examples(kind, examples, data) == {"choices": "2 to 3", "question": "question"}
    assert described_inputs(kind, data)["judged"] == (
        "the choice with the highest sum of its tokens' log-probabilities"
    )
    whole = make_evaluator("multiple-choice", {"per_token": True})
    assert "highest mean of" in described_inputs(whole, data)["judged"]
    examples, data = written(tmp_path, rows, prompt_column="question")
    assert described_examples(kind, examples.select([0]), data) == {"choices": "2"}
    assert described_inputs(kind, data)["prompt_column"] == "question"
    assert described_examples(kind, "sciq", data) == {}


def test_label_may_be_an_answer_without_its_space(model):
    rows = {"question": ["the"], "choices": [[" good", " bad"]], "label": ["bad"]}
    assert run(model, "multiple-choice", rows) == run(model, "multiple-choice", rows | {"label": [1]})


def test_template_makes_the_prompt_from_columns(folder, model, tmp_path):
    rows = {"film": ["odd one", "bad"], "year": [2001, 1999], "text": [" good", " bad"]}
    template = "review {{ year }}: {{ film | upper }}\nanswer:"
    examples, data = written(tmp_path, rows, template=template)
    kind = make_evaluator("log-likelihood", {})
    found = kind.outcomes(model, kind.encode(model, examples, columns_of(data), 1))
    expected = [
        by_hand(folder, f"review {year}: {film.upper()}\nanswer:", text, per_token=True)
        for film, year, text in zip(*rows.values(), strict=True)
    ]
    assert [outcome.score for outcome in found] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ film }} {{ genre }}", "there is no column 'genre'"),
        ("{{ film.__class__.__mro__ }}", "SecurityError"),
        ("{% include '/etc/passwd' %}{{ film }}", "no loader"),
        ("{{ 1 // (film | length - 3) }}", "ZeroDivisionError"),
    ],
)
def test_template_that_cannot_be_filled_in_is_one_sentence(tmp_path, template, problem):
    with pytest.raises(EvaluationError, match=problem):
        written(tmp_path, {"film": ["odd"], "text": ["x"]}, template=template)


@pytest.mark.parametrize(
    ("evaluator", "data", "problem"),
    [
        ("multiple-choice", {"template": "{{ film"}, r"template.*no Jinja2 template"),
        ("multiple-choice", {"template": "review: {film}"}, r"uses no column.*\{\{question\}\}"),
        ("multiple-choice", {"template": "{{ a }}", "prompt_column": "a"}, "name one of them"),
        ("multiple-choice", {"few_shot": {"count": 2, "split": "test"}}, "name another split"),
        ("image-classification", {"prompt_column": "a"}, "image-classification has no prompts"),
        ("text-classification", {"few_shot": {"count": 2}}, "text-classification has no prompts"),
    ],
)
def test_prompts_that_cannot_be_are_reported_with_the_recipe(evaluator, data, problem):
    evaluation = {"evaluator": evaluator, "tasks": {"a": {"dataset": "./x.jsonl"} | data}}
    with pytest.raises(RecipeError, match=problem):
        parse_recipe(recipe_values(("a",), evaluation=evaluation))


SHOTS = {"question": ["one", "two", "six"], "choices": [["good", "bad"]] * 3, "label": [0, 1, 1]}


def shot_recipe(folder, tmp_path, **keys):
    """Return a recipe whose test has two questions, and two solved ones before each."""
    Dataset.from_dict(SHOTS).to_json(tmp_path / "shots.jsonl")
    asked = {"question": ["the film", "a review"], "choices": [["good", "bad"], [" odd", " bad"]]}
    Dataset.from_dict(asked | {"label": [1, 0]}).to_json(tmp_path / "rows.jsonl")
    data = {"dataset": "./rows.jsonl", "few_shot": {"count": 2, "dataset": "./shots.jsonl", **keys}}
    values = recipe_values(("a",), evaluation={"evaluator": "multiple-choice", "tasks": {"a": data}})
    values |= {"base_model": str(folder), "tasks": [{"name": "a", "model": str(folder)}]}
    return parse_recipe(values, folder=tmp_path), asked


def test_solved_examples_stand_before_every_prompt(folder, tmp_path):
    recipe, asked = shot_recipe(folder, tmp_path, seed=3)
    scores = evaluate(recipe, lock(recipe), folder)
    solved = [f"{q} {c[n]}\n\n" for q, c, n in zip(*SHOTS.values(), strict=True)]
    orders = [a + b for a in solved for b in solved if a != b]
    answers = [[" good", " bad"], [" odd", " bad"]]

    def probabilities(before):
        for question, choices, right in zip(asked["question"], answers, (1, 0), strict=True):
            found = torch.tensor([by_hand(folder, before + question, choice) for choice in choices])
            yield float(found.softmax(0)[right])

    found = scores.get("base_model", "a").probabilities
    same = [before for before in orders if list(probabilities(before)) == pytest.approx(found, abs=2e-6)]
    assert len(same) == 1
    assert scores.data["a"]["few_shot"] == "2 of ./shots.jsonl, split train, seed 3"
    again, _ = shot_recipe(folder, tmp_path, seed=3)
    assert evaluate(again, lock(again), folder) == scores


def test_data_of_solved_examples_is_pinned_and_watched(folder, tmp_path):
    recipe, _ = shot_recipe(folder, tmp_path)
    assert [data.dataset for data in data_of(recipe)] == ["./rows.jsonl", "./shots.jsonl"]
    pins = pin_local_data(recipe)
    (tmp_path / "shots.jsonl").write_text("{}")
    with pytest.raises(LockError, match=r"shots\.jsonl"):
        check_local_data(recipe.evaluation.tasks.values(), recipe, pins)


def test_more_solved_examples_than_there_are_is_refused(folder, tmp_path):
    recipe, _ = shot_recipe(folder, tmp_path, count=4)
    with pytest.raises(EvaluationError, match="4 solved examples are asked for, and there are 3"):
        evaluate(recipe, lock(recipe), folder)


def test_chat_template_of_the_model_makes_the_turns(folder, tmp_path):
    write_llama(tmp_path)
    words = AutoTokenizer.from_pretrained(tmp_path)
    words.chat_template = CHAT
    words.save_pretrained(tmp_path)
    model = load_model(ModelPlace(str(tmp_path)), "AutoModelForCausalLM", "AutoTokenizer", "a test")
    rows = {
        "question": ["was it?"],
        "text": ["good"],
        "shots": [json.dumps([{"question": "a", "text": "b"}])],
    }
    columns = Columns(prompt="question", shots="shots")
    kind = make_evaluator("log-likelihood", {"chat_template": True})
    (found,) = kind.outcomes(model, kind.encode(model, Dataset.from_dict(rows), columns, 1))
    before = "<|user|>a\n<|assistant|>b\n<|user|>was it?\n<|assistant|>"
    assert found.score == pytest.approx(by_hand(folder, before, "good", per_token=True), abs=1e-6)


def test_model_without_a_chat_template_is_named(model, folder):
    rows = {"question": ["the"], "choices": [["a", "b"]], "label": [0]}
    with pytest.raises(EvaluationError, match=f"{folder}: the tokenizer has no chat template"):
        run(model, "multiple-choice", rows, chat_template=True)


def test_prompts_beyond_the_context_lose_their_beginning_and_are_counted(tmp_path):
    write_llama(tmp_path, context=8)
    rows = {"question": ["good bad odd " * 9, "a film"], "text": [" good bad", " bad"]}
    Dataset.from_dict(rows).to_json(tmp_path / "rows.jsonl")
    data = {"dataset": "./rows.jsonl", "prompt_column": "question"}
    values = recipe_values(("a",), evaluation={"evaluator": "log-likelihood", "tasks": {"a": data}})
    values |= {"base_model": str(tmp_path), "tasks": [{"name": "a", "model": str(tmp_path)}]}
    recipe = parse_recipe(values, folder=tmp_path)
    scores = evaluate(recipe, lock(recipe), tmp_path)
    network, words = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    tokens = words(rows["question"][0].rstrip() + "  good bad")["input_ids"][-9:]
    with torch.no_grad():  # eight tokens in, and what they say of the last ones
        logits = network(torch.tensor([tokens[:-1]])).logits[0].double().log_softmax(-1)
    score = scores.get("merged", "a")
    answer = len(words("  good bad")["input_ids"])
    wanted = [float(logits[-n, tokens[-n]]) for n in range(answer, 0, -1)]
    assert score.outcomes[0] == pytest.approx(sum(wanted) / len(wanted), abs=1e-6)
    assert score.num_cut == 1
    line = "a: 1 of 2 examples are beyond the context of merged, and a part of each was left out"
    assert line in scores.table().split("\n")
    write_scores(scores, tmp_path)
    assert read_scores(tmp_path) == scores


def test_data_without_prompts_keeps_its_digest():
    evaluation = {"evaluator": "multiple-choice", "tasks": {"a": {"dataset": "./x.jsonl"}}}
    recipe = parse_recipe(recipe_values(("a",), evaluation=evaluation))
    assert set(recipe.evaluation.model_dump()["tasks"]["a"]) == {
        "dataset", "config", "split", "revision", "input_column", "label_column",
    }  # fmt: skip


@pytest.mark.parametrize(("column", "rows"), [("text", ["", "x y"]), ("question", ["a", "b"])])
def test_text_of_which_nothing_can_be_scored_is_an_error(model, column, rows):
    data = Data(dataset="x", prompt_column="question") if column == "question" else None
    with pytest.raises(EvaluationError, match=r"fewer than two tokens|an answer is empty"):
        run(model, "log-likelihood", {column: rows} | ({} if column == "text" else {"text": ["", "b"]}), data)


def test_choices_of_one_token_and_beginnings_of_other_rows_run_once(folder, model, monkeypatch):
    rows = [
        Row([1, 5, 6, 7], 3),
        Row([1, 5, 6, 9], 3),  # the same input, another answer
        Row([1, 5, 8], 2),  # its input begins that of the others
        Row([1, 5, 6, 7, 3], 3),  # its input is the first row whole
        Row([1, 4, 6], 2),
        Row([2, 3], 1),
    ]
    sizes = []
    forward = model.network.forward

    def counted(input_ids, **inputs):
        sizes.append(tuple(input_ids.shape))
        return forward(input_ids=input_ids, **inputs)

    with monkeypatch.context() as patch:
        patch.setattr(model.network, "forward", counted)
        found = log_likelihoods(model, rows)
    assert sizes == [(3, 4)]
    alone = [log_likelihoods(model, [row])[0] for row in rows]
    assert found == pytest.approx(alone, abs=1e-5)
