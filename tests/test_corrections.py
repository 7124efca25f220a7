"""Corrections of merged representations: an oracle, by hand, by their properties, and in files."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PillowImage
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from hub_magmax.checkpoints.data_statistics import open_statistics
from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.checkpoints.opening import open_checkpoints
from hub_magmax.cli import main
from hub_magmax.errors import (
    CheckpointError,
    EvaluationError,
    LockError,
    MismatchError,
    NonFiniteError,
    RecipeError,
)
from hub_magmax.evaluation.collecting import FileNames
from hub_magmax.evaluation.evaluators import make_evaluator
from hub_magmax.evaluation.evaluators.loading import LoadedModel, load_model
from hub_magmax.evaluation.representations import Head, find_head, summed_products
from hub_magmax.fleet.rebuilding import rebuild
from hub_magmax.merging.correcting import correction_of
from hub_magmax.merging.execution import make_shards, merge
from hub_magmax.merging.in_memory import InMemoryMerger
from hub_magmax.merging.output.folder import PartialFolder
from hub_magmax.methods.corrections import Products, correction, rotation, times
from hub_magmax.pipeline import lock, plan
from hub_magmax.planning.budget import peak_memory_bytes
from hub_magmax.planning.fitting.data_statistics import check_correction
from hub_magmax.planning.plan import Shard, TiedJob
from hub_magmax.planning.summary import describe, explain
from hub_magmax.processes import Processes
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.recipe.lockfile import read_lock
from hub_magmax.recipe.matching import changed_keys
from hub_magmax.reporting.card import render_card
from tests import oracles_data as oracles
from tests.classifiers import CLASSES, classifier_recipe, write_classifiers
from tests.families import accepted, read_merged, yaml_text

WEIGHTS = [(1 / 3, 1 / 3, 1 / 3), (0.5, 0.3, 0.2), (0.6, 0.0, 0.4), (0.0, 1.0, 0.0)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs(examples: int = 40, size: int = 6, tasks: int = 3) -> list[tuple[Tensor, Tensor]]:
    """By task, representations of its own model and of the merged one, a row for each example."""
    found = []
    for task in range(tasks):
        merged = normal(examples, size, seed=task) * torch.linspace(0.2, 2, size) + 0.3
        own = merged @ (torch.eye(size) + 0.4 * normal(size, size, seed=10 + task))
        found.append((own, merged))
    return found


def product(head: Tensor, matrix: Tensor) -> Tensor:
    return torch.cat([*times(head, matrix)])


def products(found: list[tuple[Tensor, Tensor]]) -> list[Products]:
    return [Products(own.T @ merged, merged.T @ merged) for own, merged in found]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("ridge", [0.1, 20.0])
def test_corrections_are_those_of_the_paper(weights, ridge):
    found = pairs()
    own, merged = ([one[number].T.numpy() for one in found] for number in (0, 1))
    expected = oracles.react(own, merged, weights, ridge)
    np.testing.assert_allclose(correction(products(found), weights, ridge).numpy(), expected, atol=1e-10)


def test_a_correction_of_one_dimension_by_hand():
    one, other = (Products(torch.tensor([[m]]), torch.tensor([[g]])) for m, g in ((3.0, 1.0), (-1.0, 3.0)))
    # The rotations are 1 and -1: (¾·(3 + 1) + ¼·(-1 - 1)) / (¾·(1 + 1) + ¼·(3 + 1)) = 2.5 / 2.5.
    assert correction([one, other], (0.75, 0.25), 1.0).item() == pytest.approx(1.0)
    assert correction([one, other], (0.5, 0.5), 1.0).item() == pytest.approx(1 / 3)


def test_a_turn_is_found_as_it_is():
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    merged = normal(9, 2)
    found = correction(products([(merged @ turn.T, merged)]), (1.0,), 0.1)
    torch.testing.assert_close(found, turn)


@pytest.mark.parametrize("examples", [40, 4])
def test_representations_that_agree_are_left_as_they_are(examples):
    """Also where there are fewer examples than dimensions, and the rotation is not decided by them."""
    found = products([(merged, merged) for _, merged in pairs(examples)])
    matrix = correction(found, (0.5, 0.3, 0.2), 0.1)
    torch.testing.assert_close(matrix, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-9)
    head = normal(3, 6).float()
    assert product(head, matrix).equal(head)


@pytest.mark.parametrize("task", range(3))
def test_all_preference_on_one_task_gives_its_own_map(task):
    found = products(pairs())
    weights = tuple(float(number == task) for number in range(3))
    assert correction(found, weights, 0.1).equal(correction(found[task : task + 1], (1.0,), 0.1))


def test_the_order_of_tasks_does_not_matter():
    found = products(pairs())
    turned = correction(found[::-1], (0.2, 0.3, 0.5), 0.1)
    torch.testing.assert_close(turned, correction(found, (0.5, 0.3, 0.2), 0.1), rtol=1e-12, atol=1e-12)


def test_a_map_brings_representations_nearer_to_those_of_the_tasks():
    found, weights = pairs(), (0.5, 0.3, 0.2)
    matrix = correction(products(found), weights, 1e-6)

    def distance(matrix: Tensor) -> float:
        each = zip(found, weights, strict=True)
        return sum(w * float((own - merged @ matrix.T).square().sum()) for (own, merged), w in each)

    for seed in range(5):
        assert distance(matrix) < distance(matrix + 0.01 * normal(6, 6, seed=seed))


def test_directions_that_no_example_shows_are_not_turned():
    own, merged = normal(5, 2), normal(5, 2, seed=1)
    cross = torch.zeros(4, 4, dtype=torch.float64)
    cross[:2, :2] = own.T @ merged
    found = rotation(cross)
    torch.testing.assert_close(found[2:, 2:], torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(found @ found.T, torch.eye(4, dtype=torch.float64))
    assert rotation(torch.zeros(3, 3, dtype=torch.float64)).equal(torch.eye(3, dtype=torch.float64))


def test_sums_without_an_inverse_say_what_to_do():
    large = Products(*[torch.full((2, 2), 1e20, dtype=torch.float64)] * 2)
    with pytest.raises(RecipeError, match="has no inverse") as caught:
        correction([large], (1.0,), 0.1)
    assert caught.value.problems[0].key == ("correction", "ridge")
    correction([large], (1.0,), float(caught.value.hint.split()[-1].rstrip(".")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_are_multiplied_in_float64_and_rounded_once(dtype):
    head, matrix = normal(2500, 6).to(dtype), normal(6, 6, seed=1)
    found = product(head, matrix)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), head.double() @ matrix, rtol=torch.finfo(dtype).eps, atol=1e-12
    )


# Heads and their inputs.


class Network(nn.Module):
    """An encoder and a head; `kind` says what is odd about it."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.encoder = nn.Linear(4, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])
        self.other, self.head = nn.Linear(4, 3), nn.Linear(4, 3)
        if kind == "tied":
            self.table = nn.Embedding(3, 4)
            self.head.weight = self.table.weight

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        inside = self.encoder(x).relu()
        if self.kind == "in a block":
            return SimpleNamespace(logits=self.layers[0](inside))
        logits = self.other(inside) if self.kind == "two heads" else 0
        logits = logits + self.head(inside)
        if self.kind == "twice":
            logits = logits + self.head(-inside)
        return SimpleNamespace(logits=logits[..., :2] if self.kind == "cut" else logits)


