import hashlib
import itertools
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch

from hub_magmax.errors import HubMagmaxError, PublishError, RecipeError
from hub_magmax.fleet.verifying import verify
from hub_magmax.merging.output.journal import Journal
from hub_magmax.pipeline import run
from hub_magmax.publishing import streaming_push
from hub_magmax.publishing.commits import Destination
from hub_magmax.recipe.loading import load_recipe, parse_recipe
from tests.families import recipe_values, write_family, write_recipe
from tests.test_checkpoints_hub import KINDS

_numbers = itertools.count()


@pytest.fixture
def repo():
    return f"me/relayed{next(_numbers)}"


def streaming(family, repo, **changes):
    output = {"path": "merged", "shard_size": "600B", "push_to_hub": repo, "keep": False} | changes
    return load_recipe(write_recipe(family, method="average", output=output))


def local_weights(family):
    """Merge the same into a folder; return the content of its files of weights."""
    recipe = load_recipe(
        write_recipe(family, method="average", output={"path": "kept", "shard_size": "600B"})
    )
    folder = run(recipe).output
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def weights_on_hub(hub, repo, revision="main"):
    return {
        path: hub.read(repo, path, revision)
        for path in hub.files(repo, revision)
        if path.endswith(".safetensors")
    }


def test_streamed_model_is_the_one_that_a_folder_would_hold(family, hub, repo):
    done = run(streaming(family, repo))
    assert weights_on_hub(hub, repo) == local_weights(family)
    assert done.published.commit == hub.head(repo)
    assert hub.counts["POST commit"] == 1
    assert verify(repo) == done.report.sha256
    assert {"README.md", "recipe.yaml", "recipe.lock.json", "merge_report.json"} <= set(hub.files(repo))
    assert f"# `{repo}`" in hub.read(repo, "README.md").decode()


def test_nothing_stays_on_the_disk(family, hub, repo):
    before = sorted(family.rglob("*"))
    run(streaming(family, repo))
    left = [path for path in sorted(family.rglob("*")) if path not in before]
    assert left == [family / "recipe.yaml"]


def test_two_files_of_weights_are_on_the_disk_at_most(family, hub, repo, monkeypatch):
    seen = []
    record = Journal.record

    def watched(journal, found):
        seen.append(len(list(journal.shards.glob("*.safetensors*"))))
        record(journal, found)

    monkeypatch.setattr(Journal, "record", watched)
    hub.faults.add("/_storage/*/upload", "latency", seconds=0.05)
    run(streaming(family, repo))
    assert len(seen) > 3
    assert max(seen) == 2


def test_second_run_finds_the_model_and_does_nothing(family, hub, repo):
    first = run(streaming(family, repo))
    hub.reset_log()
    second = run(streaming(family, repo))
    assert second.published.commit == first.published.commit
    assert not [e for e in hub.log if e.route in ("commit", "lfs_batch") or e.method == "PUT"]


