"""Methods of whole matrices on adapters: by their factors, against the same on whole task vectors."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from hub_magmax.checkpoints.adapters.adapter import AdapterSource
from hub_magmax.checkpoints.index import ADAPTER_CONFIG_NAME, ADAPTER_NAME
from hub_magmax.errors import ArgumentError, RecipeError
from hub_magmax.fleet.rebuilding import rebuild
from hub_magmax.merging.execution import merge
from hub_magmax.merging.output.report import read_report
from hub_magmax.methods import get_method, merge_method
from hub_magmax.methods.factors import Factors, in_coordinates
from hub_magmax.methods.registry import preferred
from hub_magmax.pipeline import lock, plan
from hub_magmax.planning.summary import explain
from hub_magmax.recipe.matching import changed_keys
from hub_magmax.registry import METHODS as REGISTRY
from tests.families import read_merged, write_checkpoint
from tests.test_adapting import applied, merged_adapter, read_back, recipe_of, write_tasks
from tests.test_matrix_methods import METHODS, ONCE, RETURNING, normal, one_hot, preferences

EVERY = [pytest.param(name, options, id=f"{name} {options}") for name, options, _ in METHODS]
every_method = pytest.mark.parametrize(("name", "options"), EVERY)


def products(*ranks: int, rows: int = 20, columns: int = 30, seed: int = 0) -> list[Factors]:
    sides = ((rows, rank, columns) for rank in ranks)
    return [
        Factors(normal(1, r, k, seed=seed + number)[0], normal(1, k, c, seed=seed + 100 + number)[0])
        for number, (r, k, c) in enumerate(sides)
    ]


def sharing_inputs() -> list[Factors]:
    """Adapters that were trained with one frozen A."""
    first, second, third = products(3, 3, 3)
    return [first, Factors(second.left, first.right), Factors(third.left, first.right)]


#: Factors of the tasks of one matrix.
CASES = {
    "ranks": products(4, 4, 4),
    "ranks apart": products(1, 6, 2),
    "tall": products(3, 3, 3, rows=40, columns=12),
    "more ranks than columns": products(5, 5, 5, columns=12),
    "one A": sharing_inputs(),
    "one task has none": products(4, 0, 4),
    "scales apart": [
        Factors(one.left * s, one.right) for one, s in zip(products(3, 3, 3), (0.1, 1, 9), strict=True)
    ],
}


def call(name, options, vectors, weights, sides):
    """Return what a method's function gives for the tasks with a weight."""
    tasks = [task for task, weight in enumerate(weights) if weight]
    numbers = tuple(weights[task] for task in tasks)
    supplied = {"preference": numbers, "multipliers": tuple(len(weights) * number for number in numbers)}
    method = get_method(name)
    given = {key: value for key, value in supplied.items() if key in method.supplied}
    return method.function(vectors[tasks], sides=sides, **given, **options)


@every_method
@pytest.mark.parametrize("case", CASES)
def test_coordinates_of_factors_give_what_whole_matrices_give(case, name, options):
    factors = CASES[case]
    found = in_coordinates(factors)
    whole = found.left @ found.small.double() @ found.right.T
    for one, vector in zip(factors, whole, strict=True):
        torch.testing.assert_close(vector, one.left.double() @ one.right.double(), rtol=0, atol=1e-5)
    assert max(found.small.shape[1:]) <= max(12, sum(one.left.shape[1] for one in factors))
    for weights in [*preferences(3), one_hot(2, 3)]:
        sides = tuple(whole.shape[1:])
        expected = call(name, options, whole, weights, sides).double()
        small = call(name, options, found.small, weights, sides).double()
        merged = found.left @ small @ found.right.T
        torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_coordinates_by_hand():
    first = Factors(torch.tensor([[3.0], [0], [4]]), torch.tensor([[0.0, 2]]))
    second = Factors(torch.tensor([[0.0], [1], [0]]), torch.tensor([[0.0, 1]]))
    found = in_coordinates([first, second])
    # Rows (3, 0, 4) / 5 and (0, 1, 0), and the second column alone: ten of the first, one of the second.
    assert found.small.abs()[:, :, 0].tolist() == [[10.0, 0.0], [0.0, 1.0]]
    torch.testing.assert_close(found.left.abs(), torch.tensor([[0.6, 0], [0, 1], [0.8, 0]]).double())


def whole_weights(folder, to, method, **changes):
    return merged_adapter(folder, method=method, output={"format": "weights", "path": to}, **changes)


