"""Early stop: which examples are held out, when training ends, with which weights, resumed to the byte."""

import json
import math
import shutil

import pytest
import torch
from click.testing import CliRunner
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hub_magmax as hm
from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.cli import main
from hub_magmax.errors import NonFiniteError, OutputError, RecipeError
from hub_magmax.evaluation.evaluators import Columns, make_evaluator
from hub_magmax.evaluation.evaluators.loading import load_model
from hub_magmax.files import code_digest
from hub_magmax.processes import Processes
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.recipe.training import HeldOut
from hub_magmax.training.order import Mixture
from hub_magmax.training.record import read_record
from hub_magmax.training.states import TrainingFolder
from hub_magmax.training.step_examples import HeldOutExamples, StepExamples, held_apart
from hub_magmax.training.stopping import Watch, held_out_loss, trained_weights
from tests.families import yaml_text
from tests.learners import CLASSES, Stopped, stop, stopping, training_recipe, write_learner

#: Of eight different texts two are held out.
ROWS = [
    {"text": f"{first} {word}", "label": word}
    for first in ("a", "the", "so", "an")
    for word in ("good", "odd")
]

HELD = {"share": 0.25, "every": 2, "patience": 2}

#: So high a rate that the loss on other texts does not fall for long.
TRAINING = {
    "held_out": HELD,
    "steps": 30,
    "batch_size": 4,
    "learning_rate": 0.05,
    "warmup": 0,
    "schedule": "constant",
}


@pytest.fixture(scope="module")
def learner(tmp_path_factory):
    folder = write_learner(tmp_path_factory.mktemp("learner"))
    for task in ("a", "b"):
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def finetune(folder, changes=None, **options):
    values = training_recipe(TRAINING | (changes or {}))
    return hm.finetune(parse_recipe(values, folder=folder), **options)


@pytest.fixture(scope="module")
def trained(learner, tmp_path_factory):
    folder = shutil.copytree(learner, tmp_path_factory.mktemp("trained") / "all")
    lines = []
    return folder, finetune(folder, report=lines.append), lines


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=20),
    st.floats(0.01, 0.99),
    st.randoms(use_true_random=False),
)
def test_copies_are_on_one_side_and_neither_order_nor_place_decides(numbers, share, random):
    sides = held_apart(Dataset.from_dict({"text": numbers}), share)
    own, held = ({numbers[place] for place in side} for side in sides)
    assert sorted(sides[0] + sides[1]) == [*range(len(numbers))] and not own & held
    assert len(held) == max(1, int(share * len({*numbers})))
    shuffled = random.sample(numbers, len(numbers))
    assert {shuffled[place] for place in held_apart(Dataset.from_dict({"text": shuffled}), share)[1]} == held


def test_patience_by_hand():
    network, found = nn.Linear(1, 1), iter((0.9, 0.5, 0.5, 0.4, 0.6, 0.7))
    watch = Watch(HeldOut(share=0.5, every=10, patience=2), network, lambda: next(found))
    over = []
    for step in range(5, 61, 5):
        network.weight.data.fill_(step)
        over.append(watch.stops(step, 200))
    # The second 0.5 is no lower than the first; 0.4 begins anew.
    assert over == 11 * [False] + [True] and watch.best_step == 40
    watch.restore()
    assert network.weight.item() == 40
    assert watch.to_dict()["loss"][:2] == [[10, 0.9], [20, 0.5]]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_held_out_loss_that_is_not_finite_is_refused(loss):
    watch = Watch(HeldOut(share=0.5, every=10), nn.Linear(1, 1), lambda: loss)
    with pytest.raises(NonFiniteError, match=f"the held-out loss is {loss} in step 10.*learning_rate"):
        watch.stops(10, 200)


def test_buffers_that_are_saved_are_part_of_the_weights():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    network[0].weight.requires_grad_(False)
    network[1].register_buffer("scratch", torch.zeros(1), persistent=False)
    names = trained_weights(network).keys()
    assert names == {
        "0.bias",
        "1.weight",
        "1.bias",
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    }


def test_training_ends_early_with_the_weights_of_the_lowest_loss(trained):
    folder, made, lines = trained
    one = made.tasks[0]
    record = read_record(folder / "a" / "finetune_report.json")
    assert record.held_out == one.held_out and record.run["steps"] == 30
    losses = dict(one.held_out["loss"])
    best, last = one.held_out["best_step"], max(losses)
    assert [*losses] == [*range(2, last + 1, 2)] and last == best + 4 < 30
    assert losses[best] == min(losses.values())
    assert f"a: step {best} of 30: held-out loss {losses[best]:.4g}, the lowest so far" in lines
    assert "a: stopping early, since the held-out loss no longer falls" in lines
    assert loss_of(folder / "a") == pytest.approx(losses[best], rel=1e-5)


