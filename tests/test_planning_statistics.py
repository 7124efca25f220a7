"""Tensors that are no weights: statistics, counters, ranges of observers, fixed buffers."""

import json
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hub_magmax.checkpoints.index import TensorInfo
from hub_magmax.errors import MismatchError, NonFiniteError
from hub_magmax.merging.execution import merge
from hub_magmax.merging.in_memory import InMemoryMerger
from hub_magmax.pipeline import lock, plan
from hub_magmax.planning.fitting.globs import settling_globs
from hub_magmax.planning.statistics import kind_of, shares_of
from hub_magmax.planning.summary import describe, explain, notices
from hub_magmax.recipe.loading import load_recipe
from hub_magmax.recipe.matching import locked_method
from tests.families import write_checkpoint, write_recipe
from tests.test_cli import call
from tests.test_in_memory import same
from tests.test_merging import METHODS

NAMES = ("a", "b", "c")
PREFERENCE = {"weights": {"a": 0.5, "b": 0.25, "c": 0.25}}
COUNTER = "bn.num_batches_tracked"


def info(name, dtype="F32", shape=(4,)):
    return TensorInfo(name, dtype, shape, "model.safetensors", 0, 0)


def write_norms(folder, *, extra=None):
    """Write a family with batch norm, whose variances are smaller in the tasks, and its counters."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(6, 4, generator=generator)
    family = {}
    for number, name in enumerate(("base", *NAMES)):
        family[name] = {
            "bn.num_batches_tracked": torch.tensor(100 * number),
            "bn.running_mean": torch.full((6,), float(number)),
            "bn.running_var": torch.full((6,), 1.0 if name == "base" else 0.1 * number),
            "bn.weight": torch.ones(6) + 0.01 * number,
            "conv.weight": weights + 0.01 * torch.randn(6, 4, generator=generator) * number,
        } | (extra or {}).get(name, {})
        write_checkpoint(folder / name, family[name])
    return family


def run(folder, **changes):
    """Merge, and return the plan and the tensors."""
    changes = {"preference": PREFERENCE, "output": {"path": "out"}, **changes}
    recipe = load_recipe(write_recipe(folder, **changes))
    made = plan(recipe, lock(recipe))
    merge(made, chunk_elements=4)
    return made, load_file(folder / "out" / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "kind"),
    [
        ("bn1.running_mean", "F32", (64,), "running means"),
        ("running_var", "BF16", (64,), "running variances"),
        ("bn/moving_variance", "F32", (64,), None),
        ("layers.0.bn.moving_variance", "F32", (64,), "running variances"),
        ("bn1.num_batches_tracked", "I64", (), "counters"),
        ("bn1.num_batches_tracked", "F32", (), "counters"),
        ("n_averaged", "I64", (), "counters"),
        ("model_ema.num_updates", "I32", (), "counters"),
        ("global_step", "I64", (1,), "counters"),
        ("step.weight", "F32", (4, 4), None),
        ("num_experts_map", "I64", (8,), None),
        ("conv.weight_fake_quant.scale", "F32", (1,), "ranges of observers"),
        ("conv.weight_fake_quant.zero_point", "I32", (1,), "ranges of observers"),
        ("act.activation_post_process.min_val", "F32", (), "ranges of observers"),
        ("layer_scale.scale", "F32", (8,), None),
        ("embeddings.position_ids", "I64", (1, 512), "positions"),
        ("layers.0.attn.relative_position_index", "I64", (49, 49), "positions"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", "F32", (64,), "frequencies"),
        ("h.0.attn.bias", "U8", (1, 1, 64, 64), "masks"),
        ("h.0.attn.bias", "F32", (1, 1, 64, 64), "masks"),
        ("h.0.attn.masked_bias", "F32", (), "masks"),
        ("layers.0.attention.bias", "BOOL", (1, 1, 32, 32), "masks"),
        ("h.0.attn.bias", "F32", (64,), None),
        ("pool.attn.bias", "F32", (1,), None),
        ("h.0.attn.bias", "F32", (8, 64, 64), None),
        ("layers.0.blocks.1.attn_mask", "F32", (4, 49, 49), "masks"),
        ("model.norm.weight", "F32", (8,), None),
        ("logit_scale", "F32", (), None),
    ],
)
def test_what_is_no_weight_is_known_by_name_dtype_and_shape(name, dtype, shape, kind):
    found = kind_of(info(name, dtype, shape))
    assert (found and found.name) == kind


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("scaling", [-1.0, 0.0, 0.3, 7.0])
def test_statistics_stay_between_the_checkpoints(tmp_path, method, scaling):
    family = write_norms(tmp_path)
    written = {"name": method} if isinstance(method, str) else method
    made, found = run(tmp_path, method={**written, "scaling": scaling})
    for name in ("bn.running_mean", "bn.running_var"):
        stacked = torch.stack([tensors[name] for tensors in family.values()])
        assert (found[name] >= stacked.amin(0)).all() and (found[name] <= stacked.amax(0)).all()
    assert (found["bn.running_var"] > 0).all()
    assert found[COUNTER] == 0
    locked = made.lock
    with InMemoryMerger(made.recipe, locked) as merger:
        again = merger.merge(locked_method(made.recipe.method), locked.weights).weights(scaling)
    assert same(again, found)


@pytest.mark.parametrize(
    ("method", "scaling", "expected"),
    [
        ("average", 1.0, 0.175),
        ("task_arithmetic", 0.3, 0.175),
        ("task_arithmetic", -1.0, 1.0),
        ("ties", 0.0, 1.0),
        ("magmax", 0.5, 0.2),  # ignores the preference
        ("single_task", 1.0, 0.1),
        ("last_task", 1.0, 0.3),
    ],
)
def test_a_variance_is_the_mean_of_the_tasks_that_are_added(tmp_path, method, scaling, expected):
    write_norms(tmp_path)
    _, found = run(tmp_path, method={"name": method, "scaling": scaling})
    assert found["bn.running_var"].tolist() == pytest.approx([expected] * 6, rel=1e-6)


def test_one_preferred_task_gives_its_own_statistics_to_the_bit(tmp_path):
    family = write_norms(tmp_path)
    _, found = run(tmp_path, method="average", preference={"weights": {"b": 1}})
    for name in ("bn.running_mean", "bn.running_var"):
        assert found[name].equal(family["b"][name])


def test_shares_are_of_the_tasks_that_are_added():
    method = {"name": "task_arithmetic", "scaling": 1.0}
    assert shares_of(method, (0.5, 0.5), 2.0) == (0.0, 0.5, 0.5)
    assert shares_of(method, (0.5, 0.5), -2.0) == (1.0, 0.0, 0.0)
    assert shares_of(method, (3.0, -1.0), 1.0) == (0.0, 1.0, 0.0)
    assert shares_of(method, (3.0, -1.0), -1.0) == (0.0, 0.0, 1.0)


def test_statistics_are_no_part_of_a_survey_of_the_model(tmp_path):
    write_norms(tmp_path)
    _, found = run(tmp_path, method={"name": "ties", "density": 0.3, "scope": "model"})
    for name in ("base", *NAMES):
        tensors = load_file(tmp_path / name / "model.safetensors")
        kept = {key: value for key, value in tensors.items() if "weight" in key}
        write_checkpoint(tmp_path / name, kept)
    (tmp_path / "out").rename(tmp_path / "before")
    _, alone = run(tmp_path, method={"name": "ties", "density": 0.3, "scope": "model"})
    assert all(found[name].equal(alone[name]) for name in alone)


def test_what_is_done_is_said_by_plan_run_and_card(tmp_path):
    write_norms(tmp_path)
    recipe = write_recipe(tmp_path, preference=PREFERENCE, method="average", output={"path": "out"})
    code, out, err = call("run", recipe)
    assert code == 0, err
    said = ["running means (1: 'bn.running_mean') are means over the tasks", "counters (1: 'bn.num_batches"]
    card = (tmp_path / "out" / "README.md").read_text()
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    for text in said:
        assert text in out
        assert text.split("(")[0] in card
        assert any(text in notice for notice in report["notices"])
    made = plan(load_recipe(recipe))
    assert {job.name: job.source for job in made.jobs if not job.merged} == {
        COUNTER: "base_model", "bn.running_mean": "mean of the tasks", "bn.running_var": "mean of the tasks",
    }  # fmt: skip
    assert "1 from mean of the tasks: running variances, which are no weights" in explain(made)
    assert describe(made)["tensors_copied"] == 3


@pytest.mark.parametrize("lacks", ["base", "b"])
def test_positions_that_one_checkpoint_lacks_are_said(tmp_path, lacks):
    positions = {"embeddings.position_ids": torch.arange(9)[None]}
    write_norms(tmp_path, extra={name: positions for name in ("base", *NAMES) if name != lacks})
    made, found = run(tmp_path, method="average")
    if lacks == "base":
        assert "embeddings.position_ids" not in found
        assert "left out, as the base model lacks them: 'embeddings.position_ids'" in notices(made)
    else:
        assert found["embeddings.position_ids"].equal(positions["embeddings.position_ids"])
        text = "missing in b and copied from the base model: 'embeddings.position_ids'"
        assert text in notices(made)
    with InMemoryMerger(made.recipe, made.lock) as merger:
        assert same(merger.merge(made.lock.method, made.lock.weights).weights(1.0), found)


def test_buffers_of_the_code_are_the_base_models(tmp_path):
    extra = {
        name: {
            "h.0.attn.bias": torch.ones(1, 1, 5, 5).tril(),
            "h.0.attn.masked_bias": torch.tensor(-1e4 - number),
            "rotary_emb.inv_freq": torch.arange(4) + 1.0 + number,
            "q.activation_post_process.min_val": torch.tensor(math.inf if name == "base" else -1.0),
            "q.activation_post_process.max_val": torch.tensor(-math.inf if name == "base" else 1.0),
        }
        for number, name in enumerate(("base", *NAMES))
    }
    write_norms(tmp_path, extra=extra)
    made, found = run(tmp_path, method="task_arithmetic")
    assert all(found[name].equal(value) for name, value in extra["base"].items())
    assert any(text.startswith("ranges of observers (2:") for text in notices(made))


def test_statistics_that_are_not_finite_are_refused_with_their_place(tmp_path):
    write_norms(tmp_path, extra={"b": {"bn.running_var": torch.tensor([1.0, math.nan] * 3)}})
    with pytest.raises(NonFiniteError, match=r"element 1 is nan") as caught:
        run(tmp_path, method="average")
    assert "bn.running_var" in str(caught.value)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_a_cast_model_has_cast_statistics(tmp_path, dtype):
    write_norms(tmp_path)
    _, found = run(tmp_path, method="average", output={"path": "out", "dtype": dtype})
    assert found["bn.running_var"].dtype == getattr(torch, dtype)
    assert found[COUNTER].dtype == torch.int64


def test_other_integers_that_differ_are_told_together_and_the_advice_settles_them(tmp_path):
    extra = {
        name: {f"layers.{i}.route.table": torch.arange(5) + (number if i else 0) for i in range(4)}
        | {"permutation": torch.arange(3) + number}
        for number, name in enumerate(("base", *NAMES))
    }
    write_norms(tmp_path, extra=extra)
    with pytest.raises(MismatchError) as caught:
        plan(load_recipe(write_recipe(tmp_path, preference=PREFERENCE, method="average")))
    assert "layers.1.route.table" in str(caught.value) and "permutation" in str(caught.value)
    rules = yaml.safe_load("tensors: " + str(caught.value.hint).split("tensors: ")[1].rstrip("."))["tensors"]
    _, found = run(tmp_path, method="average", tensors=rules)
    assert all(found[name].equal(value) for name, value in extra["base"].items())


def test_globs_match_the_group_and_nothing_else():
    every = ["l.0.a", "l.1.a", "l.2.a", "l.0.b", "m[0]", "m0"]
    assert settling_globs(["l.0.a", "l.1.a", "l.2.a"], every) == ["l.*.a"]
    assert settling_globs(["l.0.a", "l.1.a"], every) == ["l.0.a", "l.1.a"]
    assert settling_globs(["m[0]"], every) == ["m[[]0]"]


@pytest.mark.parametrize(
    ("name", "is_statistic"),
    [
        ("normalize_inputs.buffer_observation_state.std", True),
        ("unnormalize_outputs.buffer_action.min", True),
        ("obs_rms.var", True),
        ("normalizer.sigma", True),
        ("quantizer.layers.0.codebook.cluster_usage", True),
        ("vq._codebook.embed_avg", True),
        ("head.mean", False),
        ("norm.weight", False),
        ("quantizer.codebook.embed", False),
    ],
)
def test_statistics_of_data_and_codebooks_stay_between_those_of_the_tasks(tmp_path, name, is_statistic):
    values = {"base": 1.0, "a": 0.2, "b": 0.3, "c": 0.4}
    extra = {task: {name: torch.full((4,), value)} for task, value in values.items()}
    write_norms(tmp_path, extra=extra)
    made, found = run(tmp_path, method={"name": "task_arithmetic", "scaling": 3.0})
    assert (abs(found[name][0] - 0.275) < 1e-6) == is_statistic
    assert any(f"statistics (1: {name!r}) are means" in note for note in notices(made)) == is_statistic
