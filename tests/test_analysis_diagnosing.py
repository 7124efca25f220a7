"""What a diagnosis sees: numbers against slow oracles, and a planted fault of each kind, named."""

import cProfile
import csv
import io
import itertools
import json
import shutil
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from hub_magmax.analysis.diagnosing import Sample, diagnose, in_order, layer_of
from hub_magmax.cli import main
from hub_magmax.errors import MismatchError, NonFiniteError, OutputError
from hub_magmax.methods.selection import quotas
from hub_magmax.pipeline import lock, plan
from hub_magmax.planning.findings.faults import THRESHOLDS, Evidence, Geometry
from hub_magmax.planning.findings.faults import faults as find_faults
from hub_magmax.recipe.loading import load_recipe, parse_recipe
from hub_magmax.reporting.card import Beside, render_card
from hub_magmax.reporting.diagnosis import read_diagnosis
from hub_magmax.reporting.figures import cosines_figure
from tests.drawn import draw_diagnosis
from tests.families import make_tensors, recipe_values, write_checkpoint, write_recipe
from tests.test_adapting import write_tasks
from tests.test_reporting_card import make_lock, make_recipe, make_report
from tests.test_reporting_figures import texts

SHAPES = {
    "embed.weight": (50, 8),
    "layers.0.in.weight": (16, 8),
    "layers.0.in.bias": (16,),
    "layers.1.in.weight": (16, 8),
    "layers.1.in.bias": (16,),
    "layers.2.in.weight": (16, 8),
    "norm.weight": (8,),
}
TASKS = ("a", "b", "c", "d")


def write(folder, **changes):
    """Write a family of four checkpoints, some of them changed, and a recipe; return them and the plan."""
    family = {"base": make_tensors(0, shapes=SHAPES)}
    for seed, task in enumerate(TASKS, 1):
        family[task] = make_tensors(seed, base=family["base"], shapes=SHAPES)
    for task, change in changes.items():
        family[task] = change(family)
    for name, tensors in family.items():
        write_checkpoint(folder / name, tensors)
    recipe = load_recipe(write_recipe(folder, names=TASKS, preference={"geometric": {"ratio": 3}}))
    return family, plan(recipe, lock(recipe))


def faults(found):
    return {(finding.rule, finding.task) for finding in found.findings if finding.is_fault}


def floats(tensors):
    return {name: value for name, value in tensors.items() if value.is_floating_point()}


def from_another_base(family):
    other = make_tensors(99, shapes=SHAPES)
    return make_tensors(5, base=other, shapes=SHAPES)


def unchanged(family):
    return dict(family["base"])


def untrained_in_float64(family):
    return {n: t.double() if t.is_floating_point() else t for n, t in family["base"].items()}


def swapped(family):
    tensors = dict(family["b"])
    for kind in ("weight", "bias"):
        zero, one = f"layers.0.in.{kind}", f"layers.1.in.{kind}"
        tensors[zero], tensors[one] = tensors[one], tensors[zero]
    return tensors


def scaled(family):
    return {name: 100 * value if value.is_floating_point() else value for name, value in family["b"].items()}


def far(family):
    base = family["base"]
    moved = {name: base[name] + 20 * (value - base[name]) for name, value in floats(family["b"]).items()}
    return dict(family["b"]) | {
        name: base[name] + 0.02 * (v - base[name]) / 0.07 for name, v in moved.items()
    }


def copied(family):
    return {name: value + 1e-6 if value.is_floating_point() else value for name, value in family["a"].items()}


def test_a_sound_family_has_no_faults(tmp_path):
    _, planned = write(tmp_path)
    found = diagnose(planned)
    assert faults(found) == set()
    assert found.verdict in ("Nothing speaks against merging.", "Can be merged; mind the notes.")
    assert found.num_tensors == len(SHAPES) and found.unchanged == (0, 0, 0, 0)


PLANTED = pytest.mark.parametrize(
    ("change", "rule", "words"),
    [
        (from_another_base, "other base", "fine-tuned from another one"),
        (unchanged, "unchanged", "b is the base model, unchanged"),
        (untrained_in_float64, "unchanged", "its task vector is zero, and its share of the merge stays"),
        (swapped, "swapped", "layers.0.in.weight holds what is layers.1.in.weight"),
        (scaled, "scaled", "times as long as the base model's"),
        (copied, "near-identical", "b is almost a"),
    ],
)


@PLANTED
def test_a_planted_fault_is_named(tmp_path, change, rule, words):
    _, planned = write(tmp_path, b=change)
    found = diagnose(planned)
    assert faults(found) == {(rule, "b")}
    assert words in found.table()
    assert found.verdict == "Do not merge before looking at b."


@PLANTED
def test_a_planted_fault_is_named_where_only_a_part_is_looked_at(tmp_path, change, rule, words):
    _, planned = write(tmp_path, b=change)
    found = diagnose(planned, sample=Sample(64, 32, 64, 1))
    assert found.whole.num_looked_at < 0.6 * found.whole.num_elements
    assert faults(found) == {(rule, "b")}
    assert words in found.table()


def test_a_task_that_the_recipe_calls_the_base_model_is_no_fault(tmp_path):
    write(tmp_path)
    values = {"schema": 1, "base_model": "./base", "method": "average"}
    values["tasks"] = [{"name": "same", "model": "./base"}, {"name": "a", "model": "./a"}]
    found = plan(parse_recipe(values, folder=tmp_path)).findings
    assert [(one.rule, one.is_fault) for one in found if one.task == "same"] == [("unchanged", False)]


def test_a_task_vector_times_a_hundred_is_named(tmp_path):
    def longer(others):
        return {
            name: others["base"][name] + 100 * (value - others["base"][name])
            if value.is_floating_point()
            else value
            for name, value in others["b"].items()
        }

    def shorter(task):
        return lambda others: {
            name: others["base"][name] + 0.01 * (value - others["base"][name])
            if value.is_floating_point()
            else value
            for name, value in others[task].items()
        }

    _, planned = write(tmp_path / "long", b=longer)
    assert faults(diagnose(planned)) == {("scaled", "b")}
    # Where even a hundred times the change is small beside the weights, its length gives it away.
    _, planned = write(tmp_path / "short", a=shorter("a"), c=shorter("c"), d=shorter("d"))
    assert faults(diagnose(planned)) == {("long", "b")}


def slow_numbers(family, weights):
    """Compute from whole tensors, element by element, what a diagnosis sums up."""
    names = list(SHAPES)
    base = np.concatenate([family["base"][name].numpy().ravel().astype(np.float64) for name in names])
    vectors = np.stack(
        [np.concatenate([(family[t][n] - family["base"][n]).numpy().ravel() for n in names]) for t in TASKS]
    ).astype(np.float64)
    cosine = vectors @ vectors.T / np.outer(*[np.linalg.norm(vectors, axis=1)] * 2)
    agreement = np.empty((4, 4))
    for one, other in itertools.product(range(4), repeat=2):
        both = (vectors[one] != 0) & (vectors[other] != 0)
        agreement[one, other] = (np.sign(vectors[one]) == np.sign(vectors[other]))[both].mean()
    wins, lacking = np.zeros(4), np.zeros(4)
    start = 0
    for name in names:
        size = family["base"][name].numel()
        part = np.abs(vectors[:, start : start + size])
        start += size
        winners = [max(range(4), key=lambda t: (column[t], t)) for column in part.T if column.any()]
        won = np.bincount(winners, minlength=4)
        wins += won
        lacking += np.maximum(np.array(quotas(weights, len(winners))) - won, 0)
    return base, vectors, cosine, agreement, wins, lacking


def test_numbers_are_those_of_the_whole_tensors(tmp_path):
    family, planned = write(tmp_path)
    found = diagnose(planned)
    base, vectors, cosine, agreement, wins, lacking = slow_numbers(family, planned.lock.weights)
    assert found.whole.cosines == pytest.approx(cosine, abs=1e-5)
    assert found.whole.sign_agreement == pytest.approx(agreement)
    assert found.whole.lengths == pytest.approx(np.linalg.norm(vectors, axis=1), rel=1e-5)
    assert found.whole.wins == tuple(wins) and found.whole.lacking == tuple(lacking)
    assert found.whole.changed == tuple((vectors != 0).sum(axis=1))
    toward, ratio = found.whole.geometry.to_base
    checkpoints = base + vectors
    assert ratio == pytest.approx(np.linalg.norm(checkpoints, axis=1) / np.linalg.norm(base), rel=1e-5)
    assert toward * ratio == pytest.approx(checkpoints @ base / (base @ base), rel=1e-4)
    assert found.whole.num_looked_at == found.whole.num_elements == vectors.shape[1]


def test_layers_are_told_apart_and_their_numbers_stored(tmp_path):
    family, planned = write(tmp_path)
    found = diagnose(planned)
    stored = json.loads(found.to_json())["numbers"]
    assert list(stored) == ["all tensors", *(layer.name for layer in found.layers)]
    part = {name for name in SHAPES if name.startswith("layers.1.")}
    base, *vectors = (
        torch.cat([family[one][name].flatten() for name in sorted(part)]).double() for one in ("base", *TASKS)
    )
    stacked = torch.stack(vectors) - base
    lengths = stacked.norm(dim=1)
    numbers = stored["layers.1"]
    cosines = stacked @ stacked.T / torch.outer(lengths, lengths)
    assert np.array(numbers["cosines"]) == pytest.approx(cosines.numpy(), abs=1e-5)
    ratios = lengths[:, None] / lengths[None]
    assert np.array(numbers["length_ratios"]) == pytest.approx(ratios.numpy(), abs=1e-5)
    signs = stacked.sign()
    together = (signs[0] * signs[1] > 0).sum() / (signs[0] * signs[1] != 0).sum()
    assert numbers["sign_agreement"][0][1] == pytest.approx(float(together), abs=1e-6)
    assert sum(numbers["win_shares"]) == pytest.approx(1, abs=1e-5)
    assert {layer.name for layer in found.layers} == {"embed", "layers.0", "layers.1", "layers.2", "norm"}
    assert sum(layer.num_elements for layer in found.layers) == found.whole.num_elements


@pytest.mark.parametrize(
    ("tensor", "layer"),
    [
        ("model.layers.12.mlp.up_proj.weight", "model.layers.12"),
        ("vit.embeddings.cls_token", "vit.embeddings"),
        ("scale", "scale"),
        ("blocks.3", "blocks.3"),
    ],
)
def test_layers_have_the_name_that_people_know(tensor, layer):
    assert layer_of(tensor) == layer


def test_layers_of_a_stack_are_in_the_order_of_their_numbers():
    sorted_as_text = ["head", "h.0", "h.1", "h.10", "h.2", "norm", "other.11", "other.9"]
    assert in_order(sorted_as_text) == ["head", "h.0", "h.1", "h.2", "h.10", "norm", "other.9", "other.11"]


def test_a_part_of_a_large_tensor_says_the_same(tmp_path):
    shapes = {"embed.weight": (4000, 64), "head.weight": (1000, 16)}
    family = {"base": make_tensors(0, shapes=shapes)}
    family |= {task: make_tensors(n, base=family["base"], shapes=shapes) for n, task in enumerate("abc", 1)}
    for name, tensors in family.items():
        write_checkpoint(tmp_path / name, tensors)
    recipe = load_recipe(write_recipe(tmp_path))
    planned = plan(recipe, lock(recipe))
    whole = diagnose(planned)
    part = diagnose(planned, sample=Sample(1000, 1250, 10_000, 1))
    assert part.whole.num_looked_at == pytest.approx(whole.whole.num_elements / 8, rel=0.05)
    assert part.whole.cosines == pytest.approx(whole.whole.cosines, abs=0.02)
    assert part.whole.win_shares == pytest.approx(whole.whole.win_shares, abs=0.02)


def test_what_is_looked_at_stands_for_the_whole_of_each_tensor(tmp_path):
    """As of an adapter: a small tensor is changed and read whole, of a large one that is not, an eighth."""
    base = make_tensors(0, shapes={"embed.weight": (4000, 64), "layers.0.q.weight": (20, 50)})
    for number, name in enumerate(("base", "a", "b", "c")):
        changed = base["layers.0.q.weight"] * (1 + number / 100)
        write_checkpoint(tmp_path / name, base | {"layers.0.q.weight": changed})
    recipe = load_recipe(write_recipe(tmp_path))
    found = diagnose(plan(recipe, lock(recipe)), sample=Sample(1000, 1250, 10_000, 1))
    assert found.whole.num_looked_at < 40_000
    assert found.changed_shares == pytest.approx([1000 / 257_000] * 3)
    whole = np.sqrt(sum(float(tensor.double().square().sum()) for tensor in base.values()))
    lengths = [0.01 * number * float(base["layers.0.q.weight"].norm()) for number in (1, 2, 3)]
    assert found.relative_lengths == pytest.approx(np.array(lengths) / whole, rel=0.02)


