"""Metrics of activations and gradients: against transformers' own outputs, and where there are none."""

import gc
import json
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PillowImage
from torch.nn.functional import cross_entropy
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

import hub_magmax as hm
from hub_magmax.analysis.pair_examples import examine_pairs, run_model, why_not
from hub_magmax.cli import main
from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.evaluators.loading import LoadedModel
from hub_magmax.evaluation.models import Loading
from hub_magmax.pipeline import lock
from hub_magmax.recipe.loading import load_recipe
from tests.families import recipe_values
from tests.oracles_pairs import of_vectors
from tests.test_evaluation_texts import SMALL, tokenizer

NUM_ROWS = 6
PICTURES = ViTImageProcessor(size={"height": 8, "width": 8})
LABELS = ClassLabel(names=["cat", "dog", "emu"])


def vit():
    config = ViTConfig(image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=2, num_labels=3,
                       num_attention_heads=2, intermediate_size=8, initializer_range=0.5)  # fmt: skip
    return ViTForImageClassification(config)


def bert():
    return BertForSequenceClassification(BertConfig(**SMALL | {"num_labels": 3, "initializer_range": 0.5}))


def write(folder, network, reader, evaluator, rows):
    """Write a base model, two tasks' checkpoints, the rows of each and a recipe; return the networks."""
    torch.manual_seed(0)
    networks = {}
    for name in ("base", "a", "b"):
        networks[name] = network()
        networks[name].save_pretrained(folder / name)
        reader.save_pretrained(folder / name)
    for task, data in rows.items():
        data.to_parquet(str(folder / f"{task}.parquet"))
    data = {task: {"dataset": f"./{task}.parquet", "split": "train"} for task in rows}
    values = recipe_values(("a", "b"), evaluation={"evaluator": evaluator, "tasks": data})
    (folder / "recipe.yaml").write_text(json.dumps(values))
    return {name: model.eval() for name, model in networks.items()}


def pictures(seed):
    noise = np.random.default_rng(seed).integers(0, 255, (NUM_ROWS, 8, 8, 3), dtype=np.uint8)
    rows = {"image": [PillowImage.fromarray(one) for one in noise], "label": [n % 3 for n in range(NUM_ROWS)]}
    return Dataset.from_dict(rows, features=Features({"image": Image(), "label": LABELS}))


def texts(rows):
    labels = [n % 3 for n in range(len(rows))]
    features = Features({"text": Value("string"), "label": LABELS})
    return Dataset.from_dict({"text": rows, "label": labels}, features=features)


@pytest.fixture
def images(tmp_path):
    rows = {"a": pictures(1), "b": pictures(2)}
    return tmp_path, rows, write(tmp_path, vit, PICTURES, "image-classification", rows)


def runs(network, rows, indices):
    """Return of each row the mean of the last block over places, and gradients of parameters and pixels."""
    found = []
    for row in (rows[index] for index in indices):
        pixels = PICTURES(row["image"], return_tensors="pt")["pixel_values"].requires_grad_(True)
        network.zero_grad()
        output = network(pixels, output_hidden_states=True)
        blocks = network.vit(pixels, output_hidden_states=True).hidden_states
        cross_entropy(output.logits, torch.tensor([row["label"]])).backward()
        named = dict(network.named_parameters())
        below = [p.grad.flatten() for name, p in named.items() if "classifier" not in name]
        places = blocks[-1][0].mean(0).detach()
        found.append((places, torch.cat(below), pixels.grad.flatten()))
    activations, gradients, inputs = (torch.stack(part).double() for part in zip(*found, strict=True))
    return activations.numpy(), gradients.numpy(), inputs.numpy()


def expected(activations, gradients, inputs, ending=""):
    """Return metrics of three pairs of vectors by the names that they are told by."""
    found = {}
    kinds = {"activation": activations, "encoder_gradient": gradients, "input_gradient": inputs}
    for kind, pair in kinds.items():
        own = {
            name.removeprefix("task_vector_"): value
            for name, value in of_vectors(*pair).items()
            if name.startswith("task_vector_")
        }
        if kind != "activation":
            del own["magnitude_ratio"]
        found |= {f"{kind}_{name}{ending}": value for name, value in own.items()}
    return found


def test_activations_and_gradients_agree_with_those_of_transformers(images):
    folder, rows, networks = images
    taken = [0, 1, 3, 4]  # four of six, evenly spread
    both = {
        task: [np.concatenate(part) for part in zip(*(runs(networks[task], rows[t], taken) for t in "ab"),
                                                    strict=True)]
        for task in "ab"
    }  # fmt: skip
    own = {task: runs(networks[task], rows[task], taken) for task in "ab"}
    means = [(both["a"][part].mean(0), both["b"][part].mean(0)) for part in (0, 1)]
    wanted = expected(*means, (both["a"][2].ravel(), both["b"][2].ravel()))
    published = expected(
        means[0],
        (own["a"][1].mean(0), own["b"][1].mean(0)),
        (own["a"][2].ravel(), own["b"][2].ravel()),
        "_as_published",
    )
    published = {name: value for name, value in published.items() if not name.startswith("activation")}
    found = hm.diagnose(folder / "recipe.yaml", rank=0, examples=4).metrics.pairs("ab")["a", "b"]
    assert {name: found[name] for name in wanted | published} == pytest.approx(wanted | published, rel=1e-4)


