import hashlib
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import golden_cases
from hub_magmax.checkpoints.source import MemorySource
from hub_magmax.errors import LockError, MismatchError, NonFiniteError, OutputError
from hub_magmax.kernels.backend import Backend
from hub_magmax.kernels.compiled.backend import Compiled
from hub_magmax.kernels.device import Device
from hub_magmax.kernels.reference import Reference
from hub_magmax.merging.execution import merge
from hub_magmax.merging.output.report import MergeReport, read_report
from hub_magmax.merging.tensors import merge_tensors
from hub_magmax.methods import get_method, method_names
from hub_magmax.pipeline import lock, plan
from hub_magmax.planning import budget
from hub_magmax.planning.process_memory import beside_bytes, runtime_bytes
from hub_magmax.planning.summary import describe
from hub_magmax.recipe.loading import load_recipe
from hub_magmax.recipe.schema import Recipe
from tests.families import accepted, make_tensors, read_merged, write_checkpoint, write_family, write_recipe

OF_MATRICES = ("tsv", "iso_c", "iso_cts", "cart", "wudi", "actmat", "opcm")
METHODS = [
    "agreement",
    "average",
    "task_arithmetic",
    {"name": "ties", "density": 0.4},
    {"name": "ties", "density": 0.4, "rescale": "norm"},
    "dare",
    {"name": "dare_ties", "density": 0.4},
    {"name": "breadcrumbs", "density": 0.4, "outliers": 0.1},
    {"name": "breadcrumbs_ties", "density": 0.4, "outliers": 0.1},
    {"name": "della", "density": 0.6, "epsilon": 0.3},
    {"name": "della_linear", "density": 0.6, "rescale": "norm"},
    {"name": "sce", "density": 0.6},
    {"name": "pcb", "density": 0.3},
    {"name": "localize_stitch", "density": 0.4},
    {"name": "ram", "epsilon": 0.05},
    {"name": "ram_plus", "epsilon": 0.05},
    {"name": "nearswap", "limit": 0.05},
    "random_mix",
    "single_task",
    "last_task",
    "magmax",
    *OF_MATRICES,
    "tunable_magmax",
    {"name": "tunable_magmax", "selection": "top-n"},
    {"name": "ties", "density": 0.4, "scope": "model"},
    {"name": "ties", "density": 0.4, "rescale": "norm", "scope": "model"},
    {"name": "breadcrumbs", "density": 0.4, "outliers": 0.1, "scope": "model"},
    {"name": "breadcrumbs_ties", "density": 0.4, "consensus": "sum", "scope": "model"},
    {"name": "localize_stitch", "scope": "model"},
    {"name": "pcb", "scope": "model"},
    {"name": "ram_plus", "epsilon": 0.05, "scope": "model"},
    {"name": "tunable_magmax", "scope": "model"},
    {"name": "tunable_magmax", "selection": "top-n", "scope": "model"},
]
PREFERENCE = {"weights": {"a": 0.6, "b": 0.3, "c": 0.1}}


def merged(
    folder: Path,
    to: str = "merged",
    *,
    chunk_elements: int | None = 2**18,
    progress: Callable[[int], None] | None = None,
    backend: Backend | None = None,
    **changes: object,
) -> MergeReport:
    changes = {"preference": PREFERENCE, **changes}
    changes["output"] = {"path": to, **changes.get("output", {})}  # type: ignore[dict-item]
    made = plan(load_recipe(write_recipe(folder, **changes)))
    return merge(made, chunk_elements=chunk_elements, progress=progress, backend=backend)


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.safetensors"))}


def test_every_built_in_method_is_tested_here_or_by_the_stored_merges():
    here = {m if isinstance(m, str) else m["name"] for m in METHODS}
    stored = {m["name"] for m in (*golden_cases.METHODS.values(), *golden_cases.ALIKE.values())}
    stored |= {m["name"] for m in golden_cases.OF_DATA.values()}
    assert here | stored == set(method_names())


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_merge_is_base_plus_scaled_merged_task_vector(family, method):
    merged(family, method=method, seed=3)
    values = method if isinstance(method, dict) else {"name": method}
    options = {key: value for key, value in values.items() if key != "name"}
    scaling = get_method(values["name"]).scaling
    base = read_merged(family / "base")
    tasks = [read_merged(family / name) for name in "abc"]
    found = read_merged(family / "merged")
    vectors = {
        name: torch.stack([task[name] - tensor for task in tasks])
        for name, tensor in base.items()
        if tensor.is_floating_point()
    }

    def update(name: str, task_vectors: torch.Tensor) -> torch.Tensor:
        return merge_tensors(
            task_vectors, preference=(0.6, 0.3, 0.1), method=values["name"], seed=3, name=name, **options
        )

    if options.get("scope") == "model":
        joined = torch.cat([task_vectors.reshape(3, -1) for task_vectors in vectors.values()], dim=1)
        sizes = [task_vectors[0].numel() for task_vectors in vectors.values()]
        updates = dict(zip(vectors, update("the whole model", joined).split(sizes), strict=True))
    else:
        updates = {name: update(name, task_vectors) for name, task_vectors in vectors.items()}
    for name, tensor in base.items():
        expected = tensor
        if name in updates:
            expected = tensor + scaling * updates[name].view(tensor.shape)
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_chunk_size_does_not_change_a_byte(tmp_path, method, dtype):
    shapes = {"embed.weight": (20, 8), "layer.0.weight": (9, 8), "layer.0.bias": (9,), "scale": ()}
    write_family(tmp_path, "abc", dtype=dtype, shapes=shapes)
    expected = merged(tmp_path, "whole", method=method).shards
    # Of single elements are hundreds of chunks.
    sizes = (1, 7, 64) if dtype == torch.float32 and method not in OF_MATRICES else (7,)
    for chunk_elements in sizes:
        assert (
            merged(tmp_path, f"by{chunk_elements}", method=method, chunk_elements=chunk_elements).shards
            == expected
        )


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_layout_of_inputs_and_output_does_not_change_a_tensor(tmp_path, method):
    write_family(tmp_path, "abc")
    merged(tmp_path, "one", method=method)
    merged(tmp_path, "many", method=method, output={"shard_size": "600B"})
    write_family(tmp_path / "split", "abc", num_shards=3)
    merged(tmp_path / "split", "one", method=method)
    expected = read_merged(tmp_path / "one")
    assert len(hashes(tmp_path / "many")) > 1
    # Draws for the whole model are by the order of its tensors, which is another one in other files.
    draws_for_all = isinstance(method, dict) and method.get("scope") == "model" and "selection" not in method
    for folder in (tmp_path / "many", *([] if draws_for_all else [tmp_path / "split" / "one"])):
        found = read_merged(folder)
        assert found.keys() == expected.keys()
        assert all(found[name].equal(expected[name]) for name in expected)


def test_two_runs_give_the_same_files(family):
    first, second = merged(family, "first"), merged(family, "second")
    assert first.shards == second.shards
    assert first.digest == second.digest
    assert hashes(family / "first") == hashes(family / "second") == {s.file: s.sha256 for s in first.shards}


def test_seed_changes_the_draw(family):
    assert merged(family, "first", seed=1).shards != merged(family, "second", seed=2).shards


@pytest.mark.parametrize(
    "method", ["average", "random_mix", "single_task", "tunable_magmax", "ties", "dare_ties"]
)
def test_one_hot_preference_at_scaling_one_returns_that_checkpoint(family, method):
    values = {"name": method, "scaling": 1.0} | ({"density": 1.0} if "ties" in method else {})
    merged(family, method=values, preference={"weights": {"b": 1}})
    found, expected = read_merged(family / "merged"), read_merged(family / "b")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


def test_unchanged_tensors_keep_the_base_models_bytes(tmp_path):
    base = {"w": torch.tensor([-0.0, 0.0, 1.5, -2.5], dtype=torch.bfloat16)}
    for seed, name in enumerate(("base", "a", "b", "c")):
        write_checkpoint(tmp_path / name, base | make_tensors(seed, shapes={"other": (2,)}))
    merged(tmp_path)
    found = load_file(tmp_path / "merged" / "model.safetensors")["w"]
    assert found.view(torch.int16).equal(base["w"].view(torch.int16))


def test_realised_shares_are_the_preference_to_the_element(tmp_path):
    write_family(tmp_path, "abc", shapes={"w": (1000,), "v": (10, 10)})
    report = merged(tmp_path)
    assert report.shares == pytest.approx({"a": 0.6, "b": 0.3, "c": 0.1})
    assert report.elements_merged == 1100


def test_methods_that_mix_values_have_no_shares(family):
    assert merged(family, method="average").shares == {}


def test_output_is_complete(family):
    report = merged(family, output={"shard_size": "1KB"})
    folder = family / "merged"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.file for shard in report.shards}
    names = {path.name for path in folder.iterdir()}
    expected = {
        "config.json",
        "recipe.yaml",
        "recipe.lock.json",
        "merge_report.json",
        "model.safetensors.index.json",
        "provenance.json",
    }
    assert names == expected | {shard.file for shard in report.shards}
    assert read_report(folder / "merge_report.json") == report
    assert not list(family.glob("*.partial"))


def test_files_beside_the_weights_come_from_the_named_task(family):
    (family / "b" / "config.json").write_text('{"model_type": "test", "of": "b"}')
    (family / "b" / "tokenizer.json").write_text("{}")
    (family / "b" / "training.bin").write_bytes(b"not for others")
    merged(family, output={"files_from": "b"})
    assert json.loads((family / "merged" / "config.json").read_text()) == {"model_type": "test", "of": "b"}
    assert (family / "merged" / "tokenizer.json").is_file()
    assert not (family / "merged" / "training.bin").exists()


def test_output_dtype_is_cast_once(tmp_path):
    family = write_family(tmp_path, "abc")
    merged(tmp_path, method="last_task", output={"dtype": "bfloat16"})
    found = read_merged(tmp_path / "merged")
    base, last = family["base"]["embed.weight"], family["c"]["embed.weight"]
    assert found["embed.weight"].equal((base + (last - base)).to(torch.bfloat16))
    assert found["position_ids"].dtype == torch.int64


def test_rule_copies_bytes_and_leaves_out(tmp_path):
    family = write_family(tmp_path, "abc")
    merged(tmp_path, tensors=[{"match": "embed.*", "take": "b"}, {"match": "scale", "take": "nothing"}])
    found = read_merged(tmp_path / "merged")
    assert found["embed.weight"].equal(family["b"]["embed.weight"])
    assert "scale" not in found


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["base", "b"])
def test_number_that_is_not_finite_is_refused_with_its_place(family, value, where):
    tensors = load_file(family / where / "model.safetensors")
    tensors["layer.0.weight"][3, 5] = value
    save_file(tensors, family / where / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError) as caught:
        merged(family)
    assert f"./{where}, model.safetensors, tensor 'layer.0.weight'" in caught.value.where
    assert f"element {3 * 8 + 5} is {value}" in caught.value.what
    assert not (family / "merged").exists()


def test_integers_that_differ_are_refused(family):
    tensors = load_file(family / "b" / "model.safetensors")
    tensors["position_ids"][3] = 99
    save_file(tensors, family / "b" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MismatchError, match="integers differ from the base model's: 'position_ids'"):
        merged(family)
    merged(family, tensors=[{"match": "position_ids", "take": "base_model"}])


def test_output_that_holds_a_model_is_never_touched(family):
    merged(family)
    before = hashes(family / "merged")
    with pytest.raises(OutputError, match="already holds a model"):
        merged(family, seed=9)
    assert hashes(family / "merged") == before


def test_output_that_is_an_input_is_refused(family):
    with pytest.raises(OutputError, match="already holds a model"):
        merged(family, "base")


def test_empty_output_folder_is_used(family):
    (family / "merged").mkdir()
    merged(family)
    assert (family / "merged" / "model.safetensors").is_file()


def test_source_that_changed_since_the_lock_is_refused(family):
    recipe = load_recipe(write_recipe(family))
    locked = lock(recipe)
    write_checkpoint(family / "b", make_tensors(9, shapes={"other": (3,)}))
    with pytest.raises(LockError, match=r"\./b: model\.safetensors changed"):
        plan(recipe, locked)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize(
    "backend", [Compiled(), Device(device=torch.device("cpu"))], ids=["compiled", "device"]
)
def test_every_backend_merges_to_the_same_bytes(family, method, backend):
    expected = merged(family, "expected", method=method, preference=PREFERENCE, backend=Reference())
    found = merged(family, "found", method=method, preference=PREFERENCE, backend=backend)
    assert found.shards == expected.shards


NORM = {"name": "ties", "rescale": "norm"}
OF_FILES = ["tunable_magmax", NORM, {**NORM, "scope": "model"}]


@pytest.mark.parametrize("method", OF_FILES, ids=str)
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_any_number_of_threads_merges_to_the_same_bytes(family, num_threads, method, monkeypatch):
    changes = {"method": method, "output": {"shard_size": "600B"}, "preference": PREFERENCE}
    expected = merged(family, "expected", **changes)
    monkeypatch.setattr("hub_magmax.planning.budget.num_threads", lambda: num_threads)
    found = merged(family, "found", **changes)
    assert found.shards == expected.shards


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("method", OF_FILES, ids=str)
@pytest.mark.parametrize("chunk", [1, 2, 3, 4])
def test_interrupted_merge_goes_on_and_ends_with_the_same_bytes(family, chunk, method):
    changes = {"method": method, "output": {"shard_size": "600B"}, "preference": PREFERENCE}
    made = plan(load_recipe(write_recipe(family, **changes)))
    expected = merge(made, family / "expected").shards
    calls = []

    def interrupt(num_bytes: int) -> None:
        calls.append(num_bytes)
        if len(calls) == chunk:
            raise Interrupted

    with pytest.raises(Interrupted):
        merge(made, family / "merged", progress=interrupt)
    assert not (family / "merged").exists()
    finished = {
        p.name: p.stat().st_mtime_ns for p in (family / "merged.partial" / "model").glob("*.safetensors")
    }
    assert merge(made, family / "merged").shards == expected
    again = {p.name: p.stat().st_mtime_ns for p in (family / "merged").glob("*.safetensors")}
    assert finished.items() <= again.items()
    assert not (family / "merged.partial").exists()


def test_leftovers_of_another_merge_are_not_used(family):
    def interrupt(num_bytes: int) -> None:
        raise Interrupted

    recipe = load_recipe(write_recipe(family, output={"shard_size": "600B"}, seed=1))
    with pytest.raises(Interrupted):
        merge(plan(recipe), progress=interrupt)
    other = merged(family, seed=2, output={"shard_size": "600B"})
    assert other.shards == merged(family, "again", seed=2, output={"shard_size": "600B"}).shards


def test_shards_made_from_an_earlier_version_of_a_checkpoint_are_made_again(family):
    recipe = load_recipe(write_recipe(family, output={"shard_size": "600B"}))
    made = plan(recipe)
    before = merge(made, family / "before").shards
    finished = family / "merged.partial" / "journal" / f"{before[1].file}.json"

    def interrupt(num_bytes: int) -> None:
        if finished.exists():
            raise Interrupted

    with pytest.raises(Interrupted):
        merge(made, progress=interrupt)
    write_checkpoint(family / "b", make_tensors(9))  # as further training would: under the same header
    after = merge(made, family / "after").shards
    assert merge(made).shards == after
    assert before[1].sha256 != after[1].sha256


def test_damaged_finished_shard_is_made_again(family):
    recipe = load_recipe(write_recipe(family, output={"shard_size": "600B"}))
    made = plan(recipe)
    expected = merge(made, family / "expected").shards
    calls = []

    def interrupt(num_bytes: int) -> None:
        calls.append(num_bytes)
        if len(calls) == 4:
            raise Interrupted

    with pytest.raises(Interrupted):
        merge(made, progress=interrupt)
    damaged = min((family / "merged.partial" / "model").glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert merge(made).shards == expected


def test_two_merges_of_one_output_do_not_mix(family):
    from hub_magmax.merging.output.folder import PartialFolder

    first = PartialFolder(family / "merged", "sha256:one")
    first.prepare()
    with pytest.raises(OutputError, match="another process is writing"):
        merged(family)
    first.release()
    merged(family)


def test_merge_from_memory(tmp_path, family):
    tensors = {
        name: read_merged(family / folder)
        for name, folder in zip(("base_model", *"abc"), ("base", *"abc"), strict=True)
    }
    sources = {name: MemorySource.from_tensors(values, name) for name, values in tensors.items()}
    made = plan(load_recipe(write_recipe(family)))
    report = merge(made, tmp_path / "from_memory", sources=sources)
    assert report.shards == merge(made, tmp_path / "from_files").shards


def test_single_task_is_returned_unchanged(tmp_path):
    family = write_family(tmp_path, "a")
    report = merge(
        plan(
            load_recipe(write_recipe(tmp_path, names=("a",), method={"name": "tunable_magmax", "scaling": 1}))
        )
    )
    found = read_merged(tmp_path / "merged")
    assert report.shares == {"a": 1.0}
    torch.testing.assert_close(found["embed.weight"], family["a"]["embed.weight"], rtol=1e-6, atol=1e-6)


def test_report_says_what_was_done(family):
    report = merged(family)
    assert report.plan_digest == plan(load_recipe(family / "recipe.yaml")).digest
    assert report.bytes_in == 4 * sum(
        t.numel() * t.element_size() for t in read_merged(family / "base").values()
    )
    assert report.peak_memory_bytes > 10**7
    assert {"python", "torch", "hub_magmax"} <= report.versions.keys()


def test_recipe_and_lock_in_the_output_make_the_same_model(family):
    report = merged(family)
    from hub_magmax.recipe.lockfile import read_lock

    stored = load_recipe(family / "merged" / "recipe.yaml")
    assert isinstance(stored, Recipe)
    (family / "again.yaml").write_text((family / "merged" / "recipe.yaml").read_text())
    again = plan(load_recipe(family / "again.yaml"), read_lock(family / "merged" / "recipe.lock.json"))
    assert merge(again, family / "again").shards == report.shards


@pytest.mark.parametrize("method", ["average", "magmax"])
def test_merged_value_that_the_output_cannot_hold_is_refused(tmp_path, method):
    write_family(tmp_path, "abc")
    with pytest.raises(NonFiniteError) as caught:
        merged(tmp_path, method={"name": method, "scaling": 1e30}, output={"dtype": "float16"})
    assert "from finite checkpoints" in str(caught.value)
    assert "numbers that float16 can hold" in str(caught.value)
    assert not (tmp_path / "merged").exists()


def test_report_says_where_the_time_went(family):
    report = merged(family, method="magmax")
    assert set(report.profile) == {"compute", "read", "store", "write"}
    assert all(0 <= seconds <= 8 * report.seconds for seconds in report.profile.values())
    assert read_report(family / "merged" / "merge_report.json").profile == report.profile
    assert report.digest == replace(report, profile={}).digest


def odd_family(folder: Path, dtype: torch.dtype, value: float) -> dict[str, object]:
    """Write a family whose copied tensor holds `value` in the checkpoint it is copied from."""
    write_family(folder, "ab")
    for name in ("base", "a", "b"):
        tensors = load_file(folder / name / "model.safetensors")
        mask = torch.ones(40).to(dtype)
        mask[7] = value if name == "a" else 1.0
        save_file(tensors | {"mask": mask}, folder / name / "model.safetensors")
    return {"tasks": [{"name": name, "model": f"./{name}"} for name in "ab"], "preference": None}


COPIED = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", COPIED, ids=str)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_copied_value_that_is_not_finite_is_copied_and_told(tmp_path, dtype, value):
    changes = odd_family(tmp_path, dtype, value) | {"tensors": [{"match": "mask", "take": "a"}]}
    report = merged(tmp_path, chunk_elements=16, **changes)
    notice = "copied as they are, with NaN or infinity among their values: mask of a"
    assert report.notices == (notice,)
    assert read_report(tmp_path / "merged" / "merge_report.json") == report
    found = load_file(tmp_path / "merged" / "model.safetensors")["mask"]
    kept = load_file(tmp_path / "a" / "model.safetensors")["mask"]
    assert found.view(torch.uint8).equal(kept.view(torch.uint8))


def test_copied_values_that_are_finite_are_not_mentioned(tmp_path):
    changes = odd_family(tmp_path, torch.float16, 65504.0) | {"tensors": [{"match": "mask", "take": "a"}]}
    report = merged(tmp_path, **changes)
    assert report.notices == ()
    assert "not_finite" not in report.to_json()


class Slow(MemorySource):
    """Interrupts the process at the third read, and goes on slowly."""

    reads = -100  # and of headers before

    def read_into(self, path, start, buffer):
        Slow.reads += 1
        if Slow.reads == 3:
            os.kill(os.getpid(), signal.SIGINT)  # for the main thread, which waits
        time.sleep(0.02)
        super().read_into(path, start, buffer)


@pytest.mark.parametrize("method", ["magmax", {"name": "ties", "scope": "model"}], ids=["merge", "survey"])
def test_an_interruption_ends_threads_at_their_next_chunk(family, method, monkeypatch):
    made = accepted(plan(load_recipe(write_recipe(family, method=method))))
    files = {name: (family / name / "model.safetensors").read_bytes() for name in ("base", "a", "b", "c")}
    names = dict(zip(made.lock.sources, files, strict=True))
    sources = {name: Slow({"model.safetensors": files[folder]}) for name, folder in names.items()}
    assert all(source.index.tensors for source in sources.values())
    monkeypatch.setattr(Slow, "reads", 0)
    with pytest.raises(KeyboardInterrupt):
        merge(made, sources=sources, chunk_elements=8)
    assert 3 <= Slow.reads < 40, "of 300 and more"
    merge(made, sources=sources, chunk_elements=800)  # goes on, and is not interrupted again
    assert (family / "merged").is_dir()


def test_notice_about_copied_values_survives_an_interruption(tmp_path, monkeypatch):
    changes = odd_family(tmp_path, torch.float32, float("inf")) | {
        "tensors": [{"match": "mask", "take": "a"}]
    }
    made = plan(load_recipe(write_recipe(tmp_path, **changes)))

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("hub_magmax.merging.execution.write_beside_weights", interrupt)
    with pytest.raises(KeyboardInterrupt):
        merge(made)
    monkeypatch.undo()
    assert merge(made).notices == merge(made, tmp_path / "at_once").notices != ()


def test_finite_value_that_the_outputs_dtype_cannot_hold_is_no_copy(tmp_path):
    changes = odd_family(tmp_path, torch.float32, 1e30) | {"tensors": [{"match": "mask", "take": "a"}]}
    with pytest.raises(NonFiniteError, match=r"element 7 is 1\.0\d*e\+30.*numbers that float16 can hold"):
        merged(tmp_path, chunk_elements=4, output={"dtype": "float16"}, **changes)
    assert not (tmp_path / "merged").exists()


def test_a_limit_of_memory_changes_no_byte(family, monkeypatch):
    monkeypatch.setattr(budget, "CHUNK_ELEMENTS", 64)
    monkeypatch.setattr(budget, "LEAST_CHUNK_ELEMENTS", 4)
    monkeypatch.setattr("hub_magmax.planning.budget.num_threads", lambda: 2)
    merged(family, "free", chunk_elements=None, method="magmax")
    # Three tasks take 52 bytes per element of a chunk: room for two threads with 8 elements each.
    made = plan(load_recipe(write_recipe(family, method="magmax")))
    limit = runtime_bytes(made) + beside_bytes(made) + 900
    merged(family, "bound", chunk_elements=None, method="magmax", output={"memory": limit})
    plans = [
        plan(load_recipe(write_recipe(family, method="magmax", output={"memory": memory})))
        for memory in (None, limit)
    ]
    found = [budget.budget_of(one, 2) for one in plans]
    assert [(one.num_threads, one.chunk_elements) for one in found] == [(2, 2**19), (2, 8)]
    assert hashes(family / "free") == hashes(family / "bound")


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("weights", [{"a": 0.7, "c": 0.3}, {"b": 1}], ids=str)
def test_tasks_that_do_not_count_are_not_read_and_change_nothing(family, method, weights, monkeypatch):
    preference = {"weights": weights}
    found = merged(family, method=method, preference=preference)
    planned = plan(load_recipe(write_recipe(family, method=method, preference=preference)))
    unread = describe(planned)["tasks_not_read"]
    monkeypatch.setattr("hub_magmax.methods.registry.MergeMethod.unread", lambda *arguments: ())
    read = merged(family, "read", method=method, preference=preference)
    assert (found.shards, found.shares, found.num_unaligned) == (read.shards, read.shares, read.num_unaligned)
    name, looks = (method, 0) if isinstance(method, str) else (method["name"], method.get("scope") == "model")
    floats = 4 * found.elements_merged * (1 + looks * (2 if name == "pcb" else 1))  # which looks twice
    assert read.bytes_in - found.bytes_in == floats * len(unread)
    expected = {"magmax": 0, "last_task": 2, "single_task": 2}
    assert len(unread) == expected.get(name, 3 - len(weights))


def test_a_checkpoint_that_is_not_read_may_be_damaged(family):
    tensors = load_file(family / "b" / "model.safetensors")
    tensors["layer.0.weight"][3, 5] = float("nan")
    save_file(tensors, family / "b" / "model.safetensors", metadata={"format": "pt"})
    assert merged(family, preference={"weights": {"a": 0.7, "c": 0.3}}).shares["b"] == 0
    with pytest.raises(NonFiniteError, match="is nan"):
        merged(family, "other", preference={"weights": {"a": 0.7, "b": 0.1, "c": 0.2}})
