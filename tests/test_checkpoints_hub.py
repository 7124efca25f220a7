import itertools
import re

import pytest
import torch

from hub_magmax.checkpoints.storage.hub import HubSource, resolve_commit
from hub_magmax.checkpoints.storage.hub_files import WINDOW_BYTES
from hub_magmax.checkpoints.storage.local import LocalSource
from hub_magmax.errors import CheckpointError, HubMagmaxError, LockError, SourceError
from hub_magmax.merging.execution import merge
from hub_magmax.pipeline import lock, plan
from hub_magmax.planning.summary import notices
from hub_magmax.recipe.loading import parse_recipe
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


@pytest.mark.parametrize(
    ("status", "reason"), [(401, "does not accept this token"), (403, "this token may not read it")]
)
def test_token_that_is_refused_says_what_to_do(hub, names, status, reason):
    hub.faults.add("/api/models/*", "status", status=status)
    with pytest.raises(SourceError, match=rf"{reason} \(status {status}\).*HF_TOKEN"):
        lock(hub_recipe(names))


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
    assert notices(made) == ()
    assert made.lock.base_model.side_files["tokenizer.json"].startswith("git:")
    assert hub.counts["HEAD resolve"] <= 4  # config and weights, when locking and when planning
    (family / "a" / "tokenizer.json").write_text('{"version": "2.0"}')
    assert "tokenizer.json (other content)" in notices(plan(recipe))[0]


def sharded_family(hub, tmp_path, tasks="abc", num_shards=3, prefix=None):
    """Put a family of sharded checkpoints on the Hub; return their names, and how many files they have."""
    shapes = {f"layer.{number}.weight": (256, 256) for number in range(12)}
    write_family(tmp_path, tasks, num_shards=num_shards, shapes=shapes)
    prefix = prefix or f"me/sharded{next(_numbers)}"
    names = {}
    for name in ("base", *tasks):
        hub.add_repo(f"{prefix}-{name}", folder=tmp_path / name)
        names[name] = f"{prefix}-{name}"
    hub.reset_log()
    return names


def files_and_bytes(hub, names):
    repos = names.values()
    paths = [(repo, path) for repo in repos for path in hub.files(repo)]
    return len(paths), sum(len(hub.read(repo, path)) for repo, path in paths if path.endswith("tensors"))


@pytest.mark.parametrize("method", ["average", "tunable_magmax", "ties"])
def test_run_fetches_every_byte_once_with_few_requests(hub, tmp_path, method):
    from hub_magmax.pipeline import run

    names = sharded_family(hub, tmp_path, "abcde")
    tasks = [{"name": name, "model": names[name]} for name in "abcde"]
    output = {"path": "out", "shard_size": "600KB"}
    recipe = recipe_values(base_model=names["base"], tasks=tasks, method=method, output=output)
    run(parse_recipe(recipe, folder=tmp_path))
    fetched = sum(exchange.bytes_sent for exchange in hub.log if exchange.route == "storage")
    counted = sum(exchange.route != "storage" for exchange in hub.log)
    num_files, num_bytes = files_and_bytes(hub, names)
    assert fetched <= 1.02 * num_bytes
    assert counted <= 3 * num_files


@pytest.mark.parametrize("method", ["average", "tunable_magmax"])
def test_checkpoints_sharded_in_other_orders_are_fetched_once_too(hub, tmp_path, method):
    from hub_magmax.pipeline import run

    shapes = {f"layer.{number:02d}.weight": (256, 256) for number in range(24)}
    base = make_tensors(0, shapes=shapes)
    prefix, num_bytes = f"me/orders{next(_numbers)}", 0
    for seed, (name, num_shards) in enumerate({"base": 3, "a": 4, "b": 5}.items()):
        tensors = base if name == "base" else make_tensors(seed, base=base, shapes=shapes)
        folder = write_checkpoint(tmp_path / name, tensors, num_shards=num_shards)
        hub.add_repo(f"{prefix}-{name}", folder=folder)
        num_bytes += sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    tasks = [{"name": name, "model": f"{prefix}-{name}"} for name in "ab"]
    hub.reset_log()
    run(parse_recipe(recipe_values(base_model=f"{prefix}-base", tasks=tasks, method=method), folder=tmp_path))
    fetched = sum(exchange.bytes_sent for exchange in hub.log if exchange.route == "storage")
    assert fetched <= 1.02 * num_bytes


