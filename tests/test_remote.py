import itertools

import pytest
import torch

from hub_magmax.errors import HubMagmaxError, LockError, SourceError
from hub_magmax.io.remote import WINDOW_BYTES, HubSource, resolve_commit
from hub_magmax.io.source import LocalSource
from hub_magmax.locking import lock, plan
from hub_magmax.merging import merge
from hub_magmax.recipe import parse_recipe
from tests.families import make_tensors, recipe_values, write_checkpoint, write_family

_numbers = itertools.count()


@pytest.fixture
def names(hub, family):
    """Repositories with the checkpoints of `family`, by name."""
    prefix = f"me/remote{next(_numbers)}"
    for name in ("base", "a", "b", "c"):
        hub.add_repo(f"{prefix}-{name}", folder=family / name)
    hub.reset_log()
    return {name: f"{prefix}-{name}" for name in ("base", "a", "b", "c")}


def hub_recipe(names, **changes):
    tasks = [{"name": name, "model": names[name]} for name in "abc"]
    return parse_recipe(recipe_values(base_model=names["base"], tasks=tasks, **changes))


def test_tensors_from_the_hub_are_the_tensors_on_disk(names, family, hub):
    source = HubSource(names["a"], resolve_commit(names["a"], None))
    local = LocalSource(family / "a")
    for name, info in local.index.tensors.items():
        middle = info.num_elements // 2
        assert source.read(name, 0, middle).equal(local.read(name, 0, middle))
        assert source.read(name, middle, info.num_elements).equal(local.read(name, middle, info.num_elements))


def test_merge_from_the_hub_gives_the_same_bytes_as_from_disk(names, family, tmp_path):
    preference = {"geometric": {"ratio": 2}}
    from_hub = merge(plan(hub_recipe(names, preference=preference)), tmp_path / "hub")
    local = parse_recipe(recipe_values(preference=preference), folder=family)
    from_disk = merge(plan(local), tmp_path / "disk")
    header = 8 + int.from_bytes((tmp_path / "hub" / "model.safetensors").read_bytes()[:8], "little")
    assert from_hub.shards[0].counts == from_disk.shards[0].counts
    # The headers differ, since they name where the checkpoints came from; the tensors do not.
    disk = (tmp_path / "disk" / "model.safetensors").read_bytes()
    disk_header = 8 + int.from_bytes(disk[:8], "little")
    assert (tmp_path / "hub" / "model.safetensors").read_bytes()[header:] == disk[disk_header:]


def test_lock_pins_commits_and_hashes(names, hub):
    locked = lock(hub_recipe(names))
    assert locked.base_model.commit == hub.head(names["base"])
    assert all(len(file.sha256 or "") == 64 for source in locked.sources.values() for file in source.files)


def test_locked_commit_is_read_after_the_branch_moved(names, hub, family, tmp_path):
    recipe = hub_recipe(names)
    locked = lock(recipe)
    expected = merge(plan(recipe, locked), tmp_path / "before").shards
    hub.add_repo(names["b"], folder=write_checkpoint(tmp_path / "moved", make_tensors(77)))
    assert merge(plan(recipe, locked), tmp_path / "after").shards == expected
    assert lock(recipe).digest != locked.digest


def test_revisions_of_one_repository_are_successive_tasks(hub, tmp_path):
    family = write_family(tmp_path, "abc")
    repo = f"me/sequence{next(_numbers)}"
    for name in ("base", *"abc"):
        hub.add_repo(repo, folder=tmp_path / name, revision="main" if name == "base" else f"task-{name}")
    tasks = [{"name": name, "model": f"{repo}@task-{name}"} for name in "abc"]
    recipe = parse_recipe(recipe_values(base_model=repo, tasks=tasks, method="last_task"))
    merge(plan(recipe), tmp_path / "out")
    found = LocalSource(tmp_path / "out").read("embed.weight", 0, 400)
    torch.testing.assert_close(found, family["c"]["embed.weight"].reshape(-1), rtol=1e-6, atol=1e-6)


