"""Selections: which task each element is from, in place of weights, and the weights made of them again."""

import contextlib
import json
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hub_magmax.checkpoints.opening import open_inputs
from hub_magmax.checkpoints.storage.local import LocalSource
from hub_magmax.errors import (
    CheckpointError,
    HubMagmaxError,
    LockError,
    OutputError,
    RecipeError,
    SourceError,
)
from hub_magmax.fleet.applying import apply
from hub_magmax.fleet.history import history
from hub_magmax.fleet.rebuilding import rebuild
from hub_magmax.fleet.verifying import verify
from hub_magmax.merging.execution import make_shards, merge
from hub_magmax.merging.output.folder import PartialFolder
from hub_magmax.merging.selections.coding import CodeError, decode, encode
from hub_magmax.merging.selections.files import StoredSelection
from hub_magmax.merging.sites import merge_sites
from hub_magmax.pipeline import lock, plan, run
from hub_magmax.planning.selections import selection_bytes
from hub_magmax.processes import Processes
from hub_magmax.publishing.pushing import push
from hub_magmax.recipe.loading import parse_recipe
from tests.families import SHAPES, accepted, recipe_values, write_checkpoint, write_family
from tests.test_checkpoints_adapter import write_adapter
from tests.test_cli import call
from tests.test_fleet_rebuilding import tell_in_report

METHODS = {
    "magmax": {"name": "magmax"},
    "algorithm-1": {"name": "tunable_magmax"},
    "top-n": {"name": "tunable_magmax", "selection": "top-n"},
    "algorithm-1-model": {"name": "tunable_magmax", "scope": "model"},
    "top-n-model": {"name": "tunable_magmax", "selection": "top-n", "scope": "model"},
    "random_mix": {"name": "random_mix"},
}
PREFERENCE = {"weights": {"a": 0.7, "b": 0.3}}
#: One tensor is longer than a block of codes.
LONG = {**SHAPES, "long": (300, 250)}


def planned(folder, form, path, names="abc", output=None, **values):
    changes = {"path": path, "format": form, **(output or {})}
    recipe = parse_recipe(recipe_values(names, output=changes, **values), folder=folder)
    return accepted(plan(recipe, lock(recipe)))


def weights(report):
    return {shard.file: shard.sha256 for shard in report.shards}


@pytest.fixture
def selected(family):
    """A selection of the family in several files, and the report of the same merge of whole weights."""
    values = {"output": {"shard_size": "600B"}, "method": "magmax"}
    merge(planned(family, "selection", "sel", **values))
    return merge(planned(family, "weights", "whole", **values))


# Coding.


def test_codes_list_the_values_that_occur_and_then_their_digits():
    assert encode(np.array([], np.uint8)) == b"\x00"
    assert encode(np.array([5, 5, 5], np.uint8)) == b"\x01\x05"
    code = encode(np.array([7, 3, 7], np.uint8))
    assert code[:3] == b"\x02\x03\x07"
    assert zlib.decompress(code[3:], -15) == bytes([0b101])  # the first digit is the lowest