def test_neighbouring_tensors_come_in_one_request(hub, tmp_path):
    names = sharded_family(hub, tmp_path, "a", num_shards=1)
    recipe = parse_recipe(
        recipe_values(base_model=names["base"], tasks=[{"name": "a", "model": names["a"]}], method="average")
    )
    made = plan(recipe)
    hub.reset_log()
    merge(made, tmp_path / "out")
    ranges = [exchange for exchange in hub.log if exchange.route == "storage"]
    # Three megabytes each: the header, then pieces of eight megabytes at most.
    assert len(ranges) <= 2 * 2


@pytest.mark.parametrize("method", ["average", "tunable_magmax"])
def test_flipped_byte_ends_the_merge_and_nothing_made_of_it_is_kept(hub, tmp_path, method, monkeypatch):
    from hub_magmax.errors import DamagedError

    names = sharded_family(hub, tmp_path, "a")
    recipe = parse_recipe(
        recipe_values(
            base_model=names["base"],
            tasks=[{"name": "a", "model": names["a"]}],
            method=method,
            output={"path": "out", "shard_size": "300KB"},
        ),
        folder=tmp_path,
    )
    made = plan(recipe)
    hub.faults.add("/_storage/*-a/*/model-00003*", "corrupt", after_bytes=700_000, method="GET", times=1)
    # The header's window is the first request of each file; the fault waits for the tensors.
    with pytest.raises(DamagedError, match="the Hub states"):
        merge(made)
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path).glob("out.partial/journal/*.json"))
    hub.faults.clear()
    merge(made)
    local = parse_recipe(
        recipe_values(names=("a",), method=method, output={"path": "again"}), folder=tmp_path
    )
    merge(plan(local))
    from tests.families import read_merged

    found, expected = read_merged(tmp_path / "out"), read_merged(tmp_path / "again")
    assert all(found[name].equal(expected[name]) for name in expected)


KINDS = [
    {"kind": "status", "status": 503},
    {"kind": "status", "status": 429, "retry_after_seconds": 1},
    {"kind": "status", "status": 401},
    {"kind": "status", "status": 403},
    {"kind": "status", "status": 404},
    {"kind": "status", "status": 416},
    {"kind": "latency", "seconds": 0.05},
    {"kind": "bandwidth", "bytes_per_second": 10_000_000},
    {"kind": "lose_response"},
    {"kind": "reset"},
    {"kind": "truncate"},
    {"kind": "short"},
    {"kind": "expired"},
    {"kind": "ignore_range"},
    {"kind": "corrupt"},
]


@pytest.mark.parametrize("fault", KINDS, ids=str)
def test_quarter_of_all_requests_failing_gives_the_right_bytes_or_one_paragraph(
    hub, tmp_path, fault, monkeypatch
):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    # Whether a request is struck depends on its path, so the names are the same in every run.
    names = sharded_family(hub, tmp_path, "a", prefix=f"me/quarter{KINDS.index(fault)}")
    # From the storage host these say that an address has expired; from the Hub they are the last word.
    match = "/_storage/*" if fault["kind"] == "expired" or fault.get("status") in (401, 403) else "*"
    hub.faults.add(match, probability=0.25, **fault)
    recipe = parse_recipe(
        recipe_values(base_model=names["base"], tasks=[{"name": "a", "model": names["a"]}], method="average")
    )
    try:
        merge(plan(recipe), tmp_path / "out")
    except HubMagmaxError as error:
        assert fault["kind"] == "corrupt" or fault.get("status") in (404, 416), error
        assert "\n" not in str(error)
        assert not (tmp_path / "out").exists()
    else:
        hub.faults.clear()
        local = parse_recipe(recipe_values(names=("a",), method="average"), folder=tmp_path)
        merge(plan(local), tmp_path / "again")
        from tests.families import read_merged

        found, expected = read_merged(tmp_path / "out"), read_merged(tmp_path / "again")
        assert all(found[name].equal(expected[name]) for name in expected)


