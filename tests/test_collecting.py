"""Statistics of tasks' data, as locks make them: by hand, and against runs of one example at a time."""

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, GPT2Config, GPT2LMHeadModel

from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.checkpoints.pinning import file_sha256
from hub_magmax.checkpoints.source import MemorySource
from hub_magmax.cli import main
from hub_magmax.errors import EvaluationError, LockError, OutputError, RecipeError
from hub_magmax.evaluation import statistics_making, statistics_origins
from hub_magmax.evaluation.collecting import FileNames, collected, linear_layers, seeing_inputs
from hub_magmax.evaluation.evaluators import Columns, make_evaluator
from hub_magmax.evaluation.evaluators.loading import LoadedModel, load_model
from hub_magmax.evaluation.merged_moments import TaskRun, merged_moments
from hub_magmax.merging.execution import merge
from hub_magmax.pipeline import lock, plan
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.text import format_bytes
from tests import oracles_data
from tests.classifiers import classifier_recipe, write_classifiers, write_rows
from tests.families import accepted, read_merged, yaml_text
from tests.test_checkpoints_adapter import write_adapter
from tests.test_evaluation_evaluators import WORDS, word_tokenizer
from tests.tiny_llama import write_llama


@pytest.fixture
def folder(tmp_path):
    write_classifiers(tmp_path, {"base": (0.0, 0.0, 0.1), "a": (1.0, 0.0, 0.1), "b": (0.0, 1.0, 0.1)})
    write_rows(tmp_path / "others.parquet", [0] * 5 + [2] * 3)
    return tmp_path


def values_of(method="regmean", **changes):
    data = {"a": {"dataset": "rows.parquet", "split": "train"}, "b": {"dataset": "others.parquet"}}
    data["b"]["split"] = "train"
    tasks = [{"name": n, "model": f"./{n}", "statistics": f"./statistics/{n}"} for n in "ab"]
    return (
        classifier_recipe(
            tasks=tasks, method=method, statistics={"data": data, "batch_size": 4}, output={"path": "merged"}
        )
        | changes
    )


def recipe_of(folder, method="regmean", **changes):
    return parse_recipe(values_of(method, **changes), folder=folder)


def header_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def load(folder: Path) -> LoadedModel:
    evaluator = make_evaluator("image-classification", {})
    return load_model(ModelPlace(str(folder)), evaluator.model_class, evaluator.processor_class, "a test")


def inputs_of_layers(model: LoadedModel, examples: list) -> dict[str, Tensor]:
    """All inputs of every linear layer, in float64, from runs of one example at a time."""
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, i, name=name: seen.setdefault(name, []).append(i[0].flatten(0, -2))
        )
        for name, module, _ in linear_layers(model.network)
    ]
    with torch.no_grad():
        for example in examples:
            model.network(**example)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(found).double() for name, found in seen.items()}


def test_moments_are_the_means_over_all_inputs(folder):
    lock(recipe_of(folder))
    found = load_file(folder / "statistics" / "a" / "gram.safetensors")
    model = load(folder / "a")
    images = Dataset.from_parquet(str(folder / "rows.parquet"))["image"]
    seen = inputs_of_layers(model, [model.processor(images=[i], return_tensors="pt") for i in images])
    base = MemorySource.from_tensors(read_merged(folder / "base"))
    base.files["config.json"] = (folder / "base" / "config.json").read_bytes()
    names = FileNames.find(model.network, base).names
    assert {names[f"{name}.weight"] for name in seen} == found.keys() <= read_merged(folder / "base").keys()
    assert len(found) == 7  # q, k, v, what follows them, two of the block, and the head
    for name, inputs in seen.items():
        expected = (inputs.T @ inputs / len(inputs)).float()
        torch.testing.assert_close(found[names[f"{name}.weight"]], expected, rtol=1e-4, atol=1e-5)


