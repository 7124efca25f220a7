"""Things that are no full checkpoint are recognised before they are compared, and their steps lead to one."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hub_magmax.checkpoints.index import CheckpointIndex, ShardInfo, TensorInfo
from hub_magmax.checkpoints.listing import Listing
from hub_magmax.checkpoints.recognition import refuse_parts
from hub_magmax.checkpoints.source import MemorySource
from hub_magmax.errors import CheckpointError, HubMagmaxError, MismatchError
from hub_magmax.kernels.dtypes import ITEM_BYTES
from hub_magmax.merging.execution import merge
from hub_magmax.pipeline import lock, plan
from hub_magmax.recipe.loading import parse_recipe
from tests.families import make_tensors, read_merged, recipe_values, write_checkpoint, write_family
from tests.test_pickles import run_told

Spec = dict[str, tuple[str, tuple[int, ...]]]

MATRIX, ROW, ONE = (8, 4), (8, 1), (1,)

#: Tensors of quantised checkpoints by format, as name: dtype and shape.
QUANTISED: dict[str, Spec] = {
    "GPTQ or AWQ": {"q.qweight": ("I32", MATRIX), "q.qzeros": ("I32", ROW), "q.scales": ("F16", ROW)},
    "bitsandbytes": {"q.weight": ("U8", (16, 1)), "q.weight.absmax": ("U8", ONE)},
    "bitsandbytes, stored as bfloat16": {"q.weight": ("BF16", (8, 1)), "q.weight.absmax": ("U8", ONE)},
    "bitsandbytes, 8 bits": {
        "q.SCB": ("F32", (8,)),
        "q.weight": ("I8", MATRIX),
        "q.weight_format": ("U8", ()),
    },
    "8-bit with scales": {"q.weight": ("F8_E4M3", MATRIX), "q.weight_scale": ("F32", ())},
    "8-bit with scales, by block": {"q.weight": ("F8_E4M3", MATRIX), "q.weight_scale_inv": ("F32", ONE)},
    "8-bit with scales, of fused experts": {"e.up": ("F8_E4M3", (2, 8, 4)), "e.up_scale": ("F32", (2, 1, 4))},
    "8-bit with scales, as bytes": {"q.weight": ("U8", MATRIX), "q.weight_scale": ("BF16", ONE)},
    "8-bit with scales, as EETQ": {"q.weight": ("I8", MATRIX), "q.weight_scales": ("F16", (8,))},
    "compressed-tensors": {"q.weight_packed": ("I32", MATRIX), "q.weight_scale": ("BF16", ROW)},
    "NVFP4": {
        "q.weight": ("U8", MATRIX),
        "q.weight_scale": ("F8_E4M3", MATRIX),
        "q.weight_scale_2": ("F32", ()),
    },
    "MXFP4": {"e.up_blocks": ("U8", (2, 8, 2)), "e.up_scales": ("U8", (2, 8))},
    "HQQ": {"q.W_q": ("U8", MATRIX), "q.scale": ("F16", ROW), "q.zero": ("F16", ROW)},
    "MLX": {"q.weight": ("U32", MATRIX), "q.scales": ("F16", ROW), "q.biases": ("F16", ROW)},
    "MLX, without biases": {"q.weight": ("U32", MATRIX), "q.scales": ("U8", ROW)},
    "torchao": {"q._weight_qdata": ("I8", MATRIX), "q._weight_scale": ("F32", ROW)},
    "torchao, packed": {
        "q._weight_qdata": ("I32", MATRIX),
        "q._weight_scale_and_zero": ("BF16", (1, 8, 2)),
    },
    "quanto": {"q.weight._data": ("I8", MATRIX), "q.weight._scale": ("F32", ROW)},
    "float8 with ComfyUI's scales": {"q.weight": ("F8_E4M3", MATRIX), "q.scale_weight": ("F32", ())},
    "float8 with ComfyUI's scales, marked": {
        "scaled_fp8": ("F8_E4M3", (2,)),
        "q.weight": ("F8_E4M3", MATRIX),
    },
    "ComfyUI": {"q.comfy_quant": ("U8", (9,)), "q.weight": ("I8", MATRIX)},
    "EXL2": {"q.q_weight": ("I32", MATRIX), "q.q_scale": ("I32", ROW)},
    "EXL3": {"q.trellis": ("I16", (2, 2, 4)), "q.suh": ("F16", (8,))},
    "AQLM": {"q.codes": ("I8", (8, 4, 1)), "q.codebooks": ("F16", (1, 256, 1, 8))},
    "codes with scales, of any name": {"q.weight": ("I8", MATRIX), "q.dequant_scale": ("F32", ())},
    "codes with scales": {"q.packed": ("I32", MATRIX), "q.scales": ("F16", ROW)},
    "with scales that are powers of two": {"q.w": ("F8_E4M3", MATRIX), "q.s": ("F8_E8M0", ROW)},
}

#: Tensors of plain checkpoints with names that look like those.
PLAIN: dict[str, Spec] = {
    "a parameter called scales": {"norm.scales": ("F32", (8,)), "norm.weight": ("BF16", (8,))},
    "a learned scale of a weight": {"q.weight": ("BF16", MATRIX), "q.weight_scale": ("F32", ROW)},
    "a parameter called qweight": {"q.qweight": ("F32", MATRIX)},
    "blocks in the name": {"encoder_blocks": ("F32", MATRIX), "encoder_scales": ("F32", ROW)},
    "integers": {"position_ids": ("I64", (1, 9)), "mask": ("BOOL", (9, 9))},
    "positions in a layer with a scale": {"a.scale": ("F32", (8,)), "a.index": ("I64", (9, 9))},
    "a mask in a layer with one scale": {"a.scale": ("F32", ONE), "a.bias": ("U8", (1, 1, 9, 9))},
    "ranges of a training for quantisation": {
        "w.fake_quant.scale": ("F32", (8,)),
        "w.fake_quant.zero_point": ("I32", (8,)),
    },
    "float8 without scales": {"q.weight": ("F8_E4M3", MATRIX), "q.bias": ("F8_E5M2", (8,))},
    "no elements in some dimension": {"table": ("F32", (0, 4)), "counts": ("I64", (0,))},
    "a model that is made with its LoRAs": {
        "q.base_layer.weight": ("BF16", MATRIX),
        "q.lora_A.speech.weight": ("BF16", MATRIX),
        "q.lora_B.speech.weight": ("BF16", MATRIX),
    },
    "one tensor with an adapter's name": {
        "decay_lora.lora_A": ("F32", MATRIX),
        **{f"layer.{number}.weight": ("F32", MATRIX) for number in range(9)},
    },
    "a parameter called alpha": {"act.alpha": ("F32", ONE)},
}

#: Other things than a whole model: tensors, and a part of the message.
OTHERS: dict[str, tuple[Spec, str]] = {
    "kohya": (
        {
            "lora_unet_down.lora_down.weight": ("F32", MATRIX),
            "lora_unet_down.lora_up.weight": ("F32", MATRIX),
            "lora_unet_down.alpha": ("F32", ()),
        },
        "is a LoRA as kohya's scripts save it",
    ),
    "kohya, text encoder": ({"lora_te1_a.lora_down.weight": ("F32", MATRIX)}, "kohya"),
    "names of the model, kohya's halves": ({"diffusion_model.a.lora_up.weight": ("F32", MATRIX)}, "kohya"),
    "diffusers": ({"unet.a.lora_A.weight": ("F32", MATRIX)}, "is a LoRA as diffusers saves it"),
    "diffusers, older": ({"unet.a.lora.down.weight": ("F32", MATRIX)}, "is a LoRA as diffusers saves it"),
    "diffusers, oldest": ({"a.processor.to_q_lora.down.weight": ("F32", MATRIX)}, "as diffusers saves it"),
    "PEFT's names in another file": (
        {
            "base_model.model.q.lora_A.weight": ("F32", MATRIX),
            "base_model.model.q.lora_B.weight": ("F32", MATRIX),
        },
        "Call the file adapter_model.safetensors",
    ),
    "MLX's adapter": ({"model.q.lora_a": ("F32", MATRIX)}, "mlx_lm.fuse"),
    "LoKr": ({"lora_unet_a.lokr_w1": ("F32", MATRIX), "lora_unet_a.alpha": ("F32", ())}, "a LoKr"),
    "LoHa": ({"lora_unet_a.hada_w1_a": ("F32", MATRIX), "lora_unet_a.alpha": ("F32", ())}, "a LoHa"),
    "differences": (
        {"lora_unet_a.diff": ("F32", MATRIX), "lora_unet_a.diff_b": ("F32", (8,))},
        "differences",
    ),
    "IA3": ({"base_model.model.q.ia3_l": ("F32", ROW)}, "an IA3 adapter"),
    "prompt": ({"prompt_embeddings": ("F32", MATRIX)}, "a trained prompt"),
    "textual inversion": ({"<cat>": ("F32", MATRIX)}, "a textual inversion"),
    "ZeRO-3": ({"a.weight": ("BF16", (0,)), "b.weight": ("BF16", (8,))}, "'a.weight' is empty.*zero_to_fp32"),
    "FSDP": ({"layer._fsdp_wrapped_module._flat_param": ("F32", (99,))}, "flattened parameters of FSDP"),
    "an optimiser": ({"state.0.exp_avg": ("F32", MATRIX)}, "the state of an optimiser"),
    "PEFT's model, not merged": (
        {
            "base_model.model.q.base_layer.weight": ("F32", MATRIX),
            "base_model.model.q.lora_A.default.weight": ("F32", MATRIX),
            **{f"base_model.model.{number}.weight": ("F32", MATRIX) for number in range(9)},
        },
        "with an adapter in it that is not merged",
    ),
}


def recognise(
    spec: Spec, config: Mapping[str, object] | None = None, file: str = "model.safetensors"
) -> None:
    """Let the headers of one file be recognised."""
    infos = {
        name: TensorInfo(name, dtype, shape, file, 0, math.prod(shape) * ITEM_BYTES[dtype])
        for name, (dtype, shape) in spec.items()
    }
    index = CheckpointIndex("model", (ShardInfo(file, 0, ""),), infos)
    refuse_parts(Listing("model", {file: 0}, lambda path, start, stop: b""), index, config or {})


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_checkpoint_is_refused_by_names_dtypes_and_shapes(kind):
    with pytest.raises(CheckpointError) as caught:
        recognise(QUANTISED[kind] | {"norm.weight": ("BF16", (8,))})
    assert f"is quantised ({kind.split(', ')[0]}; it holds" in str(caught.value)
    assert "tensors: [" not in str(caught.value)


@pytest.mark.parametrize("kind", PLAIN)
def test_names_alone_do_not_make_a_checkpoint_another_thing(kind):
    config = {"quantization_config": None, "speech_lora": {"r": 4}}
    recognise(PLAIN[kind] | {f"layer.{number}.weight": ("BF16", MATRIX) for number in range(4)}, config)


@pytest.mark.parametrize("kind", OTHERS)
def test_parts_of_models_are_refused_with_what_they_are(kind):
    spec, said = OTHERS[kind]
    with pytest.raises(CheckpointError, match=said) as caught:
        recognise(spec, file="style.safetensors")
    assert "tensors: [" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, r"\(awq; it holds 'q\.qweight'\)"),
        ({"quantization_config": {"bits": 4}}, r"\(of a kind it does not name; "),
        ({"quantization": {"bits": 4, "group_size": 64}}, r"\(MLX; "),
        ({"quantization": "learned"}, r"\(GPTQ or AWQ; "),
    ],
)
def test_configuration_says_which_quantisation_it_is(config, said):
    with pytest.raises(CheckpointError, match=said):
        recognise(QUANTISED["GPTQ or AWQ"], config)


def test_configuration_of_codes_over_plain_numbers_is_doubted():
    with pytest.raises(CheckpointError, match=r"do not look like it.*remove `quantization`"):
        recognise({"a": ("F32", MATRIX)}, {"quantization": {"bits": 4}})


# Two sets of weights.


def shards(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Add a save in two shards to a folder."""
    kept = {path: path.read_bytes() for path in folder.glob("model.safetensors")}
    write_checkpoint(folder, tensors, num_shards=2)
    for path, content in kept.items():
        path.write_bytes(content)


