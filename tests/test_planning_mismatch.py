"""Checkpoints that differ from the base model, and the rules that settle it, followed to the end."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hub_magmax.errors import MismatchError
from hub_magmax.pipeline import plan, run
from hub_magmax.planning.fitting.globs import grouped, settling_globs
from hub_magmax.recipe.loading import load_recipe
from tests.families import read_merged, write_checkpoint, write_recipe

BASE = {f"model.layers.{n}.{m}.weight": torch.full((4, 3), float(n)) for n in range(3) for m in ("q", "up")}


def moved(tensors: Mapping[str, Tensor], by: float = 1.0) -> dict[str, Tensor]:
    return {name: value + by for name, value in tensors.items()}


def write(folder: Path, **checkpoints: Mapping[str, Tensor]) -> Path:
    for name, tensors in checkpoints.items():
        write_checkpoint(folder / name, {key: value.clone() for key, value in tensors.items()})
    tasks = [{"name": name, "model": f"./{name}"} for name in checkpoints if name != "base"]
    return write_recipe(folder, tasks=tasks, method="average", output={"path": "out"})


def refused(path: Path) -> str:
    with pytest.raises(MismatchError) as caught:
        plan(load_recipe(path))
    return str(caught.value)


def followed(path: Path, message: str) -> dict[str, Tensor]:
    """Return what is merged with the rules that a message proposes, pasted as they are."""
    rules = re.search(r"tensors: \[\{.*?\}\]", message)
    assert rules, message
    path.write_text(f"{path.read_text()}\n{rules[0]}\n")
    run(load_recipe(path))
    return read_merged(path.parent / "out")


def test_one_rule_settles_a_group_that_tasks_lack(tmp_path: Path) -> None:
    extra = {f"model_ema.diffusion_model{n}": torch.full((4,), float(n)) for n in range(40)}
    path = write(tmp_path, base=BASE | extra, one=moved(BASE), two=moved(BASE, 3))
    message = refused(path)
    assert "./one, ./two: lacks 40 tensors ('model_ema.diffusion_model{0..39}') of the base model" in message
    assert 'tensors: [{match: "model_ema.*", take: base_model}]' in message
    found = followed(path, message)
    assert found.keys() == (BASE | extra).keys()
    assert all(found[name].equal(BASE[name] + 2) for name in BASE)
    assert all(found[name].equal(value) for name, value in extra.items())


def test_what_differs_in_any_task_is_told_at_once(tmp_path: Path) -> None:
    base = BASE | {"lm_head.weight": torch.ones(5, 3), "old.bias": torch.ones(2), "codes": torch.ones(3)}
    one = moved(BASE) | {"lm_head.weight": torch.ones(7, 3), "codes": torch.ones(3, dtype=torch.int8)}
    two = moved(base) | {"new.a": torch.ones(1), "new.b": torch.ones(1)}
    path = write(tmp_path, base=base, one=one, two=two)
    message = refused(path)
    assert "./one: lacks tensor 'old.bias' of the base model" in message
    assert "1 tensor of other shapes ('lm_head.weight' [7, 3], not [5, 3])" in message
    assert "tensor 'codes' whose dtype I8 cannot be merged with F32 of ./base" in message
    assert "./two: has 2 tensors ('new.a' and 'new.b') that the base model lacks" in message
    assert 'token_rows: ["lm_head.weight"]' in message
    found = followed(path, message)
    assert found.keys() == base.keys()
    assert all(found[name].equal(base[name]) for name in ("lm_head.weight", "old.bias", "codes"))
    assert all(found[name].equal(BASE[name] + 1) for name in BASE)


def test_rules_touch_no_other_tensor(tmp_path: Path) -> None:
    lacking = {name: value for name, value in BASE.items() if name != "model.layers.1.up.weight"}
    lacking |= {"model.layers.1.extra.weight": torch.ones(2)}
    path = write(tmp_path, base=BASE, one=moved(lacking))
    message = refused(path)
    assert '{match: "model.layers.1.up.weight", take: base_model}' in message
    found = followed(path, message)
    assert found.keys() == BASE.keys()
    changed = [name for name, value in BASE.items() if found[name].equal(value + 1)]
    assert sorted(changed) == sorted(BASE.keys() - {"model.layers.1.up.weight"})


def test_no_rule_is_proposed_where_parts_could_be_two(tmp_path: Path) -> None:
    layers = {f"layer.{n}.dense.weight": torch.ones(4, 4) for n in range(3)}
    base = {f"{part}.{name}": value for part in ("encoder", "decoder") for name, value in layers.items()}
    message = refused(write(tmp_path, base=base, one=moved(layers)))
    assert "'layer.{0..2}.dense.weight'" in message and "'decoder.layer.{0..2}.dense.weight'" in message
    assert "take:" not in message and "python -c" in message


def test_advice_to_rename_leads_to_the_merged_model(tmp_path: Path) -> None:
    layers = {f"layer.{n}.dense.weight": torch.ones(4, 4) for n in range(3)}
    base = {f"{part}.{name}": value for part in ("encoder", "decoder") for name, value in layers.items()}
    path = write(tmp_path, base=base, one=moved(layers))
    refused(path)
    renamed = {name.replace("layer.", "encoder.layer.", 1): value for name, value in moved(layers).items()}
    write_checkpoint(tmp_path / "one", renamed)
    message = refused(path)
    assert '{match: "decoder.*", take: base_model}' in message
    found = followed(path, message)
    assert all(found[name].equal(value + name.startswith("encoder")) for name, value in base.items())


@pytest.mark.parametrize("start", ["", "inner."])
def test_no_rule_is_proposed_for_another_layout_of_the_same_numbers(tmp_path: Path, start: str) -> None:
    parts = {f"layers.{n}.attn.{p}.weight": torch.ones(4, 4) for n in range(2) for p in "abc"}
    whole = {f"{start}layers.{n}.attn.abc.weight": torch.ones(12, 4) for n in range(2)}
    message = refused(write(tmp_path, base=parts | BASE, one=moved(whole | BASE)))
    assert "looks like another layout of the same numbers" in message
    assert "save_original_format=False" in message and "take:" not in message


def test_biases_of_rows_are_matched_with_the_rows(tmp_path: Path) -> None:
    rows = {
        n: {
            "embed.weight": torch.ones(n, 3),
            "final_logits_bias": torch.ones(1, n),
            "head.bias": torch.ones(n),
            "other.weight": torch.ones(2, n // 2),
        }
        for n in (8, 10)
    }
    message = refused(write(tmp_path, base=rows[8] | BASE, one=moved(rows[10] | BASE)))
    assert 'token_rows: ["embed.weight", "final_logits_bias", "head.bias"]' in message


def test_no_rule_is_proposed_for_axes_in_another_order(tmp_path: Path) -> None:
    experts = {f"layers.{n}.experts.gate_up": torch.randn(2, 6, 4) for n in range(3)}
    turned = {name: value.transpose(1, 2).contiguous() for name, value in experts.items()}
    path = write(tmp_path, base=experts | BASE, one=moved(turned | BASE))
    message = refused(path)
    assert "'layers.{0..2}.experts.gate_up') with axes in another order" in message
    assert "save_original_format=False" in message and "take:" not in message


def test_no_rule_is_proposed_for_layers_that_are_numbered_otherwise(tmp_path: Path) -> None:
    one = {
        re.sub(r"\d+", lambda number: str(int(number[0]) + 1), name): value for name, value in BASE.items()
    }
    message = refused(write(tmp_path, base=BASE, one=moved(one)))
    assert "'model.layers.3.q.weight'" in message and "differ in numbers alone" in message
    assert "take:" not in message


def test_no_rule_is_proposed_where_nearly_all_has_other_names(tmp_path: Path) -> None:
    odd = {
        f"h{n}.{'ab'[k]}": value
        for n in range(3)
        for k, value in enumerate((torch.ones(4, 3), torch.zeros(4, 3)))
    }
    message = refused(write(tmp_path, base=BASE, one=odd))
    assert "calls 6 of 6 tensors otherwise" in message and "take:" not in message


def test_rule_for_a_tasks_own_names_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, base=BASE, one={f"module.{name}": value for name, value in moved(BASE).items()})
    rules: list[Any] = [{"match": "module.*", "take": "nothing"}]
    path.write_text(f"{path.read_text()}\ntensors: {json.dumps(rules)}\n")
    message = refused(path)
    assert "leave out the rules for the task's own names" in message and "take:" not in message
    values = yaml.safe_load(path.read_text())
    del values["tensors"]
    path.write_text(yaml.safe_dump(values))
    run(load_recipe(path))
    assert all(read_merged(tmp_path / "out")[name].equal(value + 1) for name, value in BASE.items())


@pytest.mark.parametrize(
    "other",
    [
        {"encoder.conv_in.weight": torch.ones(4, 3, 3, 3), "decoder.conv_in.weight": torch.ones(4, 4, 3, 3)},
        {"lora_unet_layers_0_q.diff": torch.ones(5, 3), "lora_unet_layers_1_q.diff": torch.ones(5, 3)},
    ],
)
def test_what_holds_none_of_the_base_models_tensors_gets_no_rule(
    tmp_path: Path, other: Mapping[str, Tensor]
) -> None:
    message = refused(write(tmp_path, base=BASE, one=moved(BASE), two=other))
    assert "./two: holds none of the base model's 6 tensors, but '" in message
    assert "name a whole model" in message and "take:" not in message


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a"], ["a"]),
        (["a.0.b", "a.1.b", "a.2.b"], ["a.{0..2}.b"]),
        (["a.0.b", "a.2.b"], ["a.{0,2}.b"]),
        ([f"x{n}" for n in (1, 3, 5, 7, 9)], ["x{1,3,5,7,…}"]),
        (["l.0.e.1.w", "l.0.e.2.w", "l.0.e.3.w", "norm"], ["l.0.e.{1..3}.w", "norm"]),
    ],
)
def test_names_that_differ_in_numbers_are_one_pattern(names: list[str], expected: list[str]) -> None:
    assert grouped(names) == expected


LAYERS = [f"model.layers.{n}.{m}" for n in range(12) for m in ("q.weight", "q.bias", "norm.weight")]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([name for name in LAYERS if name.endswith("bias")], ["model.layers.*.q.bias"]),
        ([name for name in LAYERS if "norm" in name], ["model.layers.*.norm.*"]),
        (
            [name for name in LAYERS if ".5." in name or ".7." in name],
            ["model.layers.5.*", "model.layers.7.*"],
        ),
        (LAYERS, ["model.*"]),
        (["head.weight", "head.bias", "scale"], ["head.*", "scale"]),
        (["odd[0]*"], ["odd[[]0][*]"]),
        ([f"block{n}" for n in range(5)], ["block*"]),
    ],
)
def test_globs_are_few(names: list[str], expected: list[str]) -> None:
    assert settling_globs(names, [*LAYERS, "other.head.weight"]) == expected


NAMES = st.lists(st.sampled_from(["a", "b", "1", "12", "w3", "[x]", "*"]), min_size=1, max_size=4).map(
    ".".join
)


@given(st.sets(NAMES, min_size=1, max_size=20), st.sets(NAMES, max_size=20))
@settings(max_examples=300)
def test_globs_match_all_names_and_no_other(names: set[str], others: set[str]) -> None:
    globs = settling_globs(sorted(names), others)
    assert all(any(fnmatchcase(name, glob) for glob in globs) for name in names)
    assert not any(fnmatchcase(name, glob) for name in others - names for glob in globs)
