"""Training of tasks' checkpoints: values by an oracle, order, resuming to the byte, refusals."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

import hub_magmax as hm
from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.cli import main
from hub_magmax.errors import EvaluationError, NonFiniteError, OutputError, RecipeError
from hub_magmax.evaluation.evaluators import Columns, make_evaluator
from hub_magmax.evaluation.evaluators.loading import load_model
from hub_magmax.files import code_digest, sha256_of
from hub_magmax.processes import Processes
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.training import finetuning
from hub_magmax.training.order import ExampleOrder, Mixture
from hub_magmax.training.step_examples import Examples, StepExamples
from tests.families import recipe_values, yaml_text
from tests.learners import CLASSES, TEXTS, Stopped, stop, stopping, training_recipe, write_learner
from tests.tiny_llama import tokenizer


@pytest.fixture(scope="module")
def trained(learner, tmp_path_factory):
    """Both tasks, trained in one go, with dropout."""
    folder = shutil.copytree(learner, tmp_path_factory.mktemp("trained") / "all")
    finetune(folder)
    return folder


def finetune(folder, changes=None, others=None, **options):
    return hm.finetune(parse_recipe(training_recipe(changes, **(others or {})), folder=folder), **options)


def digests(folder):
    return {task: code_digest((folder / task).rglob("*"), folder) for task in ("a", "b")}


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 3))
def test_each_pass_has_every_example_once(num_examples, batch_size, seed):
    order, steps = ExampleOrder(num_examples, seed), Mixture(batch_size).num_steps(3, num_examples)
    ends = [(step * batch_size, (step + 1) * batch_size) for step in range(steps)]
    seen = [place for start, end in ends for place in order.between(start, end)]
    assert len(seen) == steps * batch_size >= 3 * num_examples > (steps - 1) * batch_size
    for start in range(0, 3 * num_examples, num_examples):
        assert sorted(seen[start : start + num_examples]) == list(range(num_examples))
    # What a step sees does not depend on the steps before it.
    assert ExampleOrder(num_examples, seed).between(*ends[-1]) == seen[-batch_size:]


def test_epochs_are_rounded_up_to_steps():
    assert [Mixture(4).num_steps(epochs, 10) for epochs in (0.1, 1, 2)] == [1, 3, 5]
    assert Mixture(4, 0.5).num_steps(1, 10) == 5


@given(st.integers(1, 40), st.floats(0, 0.99), st.integers(0, 50))
def test_steps_have_one_size_and_the_share_of_the_capability(batch_size, share, step):
    (own, aside), (start, kept) = (Mixture(batch_size, share).until(at) for at in (step + 1, step))
    assert own + aside == batch_size * (step + 1) and own >= start and aside >= kept
    assert aside <= share * batch_size * (step + 1) < aside + 1


def test_examples_of_a_capability_keep_it(folder):
    found = {}
    for share in (0.01, 0.5):  # of 40 examples none are of the capability, and 20
        training = {
            "steps": 10,
            "batch_size": 4,
            "capability": {"data": {"dataset": "./a.jsonl"}, "share": share},
        }
        found[share] = finetune(folder, training).forgetting
        for task in ("a", "b"):
            shutil.rmtree(folder / task)
    assert found[0.01].scores["a"]["a"] == found[0.5].scores["a"]["a"] == 1
    assert found[0.01].scores["b"]["a"] < found[0.5].scores["b"]["a"]


@pytest.mark.parametrize("verb", (["lock"], ["plan"], ["run"], ["run", "--dry-run"]), ids=" ".join)
def test_a_checkpoint_that_is_not_there_yet_is_told_with_the_verb_that_makes_it(folder, monkeypatch, verb):
    monkeypatch.chdir(folder)
    (folder / "recipe.yaml").write_text(yaml_text(training_recipe()))
    done = CliRunner().invoke(main, [verb[0], "recipe.yaml", *verb[1:]])
    assert done.exit_code == 1 and "hub-magmax finetune RECIPE makes it" in done.stderr
    assert "Check the path" not in done.stderr


@pytest.mark.parametrize("order", ["sequential", "from_base"])
def test_weights_are_those_of_a_plain_loop(learner, tmp_path, order):
    folder = shutil.copytree(learner, tmp_path / "here")
    write_learner(folder, dropout=0.0)
    changes = {"order": order, "steps": 4, "batch_size": 4, "label_smoothing": 0.2, "clip_norm": 0.5}
    changes |= {"schedule": "linear", "warmup": 0.5, "frozen": ["*embeddings*", "classifier.*"]}
    made = finetune(folder, changes)
    start = "base"
    for task in ("a", "b"):
        expected, losses = plainly_trained(folder, start, task)
        found = load_file(folder / task / "model.safetensors")
        # The gradient of a bias of all keys is 0 but for rounding, which AdamW makes as large as any other.
        compared = {name: value for name, value in expected.items() if "key.bias" not in name}
        assert max((found[name] - value).abs().max() for name, value in compared.items()) < 1e-5
        assert next(one for one in made.tasks if one.task == task).loss == pytest.approx(losses, abs=1e-5)
        start = task if order == "sequential" else "base"
    assert [(one.task, one.model, one.is_new) for one in made.tasks] == [
        ("a", "./a", True),
        ("b", "./b", True),
    ]


def plainly_trained(folder, start, task):
    """The oracle: four steps over all four examples, the learning rate at 0, 1/2, 1 and 1/2 of its peak."""
    words = AutoTokenizer.from_pretrained(folder / start)
    model = AutoModelForSequenceClassification.from_pretrained(folder / start)
    named = {
        name: value
        for name, value in model.named_parameters()
        if "embeddings" not in name and not name.startswith("classifier")
    }
    encoded = words([text for text, _ in TEXTS[task]], padding=True, return_tensors="pt")
    labels = torch.tensor([CLASSES.index(label) for _, label in TEXTS[task]])
    moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in named.items()}
    losses = []
    for number, share in enumerate((0, 0.5, 1, 0.5), 1):
        loss = cross_entropy(model(**encoded).logits, labels, label_smoothing=0.2)
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        gradients = [gradient for gradient in gradients if gradient is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        for (name, value), gradient in zip(named.items(), gradients, strict=True):
            clipped = gradient * (0.5 / norm).clamp(max=1)
            first, second = moments[name]
            first.lerp_(clipped, 0.1)
            second.lerp_(clipped**2, 0.001)
            size = (first / (1 - 0.9**number)) / ((second / (1 - 0.999**number)).sqrt() + 1e-8)
            value.data.mul_(1 - 0.01 * share * 0.01).sub_(0.01 * share * size)
    return {name: value.detach() for name, value in model.named_parameters()}, losses


@pytest.mark.parametrize("after", [1, 3, 7, 11])
def test_a_stopped_training_goes_on_to_the_same_bytes(trained, folder, after):
    with pytest.raises(Stopped):
        finetune(folder, {"checkpoint_every": 2}, progress=stopping(after, stop))
    assert (folder / "b.training").exists() == (after > 6) and (folder / "a").exists() == (after > 6)
    lines = []
    finetune(folder, {"checkpoint_every": 2}, report=lines.append)
    assert digests(folder) == digests(trained)
    begun = [line for line in lines if "going on after" in line]
    kept = {1: [], 3: ["a: going on after step 2 of 6"], 7: [], 11: ["b: going on after step 4 of 6"]}
    assert begun == kept[after] and not list(folder.glob("*.training"))


def test_a_killed_training_goes_on_to_the_same_bytes(trained, folder):
    (folder / "recipe.yaml").write_text(yaml_text(training_recipe({"checkpoint_every": 2})))
    code = """