@given(st.integers(1, 255), st.integers(0, 2000), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_choices_are_what_they_were_coded_of(num_tasks, count, seed):
    choices = np.random.default_rng(seed).integers(0, num_tasks, count).astype(np.uint8)
    assert np.array_equal(decode(encode(choices), count), choices)


@pytest.mark.parametrize("num_tasks", [2, 3, 5, 8, 20])
@pytest.mark.parametrize("ratio", [1.0, 0.7])
def test_codes_take_little_more_than_the_entropy(num_tasks, ratio):
    shares = ratio ** np.arange(num_tasks)
    shares /= shares.sum()
    choices = np.random.default_rng(0).choice(num_tasks, 2**16, p=shares).astype(np.uint8)
    entropy = -(shares * np.log2(shares)).sum()
    assert 8 * len(encode(choices)) / len(choices) < 1.035 * entropy


@given(st.binary(max_size=60), st.integers(0, 300))
@settings(max_examples=200, deadline=None)
def test_bytes_that_are_no_code_are_refused_or_stand_for_as_many_choices(content, count):
    with contextlib.suppress(CodeError):
        assert len(decode(content, count)) == count


def test_a_code_that_unfolds_to_more_than_it_should_is_refused():
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = b"\x02\x00\x01" + deflate.compress(bytes(10**7)) + deflate.flush()
    with pytest.raises(CodeError):
        decode(bomb, 100)


# Weights made again.


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        *((method, torch.bfloat16) for method in METHODS),
        *(("magmax", dtype) for dtype in (torch.float32, torch.float64)),
        ("top-n-model", torch.float32),
    ],
    ids=str,
)
def test_weights_are_made_again_byte_for_byte(tmp_path, method, dtype):
    write_family(tmp_path, "abc", shapes=LONG, dtype=dtype)
    values = {"method": METHODS[method], "preference": PREFERENCE, "output": {"shard_size": "100KB"}}
    whole = merge(planned(tmp_path, "weights", "whole", **values))
    made = planned(tmp_path, "selection", "sel", **values)
    report = merge(made)
    again = apply(str(tmp_path / "sel"), tmp_path / "again", folder=tmp_path)
    assert weights(again) == weights(whole)
    assert report.shares == whole.shares
    assert len(report.shards) > 1
    assert report.bytes_out < selection_bytes(made) + 3000 * len(report.shards)
    assert verify(str(tmp_path / "again"))
    files = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {path.name for path in (tmp_path / "again").iterdir()} == files


@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
def test_weights_of_another_dtype_are_made_again(tmp_path, asked):
    write_family(tmp_path, "ab", dtype=torch.float16)
    values = {"output": {"dtype": asked}, "method": "random_mix", "seed": 3}
    whole = merge(planned(tmp_path, "weights", "whole", "ab", **values))
    merge(planned(tmp_path, "selection", "sel", "ab", **values))
    assert weights(apply(str(tmp_path / "sel"), tmp_path / "again", folder=tmp_path)) == weights(whole)


def test_choices_are_the_first_task_that_gives_the_value_where_tasks_differ(tmp_path):
    base = torch.zeros(6)
    write_checkpoint(tmp_path / "base", {"w": base})
    moved = {
        "a": [0.0, 1.0, 1.0, 2.0, 0.0, 4.0],
        "b": [0.0, 1.0, -1.0, 1.0, 3.0, 4.0],
        "c": [0.0, 1.0, 1.0, 2.0, 3.0, 5.0],
    }
    for name, values in moved.items():
        write_checkpoint(tmp_path / name, {"w": torch.tensor(values)})
    merge(planned(tmp_path, "selection", "sel", method="magmax"))
    stored = StoredSelection.of(LocalSource(tmp_path / "sel")).choices("w")
    # The first two are the same for all tasks. MAGMAX takes c of the others, and a or b give its value too.
    is_open = np.array([False, False, True, True, True, True])
    assert stored.next(is_open, 3).tolist() == [0, 0, 0, 0, 1, 2]


def test_choices_are_those_of_a_slow_oracle(tmp_path):
    tensors = write_family(tmp_path, "abc", dtype=torch.bfloat16)
    merge(planned(tmp_path, "selection", "sel", method={"name": "tunable_magmax", "scaling": 0.7}))
    whole = merge(planned(tmp_path, "weights", "whole", method={"name": "tunable_magmax", "scaling": 0.7}))
    merged = load_file(tmp_path / "whole" / whole.shards[0].file)
    selection = StoredSelection.of(LocalSource(tmp_path / "sel"))
    assert {*selection.tensors} == {*SHAPES}
    for name in SHAPES:
        base = tensors["base"][name].float()
        by_task = [
            (base + (tensors[task][name].float() - base) * 0.7).bfloat16().reshape(-1).tolist()
            for task in "abc"
        ]
        expected, is_open = [], []
        for value, *given_by in zip(merged[name].reshape(-1).tolist(), *by_task, strict=True):
            is_open.append(len({*given_by}) > 1)
            expected.append(given_by.index(value) if is_open[-1] else 0)
        assert selection.choices(name).next(np.array(is_open), 3).tolist() == expected


def test_the_folder_holds_nothing_that_loads_as_weights(family, selected):
    names = {path.name for path in (family / "sel").iterdir()}
    files = {f"model-0000{number}-of-00004.selection" for number in (1, 2, 3, 4)}
    beside = {"recipe.yaml", "recipe.lock.json", "provenance.json", "merge_report.json"}
    assert names == files | beside
    recipe = parse_recipe(recipe_values("ab", base_model="./sel"), folder=family)
    with pytest.raises(CheckpointError, match="holds no weights") as caught:
        lock(recipe)
    assert "hub-magmax apply" in caught.value.hint


@pytest.mark.parametrize("chunk", [None, 2**15, 2**17])
def test_chunks_and_processes_change_no_byte(tmp_path, chunk):
    write_family(tmp_path, "abc", shapes=LONG)
    values = {"output": {"shard_size": "100KB"}, "method": "magmax"}
    expected = weights(merge(planned(tmp_path, "selection", "one", **values)))
    made = planned(tmp_path, "selection", "two", **values)
    for rank in (1, 0):
        merge_of(made, rank, chunk)
    assert {name: verify(str(tmp_path / "two"))[name] for name in expected} == expected


def merge_of(made, rank, chunk):
    """Make the part of one of two processes; the last one, which is the first, publishes."""
    if rank == 0:
        return merge(made, chunk_elements=chunk)
    place = PartialFolder(made.recipe.output_path, made.digest)
    place.prepare()
    with open_inputs(made.recipe, made.lock) as sources:
        make_shards(made, sources, place, place.journal, None, chunk, Processes(rank, 2))
    place.release()
    return None


def test_an_interrupted_selection_and_its_weights_go_on(tmp_path):
    write_family(tmp_path, "abc", shapes=LONG)
    values = {"output": {"shard_size": "100KB"}, "method": "magmax"}
    whole = merge(planned(tmp_path, "weights", "whole", **values))
    expected = weights(merge(planned(tmp_path, "selection", "at_once", **values)))
    made, done = planned(tmp_path, "selection", "sel", **values), []

    def interrupt(num_bytes):
        done.append(num_bytes)
        if len(done) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(made, progress=interrupt)
    assert not (tmp_path / "sel").exists()
    assert weights(merge(made)) == expected
    assert not list(tmp_path.glob("*.partial"))

    class Stopped:
        def __init__(self, *_):
            self.count = 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def __call__(self, num_bytes):
            self.count += 1
            if self.count == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply(str(tmp_path / "sel"), tmp_path / "again", folder=tmp_path, progress=Stopped)
    assert not (tmp_path / "again").exists()
    assert weights(apply(str(tmp_path / "sel"), tmp_path / "again", folder=tmp_path)) == weights(whole)


def test_sites_get_selections_of_their_own(tmp_path):
    write_family(tmp_path, "abc")
    plans = {
        f"{form}-{number}": planned(
            tmp_path, form, f"out/{form}-{number}", preference={"weights": {"a": share, "b": 1 - share}}
        )
        for number, share in enumerate((0.2, 0.9))
        for form in ("weights", "selection")
    }
    reports = merge_sites(plans)
    for number in (0, 1):
        again = apply(
            str(tmp_path / f"out/selection-{number}"), tmp_path / f"again-{number}", folder=tmp_path
        )
        assert weights(again) == weights(reports[f"weights-{number}"])


def test_adapters_count_as_the_checkpoints_that_they_stand_for(tmp_path):
    shapes = {f"m.layers.{n}.{p}.weight": (24, 16) for n in range(2) for p in "qk"}
    base = write_family(tmp_path, (), shapes=shapes)["base"]
    for seed, name in enumerate("ab"):
        write_adapter(tmp_path / name, base, ("q",), seed)
    whole = merge(planned(tmp_path, "weights", "whole", "ab"))
    merge(planned(tmp_path, "selection", "sel", "ab"))
    assert weights(apply(str(tmp_path / "sel"), tmp_path / "again", folder=tmp_path)) == weights(whole)