def model_of(network: nn.Module) -> LoadedModel:
    return LoadedModel(network, None, "a model")


def names_of(network: nn.Module, *lacking: str) -> FileNames:
    found = {name: f"own.{name}" for name, _ in network.named_parameters() if name not in lacking}
    return FileNames(found, {}, {}, {})


def test_the_head_is_the_linear_layer_that_makes_the_logits():
    network = Network()
    for times_run in (1, 2):
        run = partial(lambda n: [network(torch.ones(2, 4)) for _ in range(n)], times_run)
        assert find_head(model_of(network), names_of(network), run) == Head("head", "own.head.weight")


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("cut", "'head', does not make its logits"),
        ("twice", "'head', does not make its logits"),
        ("in a block", r"'layers\.0', is in one of its blocks"),
        ("two heads", r"it has two heads, 'other' and 'head'"),
        ("tied", r"its head is tied to 'table\.weight'"),
    ],
)
def test_models_without_a_head_of_their_own_are_refused(kind, match):
    network = Network(kind)
    with pytest.raises(EvaluationError, match=match) as caught:
        find_head(model_of(network), names_of(network), lambda: network(torch.ones(2, 4)))
    assert caught.value.hint == "Leave correction out of the recipe."


def test_heads_that_files_lack_and_models_without_linear_layers_are_refused():
    network = Network()
    with pytest.raises(EvaluationError, match=r"no tensor of their own for 'head\.weight'"):
        find_head(model_of(network), names_of(network, "head.weight"), lambda: network(torch.ones(2, 4)))
    network = nn.Conv1d(2, 2, 1)
    with pytest.raises(EvaluationError, match="it has no linear layer"):
        find_head(model_of(network), names_of(network), lambda: network(torch.ones(1, 2, 2)))