def merged(folder: Path, model: str) -> dict[str, torch.Tensor]:
    """Return what comes out of the one task `model`."""
    recipe = parse_recipe(
        recipe_values(method="average", tasks=[{"name": "a", "model": model}]), folder=folder
    )
    merge(plan(recipe), folder / "out")
    return read_merged(folder / "out")


def refusal(folder: Path, model: str = "./a") -> HubMagmaxError:
    """Return the error of a recipe with the task `model`."""
    recipe = parse_recipe(recipe_values(tasks=[{"name": "a", "model": model}]), folder=folder)
    with pytest.raises(HubMagmaxError) as caught:
        plan(recipe)
    assert "tensors: [" not in str(caught.value)
    return caught.value


def same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.fixture
def two(tmp_path):
    return write_family(tmp_path, ["a"])


@pytest.mark.parametrize("counts", ["model.safetensors", "model.safetensors.index.json"])
def test_single_file_beside_an_index_of_others_is_refused_and_either_can_be_named(tmp_path, two, counts):
    other = make_tensors(9, base=two["base"])
    shards(tmp_path / "a", other)
    error = str(refusal(tmp_path))
    assert "two sets of weights: model.safetensors, and model.safetensors.index.json" in error
    assert f"./a/{counts}" in error
    expected = two["a"] if counts == "model.safetensors" else other
    assert same(merged(tmp_path, f"./a/{counts}"), expected)


