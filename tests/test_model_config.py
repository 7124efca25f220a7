"""config.json of an output describes its weights."""

import copy
import json
import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hub_magmax.checkpoints.names.model_classes import tensors_of_class
from hub_magmax.errors import MismatchError
from hub_magmax.fleet.rebuilding import rebuild
from hub_magmax.fleet.verifying import verify
from hub_magmax.merging.execution import merge
from hub_magmax.merging.output.side_files import with_changes
from hub_magmax.pipeline import plan
from hub_magmax.planning.plan import ConfigChange
from hub_magmax.planning.summary import notices
from hub_magmax.recipe.loading import load_recipe
from tests.families import write_recipe

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_key_value_heads": 2, "vocab_size": 40, **changes}))


def bert(**changes):
    return BertForSequenceClassification(
        BertConfig(**{**SMALL, "vocab_size": 40, "max_position_embeddings": 20, **changes})
    )


def write(folder, base, one, dtype=torch.float32):
    base.to(dtype).save_pretrained(folder / "base")
    for seed, (name, model) in enumerate((("one", one), ("two", copy.deepcopy(base)))):
        tune(model.to(dtype), base, seed)
        model.save_pretrained(folder / name)


def tune(model, base, seed):
    """Give a model, perhaps of other sizes, the base model's values and a little noise."""
    generator, start = torch.Generator().manual_seed(seed), dict(base.named_parameters())
    with torch.no_grad():
        for name, own in model.named_parameters():
            if name in start:
                shared = tuple(map(slice, map(min, own.shape, start[name].shape)))
                own[shared] = start[name][shared]
            own.add_(0.005 * torch.randn(own.shape, generator=generator))


def take(name, task="one"):
    return {"match": name, "take": task}


def planned(folder, *rules, **output):
    tasks = [{"name": name, "model": f"./{name}"} for name in ("one", "two")]
    return plan(
        load_recipe(
            write_recipe(
                folder, tasks=tasks, method="average", tensors=[*rules], output={"path": "out", **output}
            )
        )
    )


def merged(folder, *rules, **output):
    made = planned(folder, *rules, **output)
    merge(made)
    verify(str(made.recipe.output_path))
    rebuild(str(made.recipe.output_path), folder=folder)
    return made.recipe.output_path


def opened(model_class, folder):
    model, loading = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def edit_config(folder, **changes):
    path = folder / "config.json"
    values = {key: value for key, value in json.loads(path.read_text()).items() if key not in changes}
    values |= {key: value for key, value in changes.items() if value is not None}
    path.write_text(json.dumps(values, indent=2))


@pytest.mark.parametrize(
    ("stored", "asked"),
    [(torch.bfloat16, "float32"), (torch.float32, "bfloat16"), (torch.float32, "float16")],
)
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_cast_output_says_its_dtype(tmp_path, stored, asked, key):
    write(tmp_path, llama(), llama(), dtype=stored)
    for name in ("base", "one", "two"):
        edit_config(tmp_path / name, **{"dtype": None, key: str(stored).removeprefix("torch.")})
    model = opened(AutoModelForCausalLM, merged(tmp_path, dtype=asked))
    assert str(model.dtype) == f"torch.{asked}"


def test_cast_of_a_nested_model_is_said_at_every_level(tmp_path):
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**{**SMALL, "image_size": 8, "patch_size": 4}),
        text_config=LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=40),
        image_token_index=39,
    )
    write(
        tmp_path,
        LlavaForConditionalGeneration(config),
        LlavaForConditionalGeneration(config),
        dtype=torch.bfloat16,
    )
    edit_config(
        tmp_path / "base", text_config={**config.text_config.to_dict(), "dtype": "bfloat16"}, dtype="bfloat16"
    )
    values = json.loads((merged(tmp_path, dtype="float32") / "config.json").read_text())
    assert values["dtype"] == values["text_config"]["dtype"] == "float32"


