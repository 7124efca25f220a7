"""Hostile input, made from good input by chance: headers, indexes and recipes.

Each `*_case` takes a generator and returns what to run; the same generator makes the same case.
"""

from __future__ import annotations

import copy
import json
import math
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ROWS = 8

#: Values that readers stumble over: wrong kinds, wrong sizes, half characters, places outside.
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**40, 0.5, -0.0, 1e308, math.inf,
    math.nan, "", " ", "x" * 5000, "F32", "F8_E4M3", "I64", "f32", "../x", "/etc/passwd", "C:\\x", "a/b",
    "~nobody/x", "~",
    "\x00", "\x1b[2J", "\ud800", "\u202e", "é", "CON", "base_model", "model.safetensors", "__metadata__",
    [], {}, [[]], [0], [0, 0], [8, 0], [2**62, 2**62], [1] * 100, [2**62] * 70, ["a", "b"], {"a": 1},
    {"dtype": "F32"}, {"name": "x"}, [None, None], "1e999", "0x10", "12:30:45",
    "2001-99-99", "on", "5GB", "-5GB",
    "hf_" + "a" * 34, "https://me:password@host/a/b", "9" * 400 + "GB", "x" * 100_000,
    "me/model@main", "hf://datasets/x", "https://host/a/b", "--x", "$(id)", "`id`", "{{7*7}}",
)  # fmt: skip

#: Pieces of YAML that are more than a value.
YAML_PIECES = (
    "!!bool maybe", "!!int ''", "!!float x", "!!timestamp x", "!!binary x", "!!null x", "!!set {a}",
    "!!omap [a]", "!!python/object/apply:os.system [id]", "!x y", "&a x", "*a", "<<: {a: 1}", "? [a, b] : c",
    "? {a: b} : c", "{", "}", "[", "]", "[" * 300, "{a: " * 300, "|", ">", "\t", "%YAML 9.9", "---",
    "...", "- -", ":", ": :",
    "1_000", "0b2", "0o9", "190:20:30", ".nan", ".inf", "2001-02-30", "2001-02-03 25:61:61", "1:2", "=", "~",
    '"\\ud800"', '"\\x00"', "'", '"', "#", "\u0085", "\ufeff", "null: null", "1: 2", "true: x",
    "2001-01-01: x", "0x" + "F" * 4000, "1:" * 3000 + "1", "0b" + "1" * 20_000, "9" * 4000, "1" * 5000 + ".0",
)  # fmt: skip

RECIPE = """\
schema: 1
base_model: ./base
tasks:
  - {name: a, model: ./a}
  - {name: b, model: me/model@main}
  - name: c
    model: hf://me/model
method: {name: ties, scaling: 0.5, density: 0.2}
preference:
  weights: {a: 0.7, b: 0.2, c: 0.1}
tensors:
  - {match: "text.*", take: base_model}
  - {match: "head.*", take: nothing}
evaluation:
  evaluator: image-classification
  tasks:
    a: {dataset: ./data, split: "test[:10]", label_column: label}
output: {path: merged/, dtype: auto, shard_size: 5GB, files_from: a, push_to_hub: me/merged, private: true}
seed: 0
"""


def tensors(seed: int, rows: int) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return dtype, shape and content of a few tensors; the seed 0 is the base model."""
    import numpy as np

    found: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for number in range(5):
        values = np.random.default_rng(number).standard_normal((rows, 8), dtype=np.float32)
        values += (
            0.1 * seed * np.random.default_rng((seed, number)).standard_normal((rows, 8), dtype=np.float32)
        )
        found[f"layer.{number}.weight"] = ("F32", (rows, 8), values.tobytes())
    found["position_ids"] = ("I64", (4,), struct.pack("<4q", 0, 1, 2, 3))
    return found


def safetensors_bytes(content: dict[str, tuple[str, tuple[int, ...], bytes]]) -> bytes:
    """Return a safetensors file."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape, data) in content.items():
        entries[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + len(data)],
        }
        position += len(data)
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in content.values())


