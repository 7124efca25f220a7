"""Notes of configurations that differ, and of adapters of another base model: what is and is not said."""

import json

import pytest

from hub_magmax.checkpoints.adapters.base_names import other_base
from hub_magmax.errors import MismatchError
from hub_magmax.merging.execution import merge
from hub_magmax.pipeline import plan
from hub_magmax.planning.findings.configs import config_findings
from hub_magmax.planning.summary import describe, explain, notices
from hub_magmax.recipe.loading import load_recipe
from hub_magmax.recipe.lockfile import LockedSource
from tests.families import write_recipe


def findings(base, task, file="config.json"):
    contents = {"base_model": {file: json.dumps(base).encode()}, "one": {file: json.dumps(task).encode()}}
    return config_findings(contents, "base_model")


SILENT = {
    "names and versions": (
        {"_name_or_path": "a", "transformers_version": "4.1", "torch_dtype": "float32", "use_cache": True},
        {"_name_or_path": "b", "transformers_version": "5.0", "dtype": "bfloat16", "use_cache": False},
    ),
    "what is for training": (
        {"attention_dropout": 0.0, "initializer_range": 0.02, "router_aux_loss_coef": 0.1},
        {"attention_dropout": 0.1, "initializer_range": 0.01, "problem_type": "regression"},
    ),
    "defaults that one version writes": (
        {"hidden_size": 8},
        {"hidden_size": 8, "attention_bias": False, "head_dim": 4, "layer_types": ["full_attention"] * 2},
    ),
    "rope, flat and nested": (
        {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 1000000, "rope_type": "linear", "factor": 2}},
    ),
    "rope by kind of layer": (
        {"rope_theta": 1e6, "rope_local_base_freq": 1e5, "rope_scaling": None},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e5},
            }
        },
    ),
    "infinities": ({"limit": [0.0, float("inf")]}, {"limit": [0.0, {"__float__": "Infinity"}]}),
    "rope's defaults": ({}, {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}),
    "neox's rope": (
        {"rotary_emb_base": 50000, "rotary_pct": 0.25},
        {"rope_parameters": {"rope_theta": 50000, "partial_rotary_factor": 0.25}},
    ),
    "sections of rope": (
        {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3]}},
        {"rope_scaling": {"rope_type": "default", "type": "default", "mrope_section": [2, 3]}},
    ),
    "a window that is not used": (
        {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 28},
        {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 21},
    ),
    "text at the top and inside": (
        {"hidden_act": "silu", "rope_theta": 1e6},
        {"text_config": {"hidden_act": "silu", "rope_parameters": {"rope_theta": 1e6}}},
    ),
    "one stop token as a list": ({"eos_token_id": 2}, {"eos_token_id": [2]}),
}


@pytest.mark.parametrize("name", SILENT)
def test_equal_configurations_are_not_noted_whoever_wrote_them(name):
    one, other = SILENT[name]
    assert findings(one, other) == () and findings(other, one) == ()


#: Configurations as older versions of transformers and other programs wrote them, beside sizes.
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 100,
}
OLDER = (
    {"model_type": "llama", "max_sequence_length": 2048, "pad_token_id": 0, "rms_norm_eps": 1e-6},
    {"model_type": "llama", "rope_scaling": None, "pretraining_tp": 1, "torch_dtype": "float16"},
    {
        "model_type": "llama",
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "rope_type": "llama3",
        }
        | {"original_max_position_embeddings": 8192},
    },
    {"model_type": "mistral", "num_key_value_heads": 2, "rope_theta": 1e6, "sliding_window": None},
    {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 32768, "rope_theta": 1e6},
    {"model_type": "gemma", "hidden_act": "gelu", "hidden_activation": None, "head_dim": 16},
    {
        "model_type": "gemma2",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
        "sliding_window_size": 4096,
    },
    {"model_type": "gemma3_text", "rope_local_base_freq": 10000.0, "rope_theta": 1e6, "sliding_window": 512},
    {"model_type": "phi3", "original_max_position_embeddings": 4096, "rope_scaling": None, "pad_token_id": 3},
    {"model_type": "gpt_neox", "rotary_emb_base": 10000, "rotary_pct": 0.25, "hidden_act": "gelu"},
    {"model_type": "bert", "gradient_checkpointing": False, "position_embedding_type": "absolute"},
    {"model_type": "deberta-v2", "pos_att_type": "p2c|c2p", "relative_attention": True},
    {
        "model_type": "qwen2_vl",
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vision_config": {"depth": 2, "embed_dim": 64, "num_heads": 4, "in_chans": 3},
    },
)