import contextlib, os, signal, sys
import hub_magmax

done = []

def advance(count):
    done.append(count)
    if sum(done) == 5:
        os.kill(os.getpid(), signal.SIGKILL)

hub_magmax.finetune(sys.argv[1], progress=lambda *told: contextlib.nullcontext(advance))
"""
    done = subprocess.run([sys.executable, "-c", code, str(folder / "recipe.yaml")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in (folder / "a.training").glob("step-*")] == ["step-000000004"]
    finetune(folder, {"checkpoint_every": 2})
    assert digests(folder) == digests(trained)


def test_a_language_model_with_tied_embeddings_goes_on_to_the_same_bytes(tmp_path, caplog):
    torch.manual_seed(0)
    words = tokenizer(64)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    (tmp_path / "texts.jsonl").write_text('{"text": "a good film"}\n{"text": "an odd answer"}')
    training = {
        "data": {"a": {"dataset": "./texts.jsonl"}},
        "steps": 5,
        "batch_size": 2,
        "checkpoint_every": 2,
    }
    training |= {"evaluator": "log-likelihood", "learning_rate": 0.01}

    def made(name, **options):
        values = recipe_values(("a",), tasks=[{"name": "a", "model": f"./{name}"}], training=training)
        found = hm.finetune(parse_recipe(values, folder=tmp_path), **options)
        return found.tasks[0].loss, (tmp_path / name / "model.safetensors").read_bytes()

    loss, weights = made("whole")
    with pytest.raises(Stopped):
        made("stopped", progress=stopping(3, stop))
    assert made("stopped") == (loss, weights) and loss[-1] < loss[0]
    assert not caplog.records


def test_what_is_there_is_not_trained_again(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "here")
    shutil.rmtree(folder / "b")
    lines = []
    one, other = finetune(folder, report=lines.append).tasks
    told = [line for line in lines if not line.startswith("note:")]
    assert told[0] == "a: ./a is there" and (one.is_new, other.is_new) == (False, True)
    assert one.loss and digests(folder) == digests(trained)
    for task in ("a", "b"):
        (folder / task / "finetune_report.json").unlink()
    assert [one.loss for one in finetune(folder, {"learning_rate": 1.0}, report=lines.append).tasks] == [
        (),
        (),
    ]
    assert "b: ./b is there, trained elsewhere" in lines


def test_another_training_is_refused_where_one_is_there(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "here")
    with pytest.raises(OutputError, match=r"learning_rate was 0.01, and is 0.1 now"):
        finetune(folder, {"learning_rate": 0.1})


def test_a_damaged_record_is_told(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "here")
    (folder / "a" / "finetune_report.json").write_text('{"format": 1, "task": "a", "scores": [1]}')
    with pytest.raises(OutputError, match=r"a/finetune_report.json.*not the record of a training"):
        finetune(folder)


def test_another_training_is_refused_where_one_was_begun(folder):
    with pytest.raises(Stopped):
        finetune(folder, {"checkpoint_every": 2}, progress=stopping(3, stop))
    with (folder / "a.jsonl").open("a") as file:
        file.write('\n{"text": "more", "label": "odd"}')
    with pytest.raises(OutputError, match=r"data, examples was \[4\], and is \[5\] now"):
        finetune(folder, {"checkpoint_every": 2})


def test_a_loss_that_is_not_finite_ends_the_training(folder):
    path = folder / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors["classifier.bias"][0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"the loss is nan.*in step 1.*learning_rate"):
        finetune(folder)
    assert not (folder / "a").exists()


def test_remains_of_a_training_that_was_killed_after_its_last_step_are_removed(folder):
    finetune(folder, {"steps": 1})
    left = folder / "a.training" / "finetune_report.json"
    left.parent.mkdir()
    left.write_bytes((folder / "a" / left.name).read_bytes())
    finetune(folder, {"steps": 1})
    assert not left.parent.exists()


def test_frozen_parameters_keep_their_values_and_dtypes_stay(tmp_path):
    folder = write_learner(tmp_path, dtype=torch.bfloat16)
    finetune(folder, {"frozen": ["bert.encoder.*"], "learning_rate": 0.1})
    base, task = (load_file(folder / name / "model.safetensors") for name in ("base", "a"))
    kept = {name for name in base if torch.equal(base[name], task[name])}
    assert {value.dtype for value in task.values()} == {torch.bfloat16}
    assert kept >= {name for name in base if "encoder" in name} and "classifier.weight" not in kept


def test_a_glob_that_freezes_nothing_or_all_is_refused(folder):
    with pytest.raises(RecipeError, match=r"no parameter of .* matches 'classifer.weight'.*classifier"):
        finetune(folder, {"frozen": ["classifer.weight"]})
    with pytest.raises(RecipeError, match="every parameter is frozen"):
        finetune(folder, {"frozen": ["*"]})


def test_a_task_without_checkpoint_and_data_is_refused_before_anything_is_trained(folder):
    data = {"a": {"dataset": "./a.jsonl"}}
    with pytest.raises(RecipeError, match=r"neither a checkpoint of b nor data to train it on"):
        finetune(folder, {"data": data})
    assert not (folder / "a").exists() and not (folder / "a.training").exists()


def write_headless(folder, name):
    """Write the body of the learner's base model, as an encoder is downloaded."""
    AutoModel.from_pretrained(folder / "base").save_pretrained(folder / name)
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / name)