def test_index_that_lists_only_the_single_file_is_no_second_set(tmp_path, two):
    index = {"weight_map": dict.fromkeys(two["a"], "model.safetensors")}
    (tmp_path / "a" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(merged(tmp_path, "./a"), two["a"])


def test_single_file_beside_numbered_shards_is_refused(tmp_path, two):
    shards(tmp_path / "a", make_tensors(9, base=two["base"]))
    (tmp_path / "a" / "model.safetensors.index.json").unlink()
    assert "shards without an index" in str(refusal(tmp_path))
    assert same(merged(tmp_path, "./a/model.safetensors"), two["a"])


def test_index_of_a_variant_does_not_replace_the_usual_weights(tmp_path, two):
    save_file(make_tensors(9), tmp_path / "a" / "model.fp16-1.safetensors")
    index = {"weight_map": dict.fromkeys(two["a"], "model.fp16-1.safetensors")}
    (tmp_path / "a" / "model.fp16.safetensors.index.json").write_text(json.dumps(index))
    assert same(merged(tmp_path, "./a"), two["a"])


@pytest.mark.parametrize("index", [False, True])
def test_variant_of_diffusers_does_not_replace_the_usual_weights(tmp_path, two, index):
    name = "diffusion_pytorch_model{}.safetensors"
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "a" / name.format(""))
    save_file(make_tensors(9), tmp_path / "a" / name.format(".fp16"))
    if index:
        weight_map = {"weight_map": dict.fromkeys(two["a"], name.format(".fp16"))}
        (tmp_path / "a" / f"{name.format('.fp16')}.index.json").write_text(json.dumps(weight_map))
    assert same(merged(tmp_path, "./a"), two["a"])