@pytest.mark.parametrize("kind", ["adapters", "checkpoints"])
def test_directions_are_those_of_matrices_that_some_task_changes(tmp_path, kind):
    base, factors = write_tasks(tmp_path, "llama")  # of layers q and v; o is as large as q
    if kind == "checkpoints":
        for task, changed in factors.items():
            shutil.rmtree(tmp_path / task)
            write_checkpoint(tmp_path / task, base | {name: base[name] + 1 for name in changed})
    recipe = parse_recipe(recipe_values("abc", method="average"), folder=tmp_path)
    found = diagnose(plan(recipe))
    assert {one.matrix for one in found.overlaps} == factors["a"].keys()


def test_a_change_outside_of_what_is_looked_at_is_still_a_change(tmp_path):
    base = make_tensors(0, shapes={"w": (8000,)})
    for place in (0, 4001, 7999):
        changed = dict(base)
        changed["w"] = base["w"].clone()
        changed["w"][place] += 1
        folder = tmp_path / str(place)
        for name, tensors in {"base": base, "a": changed, "b": base, "c": changed}.items():
            write_checkpoint(folder / name, tensors)
        recipe = load_recipe(write_recipe(folder))
        found = diagnose(plan(recipe, lock(recipe)), sample=Sample(whole_elements=1000))
        assert found.unchanged == (0, 1, 0)


def test_directions_that_are_shared_are_found(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(64, 40, generator=generator)}
    right = torch.linalg.qr(torch.randn(40, 40, generator=generator)).Q
    one, other = right[:8], right[8:16]

    def along(directions, seed):
        left = torch.randn(64, 8, generator=torch.Generator().manual_seed(seed))
        return {"w": base["w"] + left @ directions}

    for name, tensors in {"base": base, "a": along(one, 1), "b": along(one, 2), "c": along(other, 3)}.items():
        write_checkpoint(tmp_path / name, tensors)
    recipe = load_recipe(write_recipe(tmp_path))
    (overlap,) = diagnose(plan(recipe, lock(recipe))).overlaps
    shares = np.array(overlap.shares)
    assert shares[0, 1] == pytest.approx(1, abs=1e-3)
    assert shares[0, 2] == pytest.approx(0, abs=1e-3)
    assert overlap.chance == 8 / 40


def write_many(folder, names, shape, *, change=lambda tensors: tensors):
    """Write a base model and two checkpoints of many small tensors, and return the plan."""
    shapes = dict.fromkeys(names, shape)
    base = make_tensors(0, shapes=shapes)
    family = {"base": base, "b": make_tensors(2, base=base, shapes=shapes)}
    family["a"] = change(make_tensors(1, base=base, shapes=shapes))
    for name, tensors in family.items():
        write_checkpoint(folder / name, tensors)
    recipe = load_recipe(write_recipe(folder, names=("a", "b")))
    return plan(recipe, lock(recipe))


def test_exchanged_experts_are_named_among_many_of_one_shape(tmp_path):
    one, other = (f"layers.{layer}.experts.{expert}.up.weight" for layer, expert in ((1, 17), (6, 100)))

    def exchanged(tensors):
        return tensors | {one: tensors[other], other: tensors[one]}

    names = [f"layers.{layer}.experts.{expert}.up.weight" for layer in range(8) for expert in range(128)]
    found = diagnose(write_many(tmp_path, names, (4, 8), change=exchanged))
    assert {(swap.task, swap.tensor, swap.looks_like) for swap in found.swaps} == {
        ("a", one, other),
        ("a", other, one),
    }
    assert [layer.name for layer in found.layers] == [f"layers.{number}" for number in range(8)]
    assert found.num_tensors == 1024 and found.whole.num_looked_at == 1024 * 32


def displaced(tensors):
    floating = floats(tensors)
    return tensors | dict(zip(floating, reversed(floating.values()), strict=True))


def halved(tensors):
    return {name: value for name, value in tensors.items() if name in list(tensors)[::2]}


def swaps_in(folder, count, change):
    """Look for what is odd among small tensors of one shape, and tell how many are in another's place."""
    folder.mkdir()
    names = [f"w.{n}" for n in range(count)]
    if change is displaced:
        return len(diagnose(write_many(folder, names, (4, 8), change=change)).swaps)
    with pytest.raises(MismatchError):
        write_many(folder, names, (4, 8), change=change)
    return 0


