"""Adapters of a bound rank from whole checkpoints, and by methods that are not linear."""

import json
import re

import pytest
import torch
import yaml

from benchmarks.tiny_models import ARCHITECTURES
from hub_magmax.checkpoints.index import ADAPTER_CONFIG_NAME
from hub_magmax.errors import RecipeError
from hub_magmax.merging.execution import merge
from hub_magmax.merging.output.report import read_report
from hub_magmax.pipeline import plan
from hub_magmax.planning.budget import peak_memory_bytes
from tests.families import read_merged, write_checkpoint
from tests.test_adapting import FAMILIES, applied, merged_adapter, recipe_of, write_tasks
from tests.test_checkpoints_adapter import write_base

RANK = 3


def proposed_rules(recipe):
    """Return the rules that a refusal proposes."""
    with pytest.raises(RecipeError) as caught:
        plan(recipe)
    return yaml.safe_load(re.search(r"tensors: (\[.*?\])\.", caught.value.hint)[1])


def write_fine_tuned(folder, architecture):
    """Write a base model and one that differs from it in every element; return its class."""
    model = ARCHITECTURES[architecture].build(0)
    model.save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / "a")
    return type(model)


def cut(vector, rank):
    """Return the best approximation of a matrix, or of a convolution as one."""
    left, strengths, right = torch.linalg.svd(vector.flatten(1).double(), full_matrices=False)
    return ((left[:, :rank] * strengths[:rank]) @ right[:rank]).view(vector.shape).float()


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2", "vit", "t5", "clip"])
@pytest.mark.filterwarnings("ignore")
def test_adapter_loads_in_peft_and_computes_base_plus_low_rank_vector(tmp_path, architecture):
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    model_class = write_fine_tuned(tmp_path, architecture)
    rules = proposed_rules(recipe_of(tmp_path, "a", output={"rank": RANK}))
    folder = merged_adapter(tmp_path, "a", output={"rank": RANK}, tensors=rules)
    base, tuned = (model_class.from_pretrained(tmp_path / name) for name in ("base", "a"))
    layers = json.loads((folder / ADAPTER_CONFIG_NAME).read_text())["target_modules"]
    expected = model_class.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name in layers:
            weight = expected.get_submodule(name).weight
            weight.add_(cut(tuned.get_submodule(name).weight - weight, RANK))
        loaded = peft.PeftModel.from_pretrained(base, folder).eval()
        inputs = ARCHITECTURES[architecture].inputs()
        found, wanted = (model.eval()(**inputs) for model in (loaded, expected))
    named = {name for name, module in loaded.named_modules() if hasattr(module, "lora_A")}
    assert len(named) == len(layers) > 0
    for first, second in zip(found.to_tuple(), wanted.to_tuple(), strict=True):
        if isinstance(first, torch.Tensor):
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


RULES = [{"match": "shared.weight", "take": "base_model"}, {"match": "final.bias", "take": "base_model"}]
ELEMENTWISE = [
    "ties",
    "dare",
    {"name": "tunable_magmax", "selection": "top-n"},
    {"name": "slerp"},
    {"name": "average", "scaling": 0.5},
]


def write_checkpoints(folder, names="ab"):
    """Write a base model, and whole checkpoints that differ from it; return the base model's tensors."""
    base, _ = write_base(folder / "base", FAMILIES["t5"][0])
    for seed, name in enumerate(names):
        generator = torch.Generator().manual_seed(seed)
        moved = {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in base.items()}
        write_checkpoint(folder / name, moved)
    return base


def assert_nearest(folder, base, whole, rank):
    """Compare an adapter, and what its report says, with what whole weights add to the base model."""
    found = applied(folder, base)
    told = {part.layer: part for part in read_report(folder / "merge_report.json").lost}
    assert told
    for layer, part in told.items():
        vector = whole[f"{layer}.weight"] - base[f"{layer}.weight"]
        expected = base[f"{layer}.weight"] + cut(vector, rank)
        torch.testing.assert_close(found[f"{layer}.weight"], expected, rtol=1e-4, atol=1e-4)
        lost = float((vector - cut(vector, rank)).norm())
        assert (part.norm, part.lost) == pytest.approx((float(vector.norm()), lost), rel=1e-3)
    assert all(found[name].equal(base[name]) for name in base if name.removesuffix(".weight") not in told)
    return told


