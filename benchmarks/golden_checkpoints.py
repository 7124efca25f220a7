"""Small fixed checkpoints for `benchmarks.golden`: a base model and its tasks for each kind of source.

All values come from PCG64's raw 64-bit integers, sums and products that are exact or rounded once, so they
are the same on every processor and with every version of numpy and torch.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from hub_magmax.evaluation.statistics_writing import write_statistics as write_file

Tensors = dict[str, Tensor]

#: Shapes and dtypes of the tensors of most families. Compiled loops work on blocks of 2,048 elements.
SHAPES: Mapping[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "embed.weight": (torch.bfloat16, (37, 24)),
    "layer.0.weight": (torch.float32, (33, 17)),
    "layer.0.bias": (torch.float16, (19,)),
    "layer.1.weight": (torch.bfloat16, (53, 101)),
    "layer.2.weight": (torch.float32, (5003,)),
    "layer.3.weight": (torch.float16, (64, 33)),
    "layer.4.weight": (torch.float64, (9, 5)),
    "scale": (torch.float32, ()),
    "empty": (torch.float32, (0, 4)),
}
#: Attention layers that adapters change, and one that they leave as it is.
ADAPTED: Mapping[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "block.0.q.weight": (torch.float32, (32, 24)),
    "block.0.v.weight": (torch.bfloat16, (40, 56)),
    "block.1.q.weight": (torch.float16, (32, 24)),
    "block.1.v.weight": (torch.float32, (48, 64)),
    "final.bias": (torch.float32, (24,)),
}
#: Large enough for thresholds that are counted and for selections that look at a sample first.
LARGE: Mapping[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "layer.0.weight": (torch.bfloat16, (301, 800)),
    "layer.1.weight": (torch.float32, (250, 903)),
    "layer.1.bias": (torch.float32, (903,)),
}
RANK = 4


def noise(shape: Sequence[int], *key: object) -> Tensor:
    """Return float64 numbers of mean 0 and variance 1, nearly normal; the key decides them."""
    count = int(np.prod(shape))
    raw = np.random.PCG64(zlib.crc32(repr(key).encode())).random_raw(count)
    parts = np.asarray(raw, "<u8").view("<u2").reshape(count, 4)
    sums = parts.sum(axis=1, dtype=np.int64) - 2 * 65535
    return torch.from_numpy(sums * (1.732 / 65536)).reshape(tuple(shape))


def base_tensors(shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], scale: float = 1.0) -> Tensors:
    """Return a base model's tensors: noise times `scale`, with zeros of both signs at the beginning."""
    tensors = {}
    for name, (dtype, shape) in shapes.items():
        values = (scale * noise(shape, "base", name)).to(dtype)
        if values.numel() > 4:
            values.view(-1)[:4] = torch.tensor([0.0, -0.0, 0.0, -0.0])
        tensors[name] = values
    return tensors


def task_tensors(base: Tensors, task: str) -> Tensors:
    """Return a task's tensors: half of the elements move, by multiples of .01 so that many magnitudes tie."""
    tensors = {}
    for name, values in base.items():
        moves = noise(values.shape, task, name, "moves") < 0
        step = 0.01 * (10 * noise(values.shape, task, name)).round()
        tensors[name] = (values.double() + step * moves).to(values.dtype)
    return tensors


def small_tensors(names: Sequence[str]) -> dict[str, Tensors]:
    """Return a family with all dtypes, a tensor that nobody moves, and integers that are copied."""
    base = base_tensors(SHAPES)
    family = {name: dict(base) if name == "base" else task_tensors(base, name) for name in ("base", *names)}
    still = base_tensors({"still.weight": (torch.float32, (40, 8))})
    copied = {"position_ids": torch.arange(7), "mask": torch.tensor([True, False, True])}
    for name, tensors in family.items():
        tensors.update(still | copied)
        # Of another dtype in one task than in the base model.
        wide = noise((70, 31), "mixed") + (0.05 * noise((70, 31), name, "mixed") if name != "base" else 0)
        tensors["mixed.weight"] = wide.to(torch.float32 if name == names[0] else torch.bfloat16)
    return family


def large_tensors(names: Sequence[str]) -> dict[str, Tensors]:
    """Return a family as real fine-tunes are: weights of .02 that move by 1e-4, many of them not at all."""
    base = base_tensors(LARGE, 0.02)
    family = {"base": base}
    for task in names:
        steps = {name: 1e-4 * noise(values.shape, task, name) for name, values in base.items()}
        family[task] = {name: (base[name].double() + steps[name]).to(base[name].dtype) for name in base}
    return family