def test_information_of_a_constant_classifier_by_hand(folder):
    lock(recipe_of(folder, "fisher"))
    found = load_file(folder / "statistics" / "a" / "fisher.safetensors")
    p = torch.tensor([1.0, 0.0, 0.1]).softmax(-1)
    # The mean over the answers of the square of (1 where it is the answer) − p.
    torch.testing.assert_close(found["classifier.bias"], p * (1 - p), rtol=1e-5, atol=1e-7)
    assert not found["vit.layernorm.weight"].any()  # the head does not look at it
    squares = sum(float(t.double().square().sum()) for t in found.values())
    scale = (squares / sum(t.numel() for t in found.values())) ** 0.5
    assert float(
        header_of(folder / "statistics" / "a" / "fisher.safetensors")["root_mean_square"]
    ) == pytest.approx(scale)


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_a_second_lock_takes_what_is_there_and_the_first_file_is_the_same_each_time(folder, method):
    told = []
    first = lock(recipe_of(folder, method), report=told.append)
    size, *runs = told
    paths = [f"statistics/{n}/{'gram' if method == 'regmean' else 'fisher'}.safetensors" for n in "ab"]
    assert all(path in size for path in paths) and f"about {size_of(folder / paths[0])} of each task" in size
    assert [line.split(" for ")[0] for line in runs] == [
        f"running {n} on {c} of its examples," for n, c in (("a", 10), ("b", 8))
    ]
    told.clear()
    assert lock(recipe_of(folder, method), report=told.append) == first
    assert told == []
    (path,) = (folder / "statistics" / "b").iterdir()
    before = path.read_bytes()
    path.unlink()
    assert lock(recipe_of(folder, method)) == first
    assert path.read_bytes() == before


def size_of(path: Path) -> str:
    """The size of a file's tensors as people are told it."""
    return format_bytes(sum(tensor.nbytes for tensor in load_file(path).values()))


def test_statistics_without_room_are_not_made(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(OutputError, match=r"gram statistics of the tasks take about .* 100 B are free"):
        lock(recipe_of(folder))
    assert not (folder / "statistics").exists()


@pytest.fixture
def adapted(tmp_path):
    """A language model with two adapters that change half of its attention."""
    write_llama(tmp_path / "base")
    base = load_file(tmp_path / "base" / "model.safetensors")
    for seed, name in enumerate("ab"):
        write_adapter(tmp_path / name, base, ("q_proj", "v_proj"), seed, config={"task_type": "CAUSAL_LM"})
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"{name} good film"}))
    return tmp_path


def of_adapters(folder, method):
    data = {n: {"dataset": f"./{n}.jsonl", "split": "train"} for n in "ab"}
    tasks = [{"name": n, "model": f"./{n}", "statistics": f"./statistics/{n}"} for n in "ab"]
    values = {"schema": 1, "base_model": "./base", "tasks": tasks, "method": method}
    values |= {"statistics": {"evaluator": "log-likelihood", "data": data}, "output": {"path": method}}
    return parse_recipe(values, folder=folder)


@pytest.mark.parametrize(("method", "kind"), [("regmean", "gram"), ("fisher", "fisher")])
def test_statistics_of_tensors_that_no_adapter_changes_are_neither_made_nor_read(
    adapted, method, kind, monkeypatch
):
    recipe, path = of_adapters(adapted, method), adapted / "statistics" / "a" / f"{kind}.safetensors"
    made = plan(recipe)
    names = {*load_file(path)}
    assert names and all(name.endswith(("q_proj.weight", "v_proj.weight")) for name in names)
    assert {*made.by_statistics} == names
    merge(made)

    # Files of an earlier version have all of them, and are not made again.
    scale = header_of(path).get("root_mean_square")
    for name in "ab":
        (adapted / "statistics" / name / f"{kind}.safetensors").unlink()
    monkeypatch.setattr(
        statistics_making, "changed_tensors", lambda lock, opened: opened["base_model"].index.tensors.keys()
    )
    locked = lock(recipe)
    monkeypatch.undo()
    assert {*load_file(path)} > names and header_of(path).get("root_mean_square") == scale
    again = plan(recipe, locked)
    assert again.by_statistics == made.by_statistics and again.bytes_in == made.bytes_in
    merge(again, adapted / "again")
    few, all_of_them = read_merged(adapted / method), read_merged(adapted / "again")
    assert all(few[name].equal(tensor) for name, tensor in all_of_them.items())


def test_checkpoints_are_hashed_once_to_compare_statistics(folder, monkeypatch):
    hashed = []

    def counting(source, path):
        hashed.append((source.label, path))
        return file_sha256(source, path)

    monkeypatch.setattr(statistics_origins, "file_sha256", counting)
    lock(recipe_of(folder, "regmean_plusplus"))
    assert len(hashed) == len(set(hashed)) == 2


def test_the_header_says_what_statistics_were_made_of(folder):
    lock(recipe_of(folder))
    facts = header_of(folder / "statistics" / "b" / "gram.safetensors")
    assert (facts["statistics"], facts["task"], facts["examples"]) == ("gram", "b", "8")
    assert json.loads(facts["evaluator"]) == ["image-classification", {}]
    assert facts["inputs"] == "8 to 40"  # one of the head for each example, and five places elsewhere


