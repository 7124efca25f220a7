"""Tiny checkpoint families and recipes for tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from hub_magmax.planning.plan import Plan

SHAPES: Mapping[str, tuple[int, ...]] = {
    "embed.weight": (50, 8),
    "layer.0.weight": (16, 8),
    "layer.0.bias": (16,),
    "layer.1.weight": (8, 16),
    "scale": (),
}


def make_tensors(
    seed: int,
    *,
    base: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
) -> dict[str, Tensor]:
    """Return random tensors, or `base` plus a small random change in about half of the elements."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if base is None:
            tensors[name] = noise.to(dtype)
        else:
            keep = torch.rand(shape, generator=generator) < 0.5
            tensors[name] = (base[name].float() + 0.1 * noise * keep).to(dtype)
    tensors["position_ids"] = torch.arange(7)
    return tensors


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], *, num_shards: int = 1) -> Path:
    """Write a checkpoint folder: weights in one or more files, an index where needed, a config."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    if num_shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for number in range(num_shards):
            file = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
            part = {name: tensors[name] for name in names[number::num_shards]}
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "test"}))
    return folder


def write_family(
    folder: Path, tasks: Sequence[str], *, num_shards: int = 1, **options: Any
) -> dict[str, dict[str, Tensor]]:
    """Write `base` and one checkpoint per task under `folder`; return all tensors by checkpoint."""
    family = {"base": make_tensors(0, **options)}
    for seed, task in enumerate(tasks, 1):
        family[task] = make_tensors(seed, base=family["base"], **options)
    for name, tensors in family.items():
        write_checkpoint(folder / name, tensors, num_shards=num_shards)
    return family


def recipe_values(names: Sequence[str] = ("a", "b", "c"), **changes: Any) -> dict[str, Any]:
    """Return plain values of a recipe over the folders that `write_family` makes."""
    values: dict[str, Any] = {
        "schema": 1,
        "base_model": "./base",
        "tasks": [{"name": task, "model": f"./{task}"} for task in names],
    }
    return values | changes


def yaml_text(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False)


def write_recipe(folder: Path, **changes: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml_text(recipe_values(**changes)))
    return path


def accepted(made: Plan) -> Plan:
    """Return a plan whose faults are accepted: random checkpoints are those of different base models."""
    return replace(made, in_spite_of=tuple(finding.name for finding in made.findings))


def read_merged(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint folder, whatever its layout."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors
