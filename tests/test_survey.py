import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from hub_magmax.errors import RecipeError
from hub_magmax.kernels import ops
from hub_magmax.kernels.compiled.backend import Compiled
from hub_magmax.kernels.reference import Reference
from hub_magmax.merging.execution import merge
from hub_magmax.merging.in_memory import InMemoryMerger
from hub_magmax.merging.survey import survey
from hub_magmax.methods import Rule, thresholds
from hub_magmax.methods.chunks import ArrayChunks
from hub_magmax.methods.selection import assignment, quotas
from hub_magmax.pipeline import lock, plan
from hub_magmax.planning.plan import TensorJob
from hub_magmax.recipe.loading import load_recipe
from tests.families import read_merged, write_family, write_recipe
from tests.test_merging import Interrupted

METHOD = {"name": "tunable_magmax", "scaling": 0.5, "selection": "algorithm-1", "scope": "model"}
TOP_N = METHOD | {"selection": "top-n"}
TIES = {"name": "ties", "scaling": 1.0, "density": 0.3, "scope": "model"}
WEIGHTS = (0.5, 0.3, 0.2)
SIZES = (3, 40, 1, 17)


def jobs(sizes: Sequence[int] = SIZES) -> list[TensorJob]:
    return [TensorJob(f"t{n}", (size,), "F32", size, "merge") for n, size in enumerate(sizes)]


def vectors(sizes: Sequence[int] = SIZES) -> torch.Tensor:
    return torch.randn(3, sum(sizes), generator=torch.Generator().manual_seed(1))


def given(rule: Rule, size: int) -> list[list[float]]:
    return [values.tolist() for values in (*rule.per_element(0, size), *rule.per_task)]


@pytest.mark.parametrize("method", [METHOD, TOP_N])
def test_quotas_hold_for_the_model_and_not_for_each_tensor(method):
    found = survey(jobs(), ArrayChunks(vectors()), method, WEIGHTS, seed=0)
    winners = [torch.tensor(given(found.part(job.name), job.num_elements)[0]) for job in jobs()]
    counts = torch.bincount(torch.cat(winners).to(torch.int64), minlength=3).tolist()
    assert tuple(counts) == quotas(WEIGHTS, sum(SIZES))
    of_second = torch.bincount(winners[1].to(torch.int64), minlength=3).tolist()
    assert tuple(of_second) != quotas(WEIGHTS, SIZES[1])


def test_a_tensor_that_moved_more_for_a_task_goes_to_it_whole():
    moved = torch.tensor([[9.0, 9, 1, 1], [1, 1, 9, 9]])
    found = survey(jobs((2, 2)), ArrayChunks(moved), TOP_N, (0.5, 0.5), seed=0)
    assert [given(found.part(name), 2) for name in ("t0", "t1")] == [[[0, 0]], [[1, 1]]]


def test_thresholds_are_of_all_tensors():
    task_vectors = vectors()
    found = survey(jobs(), ArrayChunks(task_vectors), TIES, WEIGHTS, seed=0)
    keep = 19  # of 61 elements, three tenths rounded up
    expected = task_vectors.abs().sort(dim=1, descending=True).values[:, keep - 1]
    assert all(found.part(job.name).per_task[0].tolist() == expected.tolist() for job in jobs())


@pytest.mark.parametrize("method", [METHOD, TOP_N, TIES])
def test_kept_rule_is_the_rule(tmp_path, method):
    chunks = ArrayChunks(vectors())
    fresh = survey(jobs(), chunks, method, WEIGHTS, seed=5)
    kept = survey(jobs(), chunks, method, WEIGHTS, seed=5, folder=tmp_path)
    for again in (
        kept,
        survey(jobs(), _Unread(chunks.task_vectors), method, WEIGHTS, seed=5, folder=tmp_path),
    ):
        for job in jobs():
            one, other = fresh.part(job.name), again.part(job.name)
            assert given(one, job.num_elements) == given(other, job.num_elements)
            assert one.op == other.op
            assert (one.num_unaligned, one.duality_gap) == (other.num_unaligned, other.duality_gap)


class _Unread(ArrayChunks):
    def arrays(self):
        raise AssertionError("what is kept need not be found again")


def test_facts_of_the_model_are_told_once():
    found = survey(jobs(), ArrayChunks(vectors()), TOP_N, WEIGHTS, seed=0)
    gaps = [found.part(job.name).duality_gap for job in jobs()]
    assert gaps[0] is not None and gaps[1:] == [None] * 3


@pytest.mark.parametrize("damage", ["0", "rule.json"])
def test_damaged_rule_is_found_again(tmp_path, damage):
    chunks = ArrayChunks(vectors())
    expected = given(survey(jobs(), chunks, METHOD, WEIGHTS, 0, tmp_path).part("t1"), 40)
    content = (tmp_path / damage).read_bytes()
    (tmp_path / damage).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    found = survey(jobs(), chunks, METHOD, WEIGHTS, 0, tmp_path)
    assert given(found.part("t1"), 40) == expected
    assert (tmp_path / damage).read_bytes() == content


def test_threshold_that_changed_where_it_was_kept_is_found_again(tmp_path):
    chunks = ArrayChunks(vectors())
    expected = given(survey(jobs(), chunks, TIES, WEIGHTS, 0, tmp_path).part("t1"), 40)
    text = (tmp_path / "rule.json").read_text()
    first = str(expected[0][0])
    (tmp_path / "rule.json").write_text(text.replace(first, f"9{first[1:]}"))
    assert given(survey(jobs(), chunks, TIES, WEIGHTS, 0, tmp_path).part("t1"), 40) == expected
    assert (tmp_path / "rule.json").read_text() == text


