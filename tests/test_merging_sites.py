"""Several merges of the same checkpoints at a time: the bytes of each alone, and every tensor read once."""

import shutil

import pytest

from hub_magmax.checkpoints.storage.local import LocalSource
from hub_magmax.errors import LockError, NonFiniteError, OutputError
from hub_magmax.files import read_fully
from hub_magmax.kernels.compiled.backend import Compiled
from hub_magmax.merging import bundles, sites
from hub_magmax.merging.execution import merge
from hub_magmax.merging.output.report import MergeReport, read_report
from hub_magmax.merging.output.shard import ShardFile
from hub_magmax.merging.rows import FileRows
from hub_magmax.merging.sites import merge_sites
from hub_magmax.methods import thresholds
from hub_magmax.methods.selection import assignment
from hub_magmax.pipeline import lock, plan
from hub_magmax.planning.budget import Budget
from hub_magmax.recipe.loading import parse_recipe
from tests.families import accepted, read_merged, recipe_values, write_checkpoint, write_family
from tests.test_checkpoints_adapter import write_adapter
from tests.test_planning_reads import HEADER_BYTES, upload

METHODS = ("average", "tunable_magmax", "ties", "dare", "random_mix", "tsv")
PREFERENCES = (None, {"weights": {"a": 0.7, "b": 0.2, "c": 0.1}}, {"weights": {"a": 1}})


def plans_of(folder, sites, names="abc", **values):
    """Return a plan for each site: the recipe's values with its own in their place."""
    plans = {}
    for site, own in sites.items():
        changes = values | own | {"output": {"path": f"out/{site}"} | own.get("output", {})}
        recipe = parse_recipe(recipe_values(names, **changes), folder=folder)
        plans[site] = accepted(plan(recipe, lock(recipe)))
    return plans


def alone(plans, folder):
    """Merge each plan by itself, and return the files by site and name."""
    for site, made in plans.items():
        merge(made, folder / "alone" / site)
    return {site: content(folder / "alone" / site) for site in plans}


def content(folder):
    """Return the files of a merged model but the two that tell when and how fast it was merged."""
    kept_out = ("merge_report.json", "provenance.json")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in kept_out}


@pytest.mark.parametrize("num_shards", [1, 3])
def test_each_site_gets_the_bytes_of_its_own_merge(tmp_path, num_shards):
    write_family(tmp_path, "abc", num_shards=num_shards)
    sites = {
        f"{method}-{number}": {"method": method, **({"preference": preference} if preference else {})}
        for method in METHODS
        for number, preference in enumerate(PREFERENCES)
    }
    sites["model"] = {"method": {"name": "tunable_magmax", "selection": "top-n", "scope": "model"}}
    plans = plans_of(tmp_path, sites)
    reports = merge_sites(plans)
    assert list(reports) == list(sites)
    expected = alone(plans, tmp_path)
    for site in sites:
        assert content(tmp_path / "out" / site) == expected[site]
        assert reports[site] == read_report(tmp_path / "out" / site / "merge_report.json")


@pytest.fixture
def in_small_chunks(monkeypatch):
    """Merge by compiled loops, in two threads that have 4096 elements at a time, and count magnitudes."""
    monkeypatch.setattr(sites, "budget_of", lambda plan, num_threads: Budget(2, 4096))
    monkeypatch.setattr(sites, "backend_of", lambda plan: Compiled())
    monkeypatch.setattr(thresholds, "HELD_NUMBERS", 1 << 10)


@pytest.mark.usefixtures("in_small_chunks")
def test_tensors_of_many_chunks_are_merged_in_turn(tmp_path):
    write_family(tmp_path, "abc", shapes={"x": (150, 128), "y": (40, 500), "z": (7,)})
    methods = {name: name for name in ("average", "ties", "della", "tunable_magmax")}
    methods["model"] = {"name": "ties", "scope": "model"}
    own = {
        f"{name}-{number}": {"method": method, "preference": preference}
        for name, method in methods.items()
        for number, preference in enumerate(PREFERENCES[1:])
    }
    plans = plans_of(tmp_path, own)
    merge_sites(plans)
    expected = alone(plans, tmp_path)
    assert all(content(tmp_path / "out" / site) == expected[site] for site in plans)


