"""Tasks whose tensors have other names than the base model's, from the recipe to the merged model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hub_magmax.errors import MismatchError, NonFiniteError, RecipeError
from hub_magmax.merging.execution import merge
from hub_magmax.pipeline import lock, plan, run
from hub_magmax.planning.summary import notices
from hub_magmax.recipe.loading import load_recipe
from hub_magmax.recipe.lockfile import read_lock
from tests.families import read_merged, write_checkpoint, write_recipe
from tests.local_hub.hub import LocalHub

Tensors = dict[str, Tensor]


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moved(tensors: Mapping[str, Tensor], seed: int) -> Tensors:
    """Return the tensors, changed a little."""
    return {
        name: value + 0.1 * rand(*value.shape, seed=seed + place) if value.is_floating_point() else value
        for place, (name, value) in enumerate(tensors.items())
    }


PLAIN = {f"model.layers.{n}.mlp.up_proj.weight": rand(8, 6, seed=n) for n in range(3)} | {
    "model.norm.weight": rand(6, seed=9)
}
MOE = "model.layers.0.block_sparse_moe."
EXPERTS = {
    f"{MOE}experts.{e}.w{k}.weight": rand(*((4, 6) if k == 2 else (6, 4)), seed=10 * k + e)
    for e in range(11)
    for k in (1, 2, 3)
} | {f"{MOE}gate.weight": rand(11, 4, seed=99), "model.norm.weight": rand(4, seed=98)}


def fused(tensors: Mapping[str, Tensor]) -> Tensors:
    """Return experts as transformers 5 holds them."""
    first, second, third = ([tensors[f"{MOE}experts.{e}.w{k}.weight"] for e in range(11)] for k in (1, 2, 3))
    return {
        "model.layers.0.mlp.experts.gate_up_proj": torch.stack(
            [torch.cat([gate, up]) for gate, up in zip(first, third, strict=True)]
        ),
        "model.layers.0.mlp.experts.down_proj": torch.stack(second),
        "model.layers.0.mlp.gate.weight": tensors[f"{MOE}gate.weight"],
        "model.norm.weight": tensors["model.norm.weight"],
    }


def renamed(rename: Callable[[str], str]) -> Callable[[Mapping[str, Tensor]], Tensors]:
    return lambda tensors: {rename(name): value for name, value in tensors.items()}


#: Tensors as one checkpoint has them, how the others have them, and a part of the note.
LAYOUTS: dict[str, tuple[Tensors, Callable[[Mapping[str, Tensor]], Tensors], str]] = {
    "prefix": (
        PLAIN, renamed("_orig_mod.{}".format), "one: its tensors are called `_orig_mod.X` for `X`, 4 tensors",
    ),
    "segment": (
        PLAIN, renamed(lambda name: name.replace("model.", "model.language_model.")),
        "called `X.language_model.Y` for `X.Y`, 4 tensors",
    ),
    "old names": (
        {f"bert.{n}.LayerNorm.{end}": rand(8, seed=n) for n in range(3) for end in ("weight", "bias")},
        renamed(lambda name: name.replace(".weight", ".gamma").replace(".bias", ".beta")),
        "`X.gamma` for `X.weight`",
    ),
    "experts": (EXPERTS, fused, "`model.layers.#.mlp.experts.gate_up_proj` for"),
}  # fmt: skip


def write(folder: Path, **checkpoints: Mapping[str, Tensor]) -> Path:
    for name, tensors in checkpoints.items():
        write_checkpoint(folder / name, dict(tensors))
    tasks = [{"name": name, "model": f"./{name}"} for name in checkpoints if name != "base"]
    return write_recipe(folder, tasks=tasks, method="average", output={"path": "out"})


@pytest.mark.parametrize(
    ("layout", "is_inverse"),
    [*((layout, False) for layout in LAYOUTS), *((layout, True) for layout in LAYOUTS if layout != "prefix")],
    ids=lambda value: value if isinstance(value, str) else "base model" if value else "task",
)
def test_task_under_other_names_is_merged_under_the_base_models(
    layout: str, is_inverse: bool, tmp_path: Path
) -> None:
    tensors, change, note = LAYOUTS[layout]
    other = dict if is_inverse else change
    one, two = moved(tensors, 1), moved(tensors, 100)
    base = change(tensors) if is_inverse else tensors
    recipe = load_recipe(write(tmp_path, base=base, one=other(one), two=change(two) if is_inverse else two))
    done = run(recipe)
    expected = {name: (a + two[name]) / 2 for name, a in one.items()}
    expected = change(expected) if is_inverse else expected
    found = read_merged(tmp_path / "out")
    assert found.keys() == base.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    assert is_inverse or note in "; ".join(notices(done.plan))
    assert any("one: its tensors are called" in line for line in notices(done.plan))
    assert not any("two" in line for line in notices(done.plan))


@pytest.mark.parametrize("wrapped", [("base",), ("base", "one"), ("base", "one", "two")], ids=str)
@pytest.mark.parametrize("prefix", ["_orig_mod.", "_fsdp_wrapped_module._orig_mod.", "module."])
def test_base_model_loses_what_wrappers_put_before_its_names(
    prefix: str, wrapped: tuple[str, ...], tmp_path: Path
) -> None:
    family = {"base": PLAIN, "one": moved(PLAIN, 1), "two": moved(PLAIN, 100)}
    stored = {n: renamed((prefix + "{}").format)(v) if n in wrapped else v for n, v in family.items()}
    recipe = write(tmp_path, **stored)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    for name in family:
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    made = plan(load_recipe(recipe))
    merge(made, tmp_path / "merged")
    found = read_merged(tmp_path / "merged")
    assert found.keys() == PLAIN.keys()
    for name in PLAIN:
        torch.testing.assert_close(found[name], (family["one"][name] + family["two"][name]) / 2)
    assert any(f"base_model: its tensors are called `{prefix}X` for `X`" in line for line in notices(made))


def test_beginning_of_all_names_stays_where_nobody_says_how_the_model_is_loaded(tmp_path: Path) -> None:
    stored = renamed("module.{}".format)(PLAIN)
    recipe = write(tmp_path, base=stored, one=moved(stored, 1))
    (tmp_path / "base" / "config.json").unlink(missing_ok=True)
    assert plan(load_recipe(recipe)).lock.base_model.renamed is None


def test_lock_holds_patterns_and_gives_the_same_merge_again(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, base=EXPERTS, one=fused(moved(EXPERTS, 1)), two=moved(EXPERTS, 50)))
    locked = lock(recipe)
    path = tmp_path / "recipe.lock.json"
    path.write_text(locked.to_json())
    assert read_lock(path) == locked
    values = json.loads(locked.to_json())["tasks"]
    assert "renamed" not in values["two"]
    assert values["one"]["renamed"]["names"] == [
        ["model.layers.#.mlp.gate.weight", "model.layers.#.block_sparse_moe.gate.weight"]
    ]
    assert len(values["one"]["renamed"]["joints"]) == 2
    assert plan(recipe, read_lock(path)).digest == plan(recipe, locked).digest


def test_source_with_the_base_models_names_is_locked_as_ever(tmp_path: Path) -> None:
    locked = lock(load_recipe(write(tmp_path, base=PLAIN, one=moved(PLAIN, 1))))
    assert "renamed" not in locked.to_json()


def test_error_names_the_tasks_own_tensor(tmp_path: Path) -> None:
    broken = {f"_orig_mod.{name}": value for name, value in PLAIN.items()}
    broken["_orig_mod.model.norm.weight"] = torch.full((6,), torch.nan)
    recipe = load_recipe(write(tmp_path, base=PLAIN, one=broken))
    with pytest.raises(NonFiniteError, match=r"tensor '_orig_mod\.model\.norm\.weight'"):
        run(recipe)


def with_rules(path: Path, *rules: Mapping[str, str]) -> Any:
    path.write_text(f"{path.read_text()}\ntensors: {json.dumps(rules)}\n")
    return load_recipe(path)


def test_rules_use_the_base_models_names(tmp_path: Path) -> None:
    one = renamed("module.{}".format)(moved(PLAIN, 1))
    path = write(tmp_path, base=PLAIN, one=one, two=moved(PLAIN, 50))
    run(with_rules(path, {"match": "model.norm.*", "take": "one"}))
    assert read_merged(tmp_path / "out")["model.norm.weight"].equal(one["module.model.norm.weight"])


def test_rules_that_set_both_names_aside_do_what_they_did(tmp_path: Path) -> None:
    path = write(tmp_path, base=PLAIN, one=renamed("module.{}".format)(moved(PLAIN, 1)))
    rules = ({"match": "model.*", "take": "base_model"}, {"match": "module.*", "take": "nothing"})
    run(with_rules(path, *rules))
    assert all(read_merged(tmp_path / "out")[name].equal(value) for name, value in PLAIN.items())


def test_encoder_and_classifier_share_what_they_share(tmp_path: Path) -> None:
    head = {"cls.predictions.bias": rand(9, seed=3)}
    base = {f"bert.{name}": value for name, value in PLAIN.items()} | head
    one = moved(PLAIN, 1) | {"classifier.weight": rand(2, 6, seed=4)}
    path = write(tmp_path, base=base, one=one)
    with pytest.raises(MismatchError) as caught:
        plan(load_recipe(path))
    assert "cls.predictions.bias" in str(caught.value) and "classifier.weight" in str(caught.value)
    assert "bert." not in str(caught.value).replace("./bert", "")
    rules = ({"match": "cls.*", "take": "base_model"}, {"match": "classifier.*", "take": "nothing"})
    run(with_rules(path, *rules))
    found = read_merged(tmp_path / "out")
    assert found.keys() == base.keys()
    for name in PLAIN:
        torch.testing.assert_close(found[f"bert.{name}"], one[name])


@pytest.mark.parametrize("prefix", ["_orig_mod.", "net."])
def test_prefix_is_taken_from_a_tasks_own_head_too(prefix: str, tmp_path: Path) -> None:
    one = renamed(f"{prefix}{{}}".format)(moved(PLAIN, 1) | {"classifier.weight": rand(2, 6, seed=4)})
    path = write(tmp_path, base=PLAIN, one=one)
    with pytest.raises(MismatchError, match=r"has tensor 'classifier\.weight' that the base model lacks"):
        plan(load_recipe(path))
    run(with_rules(path, {"match": "classifier.*", "take": "one"}))
    found = read_merged(tmp_path / "out")
    assert found.keys() == PLAIN.keys() | {"classifier.weight"}
    assert found["classifier.weight"].equal(one[f"{prefix}classifier.weight"])


def test_glob_that_matches_nothing_is_still_refused(tmp_path: Path) -> None:
    path = write(tmp_path, base=PLAIN, one=renamed("module.{}".format)(PLAIN))
    with pytest.raises(RecipeError, match="matches no tensor"):
        plan(with_rules(path, {"match": "nowhere.*", "take": "nothing"}))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("is_inverse", [False, True], ids=["task", "base model"])
def test_other_names_are_read_from_the_hub(
    layout: str, is_inverse: bool, tmp_path: Path, hub: LocalHub
) -> None:
    tensors, change, _ = LAYOUTS[layout]
    base, one = (change(tensors), moved(tensors, 1)) if is_inverse else (tensors, change(moved(tensors, 1)))
    names = [f"me/{layout.replace(' ', '-')}-{is_inverse}-{part}".lower() for part in ("base", "one")]
    for name, values in zip(names, (base, one), strict=True):
        hub.add_repo(name, folder=write_checkpoint(tmp_path / name, dict(values)))
    path = write_recipe(
        tmp_path,
        base_model=names[0],
        tasks=[{"name": "one", "model": names[1]}],
        method="ties",
        output={"path": "out"},
    )
    run(load_recipe(path))
    local = write(tmp_path / "local", base=base, one=one)
    run(load_recipe(with_method(local, "ties")))
    found, expected = read_merged(tmp_path / "out"), read_merged(tmp_path / "local" / "out")
    assert found.keys() == expected.keys() and all(
        found[name].equal(value) for name, value in expected.items()
    )


def with_method(path: Path, method: str) -> Path:
    path.write_text(path.read_text().replace("method: average", f"method: {method}"))
    return path