def test_commit_whose_answer_was_lost_is_recognised(family, hub, repo, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.faults.add("*/commit/*", "lose_response", times=1)
    done = run(streaming(family, repo))
    assert done.published.commit == hub.head(repo)
    assert [commit.title for commit in hub.commits(repo)].count("Add merged model") == 1


def test_pull_request_whose_answer_was_lost_is_recognised(family, hub, repo, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.faults.add("*/commit/*", "lose_response", times=1)
    recipe = streaming(family, repo)
    done = run(recipe, destination=Destination(repo, create_pr=True))
    assert done.published.url.endswith("/discussions/1")
    assert weights_on_hub(hub, repo) == {}
    assert weights_on_hub(hub, repo, "refs/pr/1") == local_weights(family)
    again = run(recipe, destination=Destination(repo, create_pr=True)).published
    assert done.published.is_new and again == replace(done.published, is_new=False)


def test_branch_that_moved_is_told_and_the_same_command_publishes_without_sending_again(family, hub, repo):
    recipe = streaming(family, repo)
    moved = threading.Event()

    def first_upload(request):
        if request.path.endswith("/upload") and not moved.is_set():
            moved.set()
            hub.add_repo(repo, files={"notes.txt": b"somebody else's"})
        return False

    hub.faults.add(first_upload, "latency")
    with pytest.raises(PublishError, match=r"the branch moved meanwhile.*Nothing is lost"):
        run(recipe)
    assert weights_on_hub(hub, repo) == {}
    hub.faults.clear()
    hub.reset_log()
    run(recipe)
    assert not [e for e in hub.log if e.path.endswith("/upload")]
    assert weights_on_hub(hub, repo) == local_weights(family)
    assert hub.read(repo, "notes.txt") == b"somebody else's"


def test_uploads_that_the_hub_removed_are_made_and_sent_again(family, hub, repo):
    recipe = streaming(family, repo)
    hub.faults.add("*/commit/*", "status", status=400, times=1)
    with pytest.raises(PublishError, match="400"):
        run(recipe)
    assert hub.forget_uploads(repo)
    run(recipe)
    assert weights_on_hub(hub, repo) == local_weights(family)


def test_finished_shards_are_neither_merged_nor_sent_again(family, hub, repo, monkeypatch):
    recipe = streaming(family, repo)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    contents = local_weights(family)
    first = min(contents)
    sha256 = hashlib.sha256(contents[first]).hexdigest()
    hub.faults.add(f"/_storage/*/{sha256}/upload", "status", status=500)
    with pytest.raises(PublishError):
        run(recipe)
    hub.faults.clear()
    hub.reset_log()
    made = []
    record = Journal.record
    monkeypatch.setattr(Journal, "record", lambda self, found: made.append(found.file) or record(self, found))
    done = run(recipe)
    files = [shard.file for shard in done.report.shards]
    # The second one was finished when the upload of the first was given up; both waited on the disk.
    assert made == files[2:]
    assert len([e for e in hub.log if e.path.endswith("/upload")]) == len(files)
    assert weights_on_hub(hub, repo) == contents


def test_files_that_arrived_are_not_sent_again(family, hub, repo):
    recipe = streaming(family, repo)
    hub.faults.add("*/commit/*", "status", status=403, times=1)
    with pytest.raises(PublishError, match="may not write here"):
        run(recipe)
    hub.reset_log()
    run(recipe)
    assert not [e for e in hub.log if e.path.endswith("/upload")]
    assert weights_on_hub(hub, repo) == local_weights(family)


#: What the Hub says to end a matter; asking again is no use.
REFUSALS = (401, 403, 404, 412, 416)


@pytest.mark.parametrize(
    "fault",
    [*KINDS, {"kind": "status", "status": 412}, {"kind": "reset_upload"}],
    ids=str,
)
def test_quarter_of_all_requests_failing_ends_with_the_right_model_or_one_paragraph(
    family, hub, fault, monkeypatch, request
):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    repo = f"me/quarter-{fault['kind']}{fault.get('status', '')}"
    hub.faults.add("*", probability=0.25, **fault)
    recipe = streaming(family, repo)
    failures = []
    for _ in range(3):
        try:
            run(recipe)
            break
        except HubMagmaxError as error:
            assert "\n" not in str(error)
            assert weights_on_hub(hub, repo) == {} if hub_has(hub, repo) else True
            failures.append(error)
    hub.faults.clear()
    if fault.get("status") in REFUSALS:
        assert failures
        run(recipe)
    else:
        assert len(failures) < 3, failures
    assert weights_on_hub(hub, repo) == local_weights(family)
    assert [commit.title for commit in hub.commits(repo)].count("Add merged model") == 1


def hub_has(hub, repo):
    try:
        return bool(hub.head(repo))
    except HubMagmaxError:
        return False


def test_of_two_that_push_to_one_branch_one_wins_and_the_other_is_told(family, hub, repo):
    recipes = [
        load_recipe(
            write_recipe(
                family,
                method="average",
                seed=number,
                output={"path": f"merged{number}", "shard_size": "600B", "push_to_hub": repo, "keep": False},
            )
        )
        for number in (1, 2)
    ]
    hub.add_repo(repo, files={"notes.txt": b"mine"})
    outcomes = [None, None]

    def push(number):
        try:
            outcomes[number] = run(recipes[number])
        except PublishError as error:
            outcomes[number] = error

    ready = threading.Barrier(2, timeout=120)
    original = streaming_push.commit

    def wait_for_the_other(*arguments):
        ready.wait()
        return original(*arguments)

    streaming_push.commit = wait_for_the_other
    try:
        threads = [threading.Thread(target=push, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        streaming_push.commit = original
    told = [outcome for outcome in outcomes if isinstance(outcome, PublishError)]
    won = [outcome for outcome in outcomes if not isinstance(outcome, PublishError)]
    assert len(told) == len(won) == 1
    assert "the branch moved meanwhile" in str(told[0])
    assert json.loads(hub.read(repo, "merge_report.json"))["digest"] == won[0].report.digest
    loser = run(recipes[outcomes.index(told[0])])
    assert json.loads(hub.read(repo, "merge_report.json"))["digest"] == loser.report.digest
    assert hub.read(repo, "notes.txt") == b"mine"


@pytest.mark.parametrize(
    ("output", "evaluation", "reason"),
    [
        ({"keep": False}, None, "name output.push_to_hub"),
    ],
)
def test_what_cannot_be_done_without_a_folder_is_known_from_the_recipe(output, evaluation, reason):
    values = recipe_values(output=output) | ({"evaluation": evaluation} if evaluation else {})
    with pytest.raises(RecipeError, match=reason):
        parse_recipe(values)


def test_small_files_on_the_hub_are_those_of_the_merge_report(family, hub, repo):
    run(streaming(family, repo))
    report = json.loads(hub.read(repo, "merge_report.json"))
    assert all(
        hashlib.sha256(hub.read(repo, name)).hexdigest() == sha256 for name, sha256 in report["files"].items()
    )


def test_six_sharded_models_from_hub_to_hub_cost_their_bytes_once_and_three_requests_a_file(hub, tmp_path):
    shapes = {f"layer.{number}.weight": (256, 256) for number in range(12)}
    write_family(tmp_path, "abcde", num_shards=3, shapes=shapes)
    prefix = f"me/six{next(_numbers)}"
    names = ("base", *"abcde")
    for name in names:
        hub.add_repo(f"{prefix}-{name}", folder=tmp_path / name)
    tasks = [{"name": name, "model": f"{prefix}-{name}"} for name in "abcde"]
    output = {"path": "out", "shard_size": "600KB", "push_to_hub": f"{prefix}-merged", "keep": False}
    values = recipe_values(base_model=f"{prefix}-base", tasks=tasks, method="average", output=output)
    hub.reset_log()
    run(parse_recipe(values, folder=tmp_path))
    log = hub.log
    paths = [
        (f"{prefix}-{name}", path) for name in (*names, "merged") for path in hub.files(f"{prefix}-{name}")
    ]
    weights = sum(
        len(hub.read(repo, path))
        for repo, path in paths
        if path.endswith(".safetensors") and repo != f"{prefix}-merged"
    )
    fetched = sum(e.bytes_sent for e in log if e.route == "storage" and e.method == "GET")
    assert fetched <= 1.02 * weights
    assert sum(e.route != "storage" for e in log) <= 3 * len(paths)
    assert sum(e.method == "PUT" for e in log) == len(weights_on_hub(hub, f"{prefix}-merged"))


def test_what_was_pushed_is_loaded_by_transformers_from_the_same_endpoint(hub, tmp_path, repo):
    from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    for name in ("base", "a", "b"):
        BertForSequenceClassification(BertConfig(**sizes, intermediate_size=8)).save_pretrained(
            tmp_path / name
        )
    output = {"path": "out", "shard_size": "1KB", "push_to_hub": repo, "keep": False}
    recipe = write_recipe(tmp_path, names=("a", "b"), method="average", output=output)
    done = run(load_recipe(recipe), in_spite_of=["other-base:a", "other-base:b"])
    assert len(done.report.shards) > 2
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        repo, revision=done.published.commit, output_loading_info=True
    )
    assert not any(loading.values())
    states = [
        BertForSequenceClassification.from_pretrained(tmp_path / name).state_dict() for name in ("a", "b")
    ]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, (states[0][name] + states[1][name]) / 2)


def test_server_without_xet_is_told_apart_from_a_full_disk(family, hub, repo, tmp_path):
    streaming(family, repo)
    hub.faults.add("*/xet-write-token/*", "status", status=404)
    done = subprocess.run(
        [sys.executable, "-m", "hub_magmax", "run", "recipe.yaml"],
        cwd=family,
        env=os.environ | hub.xet_environment | {"HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "set HF_HUB_DISABLE_XET=1" in done.stderr
    assert f"Error: {repo}, model-0000" in done.stderr
    assert weights_on_hub(hub, repo) == {}