def without_factors(monkeypatch):
    monkeypatch.setattr(AdapterSource, "factors", lambda self, name, base: None)


@pytest.mark.parametrize(("name", "options"), ONCE, ids=str)
@pytest.mark.parametrize(("family", "adapters"), [("t5", "each"), ("clip", "sequence")])
def test_whole_weights_agree_with_those_of_whole_task_vectors(
    tmp_path, monkeypatch, family, adapters, name, options
):
    base, _ = write_tasks(tmp_path, family)
    preference = {"weights": {"a": 0.5, "b": 0.3, "c": 0.2}}
    changes = {"method": {"name": name, **options}, "adapters": adapters, "preference": preference}
    found = read_merged(whole_weights(tmp_path, "found", **changes))
    without_factors(monkeypatch)
    expected = read_merged(whole_weights(tmp_path, "expected", **changes))
    for tensor, values in expected.items():
        size = float((values - base[tensor]).abs().max())
        torch.testing.assert_close(found[tensor], values, rtol=0, atol=1e-5 * size + 1e-7)
    assert any(not found[tensor].equal(base[tensor]) for tensor in base)


@pytest.mark.parametrize("name", sorted(RETURNING))
def test_all_preference_on_one_adapter_adds_it_bit_for_bit(tmp_path, name):
    write_tasks(tmp_path)
    changes = {"preference": {"weights": {"b": 1.0}}}
    found = whole_weights(tmp_path, "found", name, **changes)
    expected = read_merged(whole_weights(tmp_path, "expected", "average", **changes))
    assert all(values.equal(expected[tensor]) for tensor, values in read_merged(found).items())


def test_a_whole_checkpoint_among_the_tasks_is_merged_by_whole_vectors(tmp_path, monkeypatch):
    base, _ = write_tasks(tmp_path, names="ab")
    write_checkpoint(tmp_path / "c", {name: values + 0.1 for name, values in base.items()})
    found = whole_weights(tmp_path, "found", "tsv")
    without_factors(monkeypatch)
    assert read_sums(found) == read_sums(whole_weights(tmp_path, "expected", "tsv"))


def read_sums(folder):
    return {shard["sha256"] for shard in json.loads((folder / "merge_report.json").read_text())["shards"]}


def test_chunks_and_threads_change_no_byte(tmp_path, monkeypatch):
    write_tasks(tmp_path)
    shards = []
    for number, (threads, chunk) in enumerate([(1, None), (2, 100), (2, 1000)]):
        monkeypatch.setattr("hub_magmax.planning.budget.num_threads", lambda threads=threads: threads)
        recipe = recipe_of(tmp_path, method="wudi", output={"format": "weights", "path": f"out{number}"})
        shards.append(merge(plan(recipe), chunk_elements=chunk).shards)
    assert shards[0] == shards[1] == shards[2]


def test_sides_are_for_methods_of_matrices_alone():
    with pytest.raises(ArgumentError, match="sides is for the form matrix, not for 'tensor'"):

        @merge_method("sided", source="a test")
        def sided(task_vectors, *, sides):
            return task_vectors[0]


def test_sides_and_statistics_of_inputs_exclude_each_other():
    with pytest.raises(ArgumentError, match="gram and sides cannot both be asked for"):

        @merge_method("both", source="a test", form="matrix")
        def both(task_vectors, *, sides, gram):
            return task_vectors[0]


