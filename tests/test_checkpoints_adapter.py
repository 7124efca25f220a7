"""Adapters as tasks, against the same checkpoints written out, and against PEFT's formulas by hand."""

import itertools
import json
import re
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hub_magmax.analysis.diagnosing import diagnose
from hub_magmax.checkpoints.adapters.adapter import AdapterSource, with_adapters
from hub_magmax.checkpoints.adapters.config import parse_config
from hub_magmax.checkpoints.source import MemorySource
from hub_magmax.checkpoints.storage.local import LocalSource
from hub_magmax.errors import CheckpointError, LockError, MismatchError, RecipeError
from hub_magmax.merging.execution import merge
from hub_magmax.merging.output.report import read_report
from hub_magmax.pipeline import lock, plan
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.recipe.matching import check_lock
from tests.families import read_merged, recipe_values, write_checkpoint

#: Attention layers as T5, CLIP and a plain transformer name them, and their adapters' targets.
T5 = {
    f"{stack}.block.{number}.layer.0.SelfAttention.{part}.weight": (32, 24)
    for stack in ("encoder", "decoder")
    for number in (0, 1)
    for part in "qkvo"
}
CLIP = {
    f"{tower}.encoder.layers.{number}.self_attn.{part}_proj.weight": (24, 24)
    for tower in ("vision_model", "text_model")
    for number in (0, 1)
    for part in ("q", "k", "v", "out")
}
FAMILIES = {"t5": (T5, ("q", "v")), "clip": (CLIP, ("q_proj", "v_proj"))}


def write_base(folder, shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    extra = {"shared.weight": (40, 24), "final.bias": (24,)}
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in {**shapes, **extra}.items()
    }
    return tensors, write_checkpoint(folder, tensors)