@pytest.mark.parametrize("op", [ops.AGREEING_SUM, ops.Op(ops.ties_merge)], ids=["built in", "a plug-in's"])
def test_rule_that_cannot_be_kept_is_refused(tmp_path, monkeypatch, op):
    rule = Rule(op, per_task=(torch.ones(3),))
    monkeypatch.setattr("hub_magmax.merging.survey.tensor_rule", lambda *arguments: rule)
    with pytest.raises(RecipeError, match="cannot look at the whole model"):
        survey(jobs(), ArrayChunks(vectors()), METHOD, WEIGHTS, 0, tmp_path)


def recipe_of(folder, **changes):
    output = {"path": "merged", "shard_size": "600B"}
    return load_recipe(
        write_recipe(
            folder,
            **{"method": METHOD, "output": output, "preference": {"geometric": {"ratio": 2}}} | changes,
        )
    )


def test_interrupted_merge_surveys_again_and_gives_the_same_bytes(family):
    made = plan(recipe_of(family))
    expected = merge(made, family / "expected")

    def interrupt(num_bytes: int) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        merge(made, progress=interrupt)
    found = merge(made)
    assert found.shards == expected.shards
    assert (found.shares, found.num_unaligned) == (expected.shares, expected.num_unaligned)
    assert not (family / "merged.partial").exists()


@pytest.mark.parametrize("method", [METHOD, TOP_N, TIES], ids=str)
@pytest.mark.parametrize("backend", [Reference(), Compiled()], ids=["reference", "compiled"])
def test_looking_at_the_model_is_progress(family, monkeypatch, method, backend):
    monkeypatch.setattr(thresholds, "HELD_NUMBERS", 0)
    monkeypatch.setattr(assignment, "HELD_NUMBERS", 0)
    made, seen = plan(recipe_of(family, method=method)), []

    def note(num_bytes: int) -> None:
        seen.append((num_bytes, [*family.glob("*/model/*")]))

    merge(made, progress=note, backend=backend)
    looked_at = [num_bytes for num_bytes, written in seen if not written]
    assert sum(looked_at) == made.looked_at_bytes > 0
    assert sum(num_bytes for num_bytes, _ in seen) == made.progress_bytes
    again = []
    merge(made, family / "again", progress=again.append, backend=backend)
    assert sum(again) == made.progress_bytes


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_what_a_progress_raises_comes_out_as_it_is(family, monkeypatch, scope):
    monkeypatch.setattr(thresholds, "HELD_NUMBERS", 0)  # so that tensors are merged while they are looked at

    def interrupt(num_bytes: int) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        merge(plan(recipe_of(family, method=TIES | {"scope": scope})), progress=interrupt, backend=Compiled())


def test_rule_of_another_merge_is_not_used(family):
    def interrupt(num_bytes: int) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        merge(plan(recipe_of(family)), progress=interrupt)
    other = plan(recipe_of(family, seed=8))
    assert merge(other).shards == merge(other, family / "again").shards


@pytest.mark.parametrize("method", [METHOD, TOP_N, TIES], ids=str)
def test_checkpoints_on_the_hub_give_the_same_model(tmp_path, hub, method):
    write_family(tmp_path, "ab", shapes={"w": (300, 40), "v": (7,), "u": (200, 60)}, num_shards=2)
    names = ("a", "b")
    local = merge(plan(recipe_of(tmp_path, names=names, method=method)))
    for name in ("base", "a", "b"):
        hub.add_repo(f"me/survey-{name}", folder=tmp_path / name)
    tasks = [{"name": n, "model": f"me/survey-{n}"} for n in names]
    far = recipe_of(
        tmp_path,
        names=names,
        base_model="me/survey-base",
        tasks=tasks,
        method=method,
        output={"path": "far", "shard_size": "600B"},
    )
    assert merge(plan(far, lock(far))).shares == local.shares
    here, there = read_merged(tmp_path / "merged"), read_merged(tmp_path / "far")
    assert here.keys() == there.keys()
    assert all(here[name].equal(there[name]) for name in here)


@pytest.mark.parametrize("method", [METHOD, TOP_N, TIES], ids=str)
def test_model_whose_tensors_are_all_copied_has_nothing_to_survey(family, method):
    recipe = recipe_of(family, method=method, tensors=[{"match": "*", "take": "b"}])
    assert merge(plan(recipe)).elements_merged == 0
    copied, expected = read_merged(family / "merged"), read_merged(family / "b")
    assert all(copied[name].equal(expected[name]) for name in expected)
    with InMemoryMerger(recipe, lock(recipe)) as bench:
        assert bench.merge(method, WEIGHTS).weights(1.0).keys() == expected.keys()


def test_report_counts_the_model(family):
    report = merge(plan(recipe_of(family, preference={"weights": {"a": 0.5, "b": 0.3, "c": 0.2}})))
    counts = np.sum([shard.counts for shard in report.shards if shard.counts], axis=0)
    assert tuple(counts) == quotas(WEIGHTS, report.elements_merged)
    stored = json.loads((family / "merged" / "merge_report.json").read_text())
    assert sum(stored["num_unaligned"].values()) == sum(report.num_unaligned.values())
