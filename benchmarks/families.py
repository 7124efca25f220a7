"""Checkpoint families of any size with the layer names and shapes of real models.

Deterministic, and written in blocks: a 1B-parameter family needs no more memory than a small one.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Model:
    """Content of a checkpoint as `save_pretrained` writes it: config.json, and tensors of one dtype by name.

    Attributes:
        title: For people.
        config: What `config.json` holds, without the dtype.
        shapes: By name, in the order of the files. Tied tensors are there once.
        dtype: That of published checkpoints of this kind.
        deviation: Of dense task vectors before they are rounded to `dtype`. None: task vectors of deviation
            .002, sparse in bfloat16.
    """

    title: str
    config: Mapping[str, Any]
    shapes: Shapes
    dtype: torch.dtype
    deviation: float | None = None

    @property
    def num_parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    @property
    def config_text(self) -> str:
        """The content of config.json."""
        return json.dumps({**self.config, "dtype": str(self.dtype).removeprefix("torch.")}, indent=2) + "\n"


def llama(*, vocabulary: int, width: int, layers: int, inner: int, key_width: int) -> Model:
    """Return a Llama with tied embeddings."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (width,),
            f"{prefix}.mlp.down_proj.weight": (width, inner),
            f"{prefix}.mlp.gate_proj.weight": (inner, width),
            f"{prefix}.mlp.up_proj.weight": (inner, width),
            f"{prefix}.post_attention_layernorm.weight": (width,),
            f"{prefix}.self_attn.k_proj.weight": (key_width, width),
            f"{prefix}.self_attn.o_proj.weight": (width, width),
            f"{prefix}.self_attn.q_proj.weight": (width, width),
            f"{prefix}.self_attn.v_proj.weight": (key_width, width),
        }
    shapes |= {"model.norm.weight": (width,)}
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": key_width // 64,
        "tie_word_embeddings": True,
    }
    return Model("Llama", config, shapes, torch.bfloat16)


def clip_vit_b16() -> Model:
    """Return CLIP ViT-B/16: both towers and their projections."""
    text, image, joint = 512, 768, 512
    shapes: Shapes = {
        "logit_scale": (),
        "text_model.embeddings.token_embedding.weight": (49408, text),
        "text_model.embeddings.position_embedding.weight": (77, text),
        **_clip_layers("text_model", text),
        **_affine("text_model.final_layer_norm", text),
        "vision_model.embeddings.class_embedding": (image,),
        "vision_model.embeddings.patch_embedding.weight": (image, 3, 16, 16),
        "vision_model.embeddings.position_embedding.weight": (197, image),
        **_affine("vision_model.pre_layrnorm", image),
        **_clip_layers("vision_model", image),
        **_affine("vision_model.post_layernorm", image),
        "visual_projection.weight": (joint, image),
        "text_projection.weight": (joint, text),
    }
    config = {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": joint,
        "text_config": {"hidden_size": text, "intermediate_size": 4 * text, "num_attention_heads": 8},
        "vision_config": {"hidden_size": image, "intermediate_size": 4 * image, "patch_size": 16},
    }
    return Model("CLIP ViT-B/16", config, shapes, torch.float32)


def _clip_layers(tower: str, width: int) -> Shapes:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(12):
        prefix = f"{tower}.encoder.layers.{layer}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= _affine(f"{prefix}.self_attn.{name}", width, width)
        shapes |= _affine(f"{prefix}.layer_norm1", width)
        shapes |= _affine(f"{prefix}.mlp.fc1", 4 * width, width)
        shapes |= _affine(f"{prefix}.mlp.fc2", width, 4 * width)
        shapes |= _affine(f"{prefix}.layer_norm2", width)
    return shapes


def vit_b16() -> Model:
    """Return ViT-B/16 without a classifier."""
    width = 768
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.position_embeddings": (1, 197, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, 16, 16),
        "embeddings.patch_embeddings.projection.bias": (width,),
    }
    for layer in range(12):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes |= _affine(f"layers.{layer}.attention.{name}", width, width)
        shapes |= _affine(f"layers.{layer}.layernorm_before", width)
        shapes |= _affine(f"layers.{layer}.layernorm_after", width)
        shapes |= _affine(f"layers.{layer}.mlp.fc1", 4 * width, width)
        shapes |= _affine(f"layers.{layer}.mlp.fc2", width, 4 * width)
    shapes |= {**_affine("layernorm", width), **_affine("pooler.dense", width, width)}
    config = {
        "model_type": "vit",
        "architectures": ["ViTModel"],
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "patch_size": 16,
    }
    return Model("ViT-B/16", config, shapes, torch.float32)