def write_adapter(
    folder, base, targets, seed, *, rank=4, config=None, prefix="base_model.model.", extra=None
):
    """Write an adapter for the layers whose last name is in `targets`; return its factors by layer."""
    generator = torch.Generator().manual_seed(seed)
    stored, factors = {}, {}
    for name, tensor in base.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in targets:
            out, width = tensor.shape
            first = torch.randn(rank, width, generator=generator)
            second = 0.1 * torch.randn(out, rank, generator=generator)
            factors[name] = second, first
            stored[f"base_model.model.{module}.lora_A.weight"] = first
            stored[f"base_model.model.{module}.lora_B.weight"] = second
    folder.mkdir(parents=True)
    save_file({**stored, **(extra or {})}, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": list(targets)}
    (folder / "adapter_config.json").write_text(json.dumps(values | (config or {})))
    return factors


def added(base, factors, scale):
    """Write out base + scale · B @ A, whole matrices in float32."""
    return {
        name: tensor.float() + (factors[name][0] @ factors[name][1]) * scale if name in factors else tensor
        for name, tensor in base.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["average", "tunable_magmax", "ties"])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_is_merged_as_the_checkpoint_that_it_stands_for(tmp_path, family, method, dtype):
    shapes, targets = FAMILIES[family]
    base, _ = write_base(tmp_path / "base", shapes, dtype)
    for seed, name in enumerate("ab", 1):
        factors = write_adapter(tmp_path / f"lora-{name}", base, targets, seed)
        write_checkpoint(tmp_path / name, added(base, factors, 2.0))
    for kind in ("lora-", ""):
        tasks = [{"name": name, "model": f"./{kind}{name}"} for name in "ab"]
        recipe = parse_recipe(
            recipe_values(tasks=tasks, method=method, preference={"geometric": {"ratio": 2}}),
            folder=tmp_path,
        )
        merge(plan(recipe), tmp_path / f"out-{kind}", chunk_elements=100)
    from_adapters, from_checkpoints = read_merged(tmp_path / "out-lora-"), read_merged(tmp_path / "out-")
    assert from_adapters.keys() == from_checkpoints.keys()
    assert all(from_adapters[name].equal(from_checkpoints[name]) for name in from_checkpoints)
    assert any(not from_adapters[name].equal(base[name]) for name in base)


@pytest.mark.parametrize("method", ["magmax", "tunable_magmax"])
@pytest.mark.parametrize("adapters", ["each", "sequence"])
def test_elements_that_no_adapter_changes_are_no_tasks_share(tmp_path, method, adapters):
    base, _ = write_base(tmp_path / "base", T5)
    write_adapter(tmp_path / "a", base, ("q",), 1)
    write_adapter(tmp_path / "b", base, ("q", "v"), 2)
    recipe = parse_recipe(recipe_values("ab", method=method, adapters=adapters), folder=tmp_path)
    reports = [merge(plan(recipe), tmp_path / f"out-{n}", chunk_elements=n) for n in (100, 10_000)]
    changed = sum(base[name].numel() for name in base if name.endswith((".q.weight", ".v.weight")))
    size = sum(tensor.numel() for tensor in base.values())
    for report in reports:
        assert report.unchanged == pytest.approx(1 - changed / size)
        assert sum(report.shares.values()) + report.unchanged == pytest.approx(1)
    assert reports[0].digest == reports[1].digest
    assert read_report(tmp_path / "out-100" / "merge_report.json").unchanged == reports[0].unchanged


def test_whole_tensors_of_an_adapter_are_changed_and_checkpoints_are_not_guessed(tmp_path):
    base, _ = write_base(tmp_path / "base", T5)
    saved = {"base_model.model.final.bias": torch.ones(24)}
    write_adapter(tmp_path / "a", base, ("q",), 1, extra=saved, config={"modules_to_save": ["final"]})
    write_adapter(tmp_path / "b", base, ("q",), 2)
    write_checkpoint(tmp_path / "c", base | {"shared.weight": base["shared.weight"] + 1})
    changed = sum(base[name].numel() for name in base if name.endswith(".q.weight")) + 24
    size = sum(tensor.numel() for tensor in base.values())
    found = merge(plan(parse_recipe(recipe_values("ab", method="magmax"), folder=tmp_path)), tmp_path / "ab")
    assert found.unchanged == pytest.approx(1 - changed / size)
    whole = merge(plan(parse_recipe(recipe_values("ac", method="magmax"), folder=tmp_path)), tmp_path / "ac")
    assert whole.unchanged == 0 and sum(whole.shares.values()) == pytest.approx(1)
    mixed = merge(plan(parse_recipe(recipe_values("ab", method="average"), folder=tmp_path)), tmp_path / "m")
    assert (mixed.unchanged, mixed.shares) == (0, {})


@pytest.mark.parametrize("method", ["average", "tunable_magmax"])
def test_adapters_in_sequence_accumulate(tmp_path, method):
    base, _ = write_base(tmp_path / "base", T5)
    last = base
    for seed, name in enumerate("abc", 1):
        factors = write_adapter(tmp_path / f"lora-{name}", base, ("q", "v"), seed)
        last = added(last, factors, 2.0)
        write_checkpoint(tmp_path / name, last)
    outputs = {}
    for kind, key in (("lora-", {"adapters": "sequence"}), ("", {})):
        tasks = [{"name": name, "model": f"./{kind}{name}"} for name in "abc"]
        recipe = parse_recipe(recipe_values(tasks=tasks, method=method, **key), folder=tmp_path)
        merge(plan(recipe), tmp_path / f"out-{kind}")
        outputs[kind] = read_merged(tmp_path / f"out-{kind}")
    assert all(outputs["lora-"][name].equal(outputs[""][name]) for name in base)


def test_adapters_are_diagnosed_as_the_checkpoints_that_they_stand_for(tmp_path):
    base, _ = write_base(tmp_path / "base", T5)
    for seed, name in enumerate("ab", 1):
        factors = write_adapter(tmp_path / f"lora-{name}", base, ("q", "v"), seed)
        write_checkpoint(tmp_path / name, added(base, factors, 2.0))
    found = []
    for kind in ("lora-", ""):
        tasks = [{"name": name, "model": f"./{kind}{name}"} for name in "ab"]
        recipe = parse_recipe(recipe_values(tasks=tasks, method="average"), folder=tmp_path)
        found.append(replace(diagnose(plan(recipe)), seconds=0.0))
    assert found[0] == found[1]


def source_of(base, folder, **options):
    return AdapterSource(MemorySource.from_tensors(base, "base"), LocalSource(folder), **options)


def whole(source, name):
    info = source.index.tensors[name]
    return source.read(name, 0, info.num_elements).reshape(info.shape)


@settings(deadline=None)
@given(
    shape=st.tuples(st.integers(1, 300), st.integers(1, 40)),
    rank=st.integers(1, 5),
    block=st.integers(64, 4000),
    cuts=st.lists(st.integers(0, 12_000), max_size=6),
)
def test_elements_do_not_depend_on_what_else_is_read(tmp_path_factory, shape, rank, block, cuts):
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    base = {"x.q.weight": torch.randn(shape, generator=torch.Generator().manual_seed(1))}
    factors = write_adapter(folder, base, ("q",), 2, rank=rank, config={"lora_alpha": 3})
    below = MemorySource.from_tensors(base, "base")
    total = base["x.q.weight"].numel()
    places = sorted({0, total, *(cut for cut in cuts if cut < total)})
    with closing(LocalSource(folder)) as stored:
        source = AdapterSource(below, stored, block_elements=block)
        pieces = [source.read("x.q.weight", a, b) for a, b in itertools.pairwise(places)]
        again = AdapterSource(below, stored, block_elements=block).read("x.q.weight", 0, total)
    assert torch.cat(pieces).equal(again)
    expected = added(base, factors, 3 / rank)["x.q.weight"]
    torch.testing.assert_close(again.reshape(shape), expected, rtol=1e-6, atol=1e-6)


def test_matrix_in_blocks_is_the_matrix_at_once_to_the_bit(tmp_path):
    base = {"x.q.weight": torch.randn(1000, 512)}
    factors = write_adapter(tmp_path / "lora", base, ("q",), 3, rank=8)
    found = whole(source_of(base, tmp_path / "lora", block_elements=128 * 512), "x.q.weight")
    assert found.equal(added(base, factors, 1.0)["x.q.weight"])


def test_product_worked_by_hand(tmp_path):
    base = {"x.q.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    (tmp_path / "lora").mkdir()
    save_file(
        {
            "base_model.model.x.q.lora_A.weight": torch.tensor([[1.0, 10.0]]),
            "base_model.model.x.q.lora_B.weight": torch.tensor([[2.0], [3.0]]),
        },
        tmp_path / "lora" / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 0.5}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    # B @ A is [[2, 20], [3, 30]], and the scale 0.5 / 1.
    found = whole(source_of(base, tmp_path / "lora"), "x.q.weight")
    assert found.tolist() == [[2.0, 12.0], [4.5, 19.0]]


@pytest.mark.parametrize(
    ("config", "module", "scale"),
    [
        ({"r": 4, "lora_alpha": 8}, "model.layers.0.q", 2.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, "model.layers.0.q", 4.0),
        ({"r": 4, "lora_alpha": 8, "rank_pattern": {"q": 16}}, "model.layers.0.q", 0.5),
        ({"r": 4, "lora_alpha": 8, "rank_pattern": {"q": 16}}, "model.layers.0.seq", 2.0),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"layers.0.q": 2}}, "model.layers.0.q", 0.5),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {r"layers\.[01]\.(q|v)": 2}}, "model.layers.1.v", 0.5),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"^model.layers.0.q": 2}}, "model.layers.0.q", 0.5),
    ],
    ids=str,
)
def test_scale_follows_rank_alpha_and_their_patterns(config, module, scale):
    assert parse_config(json.dumps(config).encode(), "x").scale_of(module) == scale