def test_a_plug_in_gets_what_it_declares_whether_weights_or_an_adapter_are_written(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setitem(vars(REGISTRY), "registered", {})

    @merge_method("declaring", source="a test", form="matrix", uses=preferred)
    def declaring(task_vectors, *, preference, multipliers, generator, shape, sides, times: float = 2.0):
        seen.setdefault(generator.name, []).append((preference, multipliers, shape, sides, times))
        return task_vectors.sum(0) * times

    write_tasks(tmp_path)
    method = {"name": "declaring", "times": 3.0}
    changes = {"method": method, "preference": {"weights": {"a": 0.75, "c": 0.25}}}
    whole_weights(tmp_path, "whole", **changes)
    merged_adapter(tmp_path, **changes)
    assert seen
    for calls in seen.values():
        of_weights, of_adapter = calls
        assert of_weights == of_adapter
        assert of_adapter[:2] == ((0.75, 0.25), (2.25, 0.75))


@pytest.mark.parametrize("adapters", ["each", "sequence"])
@pytest.mark.parametrize("uses", [None, lambda preference: (2,)], ids=["all tasks", "one without weight"])
def test_tasks_that_a_plug_in_uses_count_for_an_adapter_whatever_their_weight(
    tmp_path, monkeypatch, uses, adapters
):
    monkeypatch.setitem(vars(REGISTRY), "registered", {})

    @merge_method("adding", source="a test", form="matrix", uses=uses)
    def adding(task_vectors, *, sides):
        return task_vectors.sum(0)

    base, _ = write_tasks(tmp_path)
    changes = {"method": "adding", "adapters": adapters, "preference": {"weights": {"a": 0.5, "b": 0.5}}}
    found = applied(merged_adapter(tmp_path, **changes), base)
    for tensor, values in read_merged(whole_weights(tmp_path, "whole", **changes)).items():
        torch.testing.assert_close(found[tensor], values, rtol=1e-5, atol=1e-5)


def test_a_plug_in_that_uses_no_task_gives_no_adapter(tmp_path, monkeypatch):
    monkeypatch.setitem(vars(REGISTRY), "registered", {})

    @merge_method("idle", source="a test", form="matrix", uses=lambda preference: ())
    def idle(task_vectors, *, sides):
        return task_vectors.sum(0)

    write_tasks(tmp_path)
    with pytest.raises(RecipeError, match="no layer is left to be adapted"):
        merged_adapter(tmp_path, method="idle")


def report_of(folder):
    return json.loads((folder / "merge_report.json").read_text())


@pytest.mark.parametrize(("name", "options"), ONCE, ids=str)
@pytest.mark.parametrize(("family", "adapters"), [("llama", "each"), ("t5", "sequence")])
def test_adapter_is_what_the_whole_weights_of_the_same_recipe_add(tmp_path, family, adapters, name, options):
    base, _ = write_tasks(tmp_path, family)
    preference = {"weights": {"a": 0.5, "b": 0.3, "c": 0.2}}
    method = {"name": name, **options, "scaling": 0.7}
    changes = {"adapters": adapters, "preference": preference}
    found = applied(merged_adapter(tmp_path, method=method, **changes), base)
    expected = read_merged(whole_weights(tmp_path, "whole", method, **changes))
    for tensor, values in expected.items():
        size = float((values - base[tensor]).abs().max())
        torch.testing.assert_close(found[tensor], values, rtol=0, atol=1e-5 * size + 1e-7)


def test_a_method_of_matrices_averages_an_embedding_beside_each_other(tmp_path):
    base = {"embed_tokens.weight": torch.randn(30, 8), "attn.weight": torch.randn(8, 24)}
    write_checkpoint(tmp_path / "base", base)
    for seed, name in enumerate("abc"):
        embedding = {"lora_embedding_A": (2, 30), "lora_embedding_B": (8, 2)}
        layer = {"lora_A.weight": (2, 8), "lora_B.weight": (24, 2)}  # of a transposed layer
        stored = {f"base_model.model.embed_tokens.{k}": normal(*s, seed=seed) for k, s in embedding.items()}
        stored |= {f"base_model.model.attn.{k}": normal(*s, seed=seed) for k, s in layer.items()}
        (tmp_path / name).mkdir()
        save_file(stored, tmp_path / name / ADAPTER_NAME)
        config = {"r": 2, "lora_alpha": 2, "fan_in_fan_out": True}
        (tmp_path / name / ADAPTER_CONFIG_NAME).write_text(json.dumps(config))
    found = read_back(merged_adapter(tmp_path, method="wudi"), tmp_path / "base")
    expected = read_merged(whole_weights(tmp_path, "whole", "wudi"))
    averaged = read_merged(whole_weights(tmp_path, "averaged", "average"))
    for tensor, values in expected.items():
        torch.testing.assert_close(found[tensor], values, rtol=0, atol=1e-5)
    assert averaged["embed_tokens.weight"].equal(expected["embed_tokens.weight"])
    assert not averaged["attn.weight"].equal(expected["attn.weight"])


@pytest.mark.parametrize("method", ["average", "tsv"])
def test_rank_keeps_the_strongest_directions_of_what_is_merged(tmp_path, method):
    base, _ = write_tasks(tmp_path)
    weights = {"weights": {"a": 0.5, "b": 0.3, "c": 0.2}}
    changes = {"method": {"name": method, "scaling": 0.7}, "preference": weights}
    folder = merged_adapter(tmp_path, output={"rank": 5}, **changes)
    found = applied(folder, base)
    whole = applied(merged_adapter(tmp_path, output={"path": "whole"}, **changes), base)
    report, lost, norms = report_of(folder), [], []
    told = {part["layer"]: part for shard in report["shards"] for part in shard["lost"]}
    for tensor, values in whole.items():
        vector = (values - base[tensor]).double()
        if not vector.any():
            continue
        strengths = torch.linalg.svdvals(vector)
        kept = torch.linalg.svdvals((found[tensor] - base[tensor]).double())
        torch.testing.assert_close(kept[:5], strengths[:5], rtol=1e-4, atol=1e-6)
        difference = float((values - found[tensor]).double().norm())
        assert difference == pytest.approx(float(strengths[5:].norm()), rel=1e-4)
        lost.append(difference)
        norms.append(float(vector.norm()))
        part = told[tensor.removesuffix(".weight")]
        assert (part["norm"], part["lost"]) == pytest.approx((norms[-1], difference), rel=1e-4)
    assert len(told) == len(lost)
    relative = read_report(folder / "merge_report.json").relative_loss
    assert relative == pytest.approx(math.hypot(*lost) / math.hypot(*norms), rel=1e-4)


def test_rank_by_hand(tmp_path):
    write_checkpoint(tmp_path / "base", {"x.q.weight": torch.zeros(2, 2)})
    for name, row in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        unit = torch.eye(2)[row : row + 1]
        stored = {"A": unit * (6.0 if name == "a" else 8.0), "B": unit.T.contiguous()}
        stored = {f"base_model.model.x.q.lora_{side}.weight": tensor for side, tensor in stored.items()}
        save_file(stored, tmp_path / name / ADAPTER_NAME)
        (tmp_path / name / ADAPTER_CONFIG_NAME).write_text(json.dumps({"r": 1, "lora_alpha": 1}))
    # The average is diag(3, 4): of its norm of 5, the direction with 4 stays and 3 is lost.
    folder = merged_adapter(tmp_path, "ab", output={"rank": 1})
    found = load_file(folder / ADAPTER_NAME)
    product = found["base_model.model.x.q.lora_B.weight"] @ found["base_model.model.x.q.lora_A.weight"]
    torch.testing.assert_close(product, torch.diag(torch.tensor([0.0, 4.0])))
    (part,) = report_of(folder)["shards"][0]["lost"]
    assert (part["norm"], part["lost"]) == pytest.approx((5.0, 3.0))
    assert read_report(folder / "merge_report.json").relative_loss == pytest.approx(0.6)
    text = explain(plan(recipe_of(tmp_path, "ab", output={"rank": 1})))
    assert "to be seen in 1 layer, whose rank is bounded" in text


def test_a_lock_from_before_a_rank_was_bounded_is_another_one(tmp_path):
    """It promises the same bytes on every machine."""
    write_tasks(tmp_path)
    bounded = recipe_of(tmp_path, output={"rank": 3})
    assert changed_keys(bounded, lock(recipe_of(tmp_path))) == ["output.rank"]
    assert changed_keys(recipe_of(tmp_path, output={"rank": 4}), lock(bounded)) == []


def test_rank_that_holds_all_changes_no_byte(tmp_path):
    write_tasks(tmp_path)
    bounded = merged_adapter(tmp_path, output={"rank": 12})
    assert "lost" not in report_of(bounded)["shards"][0]
    plain = merged_adapter(tmp_path, output={"path": "plain"})
    found, expected = (load_file(folder / ADAPTER_NAME) for folder in (bounded, plain))
    assert all(values.equal(expected[name]) for name, values in found.items())


def test_an_adapter_of_bound_rank_is_rebuilt_within_a_last_bit(tmp_path):
    write_tasks(tmp_path)
    folder = merged_adapter(tmp_path, output={"rank": 3})
    assert json.loads((folder / "recipe.lock.json").read_text())["is_portable"] is False
    rebuild(str(folder), folder=tmp_path)


def test_threads_change_no_byte_of_a_solved_adapter(tmp_path, monkeypatch):
    write_tasks(tmp_path)
    found = []
    for threads in (1, 2):
        monkeypatch.setattr("hub_magmax.planning.budget.num_threads", lambda threads=threads: threads)
        recipe = recipe_of(tmp_path, method="tsv", output={"rank": 4})
        found.append(merge(plan(recipe), tmp_path / str(threads)).shards)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ({"format": "weights", "rank": 4}, "output.rank: whole weights have no rank"),
        ({"rank": 0}, r"output.rank: .*should be at least 1"),
    ],
)
def test_rank_that_cannot_be_is_refused(tmp_path, output, told):
    with pytest.raises(RecipeError, match=told):
        recipe_of(tmp_path, output=output)