def write(folder: Path, tensors: Tensors, num_shards: int = 1) -> None:
    """Write a checkpoint's folder."""
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for number in range(num_shards):
        file = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[number::num_shards]}
        save_file(part, folder / (file if num_shards > 1 else "model.safetensors"), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if num_shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "golden"}))


def write_adapter(
    folder: Path,
    base: Tensors,
    *,
    exact: bool = True,
    config: Mapping[str, Any] = MappingProxyType({}),
    whole: Sequence[str] = (),
) -> None:
    """Write a LoRA adapter for the blocks of `base`, and for its embedding if it has one.

    Args:
        folder: Its last part is the adapter's name.
        base: Tensors of the base model.
        exact: Factors are small multiples of 1/8 and 1/64. Float32 holds every sum of their products exactly,
            so the order in which a processor adds does not matter.
        config: What the configuration says besides.
        whole: Tensors that the adapter holds whole.
    """
    stored = {}
    for name, values in base.items():
        is_embedding = name == "embed.weight"
        if not (is_embedding or (name.startswith("block") and values.dim() == 2)):
            continue
        turned = is_embedding or config.get("fan_in_fan_out", False)
        outputs, inputs = reversed(values.shape) if turned else values.shape
        first = noise((RANK, inputs), folder.name, name, "A")
        second = noise((outputs, RANK), folder.name, name, "B")
        if exact:
            first, second = (8 * first).round() / 8, (4 * second).round() / 64
        else:
            second = 0.05 * second
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        kind = "lora_embedding_{}" if is_embedding else "lora_{}.weight"
        stored[f"{layer}.{kind.format('A')}"] = first.float().contiguous()
        stored[f"{layer}.{kind.format('B')}"] = second.float().contiguous()
    for name in whole:
        stored[f"base_model.model.{name}"] = task_tensors({name: base[name]}, folder.name)[name]
    folder.mkdir(parents=True)
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    written = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["q", "v"]}
    (folder / "adapter_config.json").write_text(json.dumps({**written, **config}))


def write_token_rows(folder: Path, tokens: Mapping[str, Sequence[str]]) -> None:
    """Write a family in which each checkpoint's embedding and head have the rows of its own tokens."""
    shared = base_tensors({"layer.weight": (torch.float32, (20, 30))})
    for name, rows in tokens.items():
        tensors = shared if name == "base" else task_tensors(shared, name)
        for tensor, dtype, width in (
            ("embed.weight", torch.bfloat16, (24,)),
            ("head.bias", torch.float32, ()),
        ):
            values = [
                noise(width, tensor, token) + 0.05 * noise(width, tensor, token, name) for token in rows
            ]
            tensors[tensor] = torch.stack(values).to(dtype)
        write(folder / name, tensors)
        vocabulary = {"type": "BPE", "vocab": {token: row for row, token in enumerate(rows)}}
        (folder / name / "tokenizer.json").write_text(json.dumps({"model": vocabulary, "added_tokens": []}))


def write_folders(folder: Path) -> dict[str, Any]:
    for name, tensors in small_tensors("abcd").items():
        write(folder / name, tensors)
    return recipe(folder, {"a": 0.45, "b": 0.3, "c": 0.15, "d": 0.1})


def write_sharded(folder: Path) -> dict[str, Any]:
    for number, (name, tensors) in enumerate(small_tensors("abcd").items()):
        write(folder / name, tensors, num_shards=2 + number % 3)
    return recipe(folder, {"a": 0.45, "b": 0.3, "c": 0.15, "d": 0.1})


def write_large(folder: Path) -> dict[str, Any]:
    for name, tensors in large_tensors("abcde").items():
        write(folder / name, tensors)
    return recipe(folder, {"a": 0.4, "b": 0.25, "c": 0.2, "d": 0.15, "e": 0.0})


def write_many(folder: Path) -> dict[str, Any]:
    """Write more tasks than there are bits in a byte."""
    base = base_tensors({name: SHAPES[name] for name in ("layer.0.weight", "layer.1.weight", "scale")})
    names = [f"t{number:02d}" for number in range(11)]
    write(folder / "base", base)
    for name in names:
        write(folder / name, task_tensors(base, name))
    weights = [8 + number for number in range(10)] + [0]
    return recipe(folder, {name: weight / 125 for name, weight in zip(names, weights, strict=True)})