@pytest.mark.parametrize("counts", ["model.safetensors", "diffusion_pytorch_model.safetensors"])
def test_weights_for_diffusers_beside_others_are_refused_and_either_can_be_named(tmp_path, two, counts):
    other = make_tensors(9, base=two["base"])
    save_file(other, tmp_path / "a" / "diffusion_pytorch_model.safetensors")
    error = str(refusal(tmp_path))
    assert "two sets of weights: model.safetensors and diffusion_pytorch_model.safetensors" in error
    assert f"./a/{counts}" in error
    assert same(merged(tmp_path, f"./a/{counts}"), two["a"] if counts == "model.safetensors" else other)


def test_index_of_another_name_does_not_replace_the_usual_weights(tmp_path, two):
    save_file(make_tensors(9, base=two["base"]), tmp_path / "a" / "consolidated-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(two["a"], "consolidated-00001-of-00001.safetensors")}
    (tmp_path / "a" / "consolidated.safetensors.index.json").write_text(json.dumps(index))
    assert same(merged(tmp_path, "./a"), two["a"])


def test_other_layout_of_the_same_model_is_no_second_set(tmp_path, two):
    save_file({"layers.0.weight": torch.ones(2)}, tmp_path / "a" / "consolidated.safetensors")
    assert same(merged(tmp_path, "./a"), two["a"])


def test_file_that_the_configuration_names_is_no_other_than_the_one_that_is_read(tmp_path, two):
    save_file(make_tensors(9, base=two["base"]), tmp_path / "a" / "other.safetensors")
    (tmp_path / "a" / "config.json").write_text('{"transformers_weights": "other.safetensors"}')
    assert "./a/other.safetensors or ./a/model.safetensors" in str(refusal(tmp_path))
    assert same(merged(tmp_path, "./a/model.safetensors"), two["a"])


def test_adapter_beside_whole_weights_is_refused_and_the_weights_can_be_named(tmp_path, two):
    save_file(
        {"base_model.model.x.lora_A.weight": torch.ones(2)}, tmp_path / "a" / "adapter_model.safetensors"
    )
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    assert "and a PEFT adapter (adapter_model.safetensors)" in str(refusal(tmp_path))
    assert same(merged(tmp_path, "./a/model.safetensors"), two["a"])


def test_adapter_without_its_weights_is_named(tmp_path, two):
    (tmp_path / "a" / "model.safetensors").unlink()
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    error = str(refusal(tmp_path))
    assert "a PEFT adapter (adapter_config.json) without adapter_model.safetensors" in error


def test_shards_without_an_index_get_one_by_the_command_in_the_message(tmp_path, two):
    (tmp_path / "a" / "model.safetensors").unlink()
    shards(tmp_path / "a", two["a"])
    (tmp_path / "a" / "model.safetensors.index.json").unlink()
    run_told(refusal(tmp_path), tmp_path / "a")
    assert same(merged(tmp_path, "./a"), two["a"])


def test_lone_shard_is_no_model_whether_its_folder_is_named_or_itself(tmp_path, two):
    name = "model-00001-of-00002.safetensors"
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "a" / name)
    assert "1 of 2 shards" in str(refusal(tmp_path))
    assert "is one of several files" in (error := str(refusal(tmp_path, f"./a/{name}")))
    assert "Name the folder, ./a," in error


def test_only_shard_of_one_is_a_model(tmp_path, two):
    name = "model-00001-of-00001.safetensors"
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "a" / name)
    assert same(merged(tmp_path, "./a"), two["a"])


def test_missing_shard_is_told_by_the_numbers_of_the_others(tmp_path, two):
    (tmp_path / "a" / "model.safetensors").unlink()
    for number in (1, 3):
        save_file(two["a"], tmp_path / "a" / f"model-0000{number}-of-00003.safetensors")
    assert "2 of 3 shards" in str(refusal(tmp_path))


# Pointers of git-lfs.

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 17\n"


@pytest.mark.parametrize(
    "path",
    ["model.safetensors", "config.json", "tokenizer.json", "spiece.model", "model.safetensors.index.json"],
)
def test_pointer_of_git_lfs_is_named_with_the_step(tmp_path, two, path):
    (tmp_path / "a" / path).write_bytes(POINTER)
    assert f"{path} is a git-lfs pointer" in (error := str(refusal(tmp_path)))
    assert "git lfs pull" in error


def test_all_pointers_are_named_at_once(tmp_path, two):
    (tmp_path / "a" / "model.safetensors").unlink()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name in names:
        (tmp_path / "a" / name).write_bytes(POINTER)
    index = {"weight_map": {"x": names[0], "y": names[1]}}
    (tmp_path / "a" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"{names[0]} and {names[1]} are git-lfs pointers" in str(refusal(tmp_path))


# Other formats.

FORMATS = {
    "model-Q4_K_M.gguf": "GGUF",
    "model.onnx": "an exported graph",
    "tf_model.h5": "TensorFlow",
    "flax_model.msgpack": "Flax",
    "weights.npz": "NumPy",
    "model.nemo": "NeMo",
    "model.tar.gz": "an archive",
    "consolidated.00.pth": "only pickled weights",
    "__0_0.distcp": "distributed training checkpoint",
    "zero_pp_rank_0_mp_rank_00_model_states.pt": "DeepSpeed",
}


@pytest.mark.parametrize("name", FORMATS)
def test_other_formats_are_named_in_a_folder_and_by_themselves(tmp_path, two, name):
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "a" / name)
    (tmp_path / "a" / "training_args.bin").touch()
    assert FORMATS[name] in str(refusal(tmp_path))
    assert FORMATS[name] in str(refusal(tmp_path, f"./a/{name}"))