def test_config_is_copied_byte_for_byte_where_it_is_right(tmp_path):
    write(tmp_path, llama(), llama())
    odd = (tmp_path / "base" / "config.json").read_text().replace("\n", "\r\n") + "\n\n"
    (tmp_path / "base" / "config.json").write_bytes(odd.encode())
    assert (merged(tmp_path) / "config.json").read_bytes() == odd.encode()


def test_changed_config_keeps_order_indentation_and_unknown_keys():
    text = '{\n\t"zebra": "é",\n\t"vocab_size": 4,\n\t"eps": 1e-05,\n\t"nested": {"dtype": "float32"}\n}\n\n'
    found = with_changes(text.encode(), [ConfigChange(("vocab_size",), 4, 5)]).decode()
    assert found.startswith('{\n\t"zebra": "é",\n\t"vocab_size": 5,\n\t"eps": 1e-05')
    assert found.endswith("}\n\n")


@pytest.mark.parametrize("tied", [True, False])
def test_rows_taken_from_a_task_are_the_vocabulary(tmp_path, tied):
    write(tmp_path, llama(tie_word_embeddings=tied), llama(vocab_size=44, tie_word_embeddings=tied))
    with pytest.raises(MismatchError, match="shape"):
        planned(tmp_path)
    rules = [take("model.embed_tokens.weight")] + ([] if tied else [take("lm_head.weight")])
    assert any(
        "files_from: one" in line and "tokenizer" in line for line in notices(planned(tmp_path, *rules))
    )
    model = opened(AutoModelForCausalLM, merged(tmp_path, *rules))
    assert model.config.vocab_size == 44 and model.lm_head.weight.shape == (44, 16)


def test_rows_of_all_tensors_are_settled_by_one_message(tmp_path):
    write(tmp_path, llama(), llama(vocab_size=44))
    with pytest.raises(MismatchError, match="2 tensors of other shapes") as error:
        planned(tmp_path)
    advice = str(error.value)
    pasted = re.search(r"tensors: (\[\{.*?\}\])", advice)[1]
    assert "output.files_from: TASK" in advice
    for source, rows in (("base_model", 40), ("one", 44)):
        rules = yaml.safe_load(pasted.replace("base_model", source))
        path = f"out-{source}"
        merged(tmp_path, *rules, path=path)
        assert opened(AutoModelForCausalLM, tmp_path / path).config.vocab_size == rows


def test_vocabulary_is_right_where_the_files_are_those_of_the_task(tmp_path):
    write(tmp_path, llama(), llama(vocab_size=44))
    rules = [take("model.embed_tokens.weight"), take("lm_head.weight")]
    folder = merged(tmp_path, *rules, files_from="one")
    assert (folder / "config.json").read_bytes() == (tmp_path / "one" / "config.json").read_bytes()
    assert opened(AutoModelForCausalLM, folder).config.vocab_size == 44


def test_one_key_cannot_say_two_numbers_of_rows(tmp_path):
    write(tmp_path, llama(), llama(vocab_size=44))
    with pytest.raises(MismatchError, match="lm_head") as error:
        planned(tmp_path, take("model.embed_tokens.weight"), take("lm_head.weight", "base_model"))
    assert "vocab_size" in str(error.value)


def test_vocabulary_that_the_config_leaves_to_its_class_is_written(tmp_path):
    write(tmp_path, bert(vocab_size=30522), bert(vocab_size=30530))
    edit_config(tmp_path / "base", vocab_size=None)
    folder = merged(tmp_path, take("bert.embeddings.word_embeddings.weight"))
    assert opened(AutoModelForSequenceClassification, folder).config.vocab_size == 30530


def test_positions_and_types_of_a_task_are_said(tmp_path):
    write(tmp_path, bert(), bert(max_position_embeddings=28, type_vocab_size=3))
    folder = merged(tmp_path, take("*position_embeddings*"), take("*token_type_embeddings*"))
    config = opened(AutoModelForSequenceClassification, folder).config
    assert (config.max_position_embeddings, config.type_vocab_size) == (28, 3)