def test_layer_of_another_rank_is_added_with_its_own_scale(tmp_path):
    base, _ = write_base(tmp_path / "base", T5)
    name = next(iter(T5))
    module = name.removesuffix(".weight")
    factors = write_adapter(
        tmp_path / "lora", base, ("q",), 1, rank=2, config={"rank_pattern": {re.escape(module): 2}, "r": 8}
    )
    with pytest.raises(CheckpointError, match="the configuration says rank 8"):
        source_of(base, tmp_path / "lora")
    config = {"r": 8, "lora_alpha": 8, "rank_pattern": {"q": 2}}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    found = whole(source_of(base, tmp_path / "lora"), name)
    assert found.equal(added(base, factors, 4.0)[name])


def test_whole_modules_and_biases_take_the_place_of_the_base_models(tmp_path):
    base, _ = write_base(tmp_path / "base", T5)
    head = torch.full((40, 24), 7.0)
    extra = {
        "base_model.model.shared.weight": head,
        "base_model.model.final.base_layer.bias": torch.full((24,), 5.0),
    }
    write_adapter(tmp_path / "lora", base, ("q",), 1, extra=extra)
    source = source_of(base, tmp_path / "lora")
    assert whole(source, "shared.weight").equal(head)
    assert whole(source, "final.bias").tolist() == [5.0] * 24