def moved(folder: Path, *names: str) -> None:
    """Move the weights of a folder into sub-folders, as checkpoints of their own."""
    for name in names:
        write_checkpoint(folder / name, load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()


def test_old_folder_of_sentence_transformers_is_saved_again_with_its_pooling(tmp_path):
    """Its transformer lies in a sub-folder; naming that would leave the pooling behind."""
    library = pytest.importorskip("sentence_transformers")
    from transformers import BertConfig, BertModel, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "sits"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    sizes = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = tmp_path / "a" / "0_Transformer"
    BertModel(BertConfig(**sizes, intermediate_size=8)).save_pretrained(folder)
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(folder)
    (tmp_path / "a" / "1_Pooling").mkdir()
    pooling = {
        "word_embedding_dimension": 8,
        "pooling_mode_cls_token": True,
        "pooling_mode_mean_tokens": False,
    }
    (tmp_path / "a" / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    kinds = {"0_Transformer": "Transformer", "1_Pooling": "Pooling"}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(kinds.items())
    ]
    (tmp_path / "a" / "modules.json").write_text(json.dumps(modules))
    write_checkpoint(tmp_path / "base", make_tensors(0))
    error = refusal(tmp_path)
    assert "weights lie in 0_Transformer" in str(error)
    run_told(error, tmp_path)
    before, after = (library.SentenceTransformer(str(tmp_path / n), device="cpu") for n in ("a", "OUT"))
    assert np.allclose(before.encode("a cat sits"), after.encode("a cat sits"), atol=1e-6)
    tasks = [{"name": "a", "model": "./OUT"}]
    recipe = parse_recipe(recipe_values(base_model="./OUT", tasks=tasks), folder=tmp_path)
    assert "1_Pooling/config.json" in lock(recipe).base_model.side_files


def test_checkpoints_of_a_trainer_are_named_by_number_and_the_last_can_be_taken(tmp_path, two):
    moved(tmp_path / "a", "checkpoint-1000", "checkpoint-500", "runs")
    (tmp_path / "a" / "runs" / "model.safetensors").rename(tmp_path / "a" / "runs" / "events.out")
    (tmp_path / "a" / "training_args.bin").touch()
    error = str(refusal(tmp_path))
    assert "a trainer's folder with the checkpoints checkpoint-500 and checkpoint-1000" in error
    assert error.endswith("./a/checkpoint-1000.")
    assert same(merged(tmp_path, "./a/checkpoint-1000"), two["a"])


def test_models_of_a_pipeline_are_named_and_one_can_be_taken(tmp_path, two):
    moved(tmp_path / "a", "text_encoder", "unet", "vae")
    (tmp_path / "a" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    error = str(refusal(tmp_path))
    assert "a pipeline of diffusers, whose models lie in its folders: text_encoder, unet and vae" in error
    assert error.endswith("./a/unet.")
    assert same(merged(tmp_path, "./a/unet"), two["a"])


def test_snapshot_in_a_folder_of_the_cache_is_named(tmp_path, two):
    commit = "0123456789" * 4
    moved(tmp_path / "a", f"snapshots/{commit}")
    assert f"./a/snapshots/{commit}" in str(refusal(tmp_path))
    assert same(merged(tmp_path, f"./a/snapshots/{commit}"), two["a"])


SHARDED = {
    "pytorch_model_fsdp_0/__0_0.distcp": "accelerate merge-weights",
    "global_step500/zero_pp_rank_0_mp_rank_00_model_states.pt": "zero_to_fp32.py",
}


@pytest.mark.parametrize("path", SHARDED)
def test_shards_of_many_processes_are_told_with_what_joins_them(tmp_path, two, path):
    (tmp_path / "a" / "model.safetensors").unlink()
    for place in (tmp_path / "a" / path, tmp_path / "b" / "checkpoint-5" / path):
        place.parent.mkdir(parents=True)
        place.touch()
    assert SHARDED[path] in str(refusal(tmp_path))
    assert "./b/checkpoint-5" in str(refusal(tmp_path, "./b"))
    assert SHARDED[path] in str(refusal(tmp_path, "./b/checkpoint-5"))


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"GGUF\3\0\0\0", "a GGUF file"),
        (b"PK\3\4\0\0\0\0", "a pickle"),
        (b"<!DOCTYPE html>", "a page of the web"),
    ],
)
def test_other_formats_under_the_name_of_safetensors_are_told(tmp_path, two, start, said):
    (tmp_path / "a" / "model.safetensors").write_bytes(start + bytes(99))
    assert said in str(refusal(tmp_path))


