"""Cards load every kind of model by the class and the library that fit it: the code on the card runs."""

import json
import shutil
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from huggingface_hub.repocard import metadata_load
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.torch import load_file, save_file

from hub_magmax.pipeline import run
from hub_magmax.recipe.loading import load_recipe
from hub_magmax.reporting.model_kind import ModelFiles, ModelKind, kind_of
from tests.families import write_recipe

SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}


def save_tokenizer(folder):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(
        WordLevel({word: number for number, word in enumerate(("[UNK]", "[PAD]", "a", "b"))}, "[UNK]")
    )
    plain.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(
        folder
    )


def save_llama(folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(vocab_size=4, num_key_value_heads=2, **SIZES)).save_pretrained(folder)
    save_tokenizer(folder)


CHAT = "{% for message in messages %}b {{ message.content }}{% endfor %} a"


def save_chat(folder):
    """A language model whose chat template is a file, as transformers writes it now."""
    save_llama(folder)
    (folder / "chat_template.jinja").write_text(CHAT)


def save_older_chat(folder):
    """One that has it in the tokenizer's configuration, as transformers wrote it before."""
    save_llama(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": CHAT}))


def save_bert(folder, head="BertForSequenceClassification"):
    import transformers

    config = transformers.BertConfig(vocab_size=4, max_position_embeddings=16, **SIZES)
    getattr(transformers, head)(config).save_pretrained(folder)
    save_tokenizer(folder)


def save_encoder(folder):
    save_bert(folder, "BertModel")


def save_vit(folder):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    config = ViTConfig(image_size=4, patch_size=2, num_labels=3, **SIZES)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 4, "width": 4}).save_pretrained(folder)


def save_clip(folder):
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    text = {"vocab_size": 4, "max_position_embeddings": 16, "projection_dim": 6, "eos_token_id": 3, **SIZES}
    vision = {"image_size": 4, "patch_size": 2, "projection_dim": 6, **SIZES}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)).save_pretrained(folder)
    save_tokenizer(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 4}, crop_size=4).save_pretrained(folder)


def save_t5(folder):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=4, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    save_tokenizer(folder)


def save_sentences(folder):
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer

    save_bert(folder / "plain", "BertModel")
    SentenceTransformer(str(folder / "plain"), device="cpu").save(str(folder))


def save_custom(folder):
    """A model whose class is beside its weights."""
    save_bert(folder, "BertModel")
    config = json.loads((folder / "config.json").read_text())
    custom = {"architectures": ["OwnModel"], "auto_map": {"AutoModel": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config | custom))
    (folder / "own.py").write_text(
        "from transformers import BertModel\n\n\nclass OwnModel(BertModel):\n    pass\n"
    )


def save_tensors(folder):
    folder.mkdir(exist_ok=True)
    save_file({"one": torch.randn(3, 4), "two": torch.randn(5)}, folder / "model.safetensors")


def save_several(folder):
    save_llama(folder)
    for name in ("config.json", "generation_config.json"):
        (folder / name).unlink()


#: By kind: makes a checkpoint; class that loads the merged one, of its inputs, library and task on the Hub.
KINDS = {
    "llama": (save_llama, "LlamaForCausalLM", "tokenizer", "transformers", "text-generation"),
    "chat": (save_chat, "LlamaForCausalLM", "tokenizer", "transformers", "text-generation"),
    "older chat": (save_older_chat, "LlamaForCausalLM", "tokenizer", "transformers", "text-generation"),
    "bert": (save_bert, "BertForSequenceClassification", "tokenizer", "transformers", "text-classification"),
    "encoder": (save_encoder, "BertModel", "tokenizer", "transformers", "feature-extraction"),
    "vit": (save_vit, "ViTForImageClassification", "processor", "transformers", "image-classification"),
    "clip": (save_clip, "CLIPModel", "processor", "transformers", "zero-shot-image-classification"),
    "t5": (save_t5, "T5ForConditionalGeneration", "tokenizer", "transformers", "text-generation"),
    "texts": (save_sentences, "SentenceTransformer", None, "sentence-transformers", "sentence-similarity"),
    "own code": (save_custom, "OwnModel", "tokenizer", "transformers", "feature-extraction"),
    "tensors": (save_tensors, None, None, None, None),
    "several files": (save_several, None, None, None, None),
}  # fmt: skip


def stated_code(card):
    """Return the Python that a card states."""
    tokens = MarkdownIt("commonmark").parse(card)
    return next(token.content for token in tokens if token.type == "fence" and token.info == "python")


def merged_card(folder, save, **changes):
    """Merge two checkpoints of a kind without evaluating them, and return the path of the card."""
    save(folder / "base")
    for seed, name in enumerate("ab"):
        if not (folder / name).exists():
            shutil.copytree(folder / "base", folder / name)
        (file,) = (folder / name).glob("*.safetensors")
        torch.manual_seed(seed)
        varied = {key: value + 0.01 * torch.randn_like(value) for key, value in load_file(file).items()}
        save_file(varied, file, metadata={"format": "pt"})
    tasks = [{"name": name, "model": f"./{name}"} for name in "ab"]
    run(load_recipe(write_recipe(folder, **{"tasks": tasks, "method": "average"} | changes)))
    return folder / "merged" / "README.md"