def test_head_that_the_base_model_lacks_needs_a_rule(tmp_path):
    base, _ = write_base(tmp_path / "base", T5)
    extra = {"base_model.model.classifier.weight": torch.ones(3, 24)}
    write_adapter(tmp_path / "lora", base, ("q",), 1, extra=extra)
    tasks = [{"name": "a", "model": "./lora"}]
    values = recipe_values(tasks=tasks, method="average")
    with pytest.raises(MismatchError, match=r"'classifier.weight' that the base model lacks"):
        plan(parse_recipe(values, folder=tmp_path))
    rules = [{"match": "classifier.*", "take": "a"}]
    merge(plan(parse_recipe(values | {"tensors": rules}, folder=tmp_path)), tmp_path / "out")
    assert read_merged(tmp_path / "out")["classifier.weight"].equal(torch.ones(3, 24))


def test_transposed_layers_get_the_transposed_product(tmp_path):
    base = {"h.0.attn.c_attn.weight": torch.randn(24, 72)}  # inputs × outputs, as GPT-2 stores them
    first, second = torch.randn(2, 24), torch.randn(72, 2)
    (tmp_path / "lora").mkdir()
    prefix = "base_model.model.h.0.attn.c_attn"
    save_file(
        {f"{prefix}.lora_A.weight": first, f"{prefix}.lora_B.weight": second},
        tmp_path / "lora" / "adapter_model.safetensors",
    )
    config = {"r": 2, "lora_alpha": 2, "fan_in_fan_out": True}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    found = whole(source_of(base, tmp_path / "lora"), "h.0.attn.c_attn.weight")
    assert found.equal(base["h.0.attn.c_attn.weight"] + (second @ first).T)


def write_pair(folder, base):
    """Write an adapter of both layers of a base model, one of which is stored transposed."""
    factors = {
        "wide": (torch.randn(2, 24), torch.randn(72, 2)),
        "head": (torch.randn(2, 24), torch.randn(50, 2)),
    }
    if "square.weight" in base:
        factors["square"] = torch.randn(2, 24), torch.randn(24, 2)
    folder.mkdir()
    stored = {}
    for name, (first, second) in factors.items():
        stored |= {f"base_model.model.{name}.lora_A.weight": first}
        stored |= {f"base_model.model.{name}.lora_B.weight": second}
    save_file(stored, folder / "adapter_model.safetensors")
    return factors


@pytest.mark.parametrize("said", [True, False])
def test_each_layer_gets_its_product_as_it_stores_its_weights(tmp_path, said):
    base = {"wide.weight": torch.randn(24, 72), "head.weight": torch.randn(50, 24)}
    factors = write_pair(tmp_path / "lora", base)
    config = {"r": 2, "lora_alpha": 2, "fan_in_fan_out": said}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    source = source_of(base, tmp_path / "lora")
    products = {name: second @ first for name, (first, second) in factors.items()}
    assert whole(source, "wide.weight").equal(base["wide.weight"] + products["wide"].T)
    assert whole(source, "head.weight").equal(base["head.weight"] + products["head"])


def test_square_layer_is_refused_where_nothing_tells_how_it_is_stored(tmp_path):
    names = {"wide.weight": (24, 72), "head.weight": (50, 24), "square.weight": (24, 24)}
    base = {name: torch.randn(shape) for name, shape in names.items()}
    write_pair(tmp_path / "lora", base)
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2}))
    with pytest.raises(MismatchError, match=r"'wide' is stored transposed; of 'square'.*merge_and_unload"):
        source_of(base, tmp_path / "lora")