def examined(network, **inputs):
    evaluator = SimpleNamespace(losses=lambda model, batch, smoothing: model.network(**batch).loss[None])
    return run_model(evaluator, LoadedModel(network.eval(), None, "tiny"), iter([inputs]))


def test_a_model_of_convolutions_has_no_embeddings_and_runs():
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "num_labels": 3}
    network = ResNetForImageClassification(ResNetConfig(**sizes, layer_type="basic"))
    found = examined(network, pixel_values=torch.ones(1, 3, 16, 16), labels=torch.tensor([1]))
    assert (len(found.activation), len(found.inputs)) == (8, 3 * 16 * 16)


def test_embeddings_count_where_the_head_is_tied_to_them():
    network = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=4, n_embd=4, n_layer=1, n_head=1))
    tokens = torch.tensor([[1, 2, 3]])
    gradient = examined(network, input_ids=tokens, labels=tokens).gradient
    assert len(gradient) == sum(parameter.numel() for parameter in network.parameters())
    rows = gradient[: 8 * 4].view(8, 4)  # the embeddings are first
    assert rows[7].any(), "a token that no input has: its gradient comes from the head alone"


def test_one_model_is_held_at_a_time(images, monkeypatch):
    held, most, load = [], [], Loading.load

    def counted(*arguments):
        gc.collect()
        most.append(sum(network() is not None for network in held))
        model = load(*arguments)
        held.append(weakref.ref(model.network))
        return model

    monkeypatch.setattr(Loading, "load", counted)
    recipe = load_recipe(images[0] / "recipe.yaml")
    examine_pairs(recipe, lock(recipe), num_examples=1)
    assert most == [0, 0]


def test_one_model_twice_differs_in_nothing(images):
    folder, _, _ = images
    for file in ("model.safetensors", "config.json"):
        (folder / "b" / file).write_bytes((folder / "a" / file).read_bytes())
    recipe = load_recipe(folder / "recipe.yaml")
    found = examine_pairs(recipe, lock(recipe), num_examples=2)
    assert found.num_examples == 2
    for part in ("activations", "gradients", "input gradients"):
        one, other, product = (values[0, 1] for values in found.parts[part])
        assert one == other == pytest.approx(product) and one > 0
    own = found.parts["gradients on own examples"]
    assert own.product[0, 1] < 0.99 * own.one[0, 1], "of other examples, which is the slip"


def test_texts_of_any_length_have_gradients_of_their_embeddings(tmp_path):
    rows = {"a": texts(["a b c", "d e"]), "b": texts(["f g h a", "b d f c"])}
    networks = write(tmp_path, bert, tokenizer(), "text-classification", rows)
    done = CliRunner().invoke(
        main, ["diagnose", str(tmp_path / "recipe.yaml"), "--metrics", "--rank", "0"], catch_exceptions=False
    )
    assert "input_gradient_cosine_similarity " in done.stdout
    assert "encoder_gradient_l2_distance_as_published" in done.stdout
    assert "input_gradient_l2_distance_as_published" not in done.stdout, "of texts of other lengths"
    recipe = load_recipe(tmp_path / "recipe.yaml")
    found = examine_pairs(recipe, lock(recipe), num_examples=1).parts["input gradients"]
    squares = {}
    for task in "ab":
        squares[task] = 0.0
        for data in rows.values():
            encoded = tokenizer()(data[0]["text"], return_tensors="pt")
            words = networks[task].get_input_embeddings()(encoded.pop("input_ids")).detach()
            logits = networks[task](inputs_embeds=words.requires_grad_(True), **encoded).logits
            cross_entropy(logits, torch.tensor([0])).backward()
            squares[task] += float((words.grad.double() ** 2).sum())
    assert (found.one[0, 1], found.other[0, 1]) == pytest.approx((squares["a"], squares["b"]), rel=1e-4)


def test_it_is_said_why_no_model_runs(images, tmp_path):
    folder, _, _ = images
    recipe = load_recipe(folder / "recipe.yaml")
    values = recipe.to_dict()
    locked = lock(recipe)
    del values["evaluation"]["tasks"]["b"]
    (folder / "less.yaml").write_text(json.dumps(values))
    words = ["diagnose", str(folder / "less.yaml"), "--metrics", "--rank", "0"]
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert "without activations and gradients: evaluation.tasks has no examples of b" in done.stderr
    assert "activation_cosine_similarity" not in done.stdout
    with pytest.raises(EvaluationError, match="has no examples of b"):
        examine_pairs(load_recipe(folder / "less.yaml"), locked)
    del values["evaluation"]
    (folder / "less.yaml").write_text(json.dumps(values))
    assert why_not(load_recipe(folder / "less.yaml"), locked) == "the recipe has no evaluation"


def test_a_model_that_no_gradient_passes_through_has_gradients_of_zero(images):
    folder, _, networks = images
    with torch.no_grad():
        networks["a"].classifier.weight.zero_()
    networks["a"].save_pretrained(folder / "a")
    recipe = load_recipe(folder / "recipe.yaml")
    found = examine_pairs(recipe, lock(recipe), num_examples=1).parts
    for part in ("gradients", "input gradients"):
        one, other, product = (values[0, 1] for values in found[part])
        assert one == product == 0 < other