def test_a_base_model_without_a_head_is_told_before_examples_are_loaded(folder):
    write_headless(folder, "encoder")
    data = {task: {"dataset": "./is-not-there.jsonl"} for task in "ab"}
    with pytest.raises(EvaluationError, match=r"classifier\.bias and .* are not in its files") as told:
        finetune(folder, {"data": data}, {"base_model": "./encoder"})
    assert "docs/training.md" in told.value.hint and told.value.hint.startswith("Give the base model a head")


def test_a_model_with_a_head_is_loaded_no_more_often_for_that(folder, monkeypatch):
    loaded = []
    real = finetuning.load_model
    monkeypatch.setattr(
        finetuning, "load_model", lambda place, *rest: loaded.append(place.name) or real(place, *rest)
    )
    finetune(folder, {"steps": 1})
    assert len(loaded) == 2


def test_files_of_a_model_at_which_several_tasks_begin_are_hashed_once(folder, monkeypatch):
    hashed, real = [], finetuning.locked_start
    monkeypatch.setattr(
        finetuning, "locked_start", lambda recipe, task: hashed.append(task.name) or real(recipe, task)
    )
    finetune(folder, {"steps": 1, "order": "from_base"})
    assert hashed == ["a"]
    records = [json.loads((folder / task / "finetune_report.json").read_text()) for task in "ab"]
    assert records[0]["start"] == records[1]["start"]


