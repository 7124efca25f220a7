"""Slices of `python -m benchmarks.torture`, and the faults that need no process of their own."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import reliability, torture, victims
from hub_magmax.checkpoints.storage import local
from hub_magmax.checkpoints.storage.local import LocalSource
from hub_magmax.errors import CheckpointError, HubMagmaxError, OutputError, SourceError
from hub_magmax.files import sha256_of
from hub_magmax.merging import bundles
from hub_magmax.merging.execution import merge
from hub_magmax.merging.output.folder import PartialFolder
from hub_magmax.merging.output.report import ShardRecord
from hub_magmax.merging.output.shard import ShardFile
from hub_magmax.pipeline import plan
from hub_magmax.recipe.loading import load_recipe
from tests.families import write_family, write_recipe

ROOT = Path(__file__).parent.parent

#: Every n-th step of the attacks; `make torture` takes every one.
SLICES = {
    "crash_points": {"every": 17},
    "full_disk": {"every": 30},
    "read_errors": {"every": 40},
    "size_limits": {"limits": [0, 150, 2400]},
    "small_disk": {"step_bytes": 24_576},
    "kills": {"count": 1},
    "site_kills": {"count": 3, "rows": 64},
    "finetune_kills": {"count": 1, "rows": 2, "tries": 1},
    "source_changes": {"every": 25},
    "no_memory": {"every": 30},
}

#: The same for the attacks on a push, each of which has a Hub and a process of its own.
HUB_SLICES = {
    "hub_kills": {"count": 3, "rows": 64},
    "hub_requests": {"every": 8},
    "relay_kills": {"count": 3, "rows": 64},
    "relay_requests": {"every": 8},
}


@pytest.fixture(scope="module")
def attacked() -> dict[str, dict[str, object]]:
    return torture.in_a_process(SLICES)


@pytest.mark.parametrize("part", SLICES)
def test_attacked_merge_is_complete_or_absent_and_the_same_command_completes_it(attacked, part):
    found = attacked[part]
    if part == "small_disk" and not torture.may_mount():
        pytest.skip("no mounts here")
    assert found["failures"] == []
    assert found["attacks"] >= 1
    if part == "small_disk":  # which is full while the merge writes, and not too small to begin with
        assert found["attacks"] < 10
    if not part.endswith("kills"):  # whose moment is random, and may come after the end
        assert any("output absent" in outcome for outcome in found["outcomes"])


@pytest.mark.parametrize("part", HUB_SLICES)
def test_push_that_is_killed_leaves_no_part_of_a_model_and_the_same_command_makes_one_commit(part):
    found = torture.in_a_process({part: HUB_SLICES[part]})[part]
    assert found["failures"] == []
    assert found["attacks"] >= 3
    assert all("then complete in one commit" in outcome for outcome in found["outcomes"])


def contents(folder: Path) -> dict[str, str]:
    return victims.contents(folder)


def reference(family: Path, **changes: object) -> dict[str, str]:
    """Return what an undisturbed merge of the family makes."""
    made = plan(load_recipe(write_recipe(family, **changes)))
    merge(made)
    found = contents(family / "merged")
    shutil.rmtree(family / "merged")
    return found


def at_read(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], None]) -> None:
    """Carry out `action` just before the given read of any source."""
    original, seen = local.read_fully, []

    def read(*arguments):
        seen.append(1)
        if len(seen) == number:
            action()
        return original(*arguments)

    for module in (local, bundles):
        monkeypatch.setattr(module, "read_fully", read)


def change_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\x01")


def replace_by_copy(path: Path) -> None:
    shutil.copy(path, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


def age(folder: Path) -> None:
    """Let every file be an hour old, so that any change moves its time."""
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns - 3600 * 10**9))


@pytest.mark.parametrize("number", [9, 12, 15])
@pytest.mark.parametrize(
    "disturb", [change_byte, lambda path: os.truncate(path, path.stat().st_size - 4)], ids=["byte", "cut"]
)
def test_source_that_changes_during_the_merge_is_an_error(family, monkeypatch, disturb, number):
    made = plan(load_recipe(write_recipe(family)))
    age(family)
    at_read(monkeypatch, number, lambda: disturb(family / "b" / "model.safetensors"))
    with pytest.raises(HubMagmaxError, match="changed"):
        merge(made)
    assert not (family / "merged").exists()
    assert not (family / "merged.partial").exists()


def test_file_that_is_replaced_while_open_is_read_to_its_end_as_it_was(family, monkeypatch):
    expected = reference(family)
    made = plan(load_recipe(family / "recipe.yaml"))

    def replace() -> None:
        path = family / "b" / "model.safetensors"
        replace_by_copy(path)
        change_byte(path)

    at_read(monkeypatch, 11, replace)
    merge(made)
    assert contents(family / "merged") == expected


def test_shard_that_is_replaced_between_two_openings_is_an_error(tmp_path):
    write_family(tmp_path, "a", num_shards=5)
    source = LocalSource(tmp_path / "a")
    names = list(source.index.tensors)
    assert len(source.descriptors.opened) < 5
    replace_by_copy(tmp_path / "a" / source.index.shards[0].file)
    with pytest.raises(CheckpointError, match="changed or replaced"):
        for name in reversed(names):
            source.read(name, 0, 1)
    source.close()


def test_many_shards_need_few_open_files(tmp_path):
    write_family(tmp_path, "a", num_shards=6)
    source = LocalSource(tmp_path / "a")
    for name in [*source.index.tensors] * 2:
        source.read(name, 0, 1)
    assert len(source.descriptors.opened) <= 3
    assert all(os.fstat(descriptor).st_size > 0 for descriptor in source.descriptors.opened.values())
    source.close()
    assert source.descriptors.opened == {}


def test_threads_that_share_a_source_read_what_is_on_disk(tmp_path):
    tensors = write_family(tmp_path, "a", num_shards=6)["a"]
    source = LocalSource(tmp_path / "a")
    names = list(source.index.tensors) * 40
    with ThreadPoolExecutor(8) as executor:
        found = list(executor.map(lambda name: source.read(name, 0, tensors[name].numel()), names))
    assert all(values.equal(tensors[name].reshape(-1)) for name, values in zip(names, found, strict=True))
    source.close()


@pytest.mark.parametrize("seconds", [-(10**9), 10**9])
def test_files_from_another_time_merge_to_the_same_bytes(family, monkeypatch, seconds):
    expected = reference(family)
    for path in family.rglob("*.safetensors"):
        stamp = path.stat().st_mtime_ns + seconds * 10**9
        os.utime(path, ns=(stamp, stamp))
    clock = iter(range(10**9, 0, -1))
    monkeypatch.setattr("time.time", lambda: float(next(clock)))
    monkeypatch.setattr("time.time_ns", lambda: next(clock) * 10**9)
    merge(plan(load_recipe(family / "recipe.yaml")))
    assert contents(family / "merged") == expected


def test_push_under_a_clock_that_runs_backwards_publishes_the_same_in_one_commit(family, hub, monkeypatch):
    expected = reference(family)
    clock = iter(range(10**9, 0, -1))
    monkeypatch.setattr("time.time", lambda: float(next(clock)))
    from hub_magmax.pipeline import run

    output = {"path": "merged", "push_to_hub": "me/torture-clock"}
    run(load_recipe(write_recipe(family, output=output)))
    assert len([c for c in hub.commits("me/torture-clock") if "model.safetensors" in c.tree]) == 1
    weights = hub.read("me/torture-clock", "model.safetensors")
    assert hashlib.sha256(weights).hexdigest() == expected["model.safetensors"]


def test_shard_whose_bytes_got_lost_on_the_way_to_the_disk_is_refused(tmp_path):
    file = ShardFile(tmp_path / "model.safetensors")
    file.write(b"0123456789", 0)
    change_byte(tmp_path / "model.safetensors.tmp")
    with pytest.raises(OutputError, match="when read back"):
        file.finish()
    assert not (tmp_path / "model.safetensors").exists()


def test_process_that_comes_second_is_told_so(family):
    recipe = write_recipe(family)
    code = (
        "import sys; from pathlib import Path; from hub_magmax.merging.output.folder import PartialFolder\n"
        "place = PartialFolder(Path(sys.argv[1]), 'sha256:other'); place.prepare()\n"
        "print('ready', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(family / "merged")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as first:
        assert first.stdout.readline() == b"ready\n"
        made = plan(load_recipe(recipe))
        with pytest.raises(OutputError, match="another process is writing this output"):
            merge(made)
        assert (family / "merged.partial" / "model").is_dir()
        first.stdin.close()
        first.wait()
    merge(made)
    assert not (family / "merged.partial").exists()


def test_only_finished_shards_of_this_merge_are_kept(tmp_path):
    place = PartialFolder(tmp_path / "out", "sha256:one")
    place.prepare()
    for name in ("finished.safetensors", "unfinished.safetensors.tmp", "config.json"):
        (place.folder / name).write_bytes(b"x")
    (place.folder / "folder").mkdir()
    place.journal.record(ShardRecord("finished.safetensors", 1, sha256_of(place.folder / "config.json")))
    place.release()
    PartialFolder(tmp_path / "out", "sha256:one").prepare()
    assert [path.name for path in place.folder.iterdir()] == ["finished.safetensors"]
    PartialFolder(tmp_path / "out", "sha256:two").prepare()
    assert list(place.folder.iterdir()) == []


def test_remains_of_a_merge_that_was_killed_after_its_last_step_are_removed(tmp_path):
    (tmp_path / "out.partial" / "journal").mkdir(parents=True)
    (tmp_path / "out.partial" / "journal" / "plan").write_text("sha256:one\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(OutputError, match="already holds a model"):
        PartialFolder(tmp_path / "out", "sha256:one").prepare()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_journal_that_is_no_text_counts_as_another_merge(tmp_path):
    place = PartialFolder(tmp_path / "out", "sha256:one")
    place.prepare()
    place.release()
    (tmp_path / "out.partial" / "journal" / "plan").write_bytes(b"\xff\xff")
    PartialFolder(tmp_path / "out", "sha256:one").prepare()
    assert (tmp_path / "out.partial" / "journal" / "plan").read_text() == "sha256:one\n"


def test_output_that_a_rename_cannot_replace_is_refused_before_the_merge(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="is a link"):
        PartialFolder(tmp_path / "out", "sha256:one").prepare()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "volume")
    with pytest.raises(OutputError, match="is a mount point"):
        PartialFolder(tmp_path / "volume", "sha256:one").prepare()


@pytest.mark.parametrize("output", ["/", "/out\0put", "/out\ud800"])
def test_path_that_no_folder_can_have_is_refused(output):
    with pytest.raises(OutputError):
        PartialFolder(Path(output), "sha256:one")


def test_output_path_may_hold_any_letters_and_spaces(tmp_path):
    place = PartialFolder(tmp_path / "größe \u3000 \xa0 模型", "sha256:one")
    place.prepare()
    (place.folder / "model.safetensors").write_bytes(b"x")
    place.publish()
    assert [path.name for path in tmp_path.iterdir()] == ["größe \u3000 \xa0 模型"]


def test_folder_name_that_is_too_long_leaves_nothing(tmp_path):
    with pytest.raises(OutputError, match="File name too long"):
        PartialFolder(tmp_path / ("x" * 250), "sha256:one").prepare()
    assert list(tmp_path.iterdir()) == []


def test_links_inside_the_folder_and_into_the_hubs_cache_are_followed(tmp_path):
    write_family(tmp_path, "a")
    repository = tmp_path / "models--me--a"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in (tmp_path / "a").iterdir():
        (repository / "blobs" / path.name.upper()).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name.upper())
    (tmp_path / "a" / "vocab.txt").symlink_to("config.json")
    assert LocalSource(snapshot).index.tensors.keys() == LocalSource(tmp_path / "a").index.tensors.keys()
    assert LocalSource(tmp_path / "a").read_bytes("vocab.txt", 0, 2) == b'{"'


@pytest.mark.parametrize("target", ["../secret", "{folder}/secret", "../snapshots/secret"])
@pytest.mark.parametrize("name", ["model.safetensors", "notes.txt"])
def test_link_that_leads_out_of_the_folder_is_refused(tmp_path, target, name):
    write_family(tmp_path, "a")
    (tmp_path / "snapshots").mkdir()
    for path in (tmp_path / "secret", tmp_path / "snapshots" / "secret"):
        path.write_bytes(b"token")
    (tmp_path / "a" / name).unlink(missing_ok=True)
    (tmp_path / "a" / name).symlink_to(target.format(folder=tmp_path))
    with pytest.raises(SourceError, match="link that leads out of the folder"):
        LocalSource(tmp_path / "a").index  # noqa: B018


def test_devices_and_pipes_are_not_files(tmp_path):
    write_family(tmp_path, "a")
    os.mkfifo(tmp_path / "a" / "notes.txt")
    (tmp_path / "a" / "more.txt").symlink_to("/dev/zero")
    assert set(LocalSource(tmp_path / "a").sizes) == {"config.json", "model.safetensors"}


def check_for_secrets(found: dict[str, bytes], folder: Path) -> None:
    """Check that no content holds the token in use or names a folder of this machine."""
    places = (str(folder), str(Path.home()), os.environ["HF_HOME"], str(ROOT), sys.prefix, "/tmp/")
    for name, content in found.items():
        for secret in (os.environ["HF_TOKEN"], *places):
            assert secret.encode() not in content, f"{secret!r} in {name}"


def test_journal_of_an_interrupted_merge_is_free_of_tokens_and_of_this_machines_folders(family):
    recipe = write_recipe(
        family,
        base_model=str(family / "base"),
        output={"path": str(family / "merged"), "shard_size": "600B"},
    )

    def interrupt(num_bytes: int) -> None:
        if len(list((family / "merged.partial" / "journal").glob("*.json"))) > 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(plan(load_recipe(recipe)), progress=interrupt)
    left = {
        str(path.relative_to(family)): path.read_bytes()
        for path in (family / "merged.partial").rglob("*")
        if path.is_file()
    }
    assert {"merged.partial/journal/plan", "merged.partial/lock"} <= left.keys()
    assert len([name for name in left if name.endswith(".safetensors.json")]) > 1
    check_for_secrets(left, family)


def test_everything_that_run_writes_is_free_of_tokens_and_of_this_machines_folders(hub, family):
    from click.testing import CliRunner

    from hub_magmax.cli import main

    token = hub.token
    assert os.environ["HF_TOKEN"] == token
    hub.add_repo("me/torture-base", folder=family / "base", private=True)
    recipe = write_recipe(
        family,
        base_model="me/torture-base",
        tasks=[{"name": name, "model": str(family / name)} for name in "abc"],
        output={"path": str(family / "merged"), "push_to_hub": "me/torture-merged", "shard_size": "1KB"},
    )
    before = set(family.rglob("*"))
    for verb in ("lock", "run"):
        done = CliRunner().invoke(main, [verb, str(recipe)])
        assert done.exit_code == 0, done.output
        assert token not in done.output
    written = {path for path in set(family.rglob("*")) - before if path.is_file()}
    published = {name: hub.read("me/torture-merged", name) for name in hub.files("me/torture-merged")}
    found = published | {str(path): path.read_bytes() for path in written}
    assert {"README.md", "merge_report.json", "recipe.lock.json", "recipe.yaml"} <= published.keys()
    assert {"provenance.json", "config.json"} <= published.keys()
    check_for_secrets(found, family)


def test_report_of_the_attacks_is_what_the_stored_results_say():
    results = reliability.load()
    assert reliability.PAGE.read_text() == reliability.page(results)
    assert set(results["parts"]) == set(torture.MERGES) | set(torture.READERS) == set(reliability.PARTS)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """Where the attacks' results and page are for a test: a copy of those that are stored."""
    for name in ("RESULTS", "PAGE"):
        monkeypatch.setattr(reliability, name, Path(shutil.copy(getattr(reliability, name), tmp_path)))
    return tmp_path