@pytest.fixture
def read_bytes(monkeypatch):
    """Merge by compiled loops in one thread; return a list of the lengths of all readings of checkpoints."""
    found: list[int] = []
    monkeypatch.setattr(sites, "budget_of", lambda plan, num_threads: Budget(1, 2**15))
    monkeypatch.setattr(sites, "backend_of", lambda plan: Compiled())
    for module, name in (
        (thresholds, "HELD_NUMBERS"),
        (assignment, "HELD_NUMBERS"),
        (assignment, "DIRECT_ELEMENTS"),
    ):
        monkeypatch.setattr(module, name, 1 << 10)  # a sample is looked at before
    read, reading, read_into = FileRows.read, FileRows.reading, LocalSource.read_into

    def read_parts(self, parts):
        found.append(sum(stop - start for start, stop in parts) * len(self.places))
        return read(self, parts)

    def read_by_loops(self, start):
        found.append(2**15 * len(self.places))
        return reading(self, start)

    def read_file(self, path, start, buffer):
        if path.endswith(".safetensors"):
            found.append(len(buffer))
        return read_into(self, path, start, buffer)

    def read_bundle(descriptor, start, buffer):
        found.append(len(buffer))
        return read_fully(descriptor, start, buffer)

    monkeypatch.setattr(FileRows, "read", read_parts)
    monkeypatch.setattr(FileRows, "reading", read_by_loops)
    monkeypatch.setattr(LocalSource, "read_into", read_file)
    monkeypatch.setattr(bundles, "read_fully", read_bundle)
    return found


LARGE, ONE_CHUNK, SMALL = (
    {"m.x.weight": (300, 128), "m.y.weight": (80, 500)},
    {"m.x.weight": (150, 128), "m.y.weight": (40, 500)},
    {f"m.{n}.weight": (20, 9) for n in range(30)},
)
TOP_N = {"name": "tunable_magmax", "selection": "top-n"}


@pytest.mark.parametrize(
    ("method", "shapes", "kind"),
    [
        ("average", LARGE, "whole"),
        ("ties", LARGE, "whole"),
        ("tunable_magmax", ONE_CHUNK, "whole"),
        (TOP_N, ONE_CHUNK, "whole"),
        ({"name": "sce", "density": 0.5}, ONE_CHUNK, "whole"),
        ("ties", SMALL, "whole"),
        ("tunable_magmax", SMALL, "whole"),
        (TOP_N, SMALL, "whole"),
        ("ties", LARGE, "adapters"),
        (TOP_N, ONE_CHUNK, "adapters"),
        ("ties", LARGE, "dtypes"),
    ],
)
def test_what_is_read_of_files_does_not_grow_with_the_sites(tmp_path, read_bytes, method, shapes, kind):
    write_family(tmp_path, "abc", shapes=shapes)
    for name in ("base", *"abc"):
        tensors = {key: value for key, value in read_merged(tmp_path / name).items() if key in shapes}
        if kind == "adapters" and name != "base":
            shutil.rmtree(tmp_path / name)
            write_adapter(tmp_path / name, tensors, ("x",), ord(name))
        elif kind == "dtypes" and name == "a":
            write_checkpoint(tmp_path / name, {key: value.double() for key, value in tensors.items()})
        else:
            write_checkpoint(tmp_path / name, tensors)
    found = []
    for count in (2, 3):
        own = {f"s{n}": {"preference": {"geometric": {"ratio": 0.5 + n / 20}}} for n in range(count)}
        plans = plans_of(tmp_path, own, method=method)
        read_bytes.clear()
        merge_sites(plans)
        found.append(sum(read_bytes))
        made = {site: content(tmp_path / "out" / site) for site in own}
        shutil.rmtree(tmp_path / "out")
    assert made == alone(plans, tmp_path)
    assert 0 < found[0] == found[1]