@pytest.mark.parametrize("values", OLDER, ids=lambda values: values["model_type"])
@pytest.mark.parametrize("is_short", [True, False])
def test_what_transformers_saves_again_is_not_noted(values, is_short):
    from transformers import CONFIG_MAPPING

    older = _SIZES | {"bos_token_id": 1, "eos_token_id": 2} | values
    config = CONFIG_MAPPING[older["model_type"]].from_dict(older)
    newer = json.loads(config.to_json_string(use_diff=is_short)) | {"model_type": older["model_type"]}
    assert findings(older, newer) == () and findings(newer, older) == ()


NOTED = {
    "rope_parameters.rope_theta": ({"rope_theta": 10000.0}, {"rope_theta": 1e6}),
    "rope_parameters.factor": ({}, {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "rope_parameters.rope_type": ({"rope_scaling": None}, {"rope_scaling": {"type": "yarn", "factor": 4.0}}),
    "sliding_window": ({"sliding_window": None}, {"sliding_window": 4096}),
    "hidden_act": ({"hidden_act": "silu"}, {"hidden_act": "gelu"}),
    "rms_norm_eps": ({"rms_norm_eps": 1e-6}, {"rms_norm_eps": 1e-5}),
    "text_config.hidden_act": (
        {"text_config": {"hidden_act": "silu"}},
        {"text_config": {"hidden_act": "gelu"}},
    ),
    "final_logit_softcapping": ({}, {"final_logit_softcapping": 30.0}),
    "eos_token_id": ({"eos_token_id": 2}, {"eos_token_id": [2, 7]}),
}


@pytest.mark.parametrize("key", NOTED)
def test_a_key_that_changes_the_function_is_noted_with_both_values(key):
    base, task = NOTED[key]
    (found,) = findings(base, task)
    assert found.text.startswith("config.json of one differs from that of base_model, which the merged model")
    assert f"{key} is " in found.text and not found.is_fault
    assert findings(task, base)[0].rule == "config"


LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("stated", "other"),
    [
        ({"hidden_act": "gelu"}, "silu"),
        ({"rms_norm_eps": 1e-5}, "1e-06"),
        ({"attention_bias": True}, "False"),
    ],
)
def test_a_value_is_compared_with_the_one_that_transformers_takes_where_none_is_stated(stated, other):
    ((key, value),) = stated.items()
    (found,) = findings(LLAMA, LLAMA | stated)
    assert f"{key} is {value!r}, there " in found.text and other in found.text and not found.is_fault
    assert key in findings(LLAMA | stated, LLAMA)[0].text


def test_what_transformers_takes_is_not_noted_where_it_is_stated():
    told = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "head_dim": 16, "num_key_value_heads": 4}
    assert findings(LLAMA, LLAMA | told) == findings(LLAMA | told, LLAMA) == ()
    short = {"model_type": "llama"}  # as tests and other programs write them
    assert findings(short, LLAMA | told) == findings(LLAMA | told, short) == ()


@pytest.mark.parametrize(
    "key", ["num_attention_heads", "num_key_value_heads", "n_head", "encoder_attention_heads"]
)
def test_other_numbers_of_heads_are_a_fault(key):
    (found,) = findings({key: 4}, {key: 8})
    assert found.is_fault and found.name == "heads:one"
    assert f"{key} is 8, there 4" in found.text


@pytest.mark.parametrize("file", ["open_clip_config.json", "params.json"])
def test_configurations_of_other_libraries_are_compared(file):
    base, task = ({"model_cfg": {"quick_gelu": value}} for value in (True, False))
    (found,) = findings(base, task, file)
    assert "model_cfg.quick_gelu is False, there True" in found.text


