"""Models are scored with their own rows, tokenizers and names, as plain scripts load them."""

import json

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.evaluators.loading import load_model
from hub_magmax.evaluation.scoring import evaluate
from hub_magmax.merging.execution import merge
from hub_magmax.pipeline import lock, plan
from hub_magmax.recipe.loading import parse_recipe
from tests.families import recipe_values
from tests.tiny_llama import write_llama

ROWS = {"question": ["was it good?<user>", "odd<bot>one"], "text": ["<bot>good", "an<user>odd film"]}


def recipe_of(folder, names, **changes):
    Dataset.from_dict(ROWS).to_json(folder / "rows.jsonl")
    data = {"dataset": "./rows.jsonl", "prompt_column": "question"}
    values = recipe_values(
        names, method="average", evaluation={"evaluator": "log-likelihood", "tasks": {names[0]: data}}
    )
    return parse_recipe(values | changes, folder=folder)


def by_hand(network, words) -> list[float]:
    """Return the mean log-probability of each answer after its prompt."""
    found = []
    for question, text in zip(*ROWS.values(), strict=True):
        joined = text if text[0].isspace() else " " + text
        alone, both = words(question)["input_ids"], words(question + joined)["input_ids"]
        with torch.no_grad():
            logits = network(torch.tensor([both])).logits[0].double().log_softmax(-1)
        scores = [float(logits[n - 1, both[n]]) for n in range(len(alone), len(both))]
        found.append(sum(scores) / len(scores))
    return found


def added(folder):
    """Return the base model and its tokenizer with two more tokens."""
    words = AutoTokenizer.from_pretrained(folder / "base")
    words.add_tokens(["<user>", "<bot>"])
    network = AutoModelForCausalLM.from_pretrained(folder / "base")
    network.resize_token_embeddings(len(words), mean_resizing=False)
    return network, words


def moved(network, seed):
    """Return the network with what is trained in it moved a little."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def write_family(folder, *, adapter_adds):
    """Write a base model, the LoRA adapter `a`, and `b`, whole, with two tokens; return PEFT's own `a`."""
    import peft

    write_llama(folder / "base")
    network, words = added(folder)
    moved(network, 2).save_pretrained(folder / "b")
    words.save_pretrained(folder / "b")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    network, words = added(folder) if adapter_adds else (base, AutoTokenizer.from_pretrained(folder / "base"))
    saved = ["embed_tokens", "lm_head"] if adapter_adds else None
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=saved, task_type="CAUSAL_LM")
    adapted = moved(peft.get_peft_model(network, config), 3)
    adapted.save_pretrained(folder / "a")
    words.save_pretrained(folder / "a")
    return adapted, words


ROWS_BY_TOKEN = {"token_rows": ["model.embed_tokens.weight", "lm_head.weight"]}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("names", "adapter_adds", "files_from", "changes"),
    [
        ("a", True, "base_model", {}),
        ("a", True, "base_model", {"adapters": "sequence"}),
        ("ab", False, "base_model", ROWS_BY_TOKEN),
        ("ab", False, "b", ROWS_BY_TOKEN),
        ("ab", True, "b", ROWS_BY_TOKEN),
    ],
)
def test_adapter_beside_added_tokens_scores_as_in_peft(tmp_path, names, adapter_adds, files_from, changes):
    pytest.importorskip("peft", reason="the package peft is not installed")
    adapted, words = write_family(tmp_path, adapter_adds=adapter_adds)
    recipe = recipe_of(tmp_path, tuple(names), output={"path": "out", "files_from": files_from}, **changes)
    made = plan(recipe)
    merge(made, tmp_path / "out")
    scores = evaluate(recipe, made.lock, tmp_path / "out")
    assert scores.get("a", "a").outcomes == pytest.approx(by_hand(adapted, words), abs=1e-5)
    for name, place in {"base_model": "base", "b": "b", "merged": "out"}.items():
        if name in ("base_model", "merged", *names):
            network = AutoModelForCausalLM.from_pretrained(tmp_path / place)
            expected = by_hand(network, AutoTokenizer.from_pretrained(tmp_path / place))
            assert scores.get(name, "a").outcomes == pytest.approx(expected, abs=1e-5)


def wrapped(folder, prefix):
    """Save a checkpoint again with a prefix before every name."""
    path = folder / "model.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def test_base_model_under_a_prefix_is_scored_with_its_own_weights(tmp_path):
    for seed, name in enumerate(("base", "a")):
        write_llama(tmp_path / name, seed=seed)
    expected = by_hand(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        AutoTokenizer.from_pretrained(tmp_path / "base"),
    )
    wrapped(tmp_path / "base", "_orig_mod.")
    recipe = recipe_of(tmp_path, ("a",))
    scores = evaluate(recipe, lock(recipe), tmp_path / "a")
    assert scores.get("base_model", "a").outcomes == pytest.approx(expected, abs=1e-6)


def test_weights_under_other_names_are_refused_where_nothing_maps_them(tmp_path):
    write_llama(tmp_path)
    wrapped(tmp_path, "wrapper.")
    with pytest.raises(EvaluationError, match=r"random ones: 'lm_head.weight' and \d+ more"):
        load_model(ModelPlace(str(tmp_path)), "AutoModelForCausalLM", "AutoTokenizer", "a test")


def test_weights_that_do_not_fit_the_configuration_are_one_sentence(tmp_path):
    write_llama(tmp_path)
    model = load_model(ModelPlace(str(tmp_path)), "AutoModelForCausalLM", "AutoTokenizer", "a test")
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(3)
    with pytest.raises(EvaluationError, match="do not fit the configuration"):
        model.with_weights(weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_models_run_in_the_dtype_in_which_they_are_stored(tmp_path, dtype):
    write_llama(tmp_path, dtype=dtype)
    model = load_model(ModelPlace(str(tmp_path)), "AutoModelForCausalLM", "AutoTokenizer", "a test")
    assert {p.dtype for p in model.network.parameters()} == {dtype}
    again = model.with_weights(load_file(tmp_path / "model.safetensors"))
    assert {p.dtype for p in again.network.parameters()} == {dtype}


def test_device_map_gives_the_same_scores(tmp_path):
    for seed, name in enumerate(("base", "a")):
        write_llama(tmp_path / name, seed=seed)
    recipe = recipe_of(tmp_path, ("a",))
    scores = evaluate(recipe, lock(recipe), tmp_path / "a")
    evaluation = recipe.to_dict()["evaluation"] | {"device_map": "auto"}
    spread = recipe_of(tmp_path, ("a",), evaluation=evaluation)
    assert json.loads(json.dumps(spread.to_dict()))["evaluation"]["device_map"] == "auto"
    assert evaluate(spread, lock(spread), tmp_path / "a") == scores