def bert_base() -> Model:
    """Return BERT base with its masked language head, whose decoder is tied to the embeddings."""
    vocabulary, width = 30522, 768
    shapes: dict[str, tuple[int, ...]] = {
        "bert.embeddings.word_embeddings.weight": (vocabulary, width),
        "bert.embeddings.position_embeddings.weight": (512, width),
        "bert.embeddings.token_type_embeddings.weight": (2, width),
        **_affine("bert.embeddings.LayerNorm", width),
    }
    for layer in range(12):
        prefix = f"bert.encoder.layer.{layer}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= _affine(f"{prefix}.attention.{name}", width, width)
        shapes |= _affine(f"{prefix}.attention.output.LayerNorm", width)
        shapes |= _affine(f"{prefix}.intermediate.dense", 4 * width, width)
        shapes |= _affine(f"{prefix}.output.dense", width, 4 * width)
        shapes |= _affine(f"{prefix}.output.LayerNorm", width)
    shapes |= {
        "cls.predictions.bias": (vocabulary,),
        **_affine("cls.predictions.transform.dense", width, width),
        **_affine("cls.predictions.transform.LayerNorm", width),
    }
    config = {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM"],
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "tie_word_embeddings": True,
    }
    return Model("BERT base", config, shapes, torch.float32)


def _affine(name: str, *shape: int) -> Shapes:
    """Return a weight, and its bias of one element per row."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


_LLAMAS = {
    "1b": llama(vocabulary=32000, width=2048, layers=20, inner=5632, key_width=512),
    "250m": llama(vocabulary=32000, width=1024, layers=18, inner=2816, key_width=512),
    "30m": llama(vocabulary=8000, width=512, layers=10, inner=1408, key_width=256),
}
#: Deviations of dense task vectors that are as small as those of real fine-tunes, as sizes name them.
_SMALL = {"1e-4": 1e-4, "2e-5": 2e-5}
#: By name. The Llamas have about 1.0, 0.25 and 0.03 billion parameters.
SIZES: Mapping[str, Model] = {
    **_LLAMAS,
    **{
        f"{size}-{name}": replace(model, deviation=deviation)
        for name, deviation in _SMALL.items()
        for size, model in _LLAMAS.items()
    },
    "clip-vit-b16": clip_vit_b16(),
    "bert-base": bert_base(),
    "vit-b16": vit_b16(),
}


def make_family(
    folder: Path, size: str, *, num_tasks: int = 5, shard_bytes: int = 500_000_000
) -> tuple[Path, ...]:
    """Write `base` and `task-1` … below `folder`, unless they are there already; return their weight files.

    Raises:
        SystemExit: If a checkpoint of another size is there.
    """
    print(f"making checkpoints of size {size} in {folder}", file=sys.stderr)
    files: list[Path] = []
    model = SIZES[size]
    for number in range(num_tasks + 1):
        checkpoint = folder / (f"task-{number}" if number else "base")
        if not (checkpoint / _INDEX).is_file():
            _write(checkpoint, model, number, shard_bytes)
        index = json.loads((checkpoint / _INDEX).read_text())
        places = index["weight_map"]
        if places.keys() != model.shapes.keys() or index["metadata"].get("deviation") != model.deviation:
            sys.exit(f"{checkpoint} holds a checkpoint of another size than {size}")
        (checkpoint / "config.json").write_text(model.config_text)
        files += [checkpoint / file for file in sorted(set(places.values()))]
    return tuple(files)


def family_recipe(num_tasks: int) -> dict[str, Any]:
    """Return the checkpoints that `make_family` wrote as a recipe beside them names them."""
    tasks = [{"name": f"t{n}", "model": f"./task-{n}"} for n in range(1, num_tasks + 1)]
    return {"base_model": "./base", "tasks": tasks}


def _write(folder: Path, model: Model, number: int, shard_bytes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    groups = list(_groups(model, shard_bytes))
    weight_map = {}
    for index, names in enumerate(groups, 1):
        file = f"model-{index:05d}-of-{len(groups):05d}.safetensors"
        with ThreadPoolExecutor(2) as pool:
            tensors = pool.map(lambda name: _tensor(name, model, number), names)
            save_file(dict(zip(names, tensors, strict=True)), folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    # Last: it says that the weights are complete.
    index = {"metadata": {"deviation": model.deviation}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index))


def _groups(model: Model, shard_bytes: int) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for name, shape in model.shapes.items():
        num_bytes = model.dtype.itemsize * torch.Size(shape).numel()
        if group and size + num_bytes > shard_bytes:
            yield group
            group, size = [], 0
        group.append(name)
        size += num_bytes
    yield group


def _tensor(name: str, model: Model, number: int) -> Tensor:
    """Return base weights, or base weights moved by a dense task vector or by a tenth of their size.

    Without a deviation steps survive bfloat16, and about half of the elements of each task vector are exactly
    zero there, none in float32. Dense steps are rounded away in bfloat16 where they are small beside their
    weight, and many of the others to the same value: of deviation 1e-4, 32 % of the elements are zero and
    23 % more have one magnitude; of 2e-5, 78 and 8 %.
    """
    shape, dtype = model.shapes[name], model.dtype
    base = (0.02 * torch.randn(shape, generator=_generator(name, 0))).to(dtype)
    if number == 0:
        return base
    generator = _generator(name, number)
    step = (model.deviation or 0.002) * torch.randn(shape, generator=generator)
    if dtype == torch.bfloat16 and model.deviation is None:
        step = step * (torch.rand(shape, generator=generator) < 0.5)
    return (base.float() + step).to(dtype)


def _generator(name: str, number: int) -> torch.Generator:
    # torch's CPU generator uses the low 32 bits of a seed only.
    digest = hashlib.blake2b(f"{name}/{number}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