@pytest.mark.parametrize("name", KINDS)
def test_code_on_the_card_loads_the_model_as_what_it_is_and_runs_it(name, tmp_path, monkeypatch, capsys):
    save, model_class, inputs, library, task = KINDS[name]
    changes = {"output": {"path": "merged", "shard_size": "500B"}} if name == "several files" else {}
    card = merged_card(tmp_path, save, **changes)
    code = stated_code(card.read_text())
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("photo.jpg")
    found = {}
    capsys.readouterr()
    exec(code, found)
    assert ("print" in code) == (library is not None and name != "own code")
    assert ("print" in code) == bool(capsys.readouterr().out)
    data = metadata_load(card)
    assert (data.get("library_name"), data.get("pipeline_tag")) == (library, task)
    if model_class is None:
        (tensors,) = (
            value for value in found.values() if isinstance(value, dict) and "__name__" not in value
        )
        stored = {k: v for path in card.parent.glob("*.safetensors") for k, v in load_file(path).items()}
        assert tensors.keys() == stored.keys()
    else:
        assert type(found["model"]).__name__ == model_class
    assert (inputs in found) if inputs else not {"tokenizer", "processor"} & found.keys()
    assert ("trust_remote_code" in code) == (name == "own code")
    assert ("apply_chat_template" in code) == ("chat" in name)


def adapter_card(folder):
    """Merge two adapters of the base model in a folder to one, and return the path of its card."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    for name in "ab":
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        peft.get_peft_model(base, config).save_pretrained(folder / name)
    return merged_card(folder, lambda folder: None, output={"path": "merged", "format": "adapter"})


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of PEFT
def test_code_on_the_card_loads_a_merged_adapter_over_its_base_model(tmp_path, monkeypatch):
    save_llama(tmp_path / "base")
    card = adapter_card(tmp_path)
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(stated_code(card.read_text()), found)
    assert type(found["model"]).__name__.startswith("PeftModel")
    assert len(found["tokens"][0]) > len(found["inputs"].input_ids[0])
    assert type(found["base"]).__name__ == "LlamaForCausalLM" and "tokenizer" in found
    assert metadata_load(card)["library_name"] == "peft"
    assert metadata_load(card)["pipeline_tag"] == "text-generation"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of PEFT
def test_a_merged_adapter_of_a_chat_model_is_asked_by_its_base_models_template(tmp_path, monkeypatch, capsys):
    save_chat(tmp_path / "base")
    card = adapter_card(tmp_path)
    monkeypatch.chdir(tmp_path)
    code = stated_code(card.read_text())
    exec(code, {})
    assert "tokenizer.apply_chat_template(" in code and "Once upon a time" not in code


def test_component_of_diffusers_is_loaded_by_its_own_class(tmp_path, monkeypatch):
    def save(folder):
        save_tensors(folder)
        (folder / "model.safetensors").rename(folder / "diffusion_pytorch_model.safetensors")
        (folder / "config.json").write_text('{"_class_name": "UNet2DModel", "_diffusers_version": "0.36.0"}')

    card = merged_card(tmp_path, save)
    opened = []
    stand_in = ModuleType("diffusers")  # which is not installed where the tests run
    stand_in.UNet2DModel = type("UNet2DModel", (), {"from_pretrained": staticmethod(opened.append)})
    monkeypatch.setitem(sys.modules, "diffusers", stand_in)
    exec(stated_code(card.read_text()), {})
    assert opened == ["merged"]
    assert metadata_load(card)["library_name"] == "diffusers"


def test_automatic_classes_give_the_class_that_the_configuration_names():
    from transformers.models.auto import modeling_auto

    names = [
        name for name in dir(modeling_auto) if name.endswith("_MAPPING_NAMES") and name.startswith("MODEL_")
    ]
    known = {}  # by class, the kinds of model that have it under each automatic class
    for name in names:
        automatic = getattr(modeling_auto, name.removesuffix("_NAMES"))
        loaders = [
            value.__name__
            for value in vars(modeling_auto).values()
            if isinstance(value, type) and getattr(value, "_model_mapping", None) is automatic
        ]
        for classes in getattr(modeling_auto, name).values():
            for model_class in [classes] if isinstance(classes, str) else classes:
                known.setdefault(model_class, set()).update(loaders)
    wrong = {}
    for model_class, loaders in known.items():
        kind = kind_of(ModelFiles(frozenset(), {"architectures": [model_class]}))
        if kind.loader not in (*loaders, model_class):
            wrong[model_class] = (kind.loader, sorted(loaders))
    assert wrong == {}
    automatic = [
        name for name in known if kind_of(ModelFiles(frozenset(), {"architectures": [name]})).loader != name
    ]
    assert len(automatic) > 400


def test_evaluation_tells_the_task_and_the_configuration_the_class():
    files = ModelFiles(frozenset(["tokenizer.json"]), {"architectures": ["GPT2LMHeadModel"]})
    found = kind_of(files, "text-classification")
    assert (found.loader, found.task, found.inputs) == (
        "AutoModelForCausalLM",
        "text-classification",
        "AutoTokenizer",
    )
    assert (
        kind_of(replace(files, config={}), "text-classification").loader
        == "AutoModelForSequenceClassification"
    )


@pytest.mark.parametrize(
    ("stated", "loader", "task"),
    [
        ("CrossEncoder", "CrossEncoder", "text-ranking"),
        ("SparseEncoder", "SparseEncoder", "feature-extraction"),
        ("os.system", "SentenceTransformer", "sentence-similarity"),
    ],
)
def test_classes_of_sentence_transformers_are_those_that_it_names(stated, loader, task):
    files = ModelFiles(frozenset(["modules.json"]), {}, {"model_type": stated})
    assert (kind_of(files).loader, kind_of(files).task) == (loader, task)


@pytest.mark.parametrize("name", ["x; import os", "a b", 3, None, "Bert\nModel"])
def test_class_that_is_no_name_is_never_in_the_code(name):
    assert kind_of(ModelFiles(frozenset(), {"architectures": [name]})) == ModelKind("")
    assert kind_of(ModelFiles(frozenset(), {"_class_name": name})) == ModelKind("")