def test_a_merge_from_the_command_line_makes_them_and_ends(folder, monkeypatch):
    (folder / "recipe.yaml").write_text(yaml_text(values_of()))
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(main, ["plan", "recipe.yaml"])
    assert done.exit_code == 0, done.output
    assert "gram of " in done.output
    merge(accepted(plan(recipe_of(folder))))
    assert read_merged(folder / "merged")["classifier.bias"].isfinite().all()


class Blocks(torch.nn.Module):
    """Two blocks of two layers, and a head."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)

        def block() -> torch.nn.ModuleDict:
            return torch.nn.ModuleDict({"a": torch.nn.Linear(4, 5, bias=False), "b": torch.nn.Linear(5, 4)})

        self.layers = torch.nn.ModuleList([block(), block()])
        self.head = torch.nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = x + block["b"](block["a"](x).relu())
        return self.head(x)


def test_moments_behind_merged_blocks_are_those_of_the_paper_block_by_block():
    networks, weights = [Blocks(1), Blocks(2)], [0.7, 0.3]
    inputs = [torch.randn(20, 4, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    own = [{n: p.detach().double().numpy() for n, p in network.named_parameters()} for network in networks]
    names = {n: n for n in own[0]}
    files = FileNames(names, {}, {}, {})
    tasks = {
        task: TaskRun(network, files, lambda network=network, x=x: network(x), weight)
        for task, network, x, weight in zip("ab", networks, inputs, weights, strict=True)
    }
    found = merged_moments(tasks, 0.9, 1e-6)

    states, expected = [x.double().numpy() for x in inputs], [{}, {}]

    def solved(name: str, seen: list) -> np.ndarray:
        gram = np.stack([s.T @ s / len(s) for s in seen])
        for kept, one in zip(expected, gram, strict=True):
            kept[name] = one
        return oracles_data.regmean(np.stack([one[name] for one in own]), gram, weights, 0.9, 1e-6)

    for block in ("layers.0.", "layers.1."):
        first = solved(f"{block}a.weight", states)
        # The second layer's inputs are behind the task's own first layer, and not the merged one.
        inside = [np.maximum(s @ one[f"{block}a.weight"].T, 0) for s, one in zip(states, own, strict=True)]
        second = solved(f"{block}b.weight", inside)
        bias = sum(w * one[f"{block}b.bias"] for w, one in zip(weights, own, strict=True))
        states = [s + np.maximum(s @ first.T, 0) @ second.T + bias for s in states]
    merged = solved("head.weight", states)
    for task, kept in zip("ab", expected, strict=True):
        assert found[task][0].keys() == kept.keys()
        for name, gram in kept.items():
            np.testing.assert_allclose(found[task][0][name].numpy(), gram, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(networks[0].head.weight.detach().numpy(), merged, rtol=1e-3, atol=1e-4)


def test_statistics_of_a_merge_are_made_together_and_told_where_it_is_another(folder):
    told = []
    recipe = recipe_of(folder, "regmean_plusplus", preference={"weights": {"a": 0.7, "b": 0.3}})
    first = lock(recipe, report=told.append)
    assert told[1:] == ["merging a, b block after block, for merged_gram statistics"]
    assert lock(recipe) == first
    merge(accepted(plan(recipe, first)))
    other = recipe_of(folder, "regmean_plusplus", preference={"weights": {"a": 0.6, "b": 0.4}})
    with pytest.raises(LockError, match="these statistics are of another merge"):
        lock(other)
    (folder / "statistics" / "b" / "merged_gram.safetensors").unlink()
    lock(other)


def refused(folder, error, match, method="regmean", **changes):
    with pytest.raises(error, match=match) as caught:
        lock(recipe_of(folder, method, **changes))
    return caught.value


def test_statistics_of_a_checkpoint_that_changed_are_told(folder):
    lock(recipe_of(folder))
    tensors = read_merged(folder / "b")
    tensors["classifier.bias"] += 1  # the same header
    save_file(tensors, folder / "b" / "model.safetensors", metadata={"format": "pt"})
    error = refused(folder, LockError, "these statistics are of another checkpoint than ./b")
    assert error.problems[0].key == ("tasks", 1, "statistics")
    (folder / "statistics" / "b" / "gram.safetensors").unlink()
    lock(recipe_of(folder))


def test_statistics_of_other_examples_are_told(folder):
    lock(recipe_of(folder))
    data = {"b": {"dataset": "rows.parquet", "split": "train"}}
    refused(folder, LockError, r"of other examples than statistics\.data\.b names", statistics={"data": data})
    write_rows(folder / "others.parquet", [0] * 8)
    refused(folder, LockError, r"of other examples than statistics\.data\.b names")
    lock(recipe_of(folder, statistics=None))  # who does not name examples takes them as they are


def test_examples_that_cannot_be_loaded_are_told(folder):
    others = {"b": {"dataset": "others.parquet", "split": "train"}}
    data = others | {"a": {"dataset": "nothing.parquet"}}
    refused(folder, EvaluationError, "there is no such file", statistics={"data": data})
    data = others | {"a": {"dataset": "rows.parquet", "split": "train", "input_column": "text"}}
    refused(folder, EvaluationError, "there is no column 'text'", statistics={"data": data})


def test_an_evaluator_is_needed_to_run_models(folder):
    refused(folder, RecipeError, "nothing says how the models run", evaluation=None)
    data = values_of()["statistics"]["data"]
    lock(recipe_of(folder, evaluation=None, statistics={"data": data, "evaluator": "image-classification"}))
    refused(folder, RecipeError, "no evaluator 'image'", statistics={"data": data, "evaluator": "image"})
    clip = {"name": "zero-shot-image-classification", "classes": ["red", "blue"]}
    other = {"data": data, "evaluator": clip}
    refused(folder, EvaluationError, "tells no log-likelihoods", "fisher", statistics=other)
    wrong = "cannot be loaded for zero-shot-image"
    refused(folder, EvaluationError, wrong, "regmean_plusplus", statistics=other)
    for method in ("fisher", "regmean_plusplus"):
        error = refused(
            folder,
            RecipeError,
            "lm-eval brings its own examples",
            method,
            statistics={"data": data, "evaluator": "lm-eval"},
        )
        assert error.problems[0].key == ("statistics", "evaluator")


def test_statistics_of_a_merge_are_not_made_beside_one_on_the_hub(folder):
    tasks = values_of()["tasks"]
    tasks[1]["statistics"] = "me/of-b"
    data = {"a": values_of()["statistics"]["data"]["a"]}
    error = refused(
        folder,
        RecipeError,
        "those of b are on the Hub",
        "regmean_plusplus",
        tasks=tasks,
        statistics={"data": data},
    )
    assert error.problems[0].key == ("tasks", 1, "statistics")


def test_a_folder_that_cannot_be_written_is_told(folder):
    (folder / "statistics").write_text("a file")
    error = refused(folder, OutputError, "written")
    assert "gram.safetensors" in error.where


def test_models_without_what_a_method_needs_are_told(folder):
    model, evaluator = load(folder / "a"), make_evaluator("image-classification", {})
    rows = Dataset.from_parquet(str(folder / "rows.parquet"))
    call = (evaluator, model, rows, Columns(), 4)
    with pytest.raises(EvaluationError, match="no linear layer of the base model's files ran"):
        collected("gram", *call, source("elsewhere.weight"))
    with pytest.raises(EvaluationError, match="no parameter in the base model's files changes its answers"):
        collected("fisher", *call, source("vit.layernorm.weight"))
    zero_shot = make_evaluator("zero-shot-image-classification", {"classes": ("red", "blue")})
    with pytest.raises(EvaluationError, match="tells no log-likelihoods"):
        collected("fisher", zero_shot, *call[1:], source("vit.layernorm.weight"))


def test_values_that_are_not_finite_are_told(folder):
    model, evaluator = load(folder / "a"), make_evaluator("image-classification", {})
    rows = Dataset.from_parquet(str(folder / "rows.parquet"))
    with torch.no_grad():
        model.network.vit.embeddings.cls_token.fill_(float("inf"))
    names = [name for name, _ in model.network.named_parameters()]
    with pytest.raises(EvaluationError, match="are not finite"):
        collected("gram", evaluator, model, rows, Columns(), 4, source(*names))


def source(*names: str) -> MemorySource:
    return MemorySource.from_tensors({name: torch.ones(2, 3) for name in names})


def test_names_of_parameters_are_found_with_and_without_the_backbones():
    parameters = [("vit.a", None), ("head", None), ("b", None), ("c", None)]
    network = SimpleNamespace(base_model_prefix="vit", named_parameters=lambda: parameters)
    found = FileNames.find(network, source("a", "head", "vit.b"))
    assert found.names == {"vit.a": "a", "head": "head", "b": "vit.b"}


def test_parameters_that_are_several_tensors_of_the_files_are_taken_apart_and_put_together():
    names = FileNames({}, {"qkv": ("q", "k", "v")}, {"both": ("one", "two")}, {"q": 1, "k": 2, "v": 1})
    rows = torch.arange(8.0).view(4, 2)
    found = names.in_files({"qkv": rows, "one": rows[:1], "two": rows[1:]}, by_row=True)
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "q": [[0, 1]], "k": [[2, 3], [4, 5]], "v": [[6, 7]], "both": rows.tolist()
    }  # fmt: skip
    moments = names.in_files({"qkv": rows, "one": rows}, by_row=False)
    assert moments.keys() == {"q", "k", "v"} and all(m.equal(rows) for m in moments.values())


def test_tensors_of_the_files_have_the_order_of_the_parameters():
    joined = {f"layer.{number}.qkv": (f"q{number}", f"k{number}") for number in range(9)}
    rows = {part: 1 for parts in joined.values() for part in parts}
    found = FileNames({}, joined, {}, rows).in_files(dict.fromkeys(joined, torch.ones(2, 3)), by_row=True)
    assert [*found] == [*rows]  # the scale of fisher statistics is a sum in this order


TEXTS = ["the cat sat", "the dog ran the red blue cat", "red cat"]


@pytest.fixture
def causal(tmp_path) -> LoadedModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(WORDS), n_positions=16, n_embd=8, n_layer=1, n_head=2)
    network = GPT2LMHeadModel(config).eval()
    return LoadedModel(network, word_tokenizer(), "causal")


def inputs_of(causal: LoadedModel, text: str) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([causal.processor(text)["input_ids"][:-1]])}


def test_padding_does_not_count_and_layers_of_gpt2_are_transposed(causal):
    names = [name for name, _ in causal.network.named_parameters()]
    rows = Dataset.from_dict({"text": TEXTS})
    found, told = collected(
        "gram", make_evaluator("log-likelihood", {}), causal, rows, Columns(), 3, source(*names)
    )
    seen = inputs_of_layers(causal, [inputs_of(causal, text) for text in TEXTS])
    assert {name.removesuffix(".weight") for name in found} == seen.keys() - {
        "lm_head"
    }  # tied to the embedding
    assert {*json.loads(told["transposed"])} == found.keys()
    for name, tensor in found.items():
        inputs = seen[name.removesuffix(".weight")]
        torch.testing.assert_close(tensor, (inputs.T @ inputs / len(inputs)).float(), rtol=1e-4, atol=1e-5)


def test_padding_does_not_count_in_a_tower_that_is_run_by_itself():
    config = CLIPConfig(
        text_config={"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2,
                     "num_attention_heads": 2, "max_position_embeddings": 16, "eos_token_id": 1},
        vision_config={"image_size": 8, "patch_size": 4, "hidden_size": 8, "intermediate_size": 8,
                       "num_hidden_layers": 1, "num_attention_heads": 2},
        projection_dim=8,
    )  # fmt: skip
    network, counts = CLIPModel(config).eval(), Counter()
    layers = {name: layer for name, layer, _ in linear_layers(network)}
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    texts = torch.tensor([[2, 3, 4, 1], [5, 1, 1, 1], [6, 7, 1, 1]])
    with seeing_inputs(network, layers, lambda name, rows: counts.update({name: len(rows)})):
        network.get_text_features(input_ids=texts, attention_mask=mask)
        network.get_image_features(pixel_values=torch.zeros(2, 3, 8, 8))
    assert {count for name, count in counts.items() if name.startswith("text_model")} == {9}
    assert counts["text_projection"] == 3
    assert {count for name, count in counts.items() if "vision_model.encoder" in name} == {2 * 5}


def test_information_of_texts_is_the_mean_of_their_squared_gradients(causal):
    names = [name for name, _ in causal.network.named_parameters()]
    rows = Dataset.from_dict({"text": TEXTS})
    found, _ = collected(
        "fisher", make_evaluator("log-likelihood", {}), causal, rows, Columns(), 2, source(*names)
    )
    expected = {name: torch.zeros_like(value) for name, value in causal.network.named_parameters()}
    for text in TEXTS:
        tokens = torch.tensor([causal.processor(text)["input_ids"]])
        causal.network.zero_grad()
        loss = causal.network(input_ids=tokens, labels=tokens).loss * (tokens.shape[1] - 1)
        loss.backward()
        for name, value in causal.network.named_parameters():
            expected[name] += value.grad.square() / len(TEXTS)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name].detach(), rtol=1e-4, atol=1e-8)