def measured(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["torture", *arguments])
    return torture.main()


def test_attacks_end_when_their_time_is_over_and_what_is_missing_is_named(elsewhere, monkeypatch, capfd):
    asked = ("--part", "kills", "--part", "recipes")
    assert measured(monkeypatch, *asked, "--minutes", "0.01") == 1
    said = capfd.readouterr().out
    assert "kills: cut off, 0.01 minutes are over" in said
    assert "recipes: not begun, 0.01 minutes are over" in said
    results, page = (json.loads(reliability.RESULTS.read_text()), reliability.PAGE.read_text())
    assert results["unmeasured"] == ["kills", "recipes"]
    assert results["parts"].keys() == torture.MERGES.keys() | torture.READERS.keys(), "earlier ones stay"
    assert "Not measured in the latest run" in page and page.rstrip().count("Mutated recipes") == 2
    assert measured(monkeypatch, "--write") == 1
    # Measured after all:
    tally = victims.Tally(attacks=1).to_dict()
    monkeypatch.setattr(torture, "in_a_process", lambda parts, limit: dict.fromkeys(parts, tally))
    assert measured(monkeypatch, *asked) == 0
    assert "unmeasured" not in json.loads(reliability.RESULTS.read_text())
    assert "Not measured" not in reliability.PAGE.read_text()


def test_every_process_of_a_part_that_is_cut_off_is_killed(tmp_path, monkeypatch):
    script = tmp_path / "part"
    script.write_text(f"#!/bin/sh\nsleep 300 &\necho $! > {tmp_path}/child\necho > $TMPDIR/left\nwait\n")
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(subprocess.TimeoutExpired):
        torture.in_a_process({"headers": {}}, limit_seconds=1)
    child = (tmp_path / "child").read_text().strip()
    state = Path(f"/proc/{child}/stat")
    for _ in range(100):  # it is killed, and ends when it is next given a processor
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child goes on")


def test_child_that_hangs_is_ended_and_its_attack_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(victims, "ATTACK_SECONDS", 1)
    victim = SimpleNamespace(folder=tmp_path / "victim", arguments=[])
    child = victims.start_child(victim, lambda: time.sleep(60))
    code, _ = victims.finish_child(victim, child)
    assert code == -signal.SIGALRM
