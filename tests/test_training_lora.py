"""LoRA adapters as tasks' checkpoints: what PEFT makes of them, sequences, resuming to the byte, refusals."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

import hub_magmax as hm
from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.errors import MissingDependencyError, RecipeError
from hub_magmax.evaluation.evaluators.loading import LoadedModel, load_model
from hub_magmax.files import code_digest
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.recipe.training import Lora
from hub_magmax.training.adapters import add_adapter
from tests.families import recipe_values
from tests.learners import TEXTS, Stopped, stop, stopping, training_recipe
from tests.test_checkpoints_links import into_store
from tests.tiny_llama import tokenizer

peft = pytest.importorskip("peft", reason="the package peft is not installed")

LORA = {"rank": 4, "alpha": 8, "targets": ["*.query", "*.value"]}


def recipe(folder, changes=None, **others):
    training = {"lora": LORA, "steps": 20, "learning_rate": 0.05} | (changes or {})
    return parse_recipe(training_recipe(training, **others), folder=folder)


def finetune(folder, changes=None, **options):
    return hm.finetune(recipe(folder, changes), **options)


@pytest.fixture(scope="module")
def trained(learner, tmp_path_factory):
    folder = shutil.copytree(learner, tmp_path_factory.mktemp("trained") / "all")
    return folder, finetune(folder)


def logits(model, folder, task):
    words = AutoTokenizer.from_pretrained(folder / "base")
    with torch.no_grad():
        return model.eval()(
            **words([text for text, _ in TEXTS[task]], padding=True, return_tensors="pt")
        ).logits


def base_of(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder / "base")


def by_hand(folder, task):
    """The oracle: the base model whose layers are W + alpha / rank · B A, from the files themselves."""
    model, factors = base_of(folder), load_file(folder / task / "adapter_model.safetensors")
    for name in {name.split(".lora_")[0] for name in factors}:
        layer = model.get_submodule(name.removeprefix("base_model.model."))
        product = factors[f"{name}.lora_B.weight"] @ factors[f"{name}.lora_A.weight"]
        layer.weight.data += LORA["alpha"] / LORA["rank"] * product
    return model


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_peft_loads_what_was_trained_and_computes_the_same(trained):
    folder, made = trained
    for task in ("a", "b"):
        loaded = peft.PeftModel.from_pretrained(base_of(folder), folder / task)
        found, expected = (logits(model, folder, task) for model in (loaded, by_hand(folder, task)))
        assert torch.allclose(found, expected, atol=1e-5) and not torch.allclose(
            found, logits(base_of(folder), folder, task), atol=0.1
        )
    assert made.tasks[0].loss[-1] < made.tasks[0].loss[0]
    config = json.loads((folder / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "./base" and config["target_modules"] == [
        f"bert.encoder.layer.{layer}.attention.self.{name}" for layer in (0, 1) for name in ("query", "value")
    ]
    assert not (folder / "a" / "config.json").exists()  # the folder is no whole model


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_same_recipe_merges_and_scores_them_as_whole_weights_and_as_an_adapter(trained, tmp_path):
    folder, made = trained
    method, preference = {"name": "task_arithmetic", "scaling": 1.0}, {"coefficients": {"a": 1.0, "b": 0.0}}
    both = recipe(folder, method=method, preference=preference)
    hm.run(both)
    merged = AutoModelForSequenceClassification.from_pretrained(folder / "merged")
    assert torch.allclose(logits(merged, folder, "a"), logits(by_hand(folder, "a"), folder, "a"), atol=1e-5)
    scores = {
        (one.model, one.task): one.value for one in hm.evaluate(both, hm.lock(both), folder / "merged").scores
    }
    assert made.forgetting.scores == {
        "a": {"a": scores["a", "a"]},
        "b": {"a": scores["b", "a"], "b": scores["b", "b"]},
    }
    hm.run(recipe(folder, method="average", output={"path": "together", "format": "adapter"}))
    together = peft.PeftModel.from_pretrained(base_of(folder), folder / "together")
    assert logits(together, folder, "a").isfinite().all()


@pytest.mark.parametrize("order", ["sequential", "from_base"])
def test_in_a_sequence_an_adapter_goes_on_from_the_one_before_it(folder, order):
    """With a learning rate of almost nothing the factors stay what they were at the start."""
    finetune(folder, {"order": order, "learning_rate": 1e-20, "steps": 1})
    a, b = (load_file(folder / task / "adapter_model.safetensors") for task in ("a", "b"))
    first, second = (next(name for name in sorted(a) if f"lora_{factor}" in name) for factor in "AB")
    assert torch.allclose(a[first], b[first], atol=1e-12) == (order == "sequential")
    assert a[first].abs().max() > 0 and a[second].abs().max() < 1e-12


@pytest.mark.parametrize("after", [5, 29])
def test_a_stopped_training_goes_on_to_the_same_bytes(trained, folder, after):
    with pytest.raises(Stopped):
        finetune(folder, {"checkpoint_every": 4}, progress=stopping(after, stop))
    state = next((folder / f"{'a' if after < 20 else 'b'}.training").glob("step-*"))
    stored = load_file(state / "trained.safetensors")
    assert {name.split(".")[-3] for name in stored} == {"lora_A", "lora_B"}  # the base model is not stored
    finetune(folder, {"checkpoint_every": 4})
    digests = [code_digest(place.glob("[ab]/*"), place) for place in (trained[0], folder)]
    assert digests[0] == digests[1]


def test_without_targets_all_linear_layers_but_the_head_are_trained(learner):
    place = ModelPlace(str(learner / "base"))
    model = load_model(place, "AutoModelForSequenceClassification", "AutoTokenizer", "a test")
    linear = {name for name, one in model.network.named_modules() if isinstance(one, torch.nn.Linear)}
    adapter = add_adapter(model, "AutoModelForSequenceClassification", Lora(rank=2), 0)
    assert {*adapter.config["target_modules"]} == linear - {"classifier"}
    assert adapter.config["lora_alpha"] == 2 and len(adapter.weights) == 2 * (len(linear) - 1)
    trained = {name for name, one in model.network.named_parameters() if one.requires_grad}
    assert all("lora_" in name for name in trained) and len(trained) == len(adapter.weights)


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_head_inside_of_the_body_is_not_trained(is_tied):
    """That of T5, whose network is its own body."""
    config = T5Config(
        vocab_size=8, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=2, tie_word_embeddings=is_tied
    )
    model = LoadedModel(T5ForConditionalGeneration(config), None, "a test")
    adapter = add_adapter(model, "AutoModelForSeq2SeqLM", Lora(rank=2), 0)
    layers = {name.rpartition(".")[2] for name in adapter.config["target_modules"]}
    assert layers == {"q", "k", "v", "o", "wi", "wo"}


def test_checkpoints_behind_links_are_trained_and_scored(folder):
    into_store(folder / "base", folder / "store")
    made = hm.finetune(recipe(folder, {"steps": 1}, trusted_links=["./store"]))
    assert [*made.forgetting.scores["b"]] == ["a", "b"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_layers_that_are_stored_transposed_have_adapters_too(tmp_path):
    """GPT-2 in bfloat16: the factors are trained and stored in float32, and PEFT adds what the merge adds."""
    torch.manual_seed(0)
    words = tokenizer(16)
    config = GPT2Config(vocab_size=len(words), n_positions=16, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    (tmp_path / "texts.jsonl").write_text('{"text": "a good film"}\n{"text": "an odd answer"}')
    training = {
        "data": {"a": {"dataset": "./texts.jsonl"}},
        "lora": {"rank": 2},
        "evaluator": "log-likelihood",
    }
    training |= {"steps": 3, "batch_size": 2, "learning_rate": 0.05}
    values = recipe_values(("a",), tasks=[{"name": "a", "model": "./a"}], training=training)
    values |= {
        "method": {"name": "task_arithmetic", "scaling": 1.0},
        "output": {"path": "merged", "dtype": "float32"},
    }
    recipe = parse_recipe(values, folder=tmp_path)
    hm.finetune(recipe)
    hm.run(recipe)
    base, merged = (
        GPT2LMHeadModel.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("base", "merged")
    )
    inputs = torch.tensor([[3, 4, 5]])
    before = base.eval()(input_ids=inputs).logits.detach()
    found = peft.PeftModel.from_pretrained(base, tmp_path / "a").eval()(input_ids=inputs).logits
    assert torch.allclose(found, merged.eval()(input_ids=inputs).logits, atol=1e-6)
    assert (found - before).abs().max() > 0.1
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] and config["task_type"] == "CAUSAL_LM"


def test_rounds_train_adapters_of_the_model_before(folder):
    alternate = {"order": "from_base", "alternate": {"rounds": 2, "step": 0.5}, "steps": 2}
    done = hm.alternate(recipe(folder, alternate, method={"name": "task_arithmetic", "scaling": 1.0}))
    assert [one.is_new for one in done.rounds] == [True, True]
    second = folder / "merged.rounds" / "2" / "tasks" / "a" / "adapter_config.json"
    assert json.loads(second.read_text())["base_model_name_or_path"] == "./merged.rounds/1/model"


REFUSED = {
    "frozen": ({"frozen": ["*"]}, {}, "training.frozen.*frozen already"),
    "rounded": ({"quantization_aware": "int4"}, {}, "training.quantization_aware"),
    "sequence": ({}, {"adapters": "sequence"}, "adapters: .*leave it out"),
    "rank": ({"lora": {"rank": 0}}, {}, "training.lora.rank"),
}


@pytest.mark.parametrize("changes, others, told", REFUSED.values(), ids=REFUSED)
def test_a_recipe_that_cannot_be_trained_is_refused(tmp_path, changes, others, told):
    with pytest.raises(RecipeError, match=f"(?s){told}"):
        recipe(tmp_path, changes, **others)


def test_a_glob_that_matches_no_layer_is_told(folder):
    with pytest.raises(RecipeError, match=r"no linear layer of .* matches '\*.querry'.*such as bert"):
        finetune(folder, {"lora": LORA | {"targets": ["*.querry"]}})


def test_adapters_and_whole_checkpoints_are_no_sequence(trained, folder, tmp_path):
    mixed = shutil.copytree(trained[0], tmp_path / "mixed")
    shutil.rmtree(mixed / "b")
    (mixed / "a" / "finetune_report.json").unlink()
    with pytest.raises(RecipeError, match=r"b begins at \./a, which is an adapter.*order: from_base"):
        finetune(mixed, {"lora": None})
    with pytest.raises(RecipeError, match=r"\./a has other layers or another rank.*the same lora"):
        finetune(mixed, {"lora": LORA | {"rank": 2}})
    with pytest.raises(RecipeError, match=r"\./a has the scale 2 and not 1"):
        finetune(mixed, {"lora": LORA | {"alpha": 4}})
    shutil.copytree(folder / "base", folder / "a")
    with pytest.raises(RecipeError, match=r"b begins at \./a, a whole checkpoint.*order: from_base"):
        finetune(folder)
    # The advice works.
    assert finetune(folder, {"order": "from_base", "steps": 1}).tasks[1].is_new


def test_the_package_is_named_where_it_is_missing(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "hub-magmax\[peft\]"'):
        finetune(folder)
    assert not (folder / "a.training").exists()
