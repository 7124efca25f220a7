"""Stacks of layers, against models put together by torch, by hand and as plain copies."""

import copy
import json
import struct

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hub_magmax.analysis.diagnosing import diagnose
from hub_magmax.checkpoints.opening import open_inputs
from hub_magmax.errors import HubMagmaxError, MismatchError, RecipeError
from hub_magmax.fleet.rebuilding import rebuild
from hub_magmax.fleet.verifying import verify
from hub_magmax.merging.execution import make_shards, merge
from hub_magmax.merging.output.folder import PartialFolder
from hub_magmax.pipeline import lock, plan, run
from hub_magmax.planning.summary import describe, explain
from hub_magmax.processes import Processes
from hub_magmax.recipe.loading import load_recipe, parse_recipe
from hub_magmax.recipe.lockfile import read_lock
from hub_magmax.recipe.matching import changed_keys
from tests.families import accepted, read_merged, recipe_values, write_checkpoint, write_recipe
from tests.test_checkpoints_adapter import added, write_adapter

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}


def llama(seed, blocks=4, **changes):
    torch.manual_seed(seed)
    config = {**SMALL, "num_key_value_heads": 2, "num_hidden_layers": blocks, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(**config, **changes))


def gpt2(seed, blocks=4):
    torch.manual_seed(seed)
    config = GPT2Config(
        n_embd=16, n_head=2, n_layer=blocks, vocab_size=40, n_positions=20, initializer_range=0.3
    )
    return GPT2LMHeadModel(config)


def bert(seed, blocks=4):
    torch.manual_seed(seed)
    return BertForMaskedLM(BertConfig(**SMALL, num_hidden_layers=blocks, max_position_embeddings=20))


def t5(seed, blocks=3):
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": blocks, "vocab_size": 40}
    return T5ForConditionalGeneration(T5Config(**sizes, num_decoder_layers=blocks))


def gemma2(seed, blocks=4):
    torch.manual_seed(seed)
    config = Gemma2Config(
        **SMALL,
        num_key_value_heads=1,
        head_dim=8,
        num_hidden_layers=blocks,
        sliding_window=4,
        initializer_range=0.3,
    )
    return Gemma2ForCausalLM(config)


def stacked_by_torch(make, blocks_of, models, layers, num_blocks):
    """Return a deeper model with the modules of others as blocks, and around them those of first and last."""
    deep = make(99, num_blocks)
    first, last = models[layers[0][0]], models[layers[-1][0]]
    deep.load_state_dict({n: v for n, v in last.state_dict().items() if n in deep.state_dict()}, strict=False)
    deep.get_input_embeddings().load_state_dict(first.get_input_embeddings().state_dict())
    origins = [(models[name], number) for name, start, stop in layers for number in range(start, stop)]
    for block, (model, number) in zip(blocks_of(deep), origins, strict=True):
        block.load_state_dict(blocks_of(model)[number].state_dict())
    return deep.eval()


def written(folder, make, names=("base", "a", "b")):
    models = {name: make(seed) for seed, name in enumerate(names)}
    for name, model in models.items():
        model.eval().save_pretrained(folder / name)
    return {"base_model": models["base"], **{name: models[name] for name in names[1:]}}


def recipe_of(folder, layers, names=("a", "b"), **changes):
    values = {"output": {"path": "out"}, "method": "average"} | changes
    return load_recipe(write_recipe(folder, names=names, layers=layers, **values))


def slices(layers, **more):
    return [{"take": name, "blocks": [start, stop], **more} for name, start, stop in layers]


def made(recipe):
    """Carry out a recipe over checkpoints that are no family, and check what it wrote."""
    planned = accepted(plan(recipe))
    run(recipe, in_spite_of=planned.in_spite_of)
    verify(str(recipe.output_path))
    rebuild(str(recipe.output_path), folder=recipe.folder)
    return recipe.output_path


