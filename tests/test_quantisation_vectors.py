"""Quantisation vectors: what a donor's rounding-aware training adds to another model, end to end."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hub_magmax as hm
from hub_magmax.analysis.comparing import comparable, compare
from hub_magmax.cli import main
from hub_magmax.errors import EvaluationError, RecipeError
from hub_magmax.evaluation.gptq import rounded_by_gptq
from hub_magmax.evaluation.quantizing import rounded
from hub_magmax.pipeline import lock
from hub_magmax.recipe.loading import parse_recipe
from tests.families import recipe_values
from tests.learners import CLASSES, TEXTS, training_recipe, write_learner

#: Examples of the receiver's task that choose, and others that are reported.
TUNE = [*TEXTS["b"], ("bad and bad", "bad"), ("the odd answer", "answer")]
REPORT = [(text, text.split()[-1]) for text in ("so bad", "no answer", "film bad", "an answer", "it bad")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A donor of task a and a receiver of task b, each trained with and without rounding."""
    found = write_learner(tmp_path_factory.mktemp("vectors"))
    for bits in (None, "int3"):
        changes = {"order": "from_base", "steps": 12, "quantization_aware": bits}
        names = {task: f"./{task}{'-int3' if bits else ''}" for task in "ab"}
        tasks = [{"name": task, "model": model} for task, model in names.items()]
        hm.finetune(parse_recipe(training_recipe(changes, tasks=tasks), folder=found))
    for name, rows in {"tune": TUNE, "report": REPORT}.items():
        lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
        (found / f"{name}.jsonl").write_text("\n".join(lines))
    return found


TEXT_PROMPT = {"dataset": "./tune.jsonl", "prompt_column": "text"}


def vector_recipe(folder, scaling=1.0, output="merged", **changes):
    values = recipe_values(
        (),
        base_model="./b",
        tasks=[{"name": "donor", "model": "./a-int3", "base": "./a"}, {"name": "b", "model": "./b-int3"}],
        method={"name": "average", "scaling": scaling},
        preference={"weights": {"donor": 1.0}},
        evaluation={"evaluator": "text-classification", "tasks": {"b": {"dataset": "./report.jsonl"}}},
        output={"path": output},
    )
    return parse_recipe(values | changes, folder=folder)


def weights(folder, name):
    return load_file(folder / name / "model.safetensors")


@pytest.mark.parametrize("scaling", [1.0, -0.75])
def test_the_receiver_gets_the_difference_of_the_donors(folder, scaling):
    recipe = vector_recipe(folder, scaling, f"merged{scaling}", evaluation=None)
    hm.run(recipe)
    names = "a", "a-int3", "b", recipe.output.path
    donor, aware, receiver, found = (weights(folder, name) for name in names)
    assert any(not torch.equal(donor[name], aware[name]) for name in donor)
    for name, value in found.items():
        torch.testing.assert_close(value, receiver[name] + scaling * (aware[name] - donor[name]))


def test_the_donor_itself_becomes_its_own_aware_checkpoint(folder):
    recipe = vector_recipe(folder, 1.0, "again", evaluation=None, base_model="./a")
    hm.run(recipe)
    found, aware = weights(folder, "again"), weights(folder, "a-int3")
    for name, value in found.items():
        torch.testing.assert_close(value, aware[name], rtol=0, atol=2e-7)