def test_tied_heads_of_language_models_are_refused():
    config = GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    network = GPT2LMHeadModel(config).eval()
    tokens = torch.tensor([[1, 2, 3]])
    with pytest.raises(EvaluationError, match=r"its head is tied to 'transformer\.wte\.weight'"):
        find_head(model_of(network), names_of(network), lambda: network(input_ids=tokens))


def test_products_are_those_of_all_places_that_no_mask_leaves_out():
    own, merged = Network(), Network()
    nn.init.normal_(merged.encoder.weight)
    batches = [
        (normal(2, 3, 4, seed=seed).float(), torch.tensor([[1, 1, 0], [1, 1, 1]])) for seed in range(2)
    ]

    def run(model: LoadedModel) -> None:
        with torch.inference_mode():
            for x, mask in batches:
                model.network(x, attention_mask=mask)

    found, told = summed_products(Head("head", "own.head.weight"), model_of(own), model_of(merged), run)
    rows = torch.cat([x[mask != 0] for x, mask in batches])
    with torch.no_grad():
        z_own, z_merged = (network.encoder(rows).relu().double() for network in (own, merged))
    torch.testing.assert_close(found["cross"], z_own.T @ z_merged)
    torch.testing.assert_close(found["gram"], z_merged.T @ z_merged)
    assert told == {"head": "own.head.weight", "inputs": "10"}


def test_models_that_run_on_other_inputs_are_told():
    own, merged = model_of(Network()), model_of(Network())

    def run(model: LoadedModel) -> None:
        model.network(torch.ones(2 if model is own else 3, 4))

    with pytest.raises(EvaluationError, match="does not run on the same inputs"):
        summed_products(Head("head", "head.weight"), own, merged, run)
    with pytest.raises(EvaluationError, match="does not run on the same inputs"):
        summed_products(Head("head", "head.weight"), own, merged, lambda model: None)


# In files.


