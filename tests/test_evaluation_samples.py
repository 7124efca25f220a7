"""Examples as the models see and answer them."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from hub_magmax.cli import main
from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.samples import samples, table
from hub_magmax.evaluation.scores import read_scores
from hub_magmax.evaluation.scoring import evaluate
from hub_magmax.pipeline import lock, plan
from hub_magmax.publishing.pushing import push
from hub_magmax.recipe.loading import parse_recipe
from tests.families import recipe_values
from tests.test_cli import call
from tests.tiny_llama import write_llama

ROWS = {
    "question": ["was it good?", "the film\nwas\x1b[31m", "a token hf_" + "a" * 30],
    "choices": [[" good", " bad"], ["odd", "bad one"], ["a", "b"]],
    "text": ["good film", "bad", "an odd one"],
    "label": [1, 0, 0],
}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    write_llama(folder / "base")
    for seed, name in enumerate("ab"):
        write_llama(folder / name)
        network = LlamaForCausalLM.from_pretrained(folder / "base")
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        network.save_pretrained(folder / name)
    Dataset.from_dict(ROWS).to_json(folder / "rows.jsonl")
    return folder


def recipe_of(folder, evaluator, **data):
    tasks = {name: {"dataset": "./rows.jsonl", **data} for name in "ab"}
    return parse_recipe(
        recipe_values(("a", "b"), evaluation={"evaluator": evaluator, "tasks": tasks}), folder=folder
    )


def test_choices_are_shown_for_base_own_checkpoint_and_merge(family):
    recipe = recipe_of(family, "multiple-choice")
    locked = lock(recipe)
    seen = samples(recipe, locked, family / "b", 2)
    assert [(s.task, s.index, s.model) for s in seen] == [
        (task, index, model) for task in "ab" for index in (0, 1) for model in ("base_model", task, "merged")
    ]
    scores = evaluate(recipe, locked, family / "b")
    for example in seen:
        assert example.score == scores.get(example.model, example.task).outcomes[example.index]
        assert (example.answer == example.expected) == (example.score == 1)
    assert seen[0].prompt == "was it good?" and seen[0].expected == " bad"
    # The joint is shown as the model gets it.
    assert seen[3].expected == " odd"


def test_after_a_prompt_the_models_own_continuation_is_shown(family):
    recipe = recipe_of(family, "log-likelihood", prompt_column="question")
    (example, *_) = samples(recipe, lock(recipe), family / "b", 1)
    network, words = (
        AutoModelForCausalLM.from_pretrained(family / "base"),
        AutoTokenizer.from_pretrained(family / "base"),
    )
    tokens = words("was it good?")["input_ids"]
    for _ in words(" good film")["input_ids"]:  # greedily, without a cache
        with torch.no_grad():
            tokens.append(int(network(torch.tensor([tokens])).logits[0, -1].argmax()))
    start = len(words("was it good?")["input_ids"])
    assert example.answer == words.decode(tokens[start:], skip_special_tokens=True)
    assert example.expected == " good film"


def test_texts_are_neutralised_in_the_table_and_in_the_values(family):
    recipe = recipe_of(family, "multiple-choice")
    seen = samples(recipe, lock(recipe), family / "b", 3)
    text = table(seen)
    for shown in (text, json.dumps([s.to_dict() for s in seen])):
        assert "\x1b" not in shown and "a" * 20 not in shown and "hf_…" in shown.replace("\\u2026", "…")
    assert "\\u001b[31m" in text
    first = text.split("\n\n")[0].split("\n")
    assert first[0] == "a, example 0"
    assert first[1].split() == ["prompt", '"was', "it", 'good?"']
    # Joint and line breaks are seen: quotation marks stand at the ends, later lines below the first one.
    assert first[2].endswith('  " bad"')
    assert text.split("\n\n")[1].split("\n")[1:3] == ['  prompt      "the film', f'{" " * 15}was\\u001b[31m"']
    assert [line.split()[0] for line in first[2:]] == ["expected", "base_model", "a", "merged"]


def test_evaluator_that_shows_nothing_gives_inputs_labels_and_scores(family, monkeypatch):
    monkeypatch.delattr("hub_magmax.evaluation.evaluators.causal.LogLikelihood.samples")
    recipe = recipe_of(family, "log-likelihood")
    (example, *_) = samples(recipe, lock(recipe), family / "b", 1)
    assert (example.prompt, example.answer, example.expected) == ("good film", None, "1")
    assert table([example]).endswith(f"base_model  {example.score:.4g} nats per token")


def test_right_and_wrong_answers_are_called_so(family):
    recipe = recipe_of(family, "multiple-choice")
    seen = samples(recipe, lock(recipe), family / "b", 3)
    assert {s.judged for s in seen} == {"right", "wrong"}
    assert all((s.judged == "right") == (s.score == 1) for s in seen)
    shown = [line.split()[1] for line in table(seen).splitlines() if line.startswith("  merged")]
    assert shown == [s.judged for s in seen if s.model == "merged"]
    assert seen[0].to_dict()["judged"] == seen[0].judged


def test_examples_that_an_evaluator_brings_are_not_shown(family):
    recipe = recipe_of(family, "lm-eval")
    with pytest.raises(EvaluationError, match="names no examples that could be shown"):
        samples(recipe, lock(recipe), family / "b", 1)


def test_the_verb_shows_samples_and_writes_nothing(family, tmp_path):
    from hub_magmax.merging.execution import merge

    recipe = recipe_of(family, "multiple-choice")
    path = family / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    merge(plan(recipe), family / "merged")
    before = {file.name: file.stat().st_mtime_ns for file in (family / "merged").iterdir()}
    found = CliRunner().invoke(main, ["evaluate", str(path), "--samples", "1", "--json"])
    assert found.exit_code == 0, found.output
    assert [s["model"] for s in json.loads(found.stdout)["samples"]] == [
        "base_model", "a", "merged", "base_model", "b", "merged",
    ]  # fmt: skip
    assert before == {file.name: file.stat().st_mtime_ns for file in (family / "merged").iterdir()}


def test_a_second_evaluator_scores_the_same_model_beside_its_recipe(family, tmp_path):
    """As docs/evaluation.md says: by a second recipe, or by another value on the command line."""
    folder = shutil.copytree(family, tmp_path / "work")
    first = recipe_of(folder, "log-likelihood", prompt_column="question").to_dict()
    second = recipe_of(folder, "multiple-choice", prompt_column="question").to_dict()
    for name, values in {"mix": first, "choices": second}.items():
        (folder / f"{name}.yaml").write_text(json.dumps(values))
    code, _, err = call("run", folder / "mix.yaml")
    assert code == 0, err
    before = {path: path.read_bytes() for path in (folder / "merged").iterdir()}
    code, out, err = call("evaluate", folder / "choices.yaml")
    assert code == 0 and "choices.scores.json" in err and "accuracy" in out
    assert call("evaluate", folder / "mix.yaml", "--set", "evaluation.evaluator=multiple-choice")[1] == out
    (folder / "merged").rename(folder / "elsewhere")
    assert call("evaluate", folder / "choices.yaml", "--output", folder / "elsewhere")[1] == out
    assert {folder / "merged" / p.name: p.read_bytes() for p in (folder / "elsewhere").iterdir()} == before


def test_scores_of_a_second_evaluator_go_with_the_model_and_on_its_card(family, tmp_path, hub):
    folder = shutil.copytree(family, tmp_path / "work")
    first = recipe_of(folder, "log-likelihood", prompt_column="question").to_dict()
    second = recipe_of(folder, "multiple-choice", prompt_column="question").to_dict()
    for name, values in {"mix": first, "choices": second}.items():
        (folder / f"{name}.yaml").write_text(json.dumps(values))
    merged = folder / "merged"
    assert call("run", folder / "mix.yaml")[0] == 0
    own = (merged / "scores.json").read_bytes()
    assert "Other measurements" not in (merged / "README.md").read_text()
    code, _, err = call("evaluate", folder / "choices.yaml")
    assert "--on-card puts them on the model's card" in err
    code, _, err = call("evaluate", folder / "choices.yaml", "--on-card")
    assert code == 0 and "README.md, with these scores" in err
    assert (merged / "scores.json").read_bytes() == own
    card = (merged / "README.md").read_text()
    table = card.partition(
        "By the evaluation of `choices`:\n\n| task | base model | own checkpoint | merged |\n"
    )[2]
    assert table and card.index("## Other measurements") < card.index("## How to load it")
    found = read_scores(merged, "choices.").get("merged", "a")
    assert f"| {found.value:.3f} [{found.low:.3f}, {found.high:.3f}] |\n" in table.split("\n\n")[0] + "\n"
    assert "accuracy, a share from 0 to 1; higher is better" in table
    assert "nats per token" in card.partition("## Other measurements")[0]
    assert call("card", folder / "mix.yaml")[0] == 0 and (merged / "README.md").read_text() == card
    assert call("push", merged, "me/two-evaluators")[0] == 0
    assert b"By the evaluation of `choices`" in hub.read("me/two-evaluators", "README.md")
    assert call("verify", "me/two-evaluators")[0] == 0
    for name in ("choices.scores.json", "choices.outcomes.json"):
        assert hub.read("me/two-evaluators", name) == (merged / name).read_bytes()
        (merged / name).unlink()
    push(merged, "me/two-evaluators")
    assert not any("choices" in name for name in hub.files("me/two-evaluators"))