def write_vocabularies(folder: Path) -> dict[str, Any]:
    words = [f"w{number}" for number in range(45)]
    tokens = {
        "base": words,
        "a": [*words[::-1], "<a>"],
        "b": [*words[5:], "<b>", "<a>"],
        "c": ["<b>", *words],
    }
    write_token_rows(folder, tokens)
    values = recipe(folder, {"a": 0.5, "b": 0.3, "c": 0.2})
    return values | {"token_rows": ["embed.weight", "head.*"], "output": {"files_from": "b"}}


def adapters(exact: bool, **keys: Any) -> Callable[[Path], dict[str, Any]]:
    def write_adapters(folder: Path) -> dict[str, Any]:
        base = base_tensors(ADAPTED)
        write(folder / "base", base)
        for name in "abc":
            write_adapter(folder / name, base, exact=exact)
        return recipe(folder, {"a": 0.5, "b": 0.3, "c": 0.2}) | keys

    return write_adapters


def write_forms(folder: Path) -> dict[str, Any]:
    """Write adapters of several forms, and a whole checkpoint."""
    layers = {"embed.weight": (torch.bfloat16, (30, 24)), "head.weight": (torch.float32, (12, 24))}
    base = base_tensors({**ADAPTED, **layers})
    write(folder / "base", base)
    write_adapter(folder / "a", base, config={"use_rslora": True, "fan_in_fan_out": True})
    scales = {"alpha_pattern": {"q": 4}, "modules_to_save": ["head"], "bias": "all"}
    write_adapter(folder / "b", base, config=scales, whole=("head.weight", "final.bias"))
    write(folder / "c", task_tensors(base, "c"))
    return recipe(folder, {"a": 0.5, "b": 0.3, "c": 0.2})


def write_ruled(folder: Path) -> dict[str, Any]:
    """Write a family with tensors that are copied, or left out, by rules."""
    taken = {"layer.0.*": "b", "embed.*": "base_model", "scale": "nothing"}
    rules = [{"match": match, "take": take} for match, take in taken.items()]
    return write_folders(folder) | {"tensors": rules, "output": {"dtype": "float16"}}


def write_statistics(folder: Path) -> dict[str, Any]:
    """Write the checkpoints of `folder`, with statistics of both kinds; biases and one layer have none."""
    values = write_folders(folder)
    base = small_tensors("abcd")["base"]
    layers = {
        name: tensor
        for name, tensor in base.items()
        if tensor.is_floating_point() and tensor.ndim == 2 and tensor.numel()
    }
    for task in values["tasks"]:
        name, own = task["name"], folder / "statistics" / task["name"]
        gram, fisher = {}, {}
        for tensor, like in [*layers.items()][1:]:
            rows = noise((2 * like.shape[1], like.shape[1]), "inputs", name, tensor)
            gram[tensor] = (rows.T @ rows / len(rows)).float().contiguous()
            fisher[tensor] = noise(like.shape, "gradient", name, tensor).square().float()
        write_file(own / "gram.safetensors", gram, {"statistics": "gram"})
        write_file(own / "merged_gram.safetensors", gram, {"statistics": "merged_gram"})
        write_file(own / "fisher.safetensors", fisher, {"statistics": "fisher", "root_mean_square": "1.5"})
        task["statistics"] = f"./{folder.name}/statistics/{name}"
    return values


def recipe(folder: Path, weights: Mapping[str, float]) -> dict[str, Any]:
    """Return the values of a recipe over checkpoints that are folders of these names."""
    return {
        "base_model": f"./{folder.name}/base",
        "tasks": [{"name": name, "model": f"./{folder.name}/{name}"} for name in weights],
        "preference": {"weights": dict(weights)},
        "seed": 7,
    }


def scaled(norms: str) -> Callable[[Path], dict[str, Any]]:
    """Return a function that writes what `write_folders` does, for task vectors of one length."""
    return lambda folder: write_folders(folder) | {"norms": norms}


#: Functions that write the checkpoints of each kind of source into a folder, and return a recipe's values.
#: `hub` has those of `folder`, uploaded.
SOURCES: Mapping[str, Callable[[Path], dict[str, Any]]] = {
    "folder": write_folders,
    "hub": write_folders,
    "sharded": write_sharded,
    "large": write_large,
    "many": write_many,
    "token_rows": write_vocabularies,
    "adapter": adapters(exact=True),
    "adapter_sequence": adapters(exact=True, adapters="sequence"),
    "adapter_rounded": adapters(exact=False),
    "adapter_forms": write_forms,
    "rules": write_ruled,
    "norms": scaled("equal"),
    "norms_by_tensor": scaled("equal-by-tensor"),
}
#: The same for methods that need statistics of the tasks' data.
WITH_STATISTICS = "statistics"