def write_pictures(path: Path, number: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 255, (number, 8, 8, 3), dtype=np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=list(CLASSES))})
    pictures = [PillowImage.fromarray(one) for one in values]
    Dataset.from_dict({"image": pictures, "label": [0] * number}, features=features).to_parquet(str(path))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A base model and two tasks, and pictures of each task."""
    place = tmp_path_factory.mktemp("classifiers")
    torch.manual_seed(0)
    write_classifiers(place, {"base": (0.0, 0.0, 0.1), "a": (1.0, 0.0, 0.1), "b": (0.0, 1.0, 0.1)})
    start = load_file(place / "base" / "model.safetensors")
    start = {name: values + 0.3 * torch.randn_like(values) for name, values in start.items()}
    for seed, name in enumerate(("base", "a", "b")):
        moved = {n: values + 0.15 * (seed > 0) * torch.randn_like(values) for n, values in start.items()}
        save_file(moved, place / name / "model.safetensors", metadata={"format": "pt"})
        write_pictures(place / f"{name}.parquet", 12, seed)
    return place


@pytest.fixture
def folder(tmp_path, written):
    return Path(shutil.copytree(written, tmp_path / "family"))


def values_of(method="average", **changes):
    data = {n: {"dataset": f"{n}.parquet", "split": "train"} for n in "ab"}
    tasks = [{"name": n, "model": f"./{n}", "statistics": f"./statistics/{n}"} for n in "ab"]
    values = {
        "tasks": tasks,
        "method": method,
        "preference": {"weights": {"a": 0.7, "b": 0.3}},
        "correction": "react",
        "statistics": {"data": data, "batch_size": 5},
        "output": {"path": "merged"},
    }
    return {key: value for key, value in (classifier_recipe(**values) | changes).items() if value is not None}


def recipe_of(folder, method="average", **changes):
    return parse_recipe(values_of(method, **changes), folder=folder)


def planned(folder, method="average", **changes):
    recipe = recipe_of(folder, method, **changes)
    return accepted(plan(recipe, lock(recipe)))


def representations(folder: Path, weights: dict[str, Tensor] | None, task: str) -> np.ndarray:
    """Inputs of the head on a task's examples one by one, "dimensions examples"."""
    evaluator = make_evaluator("image-classification", {})
    place = ModelPlace(str(folder / task))
    model = load_model(place, evaluator.model_class, evaluator.processor_class, "a test")
    model = model if weights is None else model.with_weights(weights)
    seen: list[Tensor] = []
    model.network.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for image in Dataset.from_parquet(str(folder / f"{task}.parquet"))["image"]:
            model.network(**model.processor(images=[image], return_tensors="pt"))
    return torch.cat(seen).double().T.numpy()


def in_memory(made) -> dict[str, Tensor]:
    recipe = made.recipe.model_copy(update={"correction": None})
    with InMemoryMerger(recipe, made.lock) as merger:
        return merger.merge(made.lock.method, made.lock.weights).weights(made.lock.method["scaling"])


HEAD = "classifier.weight"


@pytest.mark.parametrize("method", ["average", {"name": "task_arithmetic", "scaling": 0.5}, "ties"])
def test_the_head_of_the_files_is_the_merged_one_times_the_papers_matrix(folder, method):
    made = planned(folder, method)
    merge(made)
    found, weights = read_merged(folder / "merged"), in_memory(made)
    own, merged = ([representations(folder, w, task) for task in "ab"] for w in (None, weights))
    matrix = oracles.react(own, merged, (0.7, 0.3), 0.1)
    assert np.abs(matrix - np.eye(8)).max() > 0.05
    expected = torch.from_numpy(weights[HEAD].double().numpy() @ matrix).float()
    torch.testing.assert_close(found[HEAD], expected, rtol=1e-3, atol=1e-4)
    assert found[HEAD].equal(product(weights[HEAD], correction_of(made.recipe, made.lock)))
    assert all(found[name].equal(values) for name, values in weights.items() if name != HEAD)


def test_the_corrected_model_answers_as_the_paper_says(folder):
    """W_p is applied to the representation, before the head and its bias."""
    made = planned(folder)
    merge(made)
    weights, matrix = in_memory(made), correction_of(made.recipe, made.lock)
    network = load_model(
        ModelPlace(str(folder / "merged")), "AutoModelForImageClassification", "AutoImageProcessor", "a test"
    ).network
    z = torch.from_numpy(representations(folder, weights, "a"))
    expected = (matrix @ z).T @ weights[HEAD].double().T + weights["classifier.bias"]
    torch.testing.assert_close(network.classifier(z.T.float()), expected.float(), rtol=1e-4, atol=1e-4)


def test_the_number_of_threads_the_chunk_and_the_processes_change_no_byte(folder, monkeypatch):
    made = planned(folder, output={"path": "merged", "shard_size": "1KB"})
    monkeypatch.setattr("hub_magmax.planning.budget.num_threads", lambda: 1)
    first = merge(made, folder / "first")
    monkeypatch.setattr("hub_magmax.planning.budget.num_threads", lambda: 2)
    assert merge(made, folder / "second", chunk_elements=5).shards == first.shards
    place = PartialFolder(folder / "third", made.digest)
    place.prepare()
    with open_checkpoints(made.recipe, made.lock) as sources:
        for rank in range(2):
            make_shards(made, sources, place, place.journal, None, 100, Processes(rank, 2))
    assert [place.journal.intact(shard.file) for shard in first.shards] == [*first.shards]


def test_representations_are_made_once_and_each_time_the_same(folder):
    told = []
    first = lock(recipe_of(folder), report=told.append)
    assert told[0].startswith("representation statistics are made, about ")
    assert told[1:] == [
        "merging a, b in memory, for representation statistics",
        "running the merged model and a on 12 of its examples, for representation statistics",
        "running the merged model and b on 12 of its examples, for representation statistics",
    ]
    assert first.correction == {"name": "react", "ridge": 0.1, "tensor": HEAD}
    assert not first.is_portable
    path = folder / "statistics" / "b" / "representation.safetensors"
    before = path.read_bytes()
    told.clear()
    assert lock(recipe_of(folder), report=told.append) == first
    assert told == []
    path.unlink()
    assert lock(recipe_of(folder)) == first
    assert path.read_bytes() == before
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    assert (facts["task"], facts["head"], facts["examples"], facts["inputs"]) == ("b", HEAD, "12", "12")


def test_another_ridge_takes_the_same_representations(folder):
    first = lock(recipe_of(folder))
    other = recipe_of(folder, correction={"name": "react", "ridge": 5})
    assert changed_keys(other, first) == ["correction"]
    assert changed_keys(recipe_of(folder, correction=None), first) == ["correction", "statistics"]
    again = lock(other)
    assert again.statistics == first.statistics and again.digest != first.digest
    assert changed_keys(other, again) == []


def test_locks_without_a_correction_are_what_they_were(folder):
    locked = lock(recipe_of(folder, correction=None))
    assert "correction" not in json.loads(locked.to_json()) and locked.is_portable


@pytest.mark.parametrize(
    "changes",
    [
        {"preference": {"weights": {"a": 0.6, "b": 0.4}}},
        {"method": {"name": "average", "scaling": 0.9}},
        {"tensors": [{"match": HEAD, "take": "base_model"}]},
        {"norms": "equal"},
        {"output": {"path": "merged", "dtype": "bfloat16"}},
    ],
)
def test_representations_of_another_merge_are_told_and_made_again(folder, changes):
    lock(recipe_of(folder))
    with pytest.raises(LockError, match="these statistics are of another merge") as caught:
        lock(recipe_of(folder, **changes))
    assert caught.value.problems[0].key == ("tasks", 0, "statistics")
    (folder / "statistics" / "a" / "representation.safetensors").unlink()
    merge(planned(folder, **changes))


def test_representations_of_another_base_model_are_told(folder):
    lock(recipe_of(folder))
    path = folder / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors["classifier.bias"] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(LockError, match="these statistics are of another merge"):
        lock(recipe_of(folder))


def test_methods_that_ignore_the_preference_take_the_same_representations_for_all(folder):
    """The preference then acts by the correction alone, which is the paper's own use."""
    told, digests = [], set()
    for share in (0.5, 0.7, 0.9):
        preference = {"weights": {"a": share, "b": 1 - share}}
        recipe = recipe_of(folder, "magmax", preference=preference, output={"path": f"m{share}"})
        made = accepted(plan(recipe, lock(recipe, report=told.append)))
        digests.add(merge(made).shards[0].sha256)
    assert len(told) == 4 and len(digests) == 3  # a line for sizes, for the merge, and for each task


def test_a_changed_file_of_representations_is_told(folder):
    recipe = recipe_of(folder)
    locked = lock(recipe)
    path = folder / "statistics" / "b" / "representation.safetensors"
    save_file(load_file(path), path, metadata={"statistics": "representation", "head": HEAD, "note": "x"})
    with pytest.raises(LockError, match=r"representation\.safetensors changed since the lock was written"):
        plan(recipe, locked)


def rewritten(folder: Path, tensors: dict[str, Tensor], **facts: str) -> None:
    path = folder / "statistics" / "b" / "representation.safetensors"
    save_file(tensors, path, metadata={"statistics": "representation", "head": HEAD} | facts)