@pytest.mark.parametrize("change", [displaced, halved])
def test_work_grows_with_the_tensors_and_not_with_their_pairs(tmp_path, change):
    calls = {}
    for count in (100, 400):
        profile = cProfile.Profile()
        found = profile.runcall(swaps_in, tmp_path / str(count), count, change)
        assert found > 0.9 * count or change is halved
        calls[count] = sum(entry.callcount for entry in profile.getstats())
    assert calls[400] < 5 * calls[100], "pairs: 16 times as many"


def test_memory_of_a_diagnosis_grows_with_the_tensors_and_not_with_their_pairs(tmp_path):
    tracemalloc.start()
    try:
        assert swaps_in(tmp_path / "many", 2000, displaced) > 500
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20e6, "12 MB; the products of all pairs alone are 16 MB"


def test_a_nan_in_one_of_many_small_tensors_is_refused_with_its_place(tmp_path):
    def broken(tensors):
        tensors["w.30"][3, 2] = torch.nan
        return tensors

    planned = write_many(tmp_path, [f"w.{n}" for n in range(60)], (4, 8), change=broken)
    with pytest.raises(NonFiniteError, match=r"element 26 is nan") as refused:
        diagnose(planned)
    assert "w.30" in str(refused.value)


def test_neighbouring_layers_are_joined_where_each_tensor_would_be_one(tmp_path):
    found = diagnose(write_many(tmp_path, [f"w.{n:03d}" for n in range(600)], (2, 2)))
    assert len(found.layers) == 200
    assert found.layers[0].name == "w.000 … w.002" and found.layers[0].num_elements == 12
    assert found.whole.num_elements == 2400 and found.whole.wins == pytest.approx(found.matrices.wins)


def test_the_verdict_comes_first_and_pairs_of_many_tasks_are_summed_up():
    tasks = [f"task-{n}" for n in range(40)]
    found = draw_diagnosis(tasks)
    lines = found.table().splitlines()
    assert lines[0].startswith(found.verdict)
    start = lines.index("pair: cosine, agreement in sign, ratio of lengths") + 1
    pairs = lines[start : start + 11]
    values = [found.whole.cosines[one, other] for one, other in itertools.combinations(range(40), 2)]
    assert f": {min(values):.3f}, " in pairs[0] and f": {max(values):.3f}, " in pairs[-1]
    assert pairs[5].startswith("… 770 pairs between these: cosines from ")
    assert len(lines) < 70
    assert len(draw_diagnosis(tasks[:6]).table().splitlines()) > 6 + 15


@pytest.mark.parametrize(
    ("method", "says_lacking"), [("average", False), ("magmax", False), ("tunable_magmax", True)]
)
def test_quotas_are_spoken_of_where_the_method_has_them(method, says_lacking):
    found = draw_diagnosis(["a", "b", "c", "d"], method=method)
    assert (found.whole.lacking_shares > THRESHOLDS["short"][0]).any()
    assert ("quota" in found.table()) == ("lacking" in found.table()) == says_lacking
    assert ("short" in {finding.rule for finding in found.findings}) == says_lacking


def test_the_method_is_that_of_the_recipe(tmp_path):
    _, planned = write(tmp_path)
    assert diagnose(planned).method == planned.lock.method["name"] == "tunable_magmax"


def test_notes_of_one_kind_are_bounded_and_the_worst_come_first():
    found = draw_diagnosis([f"t{n}" for n in range(40)], method="tunable_magmax")
    short = [finding for finding in found.findings if finding.rule == "short"]
    worst = found.whole.lacking_shares.argmax()
    assert short[0].task == f"t{worst}" and len(short) == 6
    count = (found.whole.lacking_shares > THRESHOLDS["short"][0]).sum()
    assert short[-1].text.startswith(f"{count - 5} more tasks short of the quota, by up to")


def test_of_many_copies_each_is_named_once():
    tasks = tuple(f"t{n}" for n in range(12))
    products = np.full((13, 13), 1.0)
    products[0], products[:, 0], products[0, 0] = 0.0, 0.0, 100.0
    geometry = Geometry(1000, products)
    found = list(find_faults(Evidence(tasks, geometry, geometry, (False,) * 12)))
    assert [finding.task for finding in found] == list(tasks[1:])