def test_adapters_are_merged_for_each_site_to_an_adapter(tmp_path):
    shapes = {f"m.layers.{n}.{p}.weight": (24, 16) for n in range(3) for p in "qk"}
    base = write_family(tmp_path, (), shapes=shapes)["base"]
    for seed, name in enumerate("ab"):
        write_adapter(tmp_path / name, base, ("q",), seed)
    output = {"output": {"format": "adapter"}}
    sites = {"x": output | {"method": "average"}, "y": output | {"method": "tsv"}}
    plans = plans_of(tmp_path, sites, "ab")
    merge_sites(plans)
    expected = alone(plans, tmp_path)
    assert all(content(tmp_path / "out" / site) == expected[site] for site in sites)


@pytest.mark.parametrize("method", ["average", "ties"])
def test_what_the_hub_sends_does_not_grow_with_the_sites(hub, tmp_path, method):
    model_bytes, adapter_bytes = upload(hub, tmp_path, f"sites-{method}")
    names = {"a": f"me/reads-sites-{method}-a", "b": f"me/reads-sites-{method}-lora-b"}
    tasks = [{"name": name, "model": model} for name, model in names.items()]
    sites = {f"s{n}": {"preference": {"weights": {"a": n / 8, "b": 1 - n / 8}}} for n in range(9)}
    plans = plans_of(tmp_path, sites, base_model=f"me/reads-sites-{method}-base", tasks=tasks, method=method)
    hub.reset_log()
    merge_sites(plans)
    fetched = sum(found.bytes_sent for found in hub.log if found.route == "storage" and found.method == "GET")
    assert abs(fetched - 2 * model_bytes - adapter_bytes) <= 4 * HEADER_BYTES
    expected = alone(plans, tmp_path)
    assert all(content(tmp_path / "out" / site) == expected[site] for site in sites)


def test_a_site_that_fails_leaves_the_others_whole(family, monkeypatch):
    plans = plans_of(family, {"x": {}, "y": {}, "z": {}})
    (family / "out" / "y").mkdir(parents=True)
    (family / "out" / "y" / "mine.txt").write_text("kept")
    write = ShardFile.write

    def full(self, data, start):
        if "/z.partial/" in str(self._path) and start:
            raise OSError(28, "No space left on device")
        return write(self, data, start)

    monkeypatch.setattr(ShardFile, "write", full)
    found = merge_sites(plans)
    assert isinstance(found["x"], MergeReport)
    assert isinstance(found["y"], OutputError) and "taken" in str(found["y"])
    assert isinstance(found["z"], OutputError) and "No space left" in str(found["z"])
    assert not (family / "out" / "z").exists()
    assert (family / "out" / "y" / "mine.txt").read_text() == "kept"
    monkeypatch.undo()
    shutil.rmtree(family / "out" / "y")
    again = merge_sites(plans)
    assert again["x"] == found["x"] and isinstance(again["y"], MergeReport)
    expected = alone(plans, family)
    assert all(content(family / "out" / site) == expected[site] for site in plans)


def test_an_interruption_keeps_finished_files_of_every_site(tmp_path):
    write_family(tmp_path, "abc", num_shards=3)
    output = {"output": {"shard_size": 1000}}
    plans = plans_of(tmp_path, {"x": output, "y": output | {"method": "ties"}})
    assert len(plans["x"].shards) > 2
    done = 0

    def stop(num_bytes):
        nonlocal done
        done += num_bytes
        if done > plans["x"].progress_bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_sites(plans, progress=stop)
    assert not (tmp_path / "out" / "x").exists()
    kept = [path.name for path in (tmp_path / "out").glob("*.partial/journal/*.json")]
    assert kept
    merge_sites(plans)
    expected = alone(plans, tmp_path)
    assert all(content(tmp_path / "out" / site) == expected[site] for site in plans)


def test_what_is_wrong_with_a_checkpoint_ends_all(family):
    tensors = read_merged(family / "a")
    tensors["embed.weight"][0, 0] = float("nan")
    write_checkpoint(family / "a", tensors)
    plans = plans_of(family, {"x": {}, "y": {"method": "ties"}})
    with pytest.raises(NonFiniteError):
        merge_sites(plans)
    assert not list((family / "out").glob("[xy]"))


def test_sites_of_other_checkpoints_are_refused(family):
    plans = plans_of(family, {"x": {}}) | plans_of(family, {"y": {}}, "ab")
    with pytest.raises(LockError, match="x and y pin different checkpoints"):
        merge_sites(plans)
