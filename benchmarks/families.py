"""Checkpoint families of any size with the layer names and shapes of real models.

Deterministic, and written in blocks: a 1B-parameter family needs no more memory than a small one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]


def llama(*, vocabulary: int, width: int, layers: int, inner: int, key_width: int) -> Shapes:
    """Return the tensors of a Llama with tied embeddings."""
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
    return shapes | {"model.norm.weight": (width,)}


#: By name: about 1.0, 0.25 and 0.03 billion parameters.
SIZES: Mapping[str, Shapes] = {
    "1b": llama(vocabulary=32000, width=2048, layers=20, inner=5632, key_width=512),
    "250m": llama(vocabulary=32000, width=1024, layers=18, inner=2816, key_width=512),
    "30m": llama(vocabulary=8000, width=512, layers=10, inner=1408, key_width=256),
}


def make_family(folder: Path, size: str, *, num_tasks: int = 5, shard_bytes: int = 500_000_000) -> None:
    """Write `base` and `task-1` … below `folder` in bfloat16, unless they are there already."""
    for number in range(num_tasks + 1):
        name = f"task-{number}" if number else "base"
        if not (folder / name / "config.json").is_file():
            _write(folder / name, SIZES[size], number, shard_bytes)


def _write(folder: Path, shapes: Shapes, number: int, shard_bytes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    groups = list(_groups(shapes, shard_bytes))
    weight_map = {}
    for index, names in enumerate(groups, 1):
        file = f"model-{index:05d}-of-{len(groups):05d}.safetensors"
        tensors = {name: _tensor(name, shapes[name], number) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def _groups(shapes: Shapes, shard_bytes: int) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for name, shape in shapes.items():
        num_bytes = 2 * torch.Size(shape).numel()
        if group and size + num_bytes > shard_bytes:
            yield group
            group, size = [], 0
        group.append(name)
        size += num_bytes
    yield group


def _tensor(name: str, shape: tuple[int, ...], number: int) -> Tensor:
    """Return base weights, or base weights moved in about half of their elements by a tenth of their size.

    Steps this large survive bfloat16; about half of each task vector is exactly zero, as it is
    in real fine-tuned checkpoints.
    """
    base = 0.02 * torch.randn(shape, generator=_generator(name, 0))
    if number == 0:
        return base.to(torch.bfloat16)
    generator = _generator(name, number)
    step = 0.002 * torch.randn(shape, generator=generator)
    keep = torch.rand(shape, generator=generator) < 0.5
    return (base.to(torch.bfloat16).float() + step * keep).to(torch.bfloat16)


def _generator(name: str, number: int) -> torch.Generator:
    # torch's CPU generator uses the low 32 bits of a seed only.
    digest = hashlib.blake2b(f"{name}/{number}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