def longer(family):
    """Three times as far from the base model as before, in every element."""
    return dict(family["b"]) | {
        name: family["base"][name] + 3 * (value - family["base"][name])
        for name, value in floats(family["b"]).items()
    }


def test_task_vectors_of_uneven_length_are_noted(tmp_path):
    _, planned = write(tmp_path)
    assert "uneven" not in {finding.rule for finding in diagnose(planned).findings}
    _, planned = write(tmp_path, b=longer)
    found = diagnose(planned)
    (note,) = (finding for finding in found.findings if finding.rule == "uneven")
    lengths = dict(zip(found.tasks, found.whole.lengths, strict=True))
    shortest = min(lengths, key=lengths.get)
    assert (note.task, note.is_fault) == ("b", False)
    assert f"of b is {lengths['b'] / lengths[shortest]:.3g} times as long as that of {shortest}" in note.text
    assert 2 < lengths["b"] / lengths[shortest] < 4
    assert "[uneven: the longest task vector is longer than the shortest by more than this factor, 2]" in (
        found.table()
    )


def test_a_task_vector_of_zeros_is_not_the_shortest(tmp_path):
    _, planned = write(tmp_path, b=unchanged)
    assert "uneven" not in {finding.rule for finding in diagnose(planned).findings}


def test_every_form_has_the_numbers_of_tasks_and_of_pairs():
    found = draw_diagnosis(("a", "b", "<c>"), method="tunable_magmax")
    rows = list(csv.DictReader(io.StringIO(found.table("csv"))))
    assert [row["task"] for row in rows] == ["a", "b", "<c>"]
    assert [float(row["cosine with b"]) for row in rows] == pytest.approx(found.whole.cosines[:, 1].tolist())
    ratios = [float(row["length over <c>"]) for row in rows]
    assert ratios == pytest.approx(found.whole.length_ratios[:, 2].tolist())
    assert float(rows[2]["lacking"]) == pytest.approx(found.whole.lacking_shares[2])
    markdown = found.table("markdown")
    assert markdown.startswith(found.verdict) and markdown.count("\n| :---") == 2
    assert f"| a | \\<c\\> | {found.whole.cosines[0, 2]:.3f} |" in markdown
    assert found.table("latex").count("begin{tabular}") == 2
    assert draw_diagnosis(("a",)).table("markdown").count("\n| :---") == 1
    assert found.table() == found.table("text") and found.table().startswith(found.verdict)


def test_the_command_prints_every_form_and_the_files_elsewhere(tmp_path):
    write(tmp_path)
    words = ["diagnose", str(tmp_path / "recipe.yaml"), "--format", "csv"]
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert [row["task"] for row in csv.DictReader(io.StringIO(done.stdout))] == list(TASKS)
    assert "wrote" in done.stderr and "recipe.diagnosis.json" in done.stderr


def test_a_nan_is_refused_with_its_place(tmp_path):
    def broken(family):
        tensors = {name: value.clone() for name, value in family["b"].items()}
        tensors["layers.1.in.weight"][3, 2] = torch.nan
        return tensors

    _, planned = write(tmp_path, b=broken)
    with pytest.raises(NonFiniteError, match=r"layers\.1\.in\.weight"):
        diagnose(planned)


def test_the_place_of_a_nan_is_that_in_the_tensor_whatever_is_looked_at_together(tmp_path):
    def broken(family):
        tensors = {name: value.clone() for name, value in family["b"].items()}
        tensors["embed.weight"].view(-1)[130] = torch.nan
        return tensors

    _, planned = write(tmp_path, b=broken)
    with pytest.raises(NonFiniteError, match=r"element 130 is nan"):
        diagnose(planned, sample=Sample(64, 64, 32, 1))


def test_what_is_stored_is_read_again(tmp_path):
    _, planned = write(tmp_path, b=swapped)
    found = diagnose(planned)
    (tmp_path / "diagnosis.json").write_text(found.to_json())
    again = read_diagnosis(tmp_path / "diagnosis.json")
    assert again == found and again.findings == found.findings
    (tmp_path / "diagnosis.json").write_text("{}")
    with pytest.raises(OutputError, match="not a diagnosis"):
        read_diagnosis(tmp_path / "diagnosis.json")


