"""Merging and pushing with Xet switched on, as most people have it: from Hub to Hub, failing, killed."""

import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from hub_magmax.pipeline import run
from hub_magmax.recipe.loading import load_recipe
from tests import xet_client
from tests.families import write_family, write_recipe
from tests.local_hub.faults import FaultKind
from tests.local_hub.hub import LocalHub
from tests.local_hub.wire import Request
from tests.xet_client import Client

# Files of several chunks of about 64 KiB.
SHAPES = {"embed.weight": (200, 800), "layer.0.weight": (300, 800), "layer.1.weight": (250, 800)}
SIZE = {"shard_size": "500KB"}


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    # One of its own: what a killed client had asked for ends with it, and is not carried out later.
    with LocalHub() as running:
        yield running


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """A family, and a recipe that merges it straight to the Hub, into several files."""
    write_family(tmp_path, ("a", "b"), shapes=SHAPES)
    write_recipe(
        tmp_path,
        names=("a", "b"),
        output={"path": "merged", "push_to_hub": "me/merged", "keep": False, **SIZE},
    )
    return tmp_path


def merged(family: Path) -> dict[str, str]:
    """Return the sha256 of the files of weights that the recipe makes."""
    path = family / "recipe.yaml"
    recipe = path.read_text()
    folder = run(load_recipe(write_recipe(family, names=("a", "b"), output={"path": "kept", **SIZE}))).output
    path.write_text(recipe)
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def weights_on_hub(hub: LocalHub, repo: str) -> dict[str, str]:
    found = [path for path in hub.files(repo) if path.endswith(".safetensors")]
    return {path: sha256(hub.read(repo, path)).hexdigest() for path in found}


def titles(hub: LocalHub, repo: str) -> list[str]:
    return [commit.title for commit in hub.commits(repo)]


def start(hub: LocalHub, family: Path, *arguments: str, token: str = "") -> subprocess.Popen[str]:
    changes = {"HF_TOKEN": token} if token else {}
    return subprocess.Popen(
        [sys.executable, "-m", "hub_magmax", *arguments],
        cwd=family,
        env=xet_client.environment(hub, family / "home", **changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    return errors


@pytest.mark.slow
def test_a_model_goes_from_hub_to_hub_and_is_loaded_by_xet(hub, tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"vocab_size": 3000, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name in ("base", "a", "b"):
        model = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=64))
        model.save_pretrained(tmp_path / name)
    with Client(hub, tmp_path / "home") as client:
        for name in ("base", "a", "b"):
            client.run(f"api.create_repo('me/{name}')")
            client.run(f"api.upload_folder(repo_id='me/{name}', folder_path='{name}')")
    assert (hub.counts["POST xet-shard"], hub.counts["POST lfs-batch"]) == (3, 0)
    total = sum((tmp_path / name / "model.safetensors").stat().st_size for name in ("base", "a", "b"))
    hub.reset_log()
    output = {"path": "out", "shard_size": "500KB", "push_to_hub": "me/merged", "keep": False}
    tasks = [{"name": name, "model": f"me/{name}"} for name in ("a", "b")]
    write_recipe(tmp_path, base_model="me/base", tasks=tasks, method="average", output=output)
    finish(start(hub, tmp_path, "run", "recipe.yaml"))
    assert titles(hub, "me/merged") == ["Add merged model", "initial commit"]
    # Sources are read by ranges of the file itself, each byte once, and not by Xet.
    assert sum(e.bytes_sent for e in hub.log if e.route == "storage") <= 1.02 * total
    assert (hub.counts["GET xet-reconstruction"], hub.counts["POST lfs-batch"]) == (0, 0)
    assert hub.counts["POST xet-shard"] == len(weights_on_hub(hub, "me/merged")) > 2
    hub.reset_log()
    load = (
        "__import__('transformers').BertForSequenceClassification.from_pretrained('me/merged')"
        ".save_pretrained('loaded')"
    )
    with Client(hub, tmp_path / "home") as client:
        assert client.run(load) == "None"
    assert hub.counts["GET xet-reconstruction"] == len(weights_on_hub(hub, "me/merged"))
    states = [
        BertForSequenceClassification.from_pretrained(tmp_path / name).state_dict()
        for name in ("a", "b", "loaded")
    ]
    for name, tensor in states[2].items():
        torch.testing.assert_close(tensor, (states[0][name] + states[1][name]) / 2)


def at_request(hub: LocalHub, pattern: str, number: int, kind: FaultKind, **options: Any) -> threading.Event:
    """Let every request for `pattern` from the given one on go wrong; return what tells that it came."""
    count, reached = itertools.count(1), threading.Event()

    def matches(request: Request) -> bool:
        if fnmatchcase(request.path, pattern) and next(count) >= number:
            reached.set()
        return reached.is_set() and fnmatchcase(request.path, pattern)

    hub.faults.add(matches, kind, **options)
    return reached


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "number"), [("/_storage/_xorbs/*", 2), ("/_xet/*/shards", 2), ("*/commit/*", 1)]
)
def test_a_run_that_was_killed_is_one_commit_after_the_same_command(hub, family, pattern, number):
    expected = merged(family)
    reached = at_request(hub, pattern, number, "latency", seconds=600)
    first = start(hub, family, "run", "recipe.yaml")
    assert reached.wait(60)
    first.kill()
    first.communicate()
    assert titles(hub, "me/merged") == ["initial commit"]
    hub.faults.clear()
    finish(start(hub, family, "run", "recipe.yaml"))
    assert weights_on_hub(hub, "me/merged") == expected
    assert titles(hub, "me/merged") == ["Add merged model", "initial commit"]
    if "_storage" not in pattern:
        # One xorb a file, and none of them twice.
        assert hub.counts["PUT storage"] == len(expected)