def loss_of(checkpoint):
    """The oracle: the mean cross-entropy of the examples that are held out, as transformers has it."""
    held = [ROWS[number] for number in held_apart(Dataset.from_list(ROWS), HELD["share"])[1]]
    words = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        logits = model(**words([row["text"] for row in held], padding=True, return_tensors="pt")).logits
    return cross_entropy(logits, torch.tensor([CLASSES.index(row["label"]) for row in held])).item()


def test_as_many_steps_without_an_early_stop_give_the_same_weights(trained, tmp_path):
    """Measuring changes nothing: with the best step as the last one, training ends there."""
    folder, made, _ = trained
    again = shutil.copytree(folder, tmp_path / "again", ignore=shutil.ignore_patterns("[ab]", "*.training"))
    best = made.tasks[0].held_out["best_step"]
    finetune(again, {"steps": best, "held_out": HELD | {"every": best}})
    weights = [(place / "a" / "model.safetensors").read_bytes() for place in (folder, again)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("before", [1, 3], ids=["after the best step", "before it"])
def test_a_stopped_training_ends_with_the_same_bytes(trained, learner, tmp_path, before):
    """States hold the weights of the lowest loss until then."""
    folder, made, _ = trained
    here = shutil.copytree(learner, tmp_path / "here")
    last = made.tasks[0].held_out["loss"][-1][0]
    with pytest.raises(Stopped):
        finetune(here, {"checkpoint_every": 3}, progress=stopping(max(last - before, 4), stop))
    lines = []
    finetune(here, {"checkpoint_every": 3}, report=lines.append)
    assert any("going on after step" in line for line in lines)
    digests = [code_digest(place.glob("[ab]/*"), place) for place in (folder, here)]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("name", ["trained.safetensors", "custom_checkpoint_0.pkl", "losses.json"])
def test_a_damaged_state_is_told_with_what_helps(learner, tmp_path, name):
    here = shutil.copytree(learner, tmp_path / "here")
    changes = {"checkpoint_every": 1, "steps": 3}
    with pytest.raises(Stopped):
        finetune(here, changes, progress=stopping(2, stop))
    [state] = (here / "a.training").glob("step-*")
    (state / name).write_bytes((state / name).read_bytes()[:5])
    with pytest.raises(OutputError, match=r"this state of a training cannot be read.*Delete .*a\.training"):
        finetune(here, changes)
    shutil.rmtree(here / "a.training")
    assert finetune(here, changes).tasks[0].is_new


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_memory_that_runs_out_is_no_damage(tmp_path, error):
    with pytest.raises(error), TrainingFolder(tmp_path / "a").readable(tmp_path / "state"):
        raise error


class Gathering(Processes):
    """One of several processes, which hears nothing of the others."""

    def gather(self, value):
        return [value]


def test_processes_share_the_held_out_examples(learner):
    model = load_model(
        ModelPlace(str(learner / "base")), "AutoModelForSequenceClassification", "AutoTokenizer", "x"
    )
    kind = make_evaluator("text-classification", {})
    held = HeldOutExamples(Dataset.from_list(ROWS[:5]), Columns())
    examples = StepExamples(kind, (), Mixture(2), 0, held)

    class Losses(nn.Module):
        def forward(self, batches, factor):
            assert not self.training
            return factor * sum(kind.losses(model, batch, 0.0).sum() for batch in batches)

    shares = [held_out_loss(model, Losses(), examples, Gathering(rank, 6)) for rank in range(6)]
    assert sum(shares) == pytest.approx(held_out_loss(model, Losses(), examples, Processes()), rel=1e-5)
    assert shares[5] == 0 < shares[4]  # the last one has none


def test_all_the_same_examples_cannot_be_held_out(learner, tmp_path):
    folder = shutil.copytree(learner, tmp_path / "here")
    (folder / "b.jsonl").write_text(2 * (json.dumps(ROWS[0]) + "\n"))
    with pytest.raises(RecipeError, match=r"examples of b are all the same.*training.data.b"):
        finetune(folder)
    assert not (folder / "a").exists()


@pytest.mark.parametrize("value, told", [(0, "share"), (1, "share"), (0.5, "patience")])
def test_values_out_of_range_are_refused(tmp_path, value, told):
    held_out = {"share": value} | ({"patience": 0} if told == "patience" else {})
    with pytest.raises(RecipeError, match=f"training.held_out.{told}"):
        parse_recipe(training_recipe({"held_out": held_out}), folder=tmp_path)


def test_the_verb_shows_the_lowest_loss(trained, monkeypatch):
    folder, made, _ = trained
    monkeypatch.chdir(folder)
    (folder / "recipe.yaml").write_text(yaml_text(training_recipe(TRAINING)))
    done = CliRunner().invoke(main, ["finetune", "recipe.yaml"])
    best = made.tasks[0].held_out["best_step"]
    loss = dict(made.tasks[0].held_out["loss"])[best]
    assert done.stdout.splitlines()[0].endswith(f"; {loss:.4g} held out, after step {best}")