def rounded_accuracy(folder, tensors, rows, make=lambda model: rounded(model, 2)):
    model = AutoModelForSequenceClassification.from_pretrained(folder / "b")
    model.load_state_dict(tensors)
    words = AutoTokenizer.from_pretrained(folder / "b")
    encoded = words([text for text, _ in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        chosen = make(model)(**encoded).logits.argmax(-1)
    return sum(CLASSES[n] == label for n, (_, label) in zip(chosen.tolist(), rows, strict=True)) / len(rows)


def test_scalings_of_both_signs_are_compared_on_rounded_weights(folder):
    tried = (-1.0, 0.0, 0.5, 1.0)
    spec = {"tune": {"dataset": "./tune.jsonl"}, "report": {"dataset": "./report.jsonl"}, "quantized": "int2"}
    recipe = vector_recipe(folder, compare={**spec, "methods": ["average"], "scaling": [*tried]})
    found = compare(recipe, lock(comparable(recipe)))
    aware, donor, receiver = (weights(folder, name) for name in ("a-int3", "a", "b"))
    for one in found.tried:
        if one["preference"] == "recipe":
            patched = {n: value + one["scaling"] * (aware[n] - donor[n]) for n, value in receiver.items()}
            assert one["value"] == pytest.approx(rounded_accuracy(folder, patched, TUNE))
    assert [one["scaling"] for one in found.tried if one["preference"] == "recipe"] == [*tried]
    assert found.base_model.value == rounded_accuracy(folder, receiver, REPORT)
    assert "weights rounded to int2" in found.table()
    assert len({one["value"] for one in found.tried}) > 1


def test_auto_chooses_by_rounded_weights_and_the_lock_says_so(folder):
    spec = {"tune": {"dataset": "./tune.jsonl"}, "quantized": "int2", "scaling": [-1, 1]}
    recipe = vector_recipe(folder, "auto", "chosen", compare=spec)
    locked = lock(recipe)
    assert locked.chosen["quantized"] == "int2" and locked.method["scaling"] in (-1, 1)
    plain = lock(vector_recipe(folder, "auto", "chosen", compare={**spec, "quantized": None}))
    assert "quantized" not in plain.chosen


def test_all_models_are_scored_rounded_and_shown_together(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HUB_MAGMAX_SCORES", str(tmp_path))
    spec = {
        "evaluator": "text-classification",
        "tasks": {"b": {"dataset": "./report.jsonl"}},
        "quantized": ["int2", "int2-gptq"],
        "quantized_models": "all",
        "calibration": {"dataset": "./tune.jsonl"},
    }
    recipe = vector_recipe(folder, output="shown", evaluation=spec)
    scores = hm.run(recipe).scores
    models = {"base_model": "b", "b": "b-int3", "merged": "shown"}
    words = AutoTokenizer.from_pretrained(folder / "b")
    encoded = words([text for text, _ in TUNE], padding=True, return_tensors="pt")

    def by_gptq(model):
        return rounded_by_gptq(model, 2, lambda network: network(**encoded))

    for name, place in models.items():
        tensors = weights(folder, place)
        assert scores.get(f"{name}:int2", "b").value == rounded_accuracy(folder, tensors, REPORT)
        assert scores.get(f"{name}:int2-gptq", "b").value == rounded_accuracy(
            folder, tensors, REPORT, by_gptq
        )
    assert not any(score.model.startswith("donor:") for score in scores.scores)
    card = (folder / "shown" / "README.md").read_text(encoding="utf-8")
    part = card.partition("## Rounded weights")[2].partition("## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in part.splitlines() if "`b`" in line]
    assert [model for _, model in rows] == ["base model", "merged", "own checkpoint"]
    assert "own checkpoint:int2-gptq" in scores.table("markdown")
    lines = []
    again = hm.evaluate(recipe, lock(recipe), folder / "shown", report=lines.append)
    # Of base model and task b, what is rounded to the nearest too; what GPTQ answers is measured again.
    assert any("4 of 9 scores are there" in line or "5 of" in line for line in lines), lines
    assert again.digest == scores.digest


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"quantized": ["int3-gptq"]}, "GPTQ needs examples.*write calibration"),
        ({"quantized": ["int3"], "calibration": {"dataset": "./tune.jsonl"}}, "nothing is rounded by it"),
        ({"quantized_models": "all"}, "nothing is rounded by it"),
        (
            {"quantized": ["int3-gptq"], "calibration": TEXT_PROMPT},
            "evaluation.calibration.prompt_column.*has no prompts",
        ),
        (
            {"evaluator": "lm-eval", "quantized": ["int3-gptq"], "calibration": {"dataset": "./tune.jsonl"}},
            "lm-eval brings its own examples.*round to the nearest",
        ),
        ({"quantized": ["int3-awq"]}, "'int3-awq' is no rounding; write int2 to int8"),
    ],
)
def test_roundings_that_lack_something_are_refused(folder, changes, told):
    spec = {"evaluator": "text-classification", "tasks": {"b": {"dataset": "./report.jsonl"}}}
    with pytest.raises(RecipeError, match=f"(?s){told}"):
        vector_recipe(folder, evaluation=spec | changes)


def test_prompts_of_a_router_s_examples_are_refused_too(folder):
    with pytest.raises(RecipeError, match=r"routing.tasks.b.prompt_column.*has no prompts"):
        vector_recipe(folder, routing={"tasks": {"b": TEXT_PROMPT}})


def test_examples_for_gptq_are_looked_at_before_the_merge(folder):
    spec = {"evaluator": "text-classification", "tasks": {"b": {"dataset": "./report.jsonl"}}}
    spec |= {"quantized": ["int3-gptq"], "calibration": {"dataset": "./tune.jsonl", "input_column": "texts"}}
    recipe = vector_recipe(folder, output="unmerged", evaluation=spec)
    with pytest.raises(EvaluationError, match="no column 'texts'") as found:
        hm.run(recipe)
    assert found.value.problems[0].key == ("evaluation", "calibration", "input_column")
    assert not (folder / "unmerged").exists()


def test_the_page_runs(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "quantisation.md").read_text(encoding="utf-8")
    donor, patch, chosen = re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S)
    (commands,) = re.findall(r"^```console\n(.*?)^```$", page, re.M | re.S)
    for name, place in {"base": "base", "animals": "b", "animals-int3": "b-int3"}.items():
        shutil.copytree(folder / place, tmp_path / name)
    files = {"flowers": "a", "animals-train": "tune", "animals-test": "report", "animals-tune": "tune"}
    for name, place in files.items():
        shutil.copy(folder / f"{place}.jsonl", f"{name}.jsonl")
    Path("donor.yaml").write_text(donor)
    Path("patch.yaml").write_text(patch)
    for line in commands.splitlines():
        done = CliRunner().invoke(main, shlex.split(line)[1:])
        assert done.exit_code == 0, (line, done.stderr)
    assert "## Rounded weights" in Path("patched/README.md").read_text(encoding="utf-8")
    Path("tuned.yaml").write_text(patch + chosen)
    done = CliRunner().invoke(main, ["lock", "tuned.yaml", "--set", "method.scaling=auto"])
    assert done.exit_code == 0 and "auto chose average" in done.stderr, done.stderr