def test_every_rule_that_is_applied_is_stated(tmp_path):
    _, planned = write(tmp_path, b=scaled, c=copied)
    for finding in diagnose(planned).findings:
        assert finding.rule in {*THRESHOLDS, "unchanged"}


def test_the_command_writes_numbers_and_picture_and_the_card_shows_them(tmp_path):
    write(tmp_path, b=unchanged)
    recipe = tmp_path / "recipe.yaml"
    done = CliRunner().invoke(main, ["diagnose", str(recipe), "--json"], catch_exceptions=False)
    assert json.loads(done.stdout)["findings"][0]["rule"] == "unchanged"
    assert (tmp_path / "recipe.diagnosis.png").read_bytes().startswith(b"\x89PNG")
    accepted = ["--in-spite-of", "unchanged:b"]
    done = CliRunner().invoke(main, ["run", str(recipe), *accepted], catch_exceptions=False)
    assert done.exit_code == 0
    assert "Appendix" not in (tmp_path / "merged" / "README.md").read_text()
    done = CliRunner().invoke(main, ["diagnose", str(recipe)], catch_exceptions=False)
    assert "FAULT: b is the base model, unchanged" in done.stdout
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "Do not merge before looking at `b`." in card
    assert "- Fault: `b is the base model, unchanged: its task vector is zero, and" in card
    assert "its share of the merge stays the base model's` (unchanged)." in card
    assert (
        CliRunner().invoke(main, ["verify", str(tmp_path / "merged")], catch_exceptions=False).exit_code == 0
    )


def test_hostile_names_in_a_diagnosis_stay_inert(tmp_path):
    _, planned = write(tmp_path)
    found = diagnose(planned)
    text = "](http://evil.example) <script> | `\u202e"
    hostile = replace(found, tasks=(text, *found.tasks[1:]), unchanged=(found.num_tensors, 0, 0, 0))
    card = render_card(make_recipe(), make_lock(), make_report(), beside=Beside(diagnosis=hostile))
    appendix = card.split("## Appendix")[1]
    assert "\u202e" not in appendix and "Do not merge before looking at `](http" in appendix
    assert "| `](http://evil.example) <script> ⟨U+007C⟩ ⟨U+0060⟩⟨U+202E⟩` |" in appendix


@pytest.mark.parametrize("num_tasks", [1, 2, 6, 20])
def test_no_label_of_the_heat_map_overlaps_another_or_leaves_the_picture(tmp_path, num_tasks):
    _, planned = write(tmp_path)
    found = diagnose(planned)
    layer = found.layers[1]
    matrix = tuple((0.5,) * (num_tasks + 1) for _ in range(num_tasks + 1))
    inner = tuple((0.5,) * num_tasks for _ in range(num_tasks))
    row = (1.0,) * num_tasks
    wide = replace(
        layer,
        products=matrix,
        agreeing=inner,
        shared=inner,
        changed=row,
        wins=row,
        lacking=row,
        num_elements=10**10,
    )
    layers = tuple(replace(wide, name=f"a.very.long.name.{'W' * 30}.layers.{n}") for n in range(45))
    tasks = tuple(f"{n:02d}{'W' * 30}" for n in range(num_tasks))
    figure = cosines_figure(replace(found, tasks=tasks, layers=layers))
    figure.canvas.draw()
    placed = texts(figure)
    assert len(placed) > 20 + num_tasks
    for text, box in placed:
        assert figure.bbox.x0 - 1 <= box.x0 and box.x1 <= figure.bbox.x1 + 1, text
        assert figure.bbox.y0 - 1 <= box.y0 and box.y1 <= figure.bbox.y1 + 1, text
    for (first, box), (second, other) in itertools.combinations(placed, 2):
        assert not box.overlaps(other), (first, second)


def test_checkpoints_on_the_hub_are_diagnosed_alike(tmp_path, hub):
    _, planned = write(tmp_path, b=swapped)
    for name in ("base", *TASKS):
        hub.add_repo(f"me/diagnosed-{name}", folder=tmp_path / name)
    values = planned.recipe.to_dict() | {
        "base_model": "me/diagnosed-base",
        "tasks": [{"name": task, "model": f"me/diagnosed-{task}"} for task in TASKS],
    }
    recipe = parse_recipe(values)
    here, there = diagnose(planned), diagnose(plan(recipe, lock(recipe)))
    assert replace(there, seconds=here.seconds) == here