def test_server_that_always_ignores_ranges_is_refused_and_not_read_whole(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    names = sharded_family(hub, tmp_path, "a")
    recipe = parse_recipe(
        recipe_values(base_model=names["base"], tasks=[{"name": "a", "model": names["a"]}], method="average")
    )
    made = plan(recipe)
    hub.faults.add("/_storage/*", "ignore_range", method="GET")
    source = HubSource(names["a"], made.lock.tasks["a"].commit, max_skipped_bytes=100_000)
    last = list(source.index.tensors)[-1]
    with pytest.raises(SourceError, match=r"ignored the range.*breaks HTTP ranges"):
        source.read(last, 0, 10)


def several_models(hub, tmp_path):
    """Put a base model and two tasks into one repository: a sub-folder, a variant, a sharded variant."""
    write_family(tmp_path, "ab")
    write_family(tmp_path / "sharded", "ab", num_shards=2)
    repo = f"me/several{next(_numbers)}"
    sharded = {
        path.name.replace("model-", "model.fp16-"): path
        for path in (tmp_path / "sharded" / "b").glob("model-*")
    }
    index = (tmp_path / "sharded" / "b" / "model.safetensors.index.json").read_text()
    files = {
        "README.md": b"---\nlicense: mit\n---\n",
        "parts/a/model.safetensors": (tmp_path / "a" / "model.safetensors").read_bytes(),
        "parts/a/config.json": b'{"model_type": "test"}',
        "model.half.safetensors": (tmp_path / "base" / "model.safetensors").read_bytes(),
        "config.json": b'{"model_type": "test"}',
        "model.safetensors.index.fp16.json": index.replace("model-", "model.fp16-").encode(),
    }
    hub.add_repo(repo, files=files | {name: path.read_bytes() for name, path in sharded.items()})
    return repo


def parts_recipe(repo, **changes):
    tasks = [
        {"name": "a", "model": f"hf://{repo}/parts/a"},
        {"name": "b", "model": f"hf://{repo}@main/model.safetensors.index.fp16.json"},
    ]
    base = f"hf://{repo}/model.half.safetensors"
    return recipe_values(base_model=base, tasks=tasks, method="average", **changes)


def test_folders_and_variants_of_one_repository_are_merged_as_folders_of_their_own(hub, tmp_path):
    from hub_magmax.merging.output.provenance import provenance
    from tests.families import read_merged

    repo = several_models(hub, tmp_path)
    recipe = parse_recipe(parts_recipe(repo), folder=tmp_path)
    made = plan(recipe)
    report = merge(made, tmp_path / "out")
    local = parse_recipe(recipe_values(names=("a", "b"), method="average"), folder=tmp_path)
    merge(plan(local), tmp_path / "again")
    found, expected = read_merged(tmp_path / "out"), read_merged(tmp_path / "again")
    assert all(found[name].equal(expected[name]) for name in expected)
    assert [source.part for source in made.lock.sources.values()] == [
        "model.half.safetensors", "parts/a", "model.safetensors.index.fp16.json",
    ]  # fmt: skip
    assert {source.license for source in made.lock.sources.values()} == {"mit"}
    assert made.lock.tasks["a"].label == f"{repo}@{hub.head(repo)[:7]}/parts/a"
    place = f"hf://{repo}@{hub.head(repo)}"
    stated = provenance(recipe, made.lock, report)
    assert f"{place}/parts/a/model.safetensors" in stated
    assert f"{place}/model.half.safetensors" in stated


def test_repository_with_several_files_of_weights_says_how_to_name_one(hub, tmp_path):
    from hub_magmax.errors import CheckpointError

    repo = several_models(hub, tmp_path)
    with pytest.raises(CheckpointError, match=r"several weight files.*hf://org/model@revision/FILE"):
        lock(parse_recipe(recipe_values(base_model=repo), folder=tmp_path))
    with pytest.raises(CheckpointError, match=r"no file 'model.bf16.safetensors'.*model.half.safetensors"):
        lock(parse_recipe(recipe_values(base_model=f"hf://{repo}/model.bf16.safetensors"), folder=tmp_path))


def test_file_of_weights_in_a_folder_of_several_is_merged(family, tmp_path):
    from tests.families import read_merged

    weights = (family / "a" / "model.safetensors").read_bytes()
    (family / "b" / "model.other.safetensors").write_bytes(weights)
    tasks = [{"name": "a", "model": "./b/model.other.safetensors"}]
    merge(plan(parse_recipe(recipe_values(tasks=tasks, method="average"), folder=family)), tmp_path / "out")
    merge(
        plan(parse_recipe(recipe_values(names=("a",), method="average"), folder=family)), tmp_path / "again"
    )
    found, expected = read_merged(tmp_path / "out"), read_merged(tmp_path / "again")
    assert all(found[name].equal(expected[name]) for name in expected)


def test_folder_of_a_repository_is_read_from_the_local_cache(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants, snapshot_download

    repo = several_models(hub, tmp_path)
    online = plan(parse_recipe(parts_recipe(repo), folder=tmp_path))
    snapshot_download(repo)
    hub.reset_log()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = plan(parse_recipe(parts_recipe(repo), folder=tmp_path))
    report = merge(offline, tmp_path / "out")
    assert hub.log == ()
    assert [s.commit for s in offline.lock.sources.values()] == [hub.head(repo)] * 3
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert merge(online, tmp_path / "again").elements_merged == report.elements_merged
    from tests.families import read_merged

    found, expected = read_merged(tmp_path / "out"), read_merged(tmp_path / "again")
    assert all(found[name].equal(expected[name]) for name in expected)


def test_folders_and_files_on_the_hub_are_named_as_a_recipe_can_have_them(hub, family):
    weights = (family / "a" / "model.safetensors").read_bytes()
    folders = {f"checkpoint-{number}/model.safetensors": weights for number in (500, 1000)}
    hub.add_repo("me/trained", files=folders | {"training_args.bin": b"x"})
    two = dict.fromkeys(("model.safetensors", "model-00001-of-00002.safetensors"), weights)
    hub.add_repo("me/twice", files=two)
    for repo, way in (("me/trained", "checkpoint-1000"), ("me/twice", "model.safetensors")):
        with pytest.raises(CheckpointError) as caught:
            plan(parse_recipe(recipe_values(tasks=[{"name": "a", "model": repo}]), folder=family))
        (name,) = re.findall(rf"hf://\S+/{way}", str(caught.value))
        assert plan(parse_recipe(recipe_values(tasks=[{"name": "a", "model": name}]), folder=family)).jobs


def test_file_of_another_format_on_the_hub_is_told_by_its_name(hub, family):
    hub.add_repo("me/gguf", files={"model-Q4_K_M.gguf": b"GGUF", "README.md": b"x"})
    for name in ("me/gguf", "hf://me/gguf/model-Q4_K_M.gguf"):
        with pytest.raises(CheckpointError, match=r"model-Q4_K_M\.gguf is a GGUF file"):
            lock(parse_recipe(recipe_values(tasks=[{"name": "a", "model": name}]), folder=family))


def test_model_that_is_not_in_the_cache_is_told_offline(hub, family, names, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match=r"the local cache does not know this revision.*HF_HUB_OFFLINE"):
        lock(hub_recipe(names))


def test_private_repository_says_what_to_do(hub, family, names, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.add_user("stranger"))
    repo = f"other/private{next(_numbers)}"
    hub.add_repo(repo, folder=family / "a", private=True)
    with pytest.raises(
        SourceError, match=r"this token may not see it.*for a private repository run `hf auth"
    ):
        lock(hub_recipe(names | {"a": repo}))


@pytest.mark.parametrize(
    ("repo_id", "path"),
    [("me/a--b", "config.json"), ("me/x", "../config.json"), ("me/x", "D:config.json"), ("me/x", "a/C:b")],
)
def test_name_that_the_local_cache_cannot_hold_is_told_so(repo_id, path):
    with pytest.raises(SourceError, match="no file of this name can be in the local cache") as caught:
        HubSource(repo_id, "0" * 40).read_into(path, 0, memoryview(bytearray(1)))
    assert caught.value.where == f"{repo_id}@0000000, {path}"
