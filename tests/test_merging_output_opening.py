"""A merged model opened as its library opens it, before it is published."""

import json
import shutil
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file

from hub_magmax.errors import OutputError
from hub_magmax.fleet.verifying import verify
from hub_magmax.merging.output import opening
from hub_magmax.merging.output.libraries import NotOpenedError, open_folder
from hub_magmax.merging.output.report import read_report
from hub_magmax.pipeline import run
from hub_magmax.recipe.loading import load_recipe
from tests.families import write_recipe

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    """A tiny Llama, as transformers saves it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=32, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def llamas(llama_folder, tmp_path):
    """`base` and tasks `a` and `b` of a tiny Llama."""
    shutil.copytree(llama_folder, tmp_path / "base")
    for seed, name in enumerate("ab"):
        shutil.copytree(llama_folder, tmp_path / name)
        torch.manual_seed(seed)
        change(
            tmp_path / name, lambda tensors: {k: v + 0.01 * torch.randn_like(v) for k, v in tensors.items()}
        )
    return tmp_path


def change(folder, how):
    save_file(how(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def configure(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def merged(folder, **changes):
    values = {"tasks": [{"name": name, "model": f"./{name}"} for name in "ab"]} | changes
    return run(load_recipe(write_recipe(folder, **values)))


def test_model_that_fits_is_opened_and_the_report_says_so(llamas):
    from importlib.metadata import version

    report = merged(llamas).report
    assert report.opened == {
        "library": f"transformers {version('transformers')}",
        "result": "12 tensors fit",
    }
    assert read_report(llamas / "merged" / "merge_report.json").opened == report.opened
    verify(str(llamas / "merged"))


def test_model_that_was_opened_is_not_opened_again(llamas, monkeypatch):
    merged(llamas)
    monkeypatch.setattr(opening, "open_folder", None)
    assert merged(llamas).report.opened["result"] == "12 tensors fit"


def test_tensor_that_the_configuration_does_not_know_is_an_error_whose_advice_works(llamas):
    head = {"classifier.weight": torch.ones(3, 16)}
    change(llamas / "a", lambda tensors: tensors | head)
    rules = [{"match": "classifier.weight", "take": "a"}]
    with pytest.raises(OutputError) as caught:
        merged(llamas, tensors=rules)
    assert "1 not used ('classifier.weight')" in caught.value.what
    assert "output: {files_from: a}" in caught.value.hint
    assert (llamas / "merged" / WEIGHTS).is_file(), "the folder stays"
    # Once more: it is not forgotten.
    with pytest.raises(OutputError, match="not used"):
        merged(llamas, tensors=rules)
    # The advice leads to a model that loads, once the configuration of `a` knows its head.
    change(llamas / "a", lambda tensors: {"score.weight": tensors.pop("classifier.weight")} | tensors)
    change(llamas / "a", lambda tensors: {k: v for k, v in tensors.items() if k != "lm_head.weight"})
    configure(llamas / "a", architectures=["LlamaForSequenceClassification"], num_labels=3)
    rules = [{"match": "score.weight", "take": "a"}, {"match": "lm_head.weight", "take": "nothing"}]
    done = merged(llamas, tensors=rules, output={"path": "out", "files_from": "a"})
    assert done.report.opened["result"] == "12 tensors fit"
    from transformers import LlamaForSequenceClassification

    loaded = LlamaForSequenceClassification.from_pretrained(llamas / "out")
    assert torch.equal(loaded.score.weight.data, head["classifier.weight"])


def test_misfit_of_the_base_model_itself_is_no_error(llamas):
    for name in ("base", "a", "b"):
        change(llamas / name, lambda tensors: tensors | {"extra": torch.ones(2)})
        change(llamas / name, lambda tensors: {k: v for k, v in tensors.items() if "norm" not in k})
    told = merged(llamas).report.opened["result"]
    assert told.startswith("12 tensors fit, but for what the base model's do not either: 3 missing (")
    assert told.endswith("1 not used ('extra')")


def test_many_tensors_that_do_not_fit_are_told_by_patterns(llamas):
    for name in ("base", "a", "b"):
        configure(llamas / name, num_hidden_layers=30)
    told = merged(llamas).report.opened["result"]
    assert "'model.layers.{1..29}.mlp.up_proj.weight'" in told and len(told) < 700


def test_tensor_that_a_rule_leaves_out_is_missing_on_purpose(llamas):
    done = merged(llamas, tensors=[{"match": "lm_head.weight", "take": "nothing"}])
    assert "1 missing ('lm_head.weight')" in done.report.opened["result"]


def test_configuration_of_another_size_is_an_error(llamas):
    configure(llamas / "a", vocab_size=40)
    with pytest.raises(OutputError, match=r"of shape \[32, 16\] and not \[40, 16\]"):
        merged(llamas, output={"path": "out", "files_from": "a"})


def test_configuration_that_the_library_refuses_is_an_error(llamas):
    configure(llamas / "a", intermediate_size="wide")
    with pytest.raises(OutputError, match="opens the base model and not this"):
        merged(llamas, output={"path": "out", "files_from": "a"})


def test_base_model_that_the_library_refuses_too_is_an_error_of_its_own(llamas):
    configure(llamas / "base", intermediate_size="wide")
    with pytest.raises(
        OutputError, match=r"neither this nor the base model can be opened \(.*expected int"
    ) as told:
        merged(llamas)
    assert told.value.what.count("expected int") == 1, "the same reason is said once"
    configure(llamas / "base", intermediate_size=24)
    assert merged(llamas, output={"path": "again"}).report.opened["result"] == "12 tensors fit"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (
            {"architectures": ["LlavaForConditionalGeneration"], "text_config": {"model_type": "nobodys"}},
            "does not know models of type 'nobodys'",
        ),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "lacks what the model needs (Using `bitsandbytes` 4-bit quantization requires bitsandbytes",
        ),
    ],
)
def test_model_that_the_library_cannot_know_is_no_fault_of_its_files(llama_folder, tmp_path, values, reason):
    shutil.copy(llama_folder / "config.json", tmp_path)
    configure(tmp_path, **values)
    with pytest.raises(NotOpenedError) as told:
        open_folder(tmp_path, {}, WEIGHTS)
    assert reason in str(told.value)


def test_model_that_is_made_with_values_only_is_not_opened(llamas, monkeypatch):
    from transformers import LlamaForCausalLM

    made = LlamaForCausalLM.__init__

    def reads_a_value(self, *arguments, **options):
        made(self, *arguments, **options)
        self.scale = self.lm_head.weight.sum().item()

    monkeypatch.setattr(LlamaForCausalLM, "__init__", reads_a_value)
    assert "makes it with values only" in merged(llamas).report.opened["result"]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"architectures": ["NobodysModel"]}, "has no class 'NobodysModel'"),
        (
            {"architectures": ["NobodysModel"], "auto_map": {"AutoModel": "modeling_x.NobodysModel"}},
            "has no class 'NobodysModel'; code of a checkpoint is not run",
        ),
        ({"architectures": ["AutoModel"]}, "has no class 'AutoModel'"),
        ({"architectures": []}, "config.json names no class of a model"),
        ({"architectures": [7]}, "config.json names no class of a model"),
        (
            {"_class_name": "UNet2DModel"},
            "looks for diffusion_pytorch_model.safetensors, and not model.safetensors",
        ),
    ],
)
def test_model_that_no_library_knows_is_not_opened_and_the_report_says_why(llamas, values, reason):
    for name in ("base", "a", "b"):
        configure(llamas / name, **values)
        (llamas / name / "modeling_x.py").write_text("raise RuntimeError('code is never run')")
    told = merged(llamas).report.opened["result"]
    assert told.startswith("not tried: ")
    assert told.endswith(reason)


@pytest.mark.skipif(find_spec("diffusers") is not None, reason="diffusers is installed")
def test_component_of_diffusers_is_not_opened_without_diffusers(llamas):
    for name in ("base", "a", "b"):
        configure(llamas / name, _class_name="UNet2DModel")
        (llamas / name / WEIGHTS).rename(llamas / name / "diffusion_pytorch_model.safetensors")
    assert merged(llamas).report.opened["result"] == "not tried: diffusers is not installed"


def test_nothing_is_opened_without_a_configuration(family):
    for name in ("base", "a", "b", "c"):
        (family / name / "config.json").unlink()
    done = run(load_recipe(write_recipe(family)))
    assert done.report.opened["result"] == "not tried: there is no config.json"


def test_no_value_is_read(llamas):
    """Reading those of a large model takes minutes."""
    merged(llamas)
    folder = llamas / "merged"
    tensors = {name: ("F32", tuple(tensor.shape)) for name, tensor in load_file(folder / WEIGHTS).items()}
    (folder / WEIGHTS).unlink()
    assert open_folder(folder, tensors, WEIGHTS).problems == frozenset()


def test_nothing_is_fetched(llamas, hub):
    merged(llamas)
    assert not sum(hub.counts.values())


def test_pickle_is_not_opened(llamas):
    torch.save(load_file(llamas / "base" / WEIGHTS), llamas / "base" / "pytorch_model.bin")
    assert ("missing", "lm_head.weight") in open_folder(llamas / "base", {}, WEIGHTS).problems


def test_weights_that_the_library_does_not_look_for_are_not_opened(llamas):
    for name in ("base", "a", "b"):
        (llamas / name / WEIGHTS).rename(llamas / name / "consolidated.safetensors")
    told = merged(llamas).report.opened["result"]
    assert told.endswith("transformers looks for model.safetensors, and not consolidated.safetensors")


def test_model_that_goes_straight_to_the_hub_is_opened_before_the_commit(llamas, hub):
    output = {"path": "out", "push_to_hub": "me/opened", "keep": False, "shard_size": "2KB"}
    done = merged(llamas, output=output)
    assert done.report.opened["result"] == "12 tensors fit"
    assert b'"12 tensors fit"' in hub.read("me/opened", "merge_report.json")
    head = hub.head("me/opened")
    configure(llamas / "a", vocab_size=40)
    with pytest.raises(OutputError, match=r"of shape \[32, 16\] and not \[40, 16\]"):
        merged(llamas, output=output | {"files_from": "a"})
    assert hub.head("me/opened") == head


@pytest.mark.parametrize("shard_size", ["5GB", "2KB"])
def test_weights_that_the_configuration_names_are_called_as_it_says(llamas, shard_size):
    from transformers import LlamaForCausalLM

    for name in ("base", "a", "b"):
        (llamas / name / WEIGHTS).rename(llamas / name / "consolidated.safetensors")
        configure(llamas / name, transformers_weights="consolidated.safetensors")
    done = merged(llamas, output={"path": "out", "shard_size": shard_size})
    assert done.report.opened["result"] == "12 tensors fit"
    LlamaForCausalLM.from_pretrained(llamas / "out")