def test_configurations_in_folders_of_modules_reach_the_plan(family):
    for name in ("base", "a", "b", "c"):
        modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}]
        (family / name / "modules.json").write_text(json.dumps(modules))
        (family / name / "1_Pooling").mkdir()
        pooling = {"pooling_mode_cls_token": name == "a"}
        (family / name / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (found,) = notices(plan(load_recipe(write_recipe(family))))
    assert (
        found.startswith("1_Pooling/config.json of a differs") and "pooling_mode_cls_token is True" in found
    )


def test_equal_differences_are_one_line():
    base, task = b'{"hidden_act": "silu", "rope_theta": 1}', b'{"hidden_act": "gelu", "rope_theta": 2}'
    contents = {"base_model": {"config.json": base}} | {
        name: {"config.json": task} for name in ("a", "b", "c")
    }
    (found,) = config_findings(contents, "base_model")
    assert found.text.startswith("config.json of a, b, c differs") and "hidden_act" in found.text


@pytest.mark.parametrize(
    ("file", "base", "task", "words"),
    [
        ("generation_config.json", {"eos_token_id": 2}, {"eos_token_id": [2, 7]}, "eos_token_id is [2, 7]"),
        ("generation_config.json", {"do_sample": True}, {}, "do_sample is not stated, there True"),
        ("preprocessor_config.json", {"image_mean": [0, 0, 0]}, {"image_mean": [1, 1, 1]}, "image_mean"),
        ("processor_config.json", {"patch_size": 14}, {"patch_size": 16}, "patch_size"),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, {"pooling_mode_cls_token": False}, "cls"),
        ("modules.json", [{"path": ""}], [{"path": "1_Pooling"}], "its content is"),
    ],
)
def test_other_files_that_decide_the_outcome_are_compared_too(file, base, task, words):
    (found,) = findings(base, task, file)
    assert found.text.startswith(f"{file} of one differs") and words in found.text


@pytest.mark.parametrize(
    ("base", "task"),
    [
        ({"temperature": 1.0, "top_k": 50}, {"transformers_version": "5"}),
        ({"eos_token_id": 2, "pad_token_id": 0}, {"eos_token_id": [2], "_from_model_config": True}),
    ],
)
def test_defaults_of_generation_are_not_noted(base, task):
    assert findings(base, task, "generation_config.json") == ()


def test_generation_without_a_file_is_that_of_the_model():
    config, same, other = (json.dumps({"eos_token_id": eos}).encode() for eos in (2, 2, 7))
    base = {"config.json": config}
    assert (
        config_findings({"base_model": base, "a": base | {"generation_config.json": same}}, "base_model")
        == ()
    )
    (found,) = config_findings(
        {"base_model": base, "a": base | {"generation_config.json": other}}, "base_model"
    )
    assert "eos_token_id is 7, there 2" in found.text


def test_a_file_that_only_tasks_have_is_noted():
    found = config_findings({"base_model": {}, "a": {"preprocessor_config.json": b"{}"}}, "base_model")
    assert [one.text for one in found] == [
        "preprocessor_config.json is in a and not in base_model, whose files the merged model gets"
    ]


def test_images_of_one_size_are_the_same_however_it_is_written():
    sizes = (224, {"height": 224, "width": 224}, {"shortest_edge": 224})
    for size in sizes:
        assert findings({"size": sizes[0]}, {"size": size}, "preprocessor_config.json") == ()


def configure(folder, **values):
    (folder / "config.json").write_text(json.dumps({"model_type": "test"} | values))


def test_notes_reach_plan_report_and_the_other_way_round(family):
    configure(family / "base", rope_theta=10000)
    configure(family / "a", rope_theta=1e6)
    made = plan(load_recipe(write_recipe(family)))
    expected = (
        "config.json of a differs from that of base_model, which the merged model gets: "
        "rope_parameters.rope_theta is 1000000.0, there not stated"
    )
    assert notices(made) == merge(made).notices == (expected,)
    assert f"note         {expected}" in explain(made)
    assert describe(made)["findings"][0]["name"] == "config:a"
    from_a = plan(load_recipe(write_recipe(family, output={"path": "out", "files_from": "a"})))
    assert notices(from_a)[0].startswith("config.json of base_model, b, c differs from that of a, which")