def test_labels_are_those_of_the_head_that_is_taken(tmp_path):
    named = {"id2label": {0: "neg", 1: "neu", 2: "pos"}, "label2id": {"neg": 0, "neu": 1, "pos": 2}}
    write(tmp_path, bert(num_labels=2), bert(**named))
    config = opened(AutoModelForSequenceClassification, merged(tmp_path, take("classifier.*"))).config
    assert config.id2label == named["id2label"] and config.label2id == named["label2id"]


def test_class_is_that_of_the_task_whose_head_replaces_another(tmp_path):
    base = BertForMaskedLM(BertConfig(**SMALL, vocab_size=40, max_position_embeddings=20))
    write(tmp_path, base, bert(num_labels=3))
    rules = [take("classifier.*"), take("bert.pooler.*"), take("cls.*", "nothing")]
    model = opened(AutoModelForSequenceClassification, merged(tmp_path, *rules))
    assert model.config.architectures == ["BertForSequenceClassification"]
    assert model.config.num_labels == 3


@pytest.mark.parametrize("base", [BertModel, BertForMaskedLM])
def test_rules_that_the_error_proposes_give_the_model_of_base_or_task(tmp_path, base):
    shared = base(BertConfig(**SMALL, vocab_size=40, max_position_embeddings=20))
    task = bert(num_labels=3)
    task.bert.load_state_dict(getattr(shared, "bert", shared).state_dict(), strict=False)
    write(tmp_path, shared, task)
    with pytest.raises(MismatchError, match="For a BertForSequenceClassification, as one is: ") as error:
        planned(tmp_path)
    proposed = [yaml.safe_load(rules) for rules in re.findall(r"tensors: (\[.*?\])", str(error.value))]
    for rules, kind in zip(proposed, [base, BertForSequenceClassification], strict=True):
        folder = merged(tmp_path, *rules, path=kind.__name__)
        assert opened(kind, folder).config.architectures == [kind.__name__]


def test_adapter_of_a_classifier_gives_its_head_by_the_rules_that_the_error_proposes(tmp_path):
    shared = BertModel(BertConfig(**SMALL, vocab_size=40, max_position_embeddings=20))
    write(tmp_path, shared, copy.deepcopy(shared))
    shutil.rmtree(tmp_path / "one")
    (tmp_path / "one").mkdir()
    width = shared.config.hidden_size
    weights = {
        "bert.encoder.layer.0.attention.self.query.lora_A.weight": torch.ones(2, width),
        "bert.encoder.layer.0.attention.self.query.lora_B.weight": torch.full((width, 2), 0.1),
        "classifier.weight": torch.ones(3, width),
        "classifier.bias": torch.zeros(3),
    }
    stored = {f"base_model.model.{name}": value for name, value in weights.items()}
    save_file(stored, tmp_path / "one" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "task_type": "SEQ_CLS"}
    (tmp_path / "one" / "adapter_config.json").write_text(
        json.dumps(config | {"target_modules": ["query"], "modules_to_save": ["classifier"]})
    )
    with pytest.raises(MismatchError, match="For a BertForSequenceClassification, as one is: ") as error:
        planned(tmp_path)
    rules = yaml.safe_load(re.findall(r"tensors: (\[.*?\])", str(error.value))[1])
    model = opened(AutoModelForSequenceClassification, merged(tmp_path, *rules))
    assert type(model) is BertForSequenceClassification and model.config.num_labels == 3
    assert torch.equal(model.classifier.weight.data, torch.ones(3, width))


def test_code_of_a_checkpoint_is_not_asked_about(monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "n")
    code = {"AutoModelForSequenceClassification": "someone/model--modeling.Model"}
    config = {"model_type": "mamba", "num_hidden_layers": 1, "hidden_size": 8, "auto_map": code}
    assert tensors_of_class(config, "AutoModelForSequenceClassification") == ("", frozenset())
    assert tensors_of_class(config, "AutoModelForCausalLM")[0] == "MambaForCausalLM"
    assert not asked