def test_files_that_are_no_representations_of_this_model_are_told(folder):
    lock(recipe_of(folder))
    unknown = {"statistics": None}  # who names no examples takes files as they are
    square, wide = torch.eye(8, dtype=torch.float64), torch.eye(9, dtype=torch.float64)
    rewritten(folder, {"cross": wide, "gram": wide.clone()})
    with pytest.raises(
        MismatchError, match=r"those of b have 9 dimensions, and 'classifier\.weight' is \[3, 8\]"
    ):
        plan(recipe_of(folder, **unknown))
    rewritten(folder, {"cross": wide, "gram": square})
    with pytest.raises(CheckpointError, match=r"there are cross \[9, 9\], gram \[8, 8\]"):
        plan(recipe_of(folder, **unknown))
    twice = {"cross": square, "gram": square.clone()}
    rewritten(folder, twice, head="other.weight")
    with pytest.raises(CheckpointError, match=r"these are representations before 'other\.weight'"):
        plan(recipe_of(folder, **unknown))
    rewritten(folder, {"cross": square * torch.nan, "gram": square})
    with pytest.raises(NonFiniteError, match="element 0 is nan"):
        merge(planned(folder, **unknown))
    rewritten(folder, twice, statistics="gram")
    with pytest.raises(CheckpointError, match="these are gram statistics"):
        plan(recipe_of(folder, **unknown))


def test_a_head_that_the_merged_model_lacks_is_told(folder):
    lock(recipe_of(folder))
    for task in "ab":
        path = folder / "statistics" / task / "representation.safetensors"
        save_file(load_file(path), path, metadata={"statistics": "representation", "head": "score.weight"})
    with pytest.raises(MismatchError, match=r"about 'score\.weight', which the merged model does not have"):
        plan(recipe_of(folder, statistics=None))


def test_a_head_that_a_rule_leaves_out_is_told_with_the_rule(folder):
    rule = {"match": "classifier.weight", "take": "nothing"}
    with pytest.raises(MismatchError, match=r"does not have") as caught:
        planned(folder, tensors=[rule])
    assert "or the rule of tensors that leaves the head out" in caught.value.hint


def test_a_head_that_is_one_parameter_with_another_tensor_is_told(folder):
    made = planned(folder)
    head = next(job for job in made.jobs if job.name == HEAD)
    values = vars(head) | {"name": "table.weight", "of": HEAD}
    tied = replace(made, shards=(Shard("a", (*made.jobs, TiedJob(**values))),))
    with open_statistics(made.recipe, made.lock, "representation") as statistics:
        check_correction(made, statistics)
        with pytest.raises(MismatchError, match=r"which is one parameter with 'table\.weight'"):
            check_correction(tied, statistics)


def test_a_product_that_the_output_cannot_hold_is_told(folder):
    output = {"path": "merged", "dtype": "float16"}
    lock(recipe_of(folder, output=output))
    for task in "ab":
        path = folder / "statistics" / task / "representation.safetensors"
        tensors = load_file(path)
        tensors["cross"] *= 1e9
        save_file(tensors, path, metadata={"statistics": "representation", "head": HEAD})
    made = planned(folder, statistics=None, output=output)
    with pytest.raises(NonFiniteError, match="the merged weight times its correction is not finite"):
        merge(made)


def test_plan_report_and_card_say_what_is_corrected(folder, monkeypatch):
    (folder / "recipe.yaml").write_text(yaml_text(values_of()))
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(main, ["plan", "recipe.yaml"])
    assert done.exit_code == 0, done.output
    assert "corrected    by react, ridge 0.1, in 'classifier.weight'" in done.output
    made = planned(folder)
    assert describe(made)["correction"] == made.lock.correction
    assert "the last bits that the correction gives depend on processor" in explain(made)
    plain = planned(folder, correction=None)
    assert describe(plain)["correction"] is None and "correct" not in explain(plain)
    assert peak_memory_bytes(made) > peak_memory_bytes(plain)
    report = merge(made)
    assert any("it fits no other model's body" in notice for notice in report.notices)
    locked = read_lock(folder / "merged" / "recipe.lock.json")
    text = render_card(made.recipe, locked, report)
    assert "- **Corrected:** by `react` ([arXiv:2511.10943](https://arxiv.org/abs/2511.10943))" in text
    assert "Corrected" not in render_card(plain.recipe, plain.lock, report)