def test_state_of_a_trainer_is_not_taken_for_weights(tmp_path, two):
    (tmp_path / "a" / "model.safetensors").unlink()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin"):
        (tmp_path / "a" / name).touch()
    assert "no safetensors file" in str(refusal(tmp_path))


def test_arrays_of_numpy_are_converted_by_the_command_in_the_message(tmp_path, two):
    (tmp_path / "a" / "model.safetensors").unlink()
    np.savez(tmp_path / "a" / "IN.npz", **{name: tensor.numpy() for name, tensor in two["a"].items()})
    run_told(refusal(tmp_path), tmp_path / "a")
    assert same(merged(tmp_path, "./a"), two["a"])


# Numbers in eight bits.


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Write other tensors over those of a checkpoint."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt", "kept": "yes"})


def float8(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.to(torch.float8_e4m3fn) if v.is_floating_point() else v for k, v in tensors.items()}


def test_float8_without_scales_is_cast_by_the_command_in_the_message(tmp_path, two):
    changed(tmp_path / "a", float8)
    (tmp_path / "a").rename(tmp_path / "IN")
    error = refusal(tmp_path, "./IN")
    assert isinstance(error, MismatchError)
    assert "dtype F8_E4M3 is not merged" in str(error)
    run_told(error, tmp_path)
    found = merged(tmp_path, "./OUT")
    expected = {name: tensor.float() for name, tensor in float8(two["a"]).items()}
    assert all(torch.allclose(found[name].float(), expected[name], atol=1e-6) for name in expected)


def test_base_model_in_float8_is_not_compared_with_itself(tmp_path, two):
    changed(tmp_path / "base", float8)
    error = str(refusal(tmp_path))
    assert error.startswith("./base: 5 tensors")
    assert "dtype F8_E4M3 is not merged" in error
    assert "python -c" in error


def test_adapter_of_a_base_model_in_float8_is_answered_with_the_cast(tmp_path, two):
    changed(tmp_path / "base", float8)
    (tmp_path / "a" / "model.safetensors").unlink()
    factors = {"lora_A.weight": torch.ones(2, 8), "lora_B.weight": torch.ones(16, 2)}
    save_file(
        {f"base_model.model.layer.0.{name}": tensor for name, tensor in factors.items()},
        tmp_path / "a" / "adapter_model.safetensors",
    )
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    error = str(refusal(tmp_path))
    assert "./base, tensor 'layer.0.weight': dtype F8_E4M3 is not merged" in error
    assert "python -c" in error