TWO_MODELS = [("a", 0, 3), ("b", 1, 4)]
KINDS = {
    "llama": (llama, lambda model: model.model.layers, AutoModelForCausalLM),
    "gpt2": (gpt2, lambda model: model.transformer.h, AutoModelForCausalLM),
    "bert": (bert, lambda model: model.bert.encoder.layer, AutoModelForMaskedLM),
    "gemma2": (gemma2, lambda model: model.model.layers, AutoModelForCausalLM),
}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gemma2"])
def test_stack_of_two_models_computes_what_their_modules_give(tmp_path, kind):
    make, blocks_of, auto = KINDS[kind]
    models = written(tmp_path, make)
    expected = stacked_by_torch(make, blocks_of, models, TWO_MODELS, 6)
    if kind == "bert":  # positions and their norm stand before the blocks
        expected.bert.embeddings.load_state_dict(models["a"].bert.embeddings.state_dict())
    if kind == "gpt2":
        expected.transformer.wpe.load_state_dict(models["a"].transformer.wpe.state_dict())
    tokens = torch.arange(12)[None]
    found = auto.from_pretrained(made(recipe_of(tmp_path, slices(TWO_MODELS))))
    torch.testing.assert_close(found(tokens).logits, expected(tokens).logits)


def test_one_of_two_stacks_is_named_and_the_other_stays(tmp_path):
    models = written(tmp_path, t5, ("base", "a"))
    layers = [("base_model", 0, 3), ("base_model", 1, 3)]
    recipe = recipe_of(tmp_path, slices(layers, of="decoder.block"), names=("a",), tensors=[
        {"match": "[!d]*", "take": "base_model"}
    ])  # fmt: skip
    found = AutoModelForSeq2SeqLM.from_pretrained(made(recipe))
    assert (found.config.num_layers, found.config.num_decoder_layers) == (3, 5)
    expected = copy.deepcopy(models["base_model"])
    expected.decoder.block.extend(copy.deepcopy(expected.decoder.block[1:]))
    for number, block in enumerate(expected.decoder.block):
        block.layer[0].SelfAttention.layer_idx = block.layer[1].EncDecAttention.layer_idx = number
    tokens = torch.arange(12)[None]
    expected = expected(tokens, decoder_input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(found(tokens, decoder_input_ids=tokens).logits, expected)


@pytest.mark.parametrize("is_stated", [True, False])
def test_kinds_of_attention_go_with_their_blocks(tmp_path, is_stated):
    """Gemma 2 slides in every second block, which its configuration says, or its class by the number."""
    make, blocks_of, auto = KINDS["gemma2"]
    models = written(tmp_path, make)
    for name in ("base", "a", "b") if not is_stated else ():
        path = tmp_path / name / "config.json"
        values = json.loads(path.read_text())
        del values["layer_types"]
        path.write_text(json.dumps(values))
    layers = [("a", 0, 3), ("b", 1, 4), ("a", 3, 4)]
    found = auto.from_pretrained(made(recipe_of(tmp_path, slices(layers))))
    full = [number % 2 for name, start, stop in layers for number in range(start, stop)]
    kinds = ["full_attention" if number else "sliding_attention" for number in full]
    assert found.config.layer_types == kinds
    expected = stacked_by_torch(make, blocks_of, models, layers, 7)
    expected = copy.deepcopy(expected)
    expected.config.layer_types = kinds
    for block, kind in zip(expected.model.layers, kinds, strict=True):
        block.attention_type = block.self_attn.layer_type = kind
        block.self_attn.is_sliding = kind == "sliding_attention"
        block.self_attn.sliding_window = 4 if kind == "sliding_attention" else None
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(found(tokens).logits, expected(tokens).logits)


# Tiny tensors, worked by hand.


def write_blocks(folder, name, values, rest=None):
    """Write a checkpoint with one number per block."""
    tensors = {f"h.{number}.w": torch.tensor([float(value)]) for number, value in enumerate(values)}
    rest = {"wte.weight": 1.0, "norm.weight": 1.0} if rest is None else rest
    return write_checkpoint(folder / name, tensors | {n: torch.tensor([v]) for n, v in rest.items()})


def numbers(folder):
    tensors = read_merged(folder)
    blocks = sorted(
        (int(name.split(".")[1]), value.item()) for name, value in tensors.items() if name[0] == "h"
    )
    assert [number for number, _ in blocks] == [*range(len(blocks))]
    return [value for _, value in blocks]


def test_slices_are_merged_block_by_block_each_source_with_its_own(tmp_path):
    write_blocks(tmp_path, "base", [10, 20, 30, 40], {"wte.weight": 1.0, "norm.weight": 1.0})
    write_blocks(tmp_path, "a", [0, 12, 0, 36, 0], {"wte.weight": 3.0, "norm.weight": 5.0})
    write_blocks(tmp_path, "b", [14, 0, 44], {"wte.weight": 5.0, "norm.weight": 9.0})
    layers = [
        {"blocks": {"base_model": [0, 1], "a": [1, 2], "b": [0, 1]}},  # 10 and (12 + 14) / 2
        {"take": "b", "blocks": [1, 2]},
        {"blocks": {"base_model": [2, 3], "a": [3, 4], "b": [2, 3]}},  # 30 and (36 + 44) / 2
    ]
    recipe = recipe_of(tmp_path, layers, method={"name": "average", "scaling": 1.0})
    merge(accepted(plan(recipe)))
    assert numbers(tmp_path / "out") == [13.0, 0.0, 40.0]
    found = read_merged(tmp_path / "out")
    assert (found["wte.weight"].item(), found["norm.weight"].item()) == (4.0, 7.0)


def test_what_is_outside_the_blocks_goes_with_the_first_slice_or_the_last(tmp_path):
    write_blocks(tmp_path, "base", [1, 2], {"wte.weight": 0.1, "norm.weight": 0.2, "lm_head.weight": 0.3})
    write_blocks(tmp_path, "a", [3, 4], {"wte.weight": 0.4, "norm.weight": 0.5, "score.weight": 0.9})
    write_blocks(tmp_path, "b", [5, 6], {"wte.weight": 0.6, "norm.weight": 0.7, "pooler.weight": 0.8})
    layers = slices([("a", 0, 2), ("b", 1, 2), ("b", 0, 1)])
    merge(accepted(plan(recipe_of(tmp_path, layers))))
    assert numbers(tmp_path / "out") == [3.0, 4.0, 6.0, 5.0]
    found = {
        name: round(value.item(), 3)
        for name, value in read_merged(tmp_path / "out").items()
        if name[0] != "h"
    }
    # The head that the last slice's source lacks is the base model's; what only the others have is left out.
    assert found == {"wte.weight": 0.4, "norm.weight": 0.7, "lm_head.weight": 0.3, "pooler.weight": 0.8}
    ruled = recipe_of(
        tmp_path, layers, tensors=[{"match": "norm*", "take": "a"}, {"match": "h.1.w", "take": "nothing"}]
    )
    with pytest.raises(MismatchError, match=r"has h.3 and lacks h.1|gap"):
        (tmp_path / "base" / "config.json").write_text(json.dumps({"n_layer": 2}))
        plan(ruled)


def data_of(path):
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def test_stack_of_all_blocks_of_the_base_model_is_the_base_model_byte_for_byte(tmp_path):
    written(tmp_path, llama)
    whole = [("base_model", 0, 4)]
    parts = [("base_model", 0, 1), ("base_model", 1, 4)]
    header, data = data_of(tmp_path / "base" / "model.safetensors")
    del header["__metadata__"]
    for number, layers in enumerate((whole, parts)):
        folder = made(recipe_of(tmp_path, slices(layers), output={"path": f"out{number}"}))
        found, content = data_of(folder / "model.safetensors")
        del found["__metadata__"]
        assert content == data
        assert list(found.items()) == list(header.items())
        assert (folder / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()


def test_merged_slice_of_all_blocks_is_the_merge_without_layers(tmp_path):
    written(tmp_path, llama)
    for number, layers in enumerate((None, [{"blocks": [0, 2]}, {"blocks": [2, 4]}])):
        output = {"path": f"out{number}"}
        made(recipe_of(tmp_path, layers, output=output, method={"name": "dare", "density": 0.5}))
    one, two = (data_of(tmp_path / f"out{number}" / "model.safetensors")[1] for number in (0, 1))
    assert one == two


def test_adapters_are_stacked_with_their_base_model(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = {f"m.layers.{n}.q.weight": torch.randn(8, 8, generator=generator) for n in range(4)}
    write_checkpoint(tmp_path / "base", base)
    adapted = {}
    for seed, name in enumerate("ab", 1):
        adapted[name] = added(base, write_adapter(tmp_path / name, base, ("q",), seed), 2.0)
    layers = [{"take": "a", "blocks": [2, 4]}, {"blocks": {"base_model": [0, 2], "a": [1, 3], "b": [2, 4]}}]
    merge(accepted(plan(recipe_of(tmp_path, layers, method={"name": "average", "scaling": 1.0}))))
    found = read_merged(tmp_path / "out")
    for number in (0, 1):
        name = "m.layers.{}.q.weight"
        torch.testing.assert_close(found[name.format(number)], adapted["a"][name.format(number + 2)])
        mean = (adapted["a"][name.format(number + 1)] + adapted["b"][name.format(number + 2)]) / 2
        torch.testing.assert_close(found[name.format(number + 2)], mean)


def test_interruption_processes_and_files_change_no_byte(tmp_path):
    written(tmp_path, llama)
    layers = [*slices(TWO_MODELS), {"blocks": [1, 3]}]
    recipe = recipe_of(tmp_path, layers, output={"path": "one", "shard_size": "8KB"})
    planned = accepted(plan(recipe))

    class Stop(Exception):
        pass

    def interrupt(num_bytes):
        total[0] += num_bytes
        if total[0] > 30_000:
            raise Stop

    total = [0]
    with pytest.raises(Stop):
        merge(planned, progress=interrupt)
    report = merge(planned)
    assert len(report.shards) > 5
    place = PartialFolder(tmp_path / "two", planned.digest)
    place.prepare()
    with open_inputs(recipe, planned.lock) as sources:
        for rank in (1, 0):  # what two processes make, one after the other
            make_shards(planned, sources, place, place.journal, None, 100, Processes(rank, 2))
    for shard in report.shards:
        assert (tmp_path / "one" / shard.file).read_bytes() == (place.folder / shard.file).read_bytes()
    place.abandon()
    whole = merge(accepted(plan(recipe_of(tmp_path, layers))), tmp_path / "whole")
    assert len(whole.shards) == 1
    one, two = read_merged(tmp_path / "one"), read_merged(tmp_path / "whole")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_stack_from_hub_to_hub_fetches_each_block_as_often_as_it_occurs(hub, tmp_path):
    tensors = {f"h.{n}.w": torch.randn(200, 256) for n in range(6)} | {"wte.weight": torch.randn(40, 256)}
    for name in ("base", "a"):
        write_checkpoint(tmp_path / name, {n: v + (name == "a") for n, v in tensors.items()})
        hub.add_repo(f"me/stack-{name}", folder=tmp_path / name)
    layers = slices([("base_model", 0, 4), ("a", 2, 6), ("base_model", 3, 6)])
    values = recipe_values(
        base_model="me/stack-base", tasks=[{"name": "a", "model": "me/stack-a"}], layers=layers,
        output={"path": "out", "push_to_hub": "me/stack-out", "keep": False, "shard_size": "500KB"},
    )  # fmt: skip
    recipe = parse_recipe(values, folder=tmp_path)
    planned = plan(recipe)
    assert planned.bytes_in == 11 * 200 * 256 * 4 + 40 * 256 * 4
    hub.reset_log()
    run(recipe, in_spite_of=accepted(planned).in_spite_of)
    fetched = sum(e.bytes_sent for e in hub.log if e.route == "storage" and e.method == "GET")
    assert planned.bytes_in <= fetched <= 1.05 * planned.bytes_in + 2**17
    found = {}
    for file in hub.files("me/stack-out"):
        if file.endswith(".safetensors"):
            found |= load(hub.read("me/stack-out", file))
    expected = [(0, n) for n in range(4)] + [(1, n) for n in range(2, 6)] + [(0, n) for n in range(3, 6)]
    for number, (plus, own) in enumerate(expected):
        assert torch.equal(found[f"h.{number}.w"], tensors[f"h.{own}.w"] + plus)
    assert torch.equal(found["wte.weight"], tensors["wte.weight"])


def test_lock_plan_and_card_tell_the_stack(tmp_path):
    written(tmp_path, llama)
    recipe = recipe_of(tmp_path, slices(TWO_MODELS))
    planned = plan(recipe)
    assert "model.layers blocks 3 to 5: blocks 1 to 3 of b" in explain(planned)
    assert describe(planned)["layers"][1] == {
        "stack": "model.layers", "blocks": [3, 6], "take": "b", "of": {"b": [1, 4]}
    }  # fmt: skip
    folder = made(recipe)
    card = (folder / "README.md").read_text()
    assert "A stack of 6 layers" in card and "no average of equals" in card
    assert "tunable_magmax" not in card and "`average`" not in card
    stored = read_lock(folder / "recipe.lock.json")
    assert [one.of for one in stored.layers] == ["model.layers"] * 2
    assert changed_keys(recipe, stored) == []
    assert changed_keys(recipe_of(tmp_path, slices([("a", 0, 3), ("b", 0, 3)])), stored) == ["layers"]


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([], r"layers.*should hold at least 1"),
        ([{"take": "a", "blocks": [3, 3]}], r"layers\.0\.blocks: \[3, 3\] has no block.*the end does not"),
        ([{"take": "a", "blocks": [3, 1]}], r"\[3, 1\] has no block"),
        ([{"take": "a", "blocks": [-1, 2]}], r"\[-1, 2\] is no part of a model"),
        ([{"take": "a", "blocks": 3}], r"3 should be \[first, end\]"),
        ([{"take": "a", "blocks": [0, 1, 2]}], r"should be \[first, end\]"),
        ([{"take": "a", "blocks": [0, True]}], r"should be \[first, end\]"),
        ([{"take": "a"}], r"the key 'blocks' is required"),
        ([{"take": "c", "blocks": [0, 1]}], r"layers\.0\.take: there is no task 'c'"),
        ([{"take": "nothing", "blocks": [0, 1]}], r"there is no task 'nothing'"),
        ([{"blocks": {"base_model": [0, 1], "a": [0, 2], "b": [0, 1]}}], r"unequally many blocks \(base"),
        ([{"blocks": {"base_model": [0, 1], "a": [0, 1]}}], r"there is no range for b.*name every source"),
        ([{"blocks": {"base": [0, 1]}}], r"there is no task 'base'"),
        ([{"blocks": {}}], r"names no source"),
        ([{"take": "a", "blocks": {"a": [0, 1]}}], r"taken from a alone"),
        ([{"take": "a", "block": [0, 1]}], r"unknown key 'block'.*blocks"),
        ({"take": "a"}, r"write layers: \[\{take: base_model"),
    ],
)  # fmt: skip
def test_what_no_stack_can_be_is_told_with_line_and_key(tmp_path, layers, reason):
    with pytest.raises(
        RecipeError, match=rf"line \d+.*layers(.|\n)*{reason}" if "layers" not in reason else reason
    ):
        load_recipe(write_recipe(tmp_path, names=("a", "b"), layers=layers))


def test_adapter_has_no_layers_of_its_own(tmp_path):
    changes = {"layers": slices([("a", 0, 1)]), "output": {"format": "adapter"}, "method": "average"}
    with pytest.raises(RecipeError, match=r"an adapter has the layers of its base model; leave this out"):
        load_recipe(write_recipe(tmp_path, names=("a",), **changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ([("a", 2, 5)], r"a has 4 blocks h\.0 to h\.3.*an end of at most 4.*ends before block 5"),
        ([("base_model", 0, 9)], r"base_model has 4 blocks"),
        ([("b", 0, 1)], r"b has no blocks that are called h\.0"),
    ],
)
def test_blocks_that_a_source_lacks_are_told_when_the_recipe_is_locked(tmp_path, changes, reason):
    write_blocks(tmp_path, "base", [1, 2, 3, 4])
    write_blocks(tmp_path, "a", [1, 2, 3, 4])
    write_blocks(tmp_path, "b", [])
    with pytest.raises(RecipeError, match=rf"layers\.0\.blocks(.|\n)*{reason}|{reason}(.|\n)*"):
        lock(recipe_of(tmp_path, slices(changes)))


def test_of_several_stacks_one_has_to_be_named(tmp_path):
    for name in ("base", "a"):
        tensors = {f"{side}.block.{n}.w": torch.ones(1) for side in ("encoder", "decoder") for n in range(2)}
        write_checkpoint(tmp_path / name, tensors)
    with pytest.raises(RecipeError, match=r"has 2 stacks.*Add of: (de|en)coder.block \(2 blocks\) or of: "):
        lock(recipe_of(tmp_path, slices([("a", 0, 1)]), names=("a",)))
    with pytest.raises(RecipeError, match=r"no stack of blocks that is called 'decoder.blok'.*decoder.block"):
        lock(recipe_of(tmp_path, slices([("a", 0, 1)], of="decoder.blok"), names=("a",)))
    found = lock(recipe_of(tmp_path, slices([("a", 0, 1)], of="decoder.block"), names=("a",)))
    assert found.layers[0].of == "decoder.block"


def test_model_without_numbered_blocks_has_no_stack(tmp_path):
    for name in ("base", "a"):
        write_checkpoint(tmp_path / name, {"w": torch.ones(1), "classifier.3.w": torch.ones(1)})
    with pytest.raises(RecipeError, match=r"no tensor of .*base has the number of a block in its name"):
        lock(recipe_of(tmp_path, slices([("a", 0, 1)]), names=("a",)))


def test_blocks_of_another_kind_are_refused_by_name(tmp_path):
    shapes = {"base": [(2,), (3,), (3,)], "a": [(2,), (3,), (4,)]}
    for name, found in shapes.items():
        write_checkpoint(tmp_path / name, {f"h.{n}.w": torch.ones(shape) for n, shape in enumerate(found)})
    with pytest.raises(
        MismatchError, match=r"block 1 of h would be block 2 of a, in which 'w' is of shape \[4\]"
    ):
        lock(recipe_of(tmp_path, slices([("a", 0, 1), ("a", 2, 3)]), names=("a",)))
    with pytest.raises(
        MismatchError, match=r"block 3 of h would be block 0 of base_model, .*\[2\].*Expected of shape \[3\]"
    ):
        lock(recipe_of(tmp_path, slices([("base_model", 0, 3), ("base_model", 0, 1)]), names=("a",)))
    assert lock(recipe_of(tmp_path, slices([("base_model", 0, 3), ("a", 1, 2)]), names=("a",))).layers


def test_blocks_that_share_a_parameter_are_refused(tmp_path):
    shared = torch.randn(6, 4)
    for name in ("base", "a"):
        tensors = {f"h.{n}.w": torch.randn(4) for n in range(2)} | {
            "h.0.embed_tokens.weight": shared + (name == "a")
        }
        tensors["h.1.embed_tokens.weight"] = tensors["h.0.embed_tokens.weight"].clone()
        write_checkpoint(tmp_path / name, tensors)
        (tmp_path / name / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    with pytest.raises(MismatchError, match=r"are one parameter.*Leave layers out"):
        lock(recipe_of(tmp_path, slices([("a", 0, 1)]), names=("a",)))


def test_tied_head_stays_tied_to_the_embedding_of_the_first_slice(tmp_path):
    for seed, name in enumerate(("base", "a")):
        llama(seed, tie_word_embeddings=True).save_pretrained(tmp_path / name)
    folder = made(recipe_of(tmp_path, slices([("a", 0, 2), ("base_model", 2, 4)]), names=("a",)))
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert torch.equal(
        found.lm_head.weight, load_file(tmp_path / "a" / "model.safetensors")["model.embed_tokens.weight"]
    )
    assert "lm_head.weight" not in read_merged(folder)


def test_other_dtype_is_cast_once(tmp_path):
    write_blocks(tmp_path, "base", [1.001, 2])
    write_blocks(tmp_path, "a", [3, 4.002])
    recipe = recipe_of(
        tmp_path,
        slices([("base_model", 0, 1), ("a", 1, 2)]),
        names=("a",),
        output={"path": "out", "dtype": "bfloat16"},
    )
    merge(accepted(plan(recipe)))
    expected = torch.tensor([1.001, 4.002]).bfloat16().tolist()
    assert numbers(tmp_path / "out") == expected


@pytest.mark.parametrize("of", [None, "h"])
@pytest.mark.parametrize("name", ["base", "a"])
def test_a_gap_in_the_numbers_of_blocks_is_told(tmp_path, of, name):
    for each in ("base", "a"):
        numbers = (0, 1, 3) if each == name else range(4)
        write_checkpoint(tmp_path / each, {f"h.{n}.w": torch.ones(2) for n in numbers})
    layers = [{"blocks": [0, 2]} | ({"of": of} if of else {})]
    with pytest.raises(RecipeError, match=r"lacks h\.2 before its last block 3"):
        plan(recipe_of(tmp_path, layers, ("a",)))


def test_other_blocks_of_a_task_are_no_sign_of_another_base_model(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = {f"h.{n}.w": torch.randn(40, 40, generator=generator) for n in range(3)} | {"norm": torch.ones(40)}
    for name in ("base", "a"):
        write_checkpoint(
            tmp_path / name, {key: values + (name == "a") * 0.01 for key, values in base.items()}
        )
    layers = [{"blocks": {"base_model": [0, 2], "a": [1, 3]}}]
    assert not [one for one in plan(recipe_of(tmp_path, layers, ("a",))).findings if one.is_fault]
    other = {key: torch.randn(values.shape, generator=generator) for key, values in base.items()}
    write_checkpoint(tmp_path / "a", other)
    layers = [{"blocks": [0, 2]}]
    found = [one.rule for one in plan(recipe_of(tmp_path, layers, ("a",))).findings if one.is_fault]
    assert found == ["other base"]


@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_product_above_the_middle_of_two_numbers_goes_up(tmp_path, dtype, step, sign):
    """A cast by way of float32 takes what lies a little above the middle for it, and goes to the even one."""
    write_checkpoint(tmp_path / "base", {"h.0.w": torch.tensor([float(sign)], dtype=dtype)})
    layers = slices([("base_model", 0, 1)])
    for number, (factor, expected) in enumerate([(1 + step / 2, 1), (1 + step / 2 + 2.0**-40, 1 + step)]):
        rules, output = [{"match": "h.*", "factor": factor}], {"path": f"out{number}"}
        merge(plan(deeper(tmp_path, layers=layers, tensors=rules, output=output)))
        assert read_merged(tmp_path / f"out{number}")["h.0.w"].item() == sign * expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_factor_multiplies_what_is_copied_and_rounds_once(tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    base = {
        f"h.{n}.{part}": torch.randn(50, generator=generator).to(torch.bfloat16)
        for n in range(3)
        for part in "op"
    }
    write_checkpoint(tmp_path / "base", base | {"norm": torch.ones(2), "step": torch.arange(3)})
    rules = [
        {"match": "*.o", "layers": [2, 4], "factor": 0},
        {"match": "h.4.p", "factor": -0.3},
        {"match": "norm", "take": "base_model", "factor": 1.7},
    ]
    layers = slices([("base_model", 0, 2), ("base_model", 0, 3)])
    merge(plan(deeper(tmp_path, layers=layers, tensors=rules, output={"path": "out", "dtype": dtype})))
    found, kind = read_merged(tmp_path / "out"), getattr(torch, dtype)
    for number, own in enumerate((0, 1, 0, 1, 2)):
        o, p = base[f"h.{own}.o"].double(), base[f"h.{own}.p"].double()
        assert torch.equal(found[f"h.{number}.o"], (o * (0 if number in (2, 3) else 1)).to(kind))
        assert torch.equal(found[f"h.{number}.p"], (p * (-0.3 if number == 4 else 1)).to(kind))
    assert torch.equal(found["norm"], torch.full((2,), 1.7, dtype=torch.float64).to(kind))
    assert torch.equal(found["step"], torch.arange(3))


def test_repeated_blocks_that_write_nothing_leave_the_function_as_it_is(tmp_path):
    """LLaMA Pro (arXiv:2401.02415): zeroed output projections make a block the identity."""
    model = llama(0).eval()
    model.save_pretrained(tmp_path / "base")
    rules = [{"match": f"*.{part}.weight", "layers": [2, 4], "factor": 0} for part in ("o_proj", "down_proj")]
    layers = slices([("base_model", 0, 2), ("base_model", 0, 4)])
    folder = made(deeper(tmp_path, layers=layers, tensors=rules))
    tokens = torch.arange(12)[None]
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert found.config.num_hidden_layers == 6
    plain = copy.deepcopy(model)  # blocks 0 and 1, nothing twice, then 2 and 3
    assert torch.equal(
        found.model.layers[2].self_attn.q_proj.weight, plain.model.layers[0].self_attn.q_proj.weight
    )
    torch.testing.assert_close(found(tokens).logits, plain(tokens).logits)
    assert "multiplied by 0" in (folder / "README.md").read_text()
    told = explain(plan(deeper(tmp_path, layers=layers, tensors=rules)))
    assert "4 from base_model, times 0: stack of layers" in told


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (
            {"match": "h.0.w", "take": "nothing", "factor": 0},
            r"tensors\.0\.factor: what is left out has no values",
        ),
        (
            {"match": "h.0.w", "scaling": 1, "factor": 0},
            r"factor multiplies tensors that are copied, and scaling",
        ),
        ({"match": "h.0.w", "factor": "x"}, r"tensors\.0\.factor: 'x' should be a number"),
        ({"match": "h.9.w", "factor": 0}, r"matches no tensor"),
        ({"match": "position_ids", "take": "base_model", "factor": 2}, r"I64 is not floating point.*by 2"),
    ],
)
def test_factor_of_what_is_not_copied_is_refused(tmp_path, rule, reason):
    write_blocks(tmp_path, "base", [1, 2, 3, 4])
    path = tmp_path / "base" / "model.safetensors"
    save_file(load_file(path) | {"position_ids": torch.arange(3)}, path)
    with pytest.raises(HubMagmaxError, match=reason):
        plan(deeper(tmp_path, tensors=[rule]))


def test_factor_needs_a_slice_that_takes_or_a_source(tmp_path):
    write_blocks(tmp_path, "base", [1, 2, 3, 4])
    write_blocks(tmp_path, "a", [1, 2, 3, 4])
    rules = [{"match": "h.*", "factor": 2}]
    with pytest.raises(RecipeError, match=r"the rule does not say from where; add take"):
        recipe_of(tmp_path, None, names=("a",), tensors=rules)
    layers = [*slices([("a", 0, 2)]), {"blocks": [2, 4]}]
    with pytest.raises(
        RecipeError, match=r"multiplies 'h.2.w' and 'h.3.w', and no slice of layers takes them"
    ):
        plan(recipe_of(tmp_path, layers, names=("a",), tensors=rules))
    merge(accepted(plan(recipe_of(tmp_path, layers, names=("a",), tensors=[{**rules[0], "layers": [0, 2]}]))))
    assert numbers(tmp_path / "out")[:2] == [2.0, 4.0]


def test_head_with_a_factor_is_no_longer_tied(tmp_path):
    llama(0, tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    save_file(
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path, {"format": "pt"}
    )
    layers = slices([("base_model", 0, 4)])
    rules = [{"match": "lm_head.weight", "take": "base_model", "factor": 2}]
    found = AutoModelForCausalLM.from_pretrained(made(deeper(tmp_path, layers=layers, tensors=rules)))
    assert torch.equal(found.lm_head.weight, 2 * found.model.embed_tokens.weight)
    assert not found.config.tie_word_embeddings


def deeper(folder, **changes):
    values = {"base_model": "./base", "layers": slices([("base_model", 0, 3), ("base_model", 1, 4)])}
    return parse_recipe(values | {"output": {"path": "out"}} | changes, folder=folder)


def test_one_model_needs_no_task_to_be_made_deeper(tmp_path):
    write_blocks(tmp_path, "base", [1, 2, 3, 4])
    folder = made(deeper(tmp_path))
    assert numbers(folder) == [1.0, 2.0, 3.0, 2.0, 3.0, 4.0]
    card = (folder / "README.md").read_text()
    assert "A stack of 6 layers of `base_model`" in card
    assert "preference" not in card.partition("## Sources")[0] and "## Tasks" not in card


def test_what_is_in_no_named_stack_is_the_base_models_without_tasks(tmp_path):
    tensors = {f"{side}.block.{n}.w": torch.randn(2) for side in ("encoder", "decoder") for n in range(2)}
    write_checkpoint(
        tmp_path / "base", tensors | {"shared.weight": torch.randn(3), "position_ids": torch.arange(3)}
    )
    layers = slices([("base_model", 0, 2), ("base_model", 1, 2)], of="decoder.block")
    merge(plan(deeper(tmp_path, layers=layers)))
    found = read_merged(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert torch.equal(found["decoder.block.2.w"], tensors["decoder.block.1.w"])
    assert len(found) == 7


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layers": [{"blocks": [0, 1]}]}, r"layers\.0: there are no tasks to merge.*take: base_model"),
        ({"preference": {"geometric": {"ratio": 1}}}, r"preference: there are no tasks to choose between"),
        ({"sweep": {}}, r"sweep: there are no tasks to choose between"),
        ({"output": {"files_from": "a"}}, r"there is no task 'a'; the recipe has no tasks"),
    ],
)
def test_without_tasks_nothing_is_asked_about_them(tmp_path, changes, reason):
    with pytest.raises(RecipeError, match=reason):
        deeper(tmp_path, **changes)


def test_nothing_merged_is_nothing_to_diagnose(tmp_path):
    write_blocks(tmp_path, "base", [1, 2, 3, 4])
    with pytest.raises(RecipeError, match=r"nothing is merged, so there is nothing to diagnose"):
        diagnose(plan(deeper(tmp_path)))


def test_copy_of_the_base_model_may_be_a_task_of_a_stack(tmp_path):
    """Otherwise a checkpoint that is the base model, or another task, is a fault."""
    write_blocks(tmp_path, "base", [1, 2, 3, 4])
    changes = {"tasks": [{"name": "same", "model": "./base"}], "method": "average"}
    assert plan(deeper(tmp_path, **changes)).findings == ()
    (found,) = plan(deeper(tmp_path, layers=[{"blocks": [0, 4]}], **changes)).findings
    assert found.name == "unchanged:same"


def test_same_recipe_with_other_sources_is_another_lock(tmp_path):
    write_blocks(tmp_path, "base", [1, 2])
    write_blocks(tmp_path, "a", [3, 4])
    digests = {
        lock(recipe_of(tmp_path, layers, names=("a",))).digest
        for layers in (None, slices([("a", 0, 2)]), slices([("a", 0, 1)]), [{"blocks": [0, 2]}])
    }
    assert len(digests) == 4