def test_tensors_that_rules_copy_or_merge_by_other_numbers_are_made_again(family):
    rules = [
        {"match": "embed.*", "take": "a"},
        {"match": "layer.1.*", "scaling": 0.25, "weights": {"c": 1}},
    ]
    whole = merge(planned(family, "weights", "whole", tensors=rules))
    made = planned(family, "selection", "sel", tensors=rules)
    merge(made)
    assert {job.name for job in made.jobs} == {"layer.0.weight", "layer.0.bias", "layer.1.weight", "scale"}
    assert weights(apply(str(family / "sel"), family / "again", folder=family)) == weights(whole)


# What cannot be made again is refused.


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_file_that_was_changed_is_refused_by_name(family, selected, damage):
    path = family / "sel" / "model-00002-of-00004.selection"
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if damage == "flip" else content[:-1])
    with pytest.raises(OutputError, match=path.name):
        apply(str(family / "sel"), family / "again", folder=family)
    assert not (family / "again").exists()


def test_whatever_byte_is_changed_in_file_and_report_gives_no_other_weights(family, selected):
    path = max((family / "sel").glob("*.selection"), key=lambda path: path.stat().st_size)
    content = path.read_bytes()
    places = np.random.default_rng(0).choice(len(content), 12, replace=False)
    for number, place in enumerate(places.tolist()):
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << number % 8)]) + content[place + 1 :])
        tell_in_report(family / "sel", path.name)
        try:
            again = apply(str(family / "sel"), family / f"again-{number}", folder=family)
        except HubMagmaxError as error:
            assert error.where
            assert not (family / f"again-{number}").exists()
        else:
            assert weights(again) == weights(selected)


@pytest.mark.parametrize(
    "own", [{"version": 2, "sha256": {}}, {"version": 1}, {"version": 1, "sha256": {}}, [], "text"]
)
def test_a_header_of_another_kind_is_refused(family, selected, own):
    path = max((family / "sel").glob("*.selection"), key=lambda path: path.stat().st_size)
    save_file(load_file(path), path, metadata={"hub_magmax_selection": json.dumps(own)})
    tell_in_report(family / "sel", path.name)
    with pytest.raises(CheckpointError, match="does not describe a selection of this version"):
        apply(str(family / "sel"), family / "again", folder=family)


def test_a_header_with_half_of_a_character_is_refused(family, selected):
    path = max((family / "sel").glob("*.selection"), key=lambda path: path.stat().st_size)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"]["hub_magmax_selection"] = "\ud800"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    tell_in_report(family / "sel", path.name)
    with pytest.raises(CheckpointError, match="does not describe a selection"):
        apply(str(family / "sel"), family / "again", folder=family)


def test_choices_of_another_merge_are_refused_though_all_hashes_fit(family, selected):
    values = {"output": {"shard_size": "600B"}, "method": "tunable_magmax"}
    other = merge(planned(family, "selection", "other", **values))
    for shard in other.shards:
        (family / "sel" / shard.file).write_bytes((family / "other" / shard.file).read_bytes())
        tell_in_report(family / "sel", shard.file)
    with pytest.raises(LockError, match="of another merge than the lock"):
        apply(str(family / "sel"), family / "again", folder=family)


@pytest.mark.parametrize(("output", "told"), [("", "no name"), ("sel/inside", "lies in the selection")])
def test_an_output_without_a_name_or_in_the_selection_is_refused(family, selected, output, told):
    with pytest.raises(HubMagmaxError, match=told):
        apply(str(family / "sel"), str(family / output) if output else output, folder=family)
    assert not (family / "sel" / "inside").exists()


def test_checkpoints_whose_values_changed_are_refused(family, selected):
    tensors = load_file(family / "b" / "model.safetensors")
    tensors["layer.1.weight"] += 1
    save_file(tensors, family / "b" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LockError, match="so a checkpoint changed since") as caught:
        apply(str(family / "sel"), family / "again", folder=family)
    assert caught.value.where == "./base, ./a, ./b and ./c, tensor 'layer.1.weight'", (
        "the selection is as it was"
    )
    assert f"`hub-magmax verify {family / 'sel'}`" in caught.value.hint
    assert not (family / "again").exists()