def test_only_the_ranges_that_are_needed_are_fetched(hub, tmp_path):
    shapes = {"first": (WINDOW_BYTES // 4,), "second": (WINDOW_BYTES // 4,), "third": (WINDOW_BYTES // 4,)}
    repo = f"me/large{next(_numbers)}"
    hub.add_repo(repo, folder=write_checkpoint(tmp_path / "large", make_tensors(0, shapes=shapes)))
    hub.reset_log()
    source = HubSource(repo, resolve_commit(repo, None))
    source.read("second", 0, 10)
    fetched = sum(exchange.bytes_sent for exchange in hub.log if exchange.route == "storage")
    assert fetched < 2.1 * WINDOW_BYTES  # the header's window and the tensor, of three


def test_a_second_look_at_a_tensor_costs_no_request(names, hub):
    source = HubSource(names["a"], resolve_commit(names["a"], None))
    source.read("embed.weight", 0, 10)
    hub.reset_log()
    source.read("embed.weight", 200, 400)
    assert hub.log == ()


@pytest.mark.parametrize(
    ("name", "reason"),
    [("me/none-such", "there is no such repository"), ("{a}@none", "there is no such revision")],
)
def test_what_is_not_there_is_refused_in_a_sentence(names, name, reason):
    written = name.format(**names)
    with pytest.raises(SourceError, match=reason):
        lock(hub_recipe(names | {"a": written}))


def test_gated_repository_says_what_to_do(hub, family, names, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.add_user("stranger"))
    repo = f"other/gated{next(_numbers)}"
    hub.add_repo(repo, folder=family / "a", gated=True)
    with pytest.raises(SourceError, match="access is gated"):
        lock(hub_recipe(names | {"a": repo}))


def test_changed_file_at_the_same_commit_is_refused(names, hub):
    from dataclasses import replace

    recipe = hub_recipe(names)
    locked = lock(recipe)
    file = replace(locked.base_model.files[0], header_sha256="0" * 64)
    with pytest.raises(LockError, match="changed since the lock"):
        plan(recipe, replace(locked, base_model=replace(locked.base_model, files=(file,))))


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "ignore_range"},
        {"kind": "status", "status": 503},
        {"kind": "status", "status": 403},
        {"kind": "reset", "after_bytes": 100},
        {"kind": "expired"},
    ],
    ids=str,
)
def test_passing_faults_of_the_server_do_not_change_a_byte(names, hub, family, fault, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    source = HubSource(names["a"], resolve_commit(names["a"], None))
    hub.faults.add("/_storage/*", times=1, method="GET", **fault)
    found = source.read("embed.weight", 0, 400)
    assert found.equal(LocalSource(family / "a").read("embed.weight", 0, 400))


@pytest.mark.parametrize("kind", ["truncate", "short"])
def test_body_that_ends_early_is_refused(names, hub, kind, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    source = HubSource(names["a"], resolve_commit(names["a"], None))
    hub.faults.add("/_storage/*", kind, after_bytes=100, method="GET")
    with pytest.raises(HubMagmaxError, match=r"connection failed|the server sent"):
        source.read("embed.weight", 0, 400)


def test_side_files_on_the_hub_are_compared_with_those_on_disk_without_a_request(hub, family, tmp_path):
    for name in ("base", "a"):
        (family / name / "tokenizer.json").write_text('{"version": "1.0"}')
    repo = f"me/side{next(_numbers)}"
    hub.add_repo(repo, folder=family / "base")
    recipe = parse_recipe(recipe_values(names=("a",), base_model=repo), folder=family)
    hub.reset_log()
    made = plan(recipe)
    assert made.notices == ()
    assert made.lock.base_model.side_files["tokenizer.json"].startswith("git:")
    assert hub.counts["HEAD resolve"] <= 4  # config and weights, when locking and when planning
    (family / "a" / "tokenizer.json").write_text('{"version": "2.0"}')
    assert "tokenizer.json (other content)" in plan(recipe).notices[0]