# --- classes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "is_noted"),
    [
        ("FSDPLlamaForCausalLM", "LlamaForCausalLM", False),
        ("LLaMAForCausalLM", "LlamaForCausalLM", False),
        ("PeftModelForCausalLM", "LlamaForCausalLM", False),
        ("OptimizedModule", "LlamaForCausalLM", False),
        ("DistributedDataParallel", "BertModel", False),
        ("LlamaModel", "LlamaForCausalLM", True),
        ("GPT2Model", "GPT2LMHeadModel", True),
        ("Qwen2_5_VLForCausalLM", "Qwen2_5_VLForConditionalGeneration", True),
    ],
)
def test_a_class_is_not_refused_for_its_name_where_all_tensors_agree(family, one, other, is_noted):
    for name, stated in {"base": other, "a": one, "b": other, "c": other}.items():
        configure(family / name, architectures=[stated])
    made = plan(load_recipe(write_recipe(family)))
    assert any("model classes differ" in notice for notice in notices(made)) == is_noted
    merge(made)


@pytest.mark.parametrize("kind", ["Test", "te-st", "test_text"])
def test_a_type_in_another_spelling_is_the_same_type(family, kind):
    configure(family / "a", model_type=kind)
    plan(load_recipe(write_recipe(family)))


def test_a_doubted_name_is_settled_by_correcting_it(family):
    configure(family / "base", architectures=["BertForSequenceClassification"])
    configure(family / "a", architectures=["BertForMultipleChoice"])
    with pytest.raises(
        MismatchError, match=r"if only the name is wrong, correct `architectures` in the config"
    ):
        plan(load_recipe(write_recipe(family)))
    configure(family / "a", architectures=["BertForSequenceClassification"])
    assert merge(plan(load_recipe(write_recipe(family)))).notices == ()


# --- adapters ----------------------------------------------------------------------------------------------


def adapter_note(stated, *, reference="./base", repo_id=None, name=None, revision=None, commit=None):
    base = LockedSource(reference, "hub" if repo_id else "local", repo_id, commit, ())
    config = {"base_model_name_or_path": stated, "revision": revision}
    return other_base("one", config, base, {"_name_or_path": name})


@pytest.mark.parametrize(
    ("stated", "base"),
    [
        ("someone/other-instruct-v2", {"name": "someone/tiny-base"}),
        ("someone/other", {"reference": "./tiny-v1"}),
        ("meta/llama-2-13b", {"repo_id": "meta/llama-2-7b"}),
        ("/data/models/mistral-7b", {"repo_id": "meta/llama-2-7b"}),
        ("unsloth/mistral-7b-bnb-4bit", {"repo_id": "meta/llama-2-7b"}),
    ],
)
def test_an_adapter_of_another_base_model_is_noted_with_both_names(stated, base):
    found = adapter_note(stated, **base)
    assert found is not None and stated in found and next(iter(base.values())) in found


@pytest.mark.parametrize(
    ("stated", "base"),
    [
        ("meta/llama-2-7b", {"repo_id": "meta/llama-2-7b"}),
        ("unsloth/Llama-2-7b-bnb-4bit", {"repo_id": "meta/llama-2-7b"}),
        ("unsloth/llama-2-7b-unsloth-bnb-4bit", {"repo_id": "meta/llama-2-7b"}),
        ("TheBloke/llama-2-7b-GPTQ", {"repo_id": "meta/llama-2-7b"}),
        ("/home/me/models/llama-2-7b/", {"repo_id": "meta/llama-2-7b"}),
        ("/cache/models--meta--llama-2-7b/snapshots/0123456789abcdef", {"repo_id": "meta/llama-2-7b"}),
        ("./base", {"repo_id": "meta/llama-2-7b"}),
        ("/tmp/run/checkpoint-500", {"repo_id": "meta/llama-2-7b"}),
        ("meta/llama-2-7b", {"reference": "./base"}),
        ("meta/llama-2-7b", {"reference": "./base_model", "name": "meta/llama-2-7b"}),
        (None, {"repo_id": "meta/llama-2-7b"}),
        (7, {"repo_id": "meta/llama-2-7b"}),
    ],
)
def test_other_names_of_the_same_base_model_are_not_noted(stated, base):
    assert adapter_note(stated, **base) is None


def test_another_commit_of_the_base_model_is_noted():
    one, other = "1" * 40, "2" * 40
    found = adapter_note("meta/llama", repo_id="meta/llama", revision=one, commit=other)
    assert found is not None and "1111111" in found and "2222222" in found
    assert adapter_note("meta/llama", repo_id="meta/llama", revision=one, commit=one) is None
    assert adapter_note("meta/llama", repo_id="meta/llama", revision="main", commit=one) is None