@pytest.mark.slow
def test_a_run_that_failed_publishes_nothing_and_the_same_command_sends_the_rest(hub, family):
    expected = merged(family)
    at_request(hub, "/_xet/*/shards", 2, "status", status=500)
    errors = finish(start(hub, family, "run", "recipe.yaml"), code=1)
    assert "Nothing was published; run the same command again" in errors
    assert titles(hub, "me/merged") == ["initial commit"]
    hub.faults.clear()
    finish(start(hub, family, "run", "recipe.yaml"))
    assert weights_on_hub(hub, "me/merged") == expected
    assert titles(hub, "me/merged") == ["Add merged model", "initial commit"]
    assert hub.counts["PUT storage"] == len(expected)


@pytest.mark.slow
def test_files_that_the_hub_has_lost_are_sent_again(hub, family):
    expected = merged(family)
    lost: list[str] = []

    def loses(request: Request) -> bool:
        if "/commit/" in request.path and not lost:
            lost.extend(hub.forget_uploads("me/merged"))
        return False

    hub.faults.add(loses, "latency")
    finish(start(hub, family, "run", "recipe.yaml"))
    assert sorted(lost) == sorted(expected.values())
    assert weights_on_hub(hub, "me/merged") == expected
    assert titles(hub, "me/merged") == ["Add merged model", "initial commit"]


def test_a_folder_is_pushed_by_xet_and_pushed_again_for_nothing(hub, family):
    expected = merged(family)
    hub.faults.add("/_storage/*", "reset_upload", after_bytes=200_000, times=1)
    finish(start(hub, family, "push", "kept", "me/pushed"))
    assert weights_on_hub(hub, "me/pushed") == expected
    assert (hub.counts["POST lfs-batch"], hub.counts["POST commit"]) == (0, 1)
    finish(start(hub, family, "push", "kept", "me/pushed"))
    assert hub.counts["POST commit"] == 1


def test_a_token_that_ended_meanwhile_is_told_and_xet_is_not_blamed(hub, family):
    hub.faults.add("*/xet-write-token/*", "status", status=401)
    errors = finish(start(hub, family, "run", "recipe.yaml"), code=1)
    assert "401" in errors and "hf auth login" in errors
    assert "HF_HUB_DISABLE_XET" not in errors