@pytest.mark.parametrize("verb", ["apply", "verify"])
@pytest.mark.parametrize("name", ["recipe.lock.json", "recipe.yaml"])
def test_a_damaged_lock_or_recipe_is_named_by_its_place(family, selected, verb, name):
    path = family / "sel" / name
    path.write_bytes(path.read_bytes().replace(b"magmax", b"magmix"))
    words = ("apply", "--out", str(family / "again")) if verb == "apply" else ("verify", "--rebuild")
    tell_in_report(family / "sel", name)
    code, _, said = call(words[0], str(family / "sel"), *words[1:], "--from", str(family))
    assert code == 1 and f"{family / 'sel'}, {name}" in said and "hub_magmax_" not in said


def test_checkpoints_that_are_not_there_are_named(family, selected, tmp_path):
    with pytest.raises(SourceError, match="--from FOLDER"):
        apply(str(family / "sel"), tmp_path / "again", folder=tmp_path / "elsewhere")


def test_whole_weights_have_nothing_to_apply(family, selected):
    with pytest.raises(OutputError, match="has its weights"):
        apply(str(family / "whole"), family / "again", folder=family)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"method": "ties"}, "ties does not take every element from one task"),
        ({"output": {"keep": False, "push_to_hub": "me/x"}}, "made in a folder"),
        (
            {"evaluation": {"evaluator": "causal-lm", "tasks": {"a": {"dataset": "./x.csv"}}}},
            "no weights that could be scored",
        ),
    ],
)
def test_what_gives_no_selection_is_refused(family, values, told):
    output = {"format": "selection", **values.get("output", {})}
    with pytest.raises(RecipeError, match=told):
        parse_recipe(recipe_values(**{**values, "output": output}), folder=family)


# Verified, published, described.


def test_a_selection_is_merged_again_and_compared(family, selected):
    assert rebuild(str(family / "sel"), folder=family).shards
    digest = StoredSelection.of(LocalSource(family / "sel")).digests["layer.1.weight"].encode()
    path = next(path for path in (family / "sel").glob("*.selection") if digest in path.read_bytes())
    path.write_bytes(path.read_bytes().replace(digest, digest[::-1]))
    tell_in_report(family / "sel", path.name)
    with pytest.raises(OutputError, match="is not what the recipe and lock give") as caught:
        rebuild(str(family / "sel"), folder=family)
    assert "'layer.1.weight'" in str(caught.value)


def test_history_tells_selections_apart(hub, family):
    for number, method in enumerate(("magmax", "tunable_magmax")):
        merge(planned(family, "selection", f"told-{number}", method=method))
        push(family / f"told-{number}", "me/selections-told-apart")
    found = [revision.weights for revision in history("me/selections-told-apart") if revision.weights]
    assert len({*found}) == len(found) == 2


def test_a_pushed_selection_is_applied_from_the_hub(hub, tmp_path):
    write_family(tmp_path, "ab")
    for name in ("base", "a", "b"):
        hub.add_repo(f"me/selections-{name}", folder=tmp_path / name)
    tasks = [{"name": name, "model": f"me/selections-{name}"} for name in "ab"]
    values = {"base_model": "me/selections-base", "tasks": tasks}
    whole = merge(planned(tmp_path, "weights", "whole", **values))
    push(tmp_path / "whole", "me/selections-merged")
    recipe = planned(tmp_path, "selection", "sel", **values).recipe
    done = run(recipe, in_spite_of=("different-base",))
    assert done.report.opened == {"library": "", "result": "not tried: a selection holds no weights"}
    push(tmp_path / "sel", "me/selections-merged")
    assert not {"model.safetensors", "config.json"} & {*hub.files("me/selections-merged")}
    assert weights(apply("me/selections-merged", tmp_path / "again")) == weights(whole)
    assert verify("me/selections-merged")


def test_the_card_says_that_there_are_no_weights(family):
    recipe = planned(family, "selection", "sel", method="magmax").recipe
    run(recipe, in_spite_of=[f.name for f in planned(family, "selection", "sel", method="magmax").findings])
    card = (family / "sel" / "README.md").read_text()
    assert "which task each element is taken from, and no weights" in card
    assert 'hm.apply("sel", "weights")' in card
    assert "library_name" not in card