def test_files_of_a_start_that_change_between_two_tasks_are_hashed_again(folder):
    weights = folder / "base" / "model.safetensors"

    def change(line):
        if line.startswith("training b"):
            changed = {name: value + 1 for name, value in load_file(weights).items()}
            save_file(changed, weights, metadata={"format": "pt"})

    before = sha256_of(weights)
    finetune(folder, {"steps": 1, "order": "from_base"}, report=change)
    records = [json.loads((folder / task / "finetune_report.json").read_text()) for task in "ab"]
    hashes = [record["start"]["model.safetensors"] for record in records]
    assert hashes == [before, sha256_of(weights)] and hashes[0] != hashes[1]


def test_the_guide_gives_a_base_model_its_head_and_trains_it(folder, monkeypatch):
    monkeypatch.chdir(folder)
    write_headless(folder, "minilm")
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    exec(compile(re.search(r"^```python\n(.*?)^```$", page, re.M | re.S)[1], "training.md", "exec"), {})
    for name, rows in {"animals": ("cat", "dog"), "vehicles": ("bicycle", "car")}.items():
        lines = "".join(json.dumps({"text": f"a {label}", "label": label}) + "\n" for label in rows)
        for kind in ("", "-test"):
            (folder / f"{name}{kind}.jsonl").write_text(lines)
    (folder / "recipe.yaml").write_text(re.search(r"^```yaml\n(.*?)^```$", page, re.M | re.S)[1])
    assert [one.task for one in hm.finetune("recipe.yaml").tasks] == ["animals", "vehicles"]