def test_embeddings_get_the_transposed_product(tmp_path):
    base = {"model.embed_tokens.weight": torch.randn(100, 16)}
    first, second = torch.randn(2, 100), torch.randn(16, 2)
    (tmp_path / "lora").mkdir()
    prefix = "base_model.model.model.embed_tokens"
    save_file(
        {f"{prefix}.lora_embedding_A": first, f"{prefix}.lora_embedding_B": second},
        tmp_path / "lora" / "adapter_model.safetensors",
    )
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2}))
    found = whole(source_of(base, tmp_path / "lora"), "model.embed_tokens.weight")
    assert found.equal(base["model.embed_tokens.weight"] + (second @ first).T)


def test_convolutions_get_their_product(tmp_path):
    base = {"conv.weight": torch.randn(8, 3, 5, 5)}
    first, second = torch.randn(2, 3, 5, 5), torch.randn(8, 2, 1, 1)
    (tmp_path / "lora").mkdir()
    save_file(
        {"base_model.model.conv.lora_A.weight": first, "base_model.model.conv.lora_B.weight": second},
        tmp_path / "lora" / "adapter_model.safetensors",
    )
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2}))
    product = torch.einsum("or,rihw->oihw", second[:, :, 0, 0], first)
    found = whole(source_of(base, tmp_path / "lora"), "conv.weight")
    torch.testing.assert_close(found, base["conv.weight"] + product, rtol=1e-6, atol=1e-6)


def test_what_describes_an_adapter_is_not_copied_beside_whole_weights(tmp_path):
    base, folder = write_base(tmp_path / "base", T5)
    (folder / "adapter_config.json").write_text("{}")
    write_adapter(tmp_path / "lora", base, ("q",), 1)
    tasks = [{"name": "a", "model": "./lora"}]
    merge(plan(parse_recipe(recipe_values(tasks=tasks, method="average"), folder=tmp_path)), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()
    assert not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize("rows", [40, 43], ids=["same", "added tokens"])
def test_layer_that_peft_saved_beneath_its_factors_gets_their_product(tmp_path, rows):
    base, _ = write_base(tmp_path / "base", T5)
    below, first, second = torch.randn(rows, 24), torch.randn(4, rows), torch.randn(24, 4)
    extra = {
        "base_model.model.shared.base_layer.weight": below,
        "base_model.model.shared.lora_embedding_A": first,
        "base_model.model.shared.lora_embedding_B": second,
    }
    write_adapter(tmp_path / "lora", base, ("q",), 1, extra=extra)
    source = source_of(base, tmp_path / "lora")
    assert source.index.tensors["shared.weight"].shape == (rows, 24)
    assert whole(source, "shared.weight").equal(below + (second @ first).T * 2.0)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_base_model_may_be_saved_with_or_without_the_prefix_of_the_class(tmp_path, prefix):
    base = {f"{prefix}layers.0.q.weight": torch.randn(8, 8), f"{prefix}layers.1.q.weight": torch.randn(8, 8)}
    written = {name.removeprefix("model.") if prefix else f"model.{name}": t for name, t in base.items()}
    factors = write_adapter(tmp_path / "lora", written, ("q",), 1)
    found = source_of(base, tmp_path / "lora")
    for name, (second, first) in zip(base, factors.values(), strict=True):
        assert whole(found, name).equal(base[name] + (second @ first) * 2.0)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "IA3"}, "an adapter of type 'IA3'"),
        ({"init_lora_weights": "pissa"}, "changes the base model's weights"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"lora_bias": True}, "a bias inside the adapter"),
        ({"target_parameters": ["experts.w"]}, "parameters outside of layers"),
    ],
    ids=str,
)
def test_adapter_that_is_more_than_a_product_is_refused_with_the_way_out(tmp_path, config, what):
    base, _ = write_base(tmp_path / "base", T5)
    write_adapter(tmp_path / "lora", base, ("q",), 1, config=config)
    recipe = parse_recipe(
        recipe_values(tasks=[{"name": "a", "model": "./lora"}], method="average"), folder=tmp_path
    )
    with pytest.raises(CheckpointError, match=rf"this adapter has .*{re.escape(what)}.*merge_and_unload"):
        lock(recipe)