@pytest.mark.parametrize("method", ELEMENTWISE, ids=str)
def test_every_method_gives_the_product_nearest_to_its_whole_weights(tmp_path, method):
    base = write_checkpoints(tmp_path)
    changes = {"method": method, "tensors": RULES}
    folder = merged_adapter(tmp_path, "ab", output={"rank": RANK}, **changes)
    weights = {"format": "weights", "path": "whole"}
    whole = read_merged(merged_adapter(tmp_path, "ab", output=weights, **changes))
    assert len(assert_nearest(folder, base, whole, RANK)) == len(FAMILIES["t5"][0])


@pytest.mark.parametrize("method", ["ties", "magmax"])
def test_layers_that_no_adapter_changes_are_not_in_the_adapter(tmp_path, method):
    base, _ = write_tasks(tmp_path)
    folder = merged_adapter(tmp_path, method=method, output={"rank": RANK})
    weights = {"format": "weights", "path": "whole"}
    whole = read_merged(merged_adapter(tmp_path, method=method, output=weights))
    told = assert_nearest(folder, base, whole, RANK)
    assert {layer.rpartition(".")[2] for layer in told} == {"q", "v"}


def test_full_rank_loses_nothing(tmp_path):
    base = write_checkpoints(tmp_path, "a")
    folder = merged_adapter(tmp_path, "a", tensors=RULES, output={"rank": 99})
    found = applied(folder, base)
    report = read_report(folder / "merge_report.json")
    assert report.relative_loss == 0 and json.loads((folder / ADAPTER_CONFIG_NAME).read_text())["r"] == 24
    for layer in (part.layer for part in report.lost):
        torch.testing.assert_close(
            found[f"{layer}.weight"], read_merged(tmp_path / "a")[f"{layer}.weight"], rtol=0, atol=1e-5
        )


def test_what_is_no_matrix_of_a_layer_is_refused_with_the_rules_that_leave_it(tmp_path):
    write_checkpoints(tmp_path, "a")
    recipe = recipe_of(tmp_path, "a", output={"rank": RANK})
    with pytest.raises(RecipeError, match=r"no matrix .*: 2 tensors, such as 'final.bias'"):
        plan(recipe)
    assert proposed_rules(recipe) == RULES[::-1]


def test_a_checkpoint_without_a_rank_makes_no_adapter(tmp_path):
    write_checkpoints(tmp_path, "a")
    with pytest.raises(RecipeError, match="a is a whole checkpoint") as caught:
        plan(recipe_of(tmp_path, "a"))
    assert "output.rank: 16" in caught.value.hint


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        (
            {"match": "encoder.*", "take": "a"},
            "takes 'encoder.block.0.layer.0.SelfAttention.k.weight' from a task",
        ),
        ({"match": "encoder.*", "take": "nothing"}, "or leaves it out"),
    ],
)
def test_rules_that_an_adapter_cannot_follow_are_refused(tmp_path, rule, told):
    write_checkpoints(tmp_path, "a")
    with pytest.raises(RecipeError, match=told):
        plan(recipe_of(tmp_path, "a", output={"rank": RANK}, tensors=[rule, *RULES]))


def test_a_method_that_looks_at_the_whole_model_is_refused(tmp_path):
    write_checkpoints(tmp_path)
    method = {"name": "ties", "scope": "model"}
    with pytest.raises(RecipeError, match="looks at the whole model"):
        plan(recipe_of(tmp_path, "ab", method=method, output={"rank": RANK}, tensors=RULES))


def test_chunks_and_threads_change_no_byte(tmp_path, monkeypatch):
    write_checkpoints(tmp_path)
    found = []
    for threads, chunk in ((1, None), (2, 100), (2, 333)):
        monkeypatch.setattr("hub_magmax.planning.budget.num_threads", lambda threads=threads: threads)
        recipe = recipe_of(tmp_path, "ab", method="ties", output={"rank": RANK}, tensors=RULES)
        found.append(merge(plan(recipe), tmp_path / f"out{chunk}", chunk_elements=chunk).shards)
    assert found[0] == found[1] == found[2]


def test_memory_that_the_plan_states_holds_the_largest_matrix(tmp_path):
    sides = (1500, 2000)
    for name in ("base", "a"):
        write_checkpoint(tmp_path / name, {"x.q.weight": torch.full(sides, 1.0 + 0.5 * (name == "a"))})
    planned = plan(recipe_of(tmp_path, "a", output={"rank": RANK}))
    assert peak_memory_bytes(planned) > 28 * sides[0] * sides[1]
    report = merge(planned)
    assert report.relative_loss == 0  # equal elements are one direction