def write_checkpoint(folder: Path, *, seed: int, rows: int) -> None:
    """Write a folder with one file of weights and a configuration."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors(seed, rows)))
    (folder / "config.json").write_text('{"model_type": "test"}')


def mutated_bytes(content: bytes, generator: random.Random) -> bytes:
    """Flip, cut, repeat or insert a few bytes."""
    found = bytearray(content)
    for _ in range(generator.randint(1, 4)):
        place = generator.randrange(len(found) + 1)
        kind = generator.randrange(5)
        if kind == 0 and place < len(found):
            found[place] = generator.randrange(256)
        elif kind == 1:
            del found[place : place + generator.choice((1, 2, 8, 100))]
        elif kind == 2:
            found[place:place] = found[place : place + generator.choice((1, 8, 50))]
        elif kind == 3:
            found[place:place] = generator.randbytes(generator.choice((1, 2, 8)))
        elif place < len(found):
            found[place] ^= 1 << generator.randrange(8)
    return bytes(found)


def mutated_value(value: Any, generator: random.Random) -> Any:
    """Return plain values with a few of them replaced, removed, doubled, renamed or nested."""
    holder = [copy.deepcopy(value)]
    for _ in range(generator.randint(1, 3)):
        parent, key = generator.choice(list(_places(holder)))
        kind = generator.randrange(6)
        if kind <= 2:
            parent[key] = copy.deepcopy(generator.choice(VALUES))
        elif kind == 3 and parent is not holder:
            del parent[key]
        elif kind == 4:
            parent[key] = [parent[key]] * generator.choice((1, 2, 50))
        elif isinstance(parent, dict):
            parent[str(generator.choice(VALUES))] = parent.pop(key)
        else:
            parent[key] = {"x": parent[key]}
    return holder[0]


def _places(holder: Any) -> Any:
    keys = range(len(holder)) if isinstance(holder, list) else list(holder)
    for key in keys:
        yield holder, key
        if isinstance(holder[key], dict | list):
            yield from _places(holder[key])


def json_text(value: Any, generator: random.Random) -> bytes:
    """Return JSON, now and then with a key twice, nested without end, or with an endless number."""
    text = json.dumps(value, ensure_ascii=generator.random() < 0.7)
    kind = generator.randrange(20)
    if kind == 0:
        text = text.replace("{", '{"x": 1, "x": 2, ', 1)
    elif kind == 1:
        text = text.replace("{", '{"x": ' + generator.choice("[{") * 2000 + ", ", 1)
    elif kind == 2:
        text = text.replace("[", "[" + "9" * 5000 + ", ", 1)
    return text.encode("utf-8", "surrogatepass")


def mutated_weights(generator: random.Random) -> bytes:
    """Return a safetensors file with a hostile header."""
    content = safetensors_bytes(tensors(1, _ROWS))
    kind = generator.randrange(4)
    if kind == 0:
        return mutated_bytes(content, generator)
    length = struct.unpack("<Q", content[:8])[0]
    text, data = content[8 : 8 + length], content[8 + length :]
    text = (
        mutated_bytes(text, generator)
        if kind == 1
        else json_text(mutated_value(json.loads(text), generator), generator)
    )
    said = len(text) if generator.random() < 0.9 else generator.choice((0, 1, 7, 2**31, 2**63, 2**64 - 1))
    if generator.random() < 0.1:
        data = data[: generator.randrange(len(data))]
    return struct.pack("<Q", said) + text + data


def header_case(generator: random.Random) -> Callable[[], None]:
    """Read the header of a mutated file, and the tensors it then holds."""
    content = mutated_weights(generator)
    return lambda: read_all({"model.safetensors": content})


def index_case(generator: random.Random) -> Callable[[], None]:
    """Read a checkpoint of three files with a mutated index."""
    content = tensors(1, _ROWS)
    names = list(content)
    files = {
        f"model-{number}.safetensors": safetensors_bytes({name: content[name] for name in names[number::3]})
        for number in range(3)
    }
    weight_map = {name: f"model-{number}.safetensors" for number in range(3) for name in names[number::3]}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    text = json_text(mutated_value(index, generator), generator)
    if generator.random() < 0.3:
        text = mutated_bytes(text, generator)
    return lambda: read_all(files | {"model.safetensors.index.json": text})


def read_good() -> None:
    """Read a checkpoint and a recipe with nothing wrong."""
    from hub_magmax.recipe.loading import parse_recipe

    read_all({"model.safetensors": safetensors_bytes(tensors(1, _ROWS))})
    parse_recipe({"schema": 1, "base_model": "./base", "tasks": [{"name": "a", "model": "./a"}]})


def read_all(files: dict[str, bytes]) -> None:
    """Read a checkpoint as a merge does: index, kind of checkpoint, then every tensor."""
    from hub_magmax.checkpoints.config import config_values
    from hub_magmax.checkpoints.recognition import refuse_parts
    from hub_magmax.checkpoints.source import MemorySource

    source = MemorySource(files, "model")
    index = source.index
    refuse_parts(source.listing, index, config_values(files.get("config.json"), source.label))
    for name, info in index.tensors.items():
        json.dumps({name: info.shape}, ensure_ascii=False).encode()
        if info.num_elements:
            source.read(name, 0, info.num_elements)


def recipe_text(generator: random.Random) -> bytes:
    """Return a hostile recipe."""
    import yaml

    kind = generator.randrange(3)
    if kind == 0:
        return mutated_bytes(RECIPE.encode(), generator)
    if kind == 1:
        values = mutated_value(yaml.safe_load(RECIPE), generator)
        try:
            return yaml.safe_dump(values, sort_keys=False).encode("utf-8", "surrogatepass")
        except yaml.YAMLError:
            return json.dumps(values).encode()
    words = RECIPE.replace("\n", " \n").split(" ")
    for _ in range(generator.randint(1, 3)):
        place = generator.randrange(len(words))
        piece = generator.choice(YAML_PIECES)
        words[place] = piece if generator.random() < 0.7 else f"{words[place]} {piece}"
    return " ".join(words).encode("utf-8", "surrogatepass")


def recipe_case(generator: random.Random, folder: Path) -> Callable[[], None]:
    """Load a mutated recipe; one that is accepted must come back equal from its own YAML."""
    content = recipe_text(generator)
    return lambda: load(content, folder)


def load(content: bytes, folder: Path) -> None:
    """Load a recipe from `folder`, and if it is accepted, use all that is derived from it."""
    from hub_magmax.recipe.loading import load_recipe

    path = folder / "recipe.yaml"
    path.write_bytes(content)
    recipe = load_recipe(path)
    assert recipe.output_path and recipe.digest
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(path) == recipe, "another recipe came back"