def test_labels_without_names_are_counted(tmp_path):
    write(tmp_path, bert(num_labels=4), bert(num_labels=3))
    edit_config(tmp_path / "one", id2label=None, label2id=None)
    config = opened(AutoModelForSequenceClassification, merged(tmp_path, take("classifier.*"))).config
    assert config.num_labels == 3


def vit(size, labels=2):
    return ViTForImageClassification(ViTConfig(**SMALL, image_size=size, patch_size=4, num_labels=labels))


def test_image_size_is_that_of_the_positions(tmp_path):
    write(tmp_path, vit(8), vit(16))
    folder = merged(tmp_path, take("*position_embeddings*"))
    assert opened(AutoModelForImageClassification, folder).config.image_size == 16


def test_positions_of_a_decoder_are_not_those_of_the_encoder(tmp_path):
    def whisper(length):
        return WhisperForConditionalGeneration(
            WhisperConfig(
                d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=40,
                num_mel_bins=8,
                max_source_positions=12, max_target_positions=length, pad_token_id=1,
                bos_token_id=1,
                eos_token_id=1, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
            )
        )  # fmt: skip

    write(tmp_path, whisper(12), whisper(20))
    folder = merged(tmp_path, take("*decoder.embed_positions*"))
    config = opened(WhisperForConditionalGeneration, folder).config
    assert (config.max_source_positions, config.max_target_positions) == (12, 20)


def test_layers_that_are_left_out_are_not_counted(tmp_path):
    write(tmp_path, llama(num_hidden_layers=3), llama(num_hidden_layers=3))
    model = opened(AutoModelForCausalLM, merged(tmp_path, take("model.layers.2.*", "nothing")))
    assert model.config.num_hidden_layers == 2


def test_layers_of_a_longer_task_are_counted(tmp_path):
    write(tmp_path, llama(num_hidden_layers=2), llama(num_hidden_layers=3))
    model = opened(AutoModelForCausalLM, merged(tmp_path, take("model.layers.2.*")))
    assert model.config.num_hidden_layers == 3


def test_layer_left_out_in_the_middle_is_refused(tmp_path):
    write(tmp_path, llama(num_hidden_layers=3), llama(num_hidden_layers=3))
    with pytest.raises(MismatchError, match=r"lacks model\.layers\.1"):
        planned(tmp_path, take("model.layers.1.*", "nothing"))


def test_size_that_no_key_can_follow_is_refused_and_the_advice_leads_on(tmp_path):
    write(tmp_path, llama(), llama(intermediate_size=32))
    rules = [take("*.mlp.*")]
    with pytest.raises(MismatchError, match=r"`intermediate_size` says 24") as error:
        planned(tmp_path, *rules)
    assert "output.files_from: one" in str(error.value)
    model = opened(AutoModelForCausalLM, merged(tmp_path, *rules, files_from="one"))
    assert model.config.intermediate_size == 32


def test_sizes_that_the_config_does_not_state_are_not_judged(tmp_path):
    for seed, (name, rows) in enumerate((("base", 6), ("one", 7), ("two", 6))):
        (tmp_path / name).mkdir()
        norm = torch.linspace(1, 2, 64) + 0.01 * seed
        tensors = {"embed_tokens.weight": torch.ones(rows, 2), "norm.weight": norm}
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"num_heads": 6}')
    folder = merged(tmp_path, take("embed_tokens.weight"))
    assert (folder / "config.json").read_text() == '{"num_heads": 6}'


def test_nested_vocabulary_is_that_of_the_text_model(tmp_path):
    def llava(rows):
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**SMALL, image_size=8, patch_size=4),
            text_config=LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=rows),
            image_token_index=3,
        )
        return LlavaForConditionalGeneration(config)

    write(tmp_path, llava(40), llava(44))
    folder = merged(tmp_path, take("*embed_tokens*"), take("*lm_head*"))
    assert opened(LlavaForConditionalGeneration, folder).config.text_config.vocab_size == 44
    assert AutoConfig.from_pretrained(folder).vision_config.image_size == 8
    assert AutoModel.from_pretrained(folder) is not None
