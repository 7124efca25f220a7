"""Training with rounded weights: gradients by hand, steps by a plain loop, resuming to the byte, refusals."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.pytorch_utils import Conv1D

import hub_magmax as hm
from hub_magmax.errors import OutputError, RecipeError
from hub_magmax.evaluation.quantizing import rounded, straight_through
from hub_magmax.recipe.loading import parse_recipe
from tests.learners import CLASSES, TEXTS, Stopped, stop, stopping, training_recipe, write_learner


def finetune(folder, bits="int3", changes=None, **options):
    changes = {"quantization_aware": bits, **(changes or {})}
    return hm.finetune(parse_recipe(training_recipe(changes), folder=folder), **options)


def weights(folder, task):
    return load_file(folder / task / "model.safetensors")


def test_a_gradient_goes_straight_through_by_hand():
    layer = nn.Linear(3, 2, bias=False)
    layer.weight.data = torch.tensor([[3.0, -1.4, 0.6], [0.0, 0.0, 0.0]])
    seen, wanted = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([1.0, 1.0])
    found = functional_call(layer, straight_through(layer, 3), (seen,))
    # Three bits: the row is 3, -1, 1, and the output 3 - 2 - 1; the unrounded one were -0.4.
    assert found.tolist() == [0.0, 0.0]
    ((found - wanted) ** 2).sum().backward()
    # 2 (output - wanted) times the input, in each row.
    assert layer.weight.grad.tolist() == [[-2.0, -4.0, 2.0], [-2.0, -4.0, 2.0]]


def test_outputs_are_those_of_the_rounded_network_and_shared_weights_stay_shared():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), Conv1D(4, 4), nn.Linear(4, 7, bias=False))
    network[3].weight = network[0].weight
    words = torch.arange(7)
    found = functional_call(network, straight_through(network, 2), (words,))
    assert torch.equal(found, rounded(network, 2)(words))
    found.square().sum().backward()
    assert set(straight_through(network, 2)) == {"2.weight", "3.weight"}
    assert all(value.grad.abs().max() > 0 for value in network.parameters())


def test_steps_are_those_of_a_plain_loop_over_rounded_copies(tmp_path):
    folder = write_learner(tmp_path, dropout=0.0)
    made = finetune(folder, changes={"steps": 3, "batch_size": 4, "warmup": 0.0, "schedule": "constant"})
    model = AutoModelForSequenceClassification.from_pretrained(folder / "base")
    words = AutoTokenizer.from_pretrained(folder / "base")
    encoded = words([text for text, _ in TEXTS["a"]], padding=True, return_tensors="pt")
    labels = torch.tensor([CLASSES.index(label) for _, label in TEXTS["a"]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.01)
    losses = []
    for _ in range(3):
        shrunk = rounded(model, 3)
        loss = cross_entropy(shrunk(**encoded).logits, labels)
        loss.backward()
        for own, other in zip(model.parameters(), shrunk.parameters(), strict=True):
            own.grad = other.grad
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert made.tasks[0].loss == pytest.approx(losses, abs=1e-5)
    expected, found = dict(model.named_parameters()), weights(folder, "a")
    # The gradient of a bias of all keys is 0 but for rounding, which AdamW makes as large as any other.
    compared = [name for name in expected if "key.bias" not in name]
    assert max((found[name] - expected[name]).abs().max() for name in compared) < 1e-5


def test_a_stopped_training_goes_on_to_the_same_bytes_and_is_recorded(learner, tmp_path):
    whole, stopped = (shutil.copytree(learner, tmp_path / name) for name in ("whole", "stopped"))
    finetune(whole)

    with pytest.raises(Stopped):
        finetune(stopped, changes={"checkpoint_every": 2}, progress=stopping(3, stop))
    assert list(stopped.glob("a.training/step-*"))
    lines = []
    finetune(stopped, changes={"checkpoint_every": 2}, report=lines.append)
    assert "a: going on after step 2 of 6" in lines
    for task in "ab":
        assert (stopped / task / "model.safetensors").read_bytes() == (
            whole / task / "model.safetensors"
        ).read_bytes()
        report = json.loads((whole / task / "finetune_report.json").read_text())
        assert report["settings"]["quantization_aware"] == "int3"
    with pytest.raises(OutputError, match="quantization_aware was 'int3', and is 'int4' now"):
        finetune(whole, "int4")


@pytest.mark.parametrize("bits", ["int1", "int9", "3"])
def test_other_numbers_of_bits_are_refused(tmp_path, bits):
    with pytest.raises(RecipeError, match=r"training.quantization_aware.*write int2 to int8"):
        parse_recipe(training_recipe({"quantization_aware": bits}), folder=tmp_path)
