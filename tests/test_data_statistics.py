"""Methods that use statistics of tasks' data: against oracles, by hand, by their properties, and in files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import hub_magmax as hm
from hub_magmax.errors import (
    ArgumentError,
    CheckpointError,
    HubMagmaxError,
    LockError,
    MismatchError,
    NonFiniteError,
    RecipeError,
)
from hub_magmax.fleet.rebuilding import rebuild
from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.merging.execution import merge
from hub_magmax.merging.in_memory import InMemoryMerger
from hub_magmax.merging.tensors import merge_tensors
from hub_magmax.methods import get_method, merge_method
from hub_magmax.methods.chunks import ArrayChunks
from hub_magmax.methods.data_statistics import TensorStatistics
from hub_magmax.pipeline import lock, plan
from hub_magmax.planning.summary import describe, explain
from hub_magmax.recipe.loading import load_recipe, parse_recipe
from hub_magmax.recipe.matching import changed_keys
from tests import oracles_data as oracles
from tests.families import accepted, read_merged, recipe_values, write_checkpoint, write_recipe
from tests.test_matrix_methods import one_hot

#: A model with layers, and what is none.
SHAPES = {"embed.weight": (9, 6), "layer.weight": (8, 6), "layer.bias": (8,), "out.weight": (6, 8)}
METHODS = {"regmean": "gram", "regmean_plusplus": "merged_gram", "fisher": "fisher"}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moments(tasks: int, size: int, rows: int = 40, seed: int = 0) -> Tensor:
    """Second moments of inputs with a mean and scales of their own."""
    inputs = normal(tasks, rows, size, seed=seed) * torch.linspace(0.1, 3, size) + normal(
        tasks, 1, size, seed=seed + 1
    )
    return inputs.transpose(1, 2) @ inputs / rows


def told(values: Tensor, **facts) -> TensorStatistics:
    flat = values.float().contiguous().view(-1).numpy()
    return TensorStatistics(lambda start, stop: flat[start:stop], len(flat), **facts)


def merged(name, vectors, statistics, weights=None, tensor="layer.weight", chunk=1 << 18, **options):
    """Merge one tensor by a method of this table, in memory."""
    tasks = len(vectors)
    method, weights = get_method(name), weights or (1 / tasks,) * tasks
    chunks = ArrayChunks(vectors.contiguous(), chunk)
    rule = method.rule(
        chunks,
        shape=tuple(vectors.shape[1:]),
        preference=weights,
        generator=CounterGenerator(0, tensor),
        options=hm.methods.check_options(method, options),
        statistics=statistics,
    )
    (parts,) = chunks.map(list)
    found = [rule.op(torch.from_numpy(p.task_vectors()), rule.of_chunk(start, p)) for start, p in parts]
    return torch.cat(found).view(vectors.shape[1:])


WEIGHTS = [(1 / 3, 1 / 3, 1 / 3), (0.5, 0.3, 0.2), (0.6, 0.0, 0.4)]


def close(found: Tensor, expected: np.ndarray) -> None:
    size = float(np.abs(expected).max())
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=2e-6 * size)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(
    "options", [{}, {"off_diagonal": 1.0}, {"off_diagonal": 0.0}, {"ridge": 0.01}, {"ridge": 0.0}]
)
@pytest.mark.parametrize("shape", [(8, 6), (6, 6), (5, 12)])
def test_regmean_agrees_with_its_oracle(shape, options, weights):
    base, vectors, gram = normal(*shape, seed=5), normal(3, *shape), moments(3, shape[1])
    found = merged("regmean", vectors, [told(g) for g in gram], weights, **options)
    numbers = {"off_diagonal": 0.9, "ridge": 1e-6, **options}
    expected = oracles.regmean((base + vectors).double().numpy(), gram.double().numpy(), weights, **numbers)
    close(base + found, expected)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("floor", [1e-6, 0.5])
def test_fisher_agrees_with_its_oracle(weights, floor):
    base, vectors = normal(50, seed=5), normal(3, 50)
    information = normal(3, 50, seed=2).square() * torch.tensor([[1e-9], [1.0], [1e6]])
    information[:, 7], information[1, 8] = 0, 0
    scales = information.square().mean(dim=1).sqrt()
    known = [told(f, scale=float(s)) for f, s in zip(information, scales, strict=True)]
    found = merged("fisher", vectors, known, weights, floor=floor)
    divided = (information / scales[:, None]).double().numpy()
    close(base + found, oracles.fisher((base + vectors).double().numpy(), divided, weights, floor))


def test_regmean_by_hand():
    # Inputs 1 and 2 of the tasks are as large as 3 and 1: (3·2 + 1·0) / 4 and (1·0 + 1·4) / 2.
    vectors = torch.tensor([[[2.0, 0.0]], [[0.0, 4.0]]]).expand(2, 2, 2)
    gram = [torch.diag(torch.tensor(d)) for d in ([3.0, 1.0], [1.0, 1.0])]
    found = merged("regmean", vectors, [told(g) for g in gram], ridge=0.0)
    torch.testing.assert_close(found, torch.tensor([[1.5, 2.0]]).expand(2, 2))
    # A weight of a quarter: (0.25·3·2) / (0.25·3 + 0.75·1), and (0.75·1·4) / 1.
    found = merged("regmean", vectors, [told(g) for g in gram], (0.25, 0.75), ridge=0.0)
    torch.testing.assert_close(found, torch.tensor([[1.0, 3.0]]).expand(2, 2))


def test_fisher_by_hand():
    vectors = torch.tensor([[4.0, 4.0, 4.0], [0.0, 8.0, 0.0]])
    known = [told(torch.tensor(f)) for f in ([3.0, 0.0, 0.0], [1.0, 1.0, 0.0])]
    # 3 to 1; nothing to all, where the floor of a half counts; nothing to nothing.
    found = merged("fisher", vectors, known, floor=0.5)
    torch.testing.assert_close(found, torch.tensor([3.0, 20 / 3, 2.0]))


def test_least_squares_change_each_tasks_outputs_least():
    inputs = normal(3, 40, 6, seed=3)
    vectors, gram = normal(3, 8, 6), inputs.transpose(1, 2) @ inputs / 40
    weights = (0.5, 0.3, 0.2)

    def changed(layer: Tensor) -> float:
        return sum(
            w * float((x @ (layer - v).T).square().sum())
            for w, x, v in zip(weights, inputs, vectors, strict=True)
        )

    found = merged("regmean", vectors, [told(g) for g in gram], weights, off_diagonal=1.0, ridge=0.0)
    for seed in range(5):
        assert changed(found + 0.01 * normal(8, 6, seed=seed + 20)) > changed(found)


def statistics_for(name: str, vectors: Tensor) -> list[TensorStatistics]:
    if METHODS[name] != "fisher":
        return [told(g) for g in moments(len(vectors), vectors.shape[2])]
    return [told(normal(*v.shape, seed=i).square()) for i, v in enumerate(vectors)]


@pytest.mark.parametrize("name", METHODS)
def test_all_preference_on_one_task_returns_its_vector_bit_for_bit(name):
    vectors = normal(3, 8, 6) * 1e-3
    for task in range(3):
        found = merged(name, vectors, statistics_for(name, vectors), one_hot(task, 3))
        assert found.equal(vectors[task])


@pytest.mark.parametrize("name", METHODS)
def test_a_task_without_weight_is_as_if_it_were_not_there(name):
    vectors = normal(3, 8, 6)
    known = statistics_for(name, vectors)
    found = merged(name, vectors, known, (0.75, 0.0, 0.25))
    assert found.equal(merged(name, vectors[[0, 2]], [known[0], known[2]], (0.75, 0.25)))
    assert found.equal(merged(name, vectors, [known[0], None, known[2]], (0.75, 0.0, 0.25)))


@pytest.mark.parametrize("name", METHODS)
def test_equal_statistics_give_the_mean(name):
    vectors, weights = normal(3, 8, 6), (0.5, 0.3, 0.2)
    found = merged(name, vectors, statistics_for(name, vectors)[:1] * 3, weights)
    torch.testing.assert_close(
        found, merge_tensors(vectors, method="average", preference=weights), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_tensor_without_statistics_is_averaged(name):
    vectors, weights = normal(3, 8, 6), (0.5, 0.3, 0.2)
    found = merged(name, vectors, [None] * 3, weights)
    assert found.equal(merge_tensors(vectors, method="average", preference=weights))
    with pytest.raises(RecipeError, match="tasks 2 have no statistics of this tensor"):
        known = statistics_for(name, vectors)
        merged(name, vectors, [known[0], None, known[2]], weights)


def test_regmean_averages_biases_and_embeddings():
    weights = (0.5, 0.3, 0.2)
    for tensor, shape in (("layer.bias", (8,)), ("embed.weight", (9, 6))):
        vectors = normal(3, *shape)
        found = merged("regmean", vectors, statistics_for("regmean", normal(3, 8, 6)), weights, tensor=tensor)
        assert found.equal(merge_tensors(vectors, method="average", preference=weights))


@pytest.mark.parametrize("ridge", [0.0, 1e-6])
def test_inputs_that_are_always_zero_are_averaged(ridge):
    vectors, weights, gram = normal(3, 8, 6), (0.5, 0.3, 0.2), moments(3, 6)
    gram[:, 2], gram[:, :, 2] = 0, 0
    found = merged("regmean", vectors, [told(g) for g in gram], weights, ridge=ridge)
    mean = merge_tensors(vectors, method="average", preference=weights)
    torch.testing.assert_close(found[:, 2], mean[:, 2], rtol=1e-5, atol=1e-6)
    others = [0, 1, 3, 4, 5]
    alone = merged(
        "regmean", vectors[:, :, others], [told(g[others][:, others]) for g in gram], weights, ridge=0.0
    )
    torch.testing.assert_close(found[:, others], alone, rtol=1e-4, atol=1e-4)
    nothing = merged("regmean", vectors, [told(torch.zeros(6, 6))] * 3, weights, ridge=ridge)
    torch.testing.assert_close(nothing, mean)


def test_inputs_that_are_rows_are_those_of_the_transposed_layer():
    vectors, gram = normal(3, 8, 6), moments(3, 6)
    found = merged("regmean", vectors, [told(g) for g in gram])
    turned = merged("regmean", vectors.transpose(1, 2), [told(g, is_transposed=True) for g in gram])
    torch.testing.assert_close(turned.T, found)


def test_moments_without_an_inverse_say_what_to_do():
    gram = torch.ones(2, 2)
    vectors = normal(2, 3, 2)
    with pytest.raises(RecipeError, match="have no inverse") as caught:
        merged("regmean", vectors, [told(gram)] * 2, off_diagonal=1.0, ridge=0.0)
    assert "Raise method.ridge" in caught.value.hint
    assert caught.value.problems[0].key == ("method", "ridge")
    merged("regmean", vectors, [told(gram)] * 2)


@pytest.mark.parametrize("chunk", [7, 20, 48])
def test_chunks_of_any_size_give_the_same_bytes(chunk):
    vectors = normal(3, 8, 6)
    for name in METHODS:
        known = statistics_for(name, vectors)
        assert merged(name, vectors, known, chunk=chunk).equal(merged(name, vectors, known))


@pytest.mark.parametrize("name", METHODS)
def test_merges_without_statistics_say_what_they_need(name):
    with pytest.raises(RecipeError, match=f"needs {METHODS[name]} statistics of each task's data"):
        merge_tensors(normal(2, 4, 4), method=name)
    with pytest.raises(HubMagmaxError, match=f"needs {METHODS[name]} statistics of each task's data"):
        hm.merge_state_dicts(
            {"w": normal(4, 4)}, {"a": {"w": normal(4, 4)}, "b": {"w": normal(4, 4)}}, method=name
        )


def test_statistics_are_for_one_form_each():
    with pytest.raises(ArgumentError, match="gram is for the form matrix, not for 'linear'"):

        @merge_method("of_gram", source="test", form="linear")
        def of_gram(num_tasks: int, *, gram) -> tuple[float, ...]:
            """Take ones."""
            return (1.0,) * num_tasks


# In files.


def statistics_of(kind: str, task: int) -> dict[str, Tensor]:
    if kind != "fisher":
        return {"layer.weight": moments(1, 6, seed=task)[0], "out.weight": moments(1, 8, seed=task + 9)[0]}
    return {name: normal(*shape, seed=task).square() for name, shape in SHAPES.items() if shape != (8,)}


def write_statistics(folder: Path, kind: str, tensors: dict[str, Tensor], **facts: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    scale = (
        sum(float(t.square().sum()) for t in tensors.values()) / sum(t.numel() for t in tensors.values())
    ) ** 0.5
    facts = {"statistics": kind, "root_mean_square": repr(scale), **facts}
    save_file(
        {name: t.contiguous() for name, t in tensors.items()}, folder / f"{kind}.safetensors", metadata=facts
    )
    return folder


@pytest.fixture
def family(tmp_path):
    """Checkpoints of a base model and three tasks, with statistics of both kinds."""
    base = {name: normal(*shape, seed=1) for name, shape in SHAPES.items()}
    for number, name in enumerate(("base", "a", "b", "c")):
        moved = {n: t + 0.1 * (number > 0) * normal(*t.shape, seed=10 * number) for n, t in base.items()}
        write_checkpoint(tmp_path / name, moved)
        for kind in METHODS.values() if number else ():
            write_statistics(tmp_path / "statistics" / name, kind, statistics_of(kind, number))
    return tmp_path


def values_of(method="regmean", **changes):
    tasks = [{"name": n, "model": f"./{n}", "statistics": f"./statistics/{n}"} for n in "abc"]
    values = {"tasks": tasks, "method": method, "preference": {"weights": {"a": 0.5, "b": 0.3, "c": 0.2}}}
    return recipe_values() | values | {"output": {"path": "merged"}} | changes


def recipe_of(family, method="regmean", **changes):
    return load_recipe(write_recipe(family, **values_of(method, **changes)))


def planned(family, method="regmean", **changes):
    return accepted(plan(recipe_of(family, method, **changes)))


@pytest.mark.parametrize("name", METHODS)
def test_files_are_merged_as_tensors_are(family, name):
    merge(planned(family, name))
    found, base = read_merged(family / "merged"), read_merged(family / "base")
    tasks = [read_merged(family / task) for task in "abc"]
    for tensor, values in base.items():
        vectors = torch.stack([task[tensor] - values for task in tasks])
        known = [statistics_of(METHODS[name], number).get(tensor) for number in (1, 2, 3)]
        scales = [scale_of(family / "statistics" / n, METHODS[name]) for n in "abc"]
        told_of = [None if k is None else told(k, scale=s) for k, s in zip(known, scales, strict=True)]
        expected = merged(name, vectors, told_of, (0.5, 0.3, 0.2), tensor=tensor)
        torch.testing.assert_close(found[tensor], values + expected, rtol=0, atol=1e-6)


def scale_of(folder: Path, kind: str) -> float:
    content = (folder / f"{kind}.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return float(header["__metadata__"]["root_mean_square"]) if kind == "fisher" else 1.0


@pytest.mark.parametrize("name", METHODS)
def test_the_number_of_threads_and_the_chunk_change_no_byte(family, monkeypatch, name):
    monkeypatch.setattr("hub_magmax.planning.budget.num_threads", lambda: 1)
    first = merge(planned(family, name), family / "first")
    monkeypatch.setattr("hub_magmax.planning.budget.num_threads", lambda: 2)
    assert merge(planned(family, name), family / "second", chunk_elements=16).shards == first.shards


@pytest.mark.parametrize("name", METHODS)
def test_merges_in_memory_are_those_of_the_files(family, name):
    made = planned(family, name)
    merge(made)
    with InMemoryMerger(made.recipe, made.lock) as merger:
        weights = merger.merge(made.lock.method, made.lock.weights).weights(made.lock.method["scaling"])
    for tensor, values in read_merged(family / "merged").items():
        assert weights[tensor].equal(values)


def test_a_comparison_of_both_kinds_has_the_statistics_of_both(family):
    compare = {"methods": ["regmean", "fisher", "average"], "tune": {"dataset": "./data", "split": "train"}}
    recipe = recipe_of(family, "average", compare=compare)
    locked = lock(recipe)
    assert [*locked.statistics] == ["gram", "fisher"]
    with InMemoryMerger(recipe, locked) as merger:
        for name in ("regmean", "fisher"):
            method = {"name": name, "scaling": 1.0}
            assert merger.merge(method, locked.weights).weights(1.0)["out.weight"].isfinite().all()


def test_the_plan_says_which_tensors_have_statistics(family):
    made = planned(family)
    assert "statistics   gram of 2 tensors, in 3 files of " in explain(made)
    assert "; the other 2 are averaged by preference" in explain(made)
    assert describe(made)["tensors_by_statistics"] == 2
    assert "fisher of 3 tensors" in explain(planned(family, "fisher"))


def test_the_plan_counts_the_bytes_of_statistics(family):
    made, without = planned(family), planned(family, "average")
    assert made.bytes_in - without.bytes_in == 4 * 3 * (6 * 6 + 8 * 8)


def test_the_lock_pins_statistics_and_a_changed_file_is_told(family):
    recipe = recipe_of(family)
    locked = lock(recipe)
    assert [s.reference for s in locked.statistics["gram"].values()] == [
        f"./statistics/{n}/gram.safetensors" for n in "abc"
    ]
    assert changed_keys(recipe, locked) == []
    assert changed_keys(recipe_of(family, "average"), locked) == ["method", "statistics"]
    write_statistics(family / "statistics" / "b", "gram", statistics_of("gram", 2), note="another")
    with pytest.raises(LockError, match=r"gram\.safetensors changed since the lock was written"):
        plan(recipe, locked)


def test_statistics_whose_values_changed_are_told_where_files_are_hashed(family):
    recipe = recipe_of(family)
    made = accepted(plan(recipe, lock(recipe, hash_files=True)))
    path = family / "statistics" / "b" / "gram.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(LockError, match=r"gram\.safetensors changed"):
        merge(made)


def test_locks_without_statistics_are_what_they_were(family):
    locked = lock(recipe_of(family, "average"))
    assert locked.statistics == {}
    assert "statistics" not in json.loads(locked.to_json())


@pytest.mark.parametrize("name", METHODS)
def test_a_merge_is_rebuilt_from_its_folder(family, name):
    merge(planned(family, name))
    assert rebuild(str(family / "merged"), folder=family).shards


def refused(family, error, match, method="regmean", **changes):
    with pytest.raises(error, match=match) as caught:
        plan(recipe_of(family, method, **changes))
    return caught.value


def without(task):
    return [
        {"name": n, "model": f"./{n}"} | ({} if n == task else {"statistics": f"./statistics/{n}"})
        for n in "abc"
    ]


def test_recipes_name_statistics_of_every_task(family):
    error = refused(
        family, RecipeError, "needs gram statistics of each task's data, and b have none", tasks=without("b")
    )
    assert "statistics: ./statistics/b" in str(error)
    compare = {"methods": ["fisher"], "tune": {"dataset": "./data", "split": "train"}}
    refused(family, RecipeError, "needs fisher statistics", "average", tasks=without("b"), compare=compare)
    refused(family, RecipeError, "there is no task 'd'", statistics={"data": {"d": {"dataset": "./d"}}})
    layers = [{"blocks": [0, 1]}]
    refused(family, RecipeError, "statistics are about the base model's own blocks", layers=layers)


def test_missing_statistics_without_examples_say_what_to_name(family):
    (family / "statistics" / "b" / "gram.safetensors").unlink()
    error = refused(family, RecipeError, "there are no gram statistics of b")
    assert error.problems[0].key == ("tasks", 1, "statistics")
    assert "statistics.data.b" in error.hint


def test_statistics_on_the_hub_cannot_be_made(family):
    tasks = [{"name": n, "model": f"./{n}", "statistics": f"me/{n}"} for n in "abc"]
    data = {n: {"dataset": "./data"} for n in "abc"}
    refused(family, RecipeError, "'me/a' is a repository on the Hub", tasks=tasks, statistics={"data": data})


def test_statistics_are_read_from_the_hub(family, hub):
    for name in "abc":
        hub.add_repo(f"me/of-{name}", folder=family / "statistics" / name)
    tasks = [{"name": n, "model": f"./{n}", "statistics": f"me/of-{n}"} for n in "abc"]
    merge(planned(family, tasks=tasks), family / "by_hub")
    merge(planned(family), family / "by_folder")
    for tensor, values in read_merged(family / "by_folder").items():
        assert read_merged(family / "by_hub")[tensor].equal(values)


def rewritten(family, kind, change, **facts):
    tensors = statistics_of(kind, 2)
    change(tensors)
    write_statistics(family / "statistics" / "b", kind, tensors, **facts)


def test_statistics_of_another_kind_are_told(family):
    gram = (family / "statistics" / "b" / "gram.safetensors").read_bytes()
    (family / "statistics" / "b" / "fisher.safetensors").write_bytes(gram)
    refused(family, CheckpointError, "these are gram statistics", "fisher")
    save_file({"w": normal(3, 3)}, family / "statistics" / "b" / "gram.safetensors")
    error = refused(family, CheckpointError, "these are no statistics")
    assert "b/gram.safetensors" in error.where
    (family / "statistics" / "b" / "gram.safetensors").write_bytes(b"no safetensors")
    refused(family, CheckpointError, "header")


@pytest.mark.parametrize(
    ("change", "told_of"),
    [
        (lambda t: t.pop("out.weight"), "b has none of 'out.weight', and a has"),
        (
            lambda t: t.update({"out.weight": normal(6, 6)}),
            r"those of b about 'out.weight' are \[6, 6\], expected \[8, 8\]",
        ),
    ],
)
def test_statistics_that_do_not_fit_are_told(family, change, told_of):
    rewritten(family, "gram", change)
    error = refused(family, MismatchError, told_of)
    assert "b/gram.safetensors" in error.where or "a/gram" in error.where


def test_statistics_of_no_tensor_are_told(family):
    for name in "abc":
        write_statistics(family / "statistics" / name, "gram", {"elsewhere.weight": normal(6, 6)})
    refused(family, MismatchError, "no task has any of a merged tensor")


def test_a_task_that_does_not_count_needs_no_fitting_statistics(family):
    rewritten(family, "gram", lambda tensors: tensors.pop("out.weight"))
    merge(planned(family, preference={"weights": {"a": 0.5, "c": 0.5}}))


@pytest.mark.parametrize(
    ("method", "value", "told_of"),
    [("regmean", float("nan"), "is nan"), ("fisher", -1.0, "is -1.0"), ("fisher", float("inf"), "is inf")],
)
def test_values_that_are_no_statistics_are_told_with_their_place(family, method, value, told_of):
    kind = METHODS[method]
    path = write_statistics(family / "statistics" / "b", kind, statistics_of(kind, 2)) / f"{kind}.safetensors"
    content, number = bytearray(path.read_bytes()), np.array([value], np.float32).tobytes()
    content[-4:] = number
    path.write_bytes(content)
    with pytest.raises(NonFiniteError, match=told_of) as caught:
        merge(planned(family, method))
    assert "b/" in caught.value.where and "tensor" in caught.value.where


@pytest.mark.parametrize("written", ["nothing", "nan", "-1", "inf"])
def test_a_scale_that_is_none_is_told(family, written):
    rewritten(family, "fisher", lambda tensors: None, root_mean_square=written)
    refused(family, CheckpointError, "root_mean_square is", "fisher")
    rewritten(family, "gram", lambda tensors: None, transposed="{")
    refused(family, CheckpointError, "transposed is no list of names")


def test_codes_in_place_of_numbers_are_told(family):
    rewritten(
        family, "fisher", lambda tensors: tensors.update({"out.weight": torch.ones(6, 8, dtype=torch.int32)})
    )
    refused(family, CheckpointError, "'out.weight' is stored as I32", "fisher")


def test_statistics_of_another_checkpoint_are_told(family):
    rewritten(family, "gram", lambda tensors: None, checkpoint="sha256:0")
    error = refused(family, LockError, r"these statistics are of another checkpoint than \./b")
    assert "Remove the file" in error.hint


def test_a_model_in_narrow_numbers_has_statistics_all_the_same(family):
    for name in ("base", "a", "b", "c"):
        write_checkpoint(family / name, {n: t.bfloat16() for n, t in read_merged(family / name).items()})
    for name in METHODS:
        merge(planned(family, name), family / name)
        assert read_merged(family / name)["out.weight"].dtype == torch.bfloat16


def test_rules_and_scaling_count_as_for_every_method(family):
    rules = [{"match": "out.*", "take": "base_model"}, {"match": "layer.*", "weights": {"a": 1.0}}]
    merge(planned(family, tensors=rules))
    found = read_merged(family / "merged")
    assert found["out.weight"].equal(read_merged(family / "base")["out.weight"])
    assert found["layer.weight"].equal(read_merged(family / "a")["layer.weight"])


def test_statistics_of_the_merge_are_of_one_preference_and_of_no_rules(family):
    made = planned(family, "regmean_plusplus")
    with InMemoryMerger(made.recipe, made.lock) as merger:
        merger.merge(made.lock.method, made.lock.weights)
        with pytest.raises(RecipeError, match="are of one preference, and this is another one"):
            merger.merge(made.lock.method, (0.4, 0.3, 0.3))
    changes = {"tensors": [{"match": "out.*", "take": "a"}]}
    refused(family, RecipeError, "of a merge without rules", "regmean_plusplus", **changes)
    for norms in ("equal", "equal-by-tensor"):
        refused(family, RecipeError, "of task vectors as long as they are", "regmean_plusplus", norms=norms)
    tasks = values_of()["tasks"]
    tasks[1]["base"] = "./other"
    refused(family, RecipeError, "tasks that share the base model", "regmean_plusplus", tasks=tasks)
    scaled = {"name": "regmean_plusplus", "scaling": 0.5}
    refused(family, RecipeError, "of a merge with scaling 1", scaled)


def test_recipes_survive_a_round_through_their_values(family):
    data = {n: {"dataset": "./data", "split": "train"} for n in "abc"}
    recipe = parse_recipe(
        values_of(statistics={"data": data, "evaluator": "image-classification"}), folder=family
    )
    assert parse_recipe(recipe.to_dict(), folder=family) == recipe