REFUSED = {
    "both": ({"epochs": 1}, {}, "epochs and steps both say how long"),
    "neither": ({"steps": None}, {}, "nothing says how long"),
    "unknown task": ({"data": {"c": {"dataset": "./a.jsonl"}}}, {}, "there is no task 'c'"),
    "no loss": ({"evaluator": "lm-eval"}, {}, "the evaluator lm-eval has no loss"),
    "unknown evaluator": ({"evaluator": "text-clasification"}, {}, "Did you mean 'text-classification'"),
    "prompts": (
        {"data": {"a": {"dataset": "./a.jsonl", "prompt_column": "text"}}},
        {},
        "the evaluator text-classification has no prompts",
    ),
    "prompts of the capability": (
        {"capability": {"data": {"dataset": "./a.jsonl", "prompt_column": "text"}, "share": 0.1}},
        {},
        "training.capability.data.prompt_column",
    ),
    "hub": (
        {},
        {"tasks": [{"name": "a", "model": "me/a"}, {"name": "b", "model": "./b"}]},
        "'me/a' is no folder here.*write ./me/a",
    ),
    "one place": (
        {},
        {"tasks": [{"name": "a", "model": "./a"}, {"name": "b", "model": "./a/"}]},
        "this is the checkpoint of a too",
    ),
    "own base": (
        {},
        {"tasks": [{"name": "a", "model": "./a", "base": "./other"}, {"name": "b", "model": "./b"}]},
        "order: from_base",
    ),
    "key": ({"learning_rates": 1}, {}, "did you mean 'learning_rate'"),
}


@pytest.mark.parametrize("changes, others, told", REFUSED.values(), ids=REFUSED)
def test_a_recipe_that_cannot_be_trained_is_refused(tmp_path, changes, others, told):
    with pytest.raises(RecipeError, match=f"(?s){told}"):
        parse_recipe(training_recipe(changes, **others), folder=tmp_path)


def test_a_recipe_without_training_is_refused():
    with pytest.raises(RecipeError, match="no `training`"):
        hm.finetune({key: value for key, value in training_recipe().items() if key != "training"})


def test_the_verb_trains_and_the_same_recipe_merges(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "recipe.yaml").write_text(yaml_text(training_recipe()))
    valid = CliRunner().invoke(main, ["validate", "recipe.yaml"])
    assert "`hub-magmax finetune` makes the checkpoints" in valid.stdout
    done = CliRunner().invoke(main, ["finetune", "recipe.yaml", "--set", "training.steps=2"])
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("a  ./a  trained  loss ") and "loss" in done.stderr
    merged = CliRunner().invoke(main, ["run", "recipe.yaml"])
    assert merged.exit_code == 0, merged.stderr
    secrets = [str(folder).encode(), os.environ["HF_TOKEN"].encode()]
    written = [path.read_bytes() for path in folder.glob("[ab]/*")]
    assert written and not any(secret in content for secret in secrets for content in written)
    # The record of a task's training is about its weights, and no file of the merged model.
    assert not (folder / "merged" / "finetune_report.json").exists()


def test_shares_of_processes_are_together_the_loss_of_one(learner):
    place = ModelPlace(str(learner / "base"))
    model = load_model(place, "AutoModelForSequenceClassification", "AutoTokenizer", "a test")
    rows = [[{"text": text, "label": label} for text, label in TEXTS[task]] for task in "ab"]
    parts = tuple(
        Examples(Dataset.from_list(part), Columns(), ExampleOrder(4, seed)) for seed, part in enumerate(rows)
    )
    kind = make_evaluator("text-classification", {})
    step_examples = StepExamples(kind, parts, Mixture(5, 0.3), 0)

    def loss(step, rank, count):
        batches, factor = step_examples.encoded(model, step, Processes(rank, count))
        return factor * sum(kind.losses(model, batch, 0.0).sum().item() for batch in batches)

    for step in range(4):
        shares = [loss(step, rank, 3) for rank in range(3)]
        assert sum(shares) / 3 == pytest.approx(loss(step, 0, 1), abs=1e-5)
    with pytest.raises(RecipeError, match=r"3 processes share a step of 2 examples"):
        finetune(learner, {"batch_size": 2}, processes=Processes(0, 3))