def test_a_corrected_merge_is_rebuilt_from_its_folder(folder):
    merge(planned(folder))
    assert rebuild(str(folder / "merged"), folder=folder).shards


@pytest.mark.parametrize("method", ["regmean", "regmean_plusplus"])
def test_methods_that_use_data_are_corrected_too(folder, method):
    made = planned(folder, method)
    assert [*made.lock.statistics] == [{"regmean": "gram"}.get(method, "merged_gram"), "representation"]
    merge(made)
    expected = product(in_memory(made)[HEAD], correction_of(made.recipe, made.lock))
    assert read_merged(folder / "merged")[HEAD].equal(expected)


def test_a_copied_head_and_narrow_numbers_are_corrected(folder):
    rules = [{"match": HEAD, "take": "b"}]
    made = planned(folder, tensors=rules, output={"path": "merged", "dtype": "bfloat16"})
    merge(made)
    head = load_file(folder / "b" / "model.safetensors")[HEAD].bfloat16()
    assert read_merged(folder / "merged")[HEAD].equal(product(head, correction_of(made.recipe, made.lock)))


LABELS = {"target": {"dataset": "d", "split": "train"}, "classes": {"a": ["cat"], "b": ["dog"]}}


@pytest.mark.parametrize(
    ("key", "match", "changes"),
    [
        (("output", "format"), "an adapter has no head", {"output": {"path": "m", "format": "adapter"}}),
        (("tokenizer",), "whose tokenizer is not written yet", {"tokenizer": "a"}),
        (("preference", "coefficients"), "by shares", {"preference": {"coefficients": {"a": 1, "b": -1}}}),
        (
            ("method", "name"),
            "without the correction",
            {"method": "auto", "compare": {"tune": {"dataset": "d"}}},
        ),
        (("compare",), "without the correction", {"compare": {"methods": ["ties"]}}),
        (("correction",), "a sweep are merged without the correction", {"sweep": {"walk": "grid"}}),
        (
            ("preference", "search"),
            "without the correction",
            {"preference": {"search": {"target": {"dataset": "d", "split": "train"}}}},
        ),
        (
            ("preference", "labels", "holdout"),
            "without the correction",
            {"preference": {"labels": LABELS | {"holdout": 0.5}}},
        ),
        (("layers",), "leave layers out, or leave correction out", {"layers": [{"blocks": [0, 1]}]}),
        (("correction", "ridge"), "above 0", {"correction": {"ridge": 0}}),
        (("correction", "name"), "react", {"correction": "act"}),
        (
            ("correction",),
            "needs representation statistics of each task's data, and b have none",
            {"tasks": [{"name": "a", "model": "./a", "statistics": "./s"}, {"name": "b", "model": "./b"}]},
        ),
    ],
)
def test_what_does_not_go_with_a_correction_is_told(folder, key, match, changes):
    with pytest.raises(RecipeError, match=match) as caught:
        recipe_of(folder, **changes)
    assert key in [problem.key for problem in caught.value.problems]


def test_merges_in_memory_of_a_corrected_recipe_are_refused(folder):
    made = planned(folder)
    with pytest.raises(RecipeError, match="merged without the correction") as caught:
        InMemoryMerger(made.recipe, made.lock)
    assert "Leave correction out" in caught.value.hint


def test_missing_representations_without_examples_are_told(folder):
    with pytest.raises(RecipeError, match="there are no representation statistics of a"):
        lock(recipe_of(folder, statistics=None))


def test_recipes_survive_a_round_through_their_values(folder):
    recipe = recipe_of(folder)
    assert parse_recipe(recipe.to_dict(), folder=folder) == recipe
    assert recipe.to_dict()["correction"] == {"name": "react", "ridge": 0.1}