@pytest.mark.parametrize(
    ("config", "step"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "train a LoRA instead"),
        ({"peft_type": "PREFIX_TUNING", "r": None}, "train a LoRA instead"),
        ({"alora_invocation_tokens": [3]}, "train a LoRA without it"),
        ({"layer_replication": [[0, 2]], "use_dora": True}, "train a LoRA without it"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
    ],
    ids=str,
)
def test_adapter_that_peft_does_not_merge_either_is_refused_without_that_line(config, step):
    content = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | config).encode()
    with pytest.raises(CheckpointError, match=re.escape(step)) as raised:
        parse_config(content, "x")
    assert "merge_and_unload" not in str(raised.value)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"task_type": "SEQ_CLS"}, "AutoModelForSequenceClassification"),
        (
            {"auto_mapping": {"base_model_class": "CLIPModel", "parent_library": "transformers.models.clip"}},
            "CLIPModel",
        ),
        ({"auto_mapping": {"base_model_class": "Mine", "parent_library": "mine"}}, "AutoModelForCausalLM"),
        (
            {"auto_mapping": {"base_model_class": "A; b", "parent_library": "transformers"}},
            "AutoModelForCausalLM",
        ),
        ({}, "AutoModelForCausalLM"),
    ],
    ids=str,
)
def test_line_that_merges_loads_the_class_that_the_adapter_was_trained_with(config, name):
    content = json.dumps({"peft_type": "LOHA", "r": 4} | config).encode()
    with pytest.raises(CheckpointError, match=rf"from transformers import {name} as M;") as raised:
        parse_config(content, "x")
    assert ("with the task's model class" in str(raised.value)) == (name == "AutoModelForCausalLM")


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"r": 0, "lora_alpha": 1}', b'{"r": 4, "lora_alpha": "x"}', b"\xff", b'{"r": 4}',
     b'{"r": 4, "lora_alpha": 1, "rank_pattern": {"(": 2}}', b'{"r": 4, "lora_alpha": Infinity}'],
)  # fmt: skip
def test_malformed_configuration_is_one_sentence(tmp_path, content):
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        parse_config(content, "me/lora")


def test_adapter_of_another_model_is_refused(tmp_path):
    base, _ = write_base(tmp_path / "base", T5)
    other = {"transformer.h.0.attn.q.weight": torch.randn(8, 8)}
    write_adapter(tmp_path / "lora", other, ("q",), 1)
    with pytest.raises(MismatchError, match=r"the adapter changes 'transformer.h.0.attn.q'"):
        source_of(base, tmp_path / "lora")


def test_adapter_of_another_width_is_refused(tmp_path):
    base, _ = write_base(tmp_path / "base", T5)
    write_adapter(tmp_path / "lora", {name: torch.zeros(32, 16) for name in T5}, ("q",), 1)
    with pytest.raises(MismatchError, match=r"has shape \[32, 16\]. Expected \[32, 24\]"):
        source_of(base, tmp_path / "lora")


def test_nan_in_a_factor_is_refused(tmp_path):
    base = {"x.q.weight": torch.ones(8, 8)}
    write_adapter(tmp_path / "lora", base, ("q",), 1)
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    stored["base_model.model.x.q.lora_A.weight"][0, 0] = torch.nan
    save_file(stored, tmp_path / "lora" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="holds a NaN"):
        whole(source_of(base, tmp_path / "lora"), "x.q.weight")


