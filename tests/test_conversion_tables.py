"""Names in files and names in model classes, by the tables of the installed transformers."""

from __future__ import annotations

from typing import Any

import pytest

from hub_magmax.checkpoints.names.conversion_tables import Joint, model_names

LAYER = "model.layers.0."

#: Configurations with the few sizes that a class needs, names in files, and the names in the class.
RENAMED: list[tuple[dict[str, Any], dict[str, str]]] = [
    (
        {"model_type": "vit", "architectures": ["ViTForImageClassification"], "num_hidden_layers": 1},
        {
            "vit.encoder.layer.0.attention.attention.query.weight": "vit.layers.0.attention.q_proj.weight",
            "vit.encoder.layer.0.output.dense.bias": "vit.layers.0.mlp.fc2.bias",
            "classifier.weight": "classifier.weight",
        },
    ),
    (
        {"model_type": "qwen2_5_vl"},
        {
            "model.layers.0.mlp.up_proj.weight": "model.language_model.layers.0.mlp.up_proj.weight",
            "visual.blocks.0.attn.qkv.weight": "model.visual.blocks.0.attn.qkv.weight",
            "lm_head.weight": "lm_head.weight",
        },
    ),
    (
        {"model_type": "nemotron_h", "time_step_limit": [0.0, {"__float__": "Infinity"}]},
        {"backbone.embeddings.weight": "model.embeddings.weight", "lm_head.weight": "lm_head.weight"},
    ),
    (
        {"model_type": "bert", "architectures": ["BertForMaskedLM"], "num_hidden_layers": 1},
        {
            "bert.encoder.layer.0.output.LayerNorm.gamma": "bert.encoder.layer.0.output.LayerNorm.weight",
            "bert.encoder.layer.0.output.LayerNorm.beta": "bert.encoder.layer.0.output.LayerNorm.bias",
        },
    ),
]


@pytest.mark.parametrize(("config", "expected"), RENAMED, ids=[config["model_type"] for config, _ in RENAMED])
def test_names_of_files_become_those_of_the_model_class(
    config: dict[str, Any], expected: dict[str, str]
) -> None:
    found = model_names(config, expected)
    assert found is not None and found.of_file == expected
    assert found.of_model == {model: file for file, model in expected.items()}


@pytest.mark.parametrize(("config", "expected"), RENAMED, ids=[config["model_type"] for config, _ in RENAMED])
def test_names_of_the_model_class_stay(config: dict[str, Any], expected: dict[str, str]) -> None:
    found = model_names(config, expected.values())
    assert found is not None and found.of_file == {name: name for name in expected.values()}


def test_experts_are_gathered_in_the_order_in_which_they_are_stacked() -> None:
    moe = f"{LAYER}block_sparse_moe."
    names = [f"{moe}experts.{e}.w{n}.weight" for e in reversed(range(11)) for n in (1, 2, 3)]
    found = model_names({"model_type": "mixtral", "num_hidden_layers": 1}, [*names, f"{moe}gate.weight"])
    assert found is not None
    assert found.of_file == {f"{moe}gate.weight": f"{LAYER}mlp.gate.weight"}
    pairs = tuple((f"{moe}experts.{e}.w1.weight", f"{moe}experts.{e}.w3.weight") for e in range(11))
    ends = tuple((f"{moe}experts.{e}.w2.weight",) for e in range(11))
    assert set(found.joined) == {
        Joint(f"{LAYER}mlp.experts.gate_up_proj", pairs, 1, is_stacked=True),
        Joint(f"{LAYER}mlp.experts.down_proj", ends, 0, is_stacked=True),
    }


def test_an_architecture_that_transformers_does_not_know_has_no_names() -> None:
    assert model_names({"model_type": "of_my_own"}, ["weight"]) is None
    assert model_names({}, ["weight"]) is None
    assert model_names({"model_type": "bert", "hidden_size": "many"}, ["weight"]) is None