def test_scaled_float8_of_comfyui_is_written_out_in_full_by_the_command_in_the_message(tmp_path, two):
    def scaled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weight = (tensors["layer.0.weight"] / 0.5).to(torch.float8_e4m3fn)
        marks = {"layer.0.scale_weight": torch.tensor(0.5), "scaled_fp8": torch.ones(2).to(weight.dtype)}
        return tensors | {"layer.0.weight": weight} | marks

    changed(tmp_path / "a", scaled)
    error = refusal(tmp_path)
    assert "is quantised (float8 with ComfyUI's scales" in str(error)
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "IN.safetensors")
    run_told(error, tmp_path)
    (tmp_path / "OUT.safetensors").rename(tmp_path / "a" / "model.safetensors")
    found = merged(tmp_path, "./a")
    assert torch.allclose(found["layer.0.weight"].float(), two["a"]["layer.0.weight"], rtol=0.07, atol=0.01)
    assert found.keys() == two["a"].keys()


def test_empty_tensor_of_any_name_gets_no_rule(tmp_path, two):
    changed(tmp_path / "a", lambda tensors: tensors | {"scale": torch.empty(0)})
    assert "the tensor is empty" in str(refusal(tmp_path))


def test_part_of_one_process_gets_no_rule(tmp_path, two):
    changed(
        tmp_path / "a",
        lambda t: {
            k: v[: len(v) // 2].clone() if v.ndim and k != "position_ids" else v for k, v in t.items()
        },
    )
    assert "its tensors are one of 2 parts of the base model's" in str(refusal(tmp_path))


def test_nothing_else_of_a_quantised_checkpoint_gets_a_rule(tmp_path, two):
    changed(
        tmp_path / "a",
        lambda t: t | {"layer.0.weight": t["layer.0.weight"].to(torch.int8), "x": torch.ones(1)},
    )
    assert "dtype I8 looks quantised" in str(refusal(tmp_path))


def test_flat_tensor_of_sharded_training_gets_no_rule(tmp_path, two):
    changed(tmp_path / "a", lambda t: t | {"layer.0.weight": t["layer.0.weight"].flatten()[:64].clone()})
    assert "the tensor is flat, [64]" in str(refusal(tmp_path))


def test_integers_in_place_of_a_weight_get_no_rule(tmp_path, two):
    changed(tmp_path / "a", lambda t: t | {"layer.0.weight": t["layer.0.weight"].to(torch.int8)})
    assert "dtype I8 looks quantised" in str(refusal(tmp_path))


def test_packed_dtype_is_told_as_quantised():
    header = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    files = {"model.safetensors": len(header).to_bytes(8, "little") + header + b"\0"}
    with pytest.raises(CheckpointError, match=r"dtype 'F4' is not supported.*before quantisation"):
        _ = MemorySource(files, "model").index


def test_lora_of_peft_in_another_file_is_read_under_the_name_in_the_message(tmp_path, two):
    factors = {"lora_A.weight": torch.ones(2, 8), "lora_B.weight": torch.ones(16, 2)}
    (tmp_path / "a" / "model.safetensors").unlink()
    save_file(
        {f"base_model.model.layer.0.{name}": tensor for name, tensor in factors.items()},
        tmp_path / "a" / "style.safetensors",
    )
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    assert "Call the file adapter_model.safetensors" in str(refusal(tmp_path))
    (tmp_path / "a" / "style.safetensors").rename(tmp_path / "a" / "adapter_model.safetensors")
    moved = merged(tmp_path, "./a")["layer.0.weight"] - two["base"]["layer.0.weight"]
    assert torch.allclose(moved, torch.full((16, 8), 4.0))


def test_recognition_comes_with_the_lock(tmp_path, two):
    changed(tmp_path / "a", lambda t: {f"lora_unet_{k}.lora_up.weight": v.clone() for k, v in t.items()})
    recipe = parse_recipe(recipe_values(names=("a",)), folder=tmp_path)
    with pytest.raises(CheckpointError, match="kohya"):
        lock(recipe)