def test_changed_alpha_is_a_changed_lock(tmp_path):
    base, _ = write_base(tmp_path / "base", T5)
    write_adapter(tmp_path / "lora", base, ("q",), 1)
    values = recipe_values(tasks=[{"name": "a", "model": "./lora"}], method="average")
    recipe = parse_recipe(values, folder=tmp_path)
    locked = lock(recipe)
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 16}))
    with pytest.raises(LockError, match=r"adapter_config.json changed"):
        plan(recipe, locked)
    sequence = parse_recipe(values | {"adapters": "sequence"}, folder=tmp_path)
    with pytest.raises(LockError, match="adapters"):
        check_lock(sequence, locked, "lock")


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"base_model": "./lora"}, CheckpointError, r"the base model is an adapter.*merge_and_unload"),
        ({"output": {"files_from": "a"}}, RecipeError, "a is an adapter"),
        (
            {"adapters": "sequence", "tasks": [{"name": "a", "model": "./base"}]},
            RecipeError,
            "none of the tasks",
        ),
    ],
    ids=str,
)
def test_adapter_cannot_stand_for_a_whole_checkpoint(tmp_path, changes, error, reason):
    base, _ = write_base(tmp_path / "base", T5)
    write_adapter(tmp_path / "lora", base, ("q",), 1)
    values = recipe_values(tasks=[{"name": "a", "model": "./lora"}]) | changes
    with pytest.raises(error, match=reason):
        lock(parse_recipe(values, folder=tmp_path))


def test_adapter_on_the_hub_is_merged_and_the_base_model_is_fetched_once(hub, tmp_path):
    base, folder = write_base(tmp_path / "base", {f"l.{n}.q.weight": (256, 256) for n in range(8)})
    below = torch.randn(256, 256)  # as PEFT saves it beneath a head's factors
    extra = {"base_model.model.l.2.q.base_layer.weight": below}
    factors = write_adapter(tmp_path / "lora", base, ("q",), 1, extra=extra)
    hub.add_repo("me/adapter-base", folder=folder)
    hub.add_repo("me/adapter-lora", folder=tmp_path / "lora")
    tasks = [{"name": "a", "model": "me/adapter-lora"}]
    recipe = parse_recipe(recipe_values(base_model="me/adapter-base", tasks=tasks, method="single_task"))
    made = plan(recipe)
    assert made.lock.tasks["a"].adapter_config
    hub.reset_log()
    merge(made, tmp_path / "out", chunk_elements=1000)
    found, expected = read_merged(tmp_path / "out"), added({**base, "l.2.q.weight": below}, factors, 2.0)
    for name in base:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    fetched = sum(exchange.bytes_sent for exchange in hub.log if exchange.route == "storage")
    sizes = [(folder / "model.safetensors").stat().st_size]
    sizes.append((tmp_path / "lora" / "adapter_model.safetensors").stat().st_size)
    assert fetched <= 1.02 * sum(sizes)


def test_whole_checkpoints_and_adapters_stand_side_by_side(tmp_path):
    base, folder = write_base(tmp_path / "base", T5)
    write_adapter(tmp_path / "lora", base, ("q",), 1)
    sources = {
        "base_model": LocalSource(folder),
        "a": LocalSource(tmp_path / "lora"),
        "b": LocalSource(folder),
    }
    found = with_adapters(sources)
    assert isinstance(found["a"], AdapterSource)
    assert found["b"] is sources["b"]


def test_whole_tensors_of_adapters_in_sequence_come_from_the_adapter_that_has_them(tmp_path):
    base = {"l.q.weight": torch.randn(8, 8), "norm1.bias": torch.zeros(8), "norm2.bias": torch.zeros(8)}
    write_checkpoint(tmp_path / "base", base)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]}
    config["modules_to_save"] = ["norm1", "norm2"]
    for task, saved in {"a": {"norm1": 10.0, "norm2": 20.0}, "b": {"norm2": 200.0}}.items():
        tensors = {"l.q.lora_A.weight": torch.randn(2, 8), "l.q.lora_B.weight": torch.randn(8, 2)}
        tensors |= {f"{name}.bias": torch.full((8,), value) for name, value in saved.items()}
        (tmp_path / task).mkdir()
        names = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
        save_file(names, tmp_path / task / "adapter_model.safetensors")
        (tmp_path / task / "adapter_config.json").write_text(json.dumps(config))
    values = recipe_values("ab", method={"name": "average", "scaling": 1}, adapters="sequence")
    merge(plan(parse_recipe(values | {"output": {"path": "out"}}, folder=tmp_path), in_spite_of=()))
    found = read_merged(tmp_path / "out")
    # b was trained from a: it has a's first norm, and a second one of its own.
    assert found["norm1.bias"].tolist() == [10.0] * 8
    assert found["norm2.bias"].tolist() == [110.0] * 8
