"""While the Hub fails, nothing older stands in for its answer: it is asked again, or there is an error.

Every kind is tried with 503 once (the right commit), 503 for ever (an error), and connections that are cut.
"""

import itertools
import json
import threading
from pathlib import Path

import datasets
import pytest
from huggingface_hub import HfApi, constants

from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.checkpoints.storage.hub import open_hub, resolve_commit
from hub_magmax.checkpoints.storage.hub_copy import copied_from_hub
from hub_magmax.errors import EvaluationError, HubMagmaxError, SourceError
from hub_magmax.evaluation.data import load_examples
from hub_magmax.evaluation.hub_data import without_prepared_copies
from hub_magmax.fleet.verifying import verify
from hub_magmax.pipeline import lock
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.recipe.values import Data
from tests.families import make_tensors, recipe_values, write_checkpoint, write_family, write_recipe
from tests.test_cli import call

_numbers = itertools.count()

#: What goes wrong for a while, and is asked again.
ONCE = [
    {"kind": "status", "status": 503, "times": 1},
    {"kind": "lose_response", "times": 2},
    {"kind": "reset", "times": 1},
    {"kind": "truncate", "times": 1},
]
#: What does not end.
FOR_EVER = [
    {"kind": "status", "status": 503},
    {"kind": "lose_response"},
    {"kind": "reset", "after_bytes": 0},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache of its own for each test, and no pauses."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "prepared")
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.fixture
def moved(hub, tmp_path):
    """A repository whose branch moved after it was downloaded: its name, and the commit of now."""
    repo = f"me/moved{next(_numbers)}"
    hub.add_repo(repo, folder=write_checkpoint(tmp_path / "old", make_tensors(1)))
    HfApi().snapshot_download(repo)
    now = hub.add_repo(repo, folder=write_checkpoint(tmp_path / "new", make_tensors(2)))
    return repo, now


@pytest.mark.parametrize("fault", ONCE, ids=str)
def test_branch_is_asked_for_again_and_the_cache_is_not(moved, hub, fault):
    repo, now = moved
    hub.faults.add("/api/models/*", **fault)
    assert resolve_commit(repo, None) == now
    hub.faults.add("/api/models/*", **fault)
    assert resolve_commit(repo, "main") == now


@pytest.mark.parametrize("fault", FOR_EVER, ids=str)
def test_branch_of_a_hub_that_fails_for_ever_is_an_error(moved, hub, fault):
    hub.faults.add("/api/models/*", **fault)
    with pytest.raises(SourceError, match="--from-cache"):
        resolve_commit(moved[0], None)


def test_offline_the_cache_answers(moved, hub, monkeypatch):
    repo, now = moved
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cached = resolve_commit(repo, None)
    assert cached == hub.commits(repo)[1].sha != now
    assert open_hub(repo, cached).commit == cached


@pytest.mark.parametrize("fault", ONCE, ids=str)
def test_lock_and_verify_see_the_commit_of_now(moved, hub, tmp_path, fault):
    repo, now = moved
    write_family(tmp_path, "a")
    recipe = parse_recipe(
        recipe_values(names=("a",), base_model=repo, tasks=[{"name": "a", "model": "./a"}]), folder=tmp_path
    )
    hub.faults.add("/api/models/*", **fault)
    assert lock(recipe).base_model.commit == now
    hub.faults.add("/api/models/*", **fault)
    with pytest.raises(HubMagmaxError, match=rf"{repo}@{now[:7]}: there is no merge_report\.json"):
        verify(repo)


@pytest.mark.parametrize("fault", FOR_EVER, ids=str)
def test_lock_and_verify_are_errors_where_the_hub_fails_for_ever(moved, hub, fault):
    hub.faults.add("/api/models/*", **fault)
    for act in (lambda: lock(parse_recipe(recipe_values(base_model=moved[0]))), lambda: verify(moved[0])):
        with pytest.raises(SourceError, match=r"Hub answered with an error|connection failed"):
            act()


@pytest.mark.parametrize("fault", [*ONCE, {"kind": "status", "status": 503, "times": 4}], ids=str)
def test_licence_of_a_source_is_not_taken_for_missing(hub, tmp_path, fault):
    repo = f"me/licensed{next(_numbers)}"
    write_family(tmp_path, "a")
    hub.add_repo(repo, folder=tmp_path / "base", files={"README.md": b"---\nlicense: mit\n---\n"})
    hub.faults.add("*/README.md", **fault)
    locked = lock(parse_recipe(recipe_values(names=("a",), base_model=repo), folder=tmp_path))
    assert locked.base_model.license == "mit"


FILES = {
    "config.json": b"{}",
    "tokenizer.json": b'{"a": 1}',
    "vocab.txt": b"x",
    "chat_template.jinja": b"y",
    "README.md": b"---\nlicense: mit\n---\n",
}


@pytest.fixture
def model(hub, tmp_path):
    """A repository of a model with files of a tokenizer, and its commit."""
    repo = f"me/model{next(_numbers)}"
    hub.add_repo(repo, folder=write_checkpoint(tmp_path / "m", make_tensors(1)), files=FILES)
    hub.add_repo(repo, files={"pytorch_model.bin": b"pickled", "notes.pdf": b"no part of it"})
    return repo, hub.head(repo)


@pytest.mark.parametrize("path", ["*/resolve/*", "*/tokenizer.json", "/api/models/*", "/_storage/*"])
@pytest.mark.parametrize("fault", ONCE, ids=str)
def test_model_to_evaluate_is_copied_whole(model, hub, path, fault):
    hub.faults.add(path, **fault)
    place = copied_from_hub(ModelPlace(*model))
    here = {file.name: file.read_bytes() for file in Path(place.name).iterdir()}
    assert here.keys() == {*FILES, "model.safetensors"}
    assert all(here[name] == content for name, content in FILES.items())
    assert place.revision is None


@pytest.mark.parametrize("path", ["*/tokenizer.json", "*/chat_template.jinja", "*/model.safetensors"])
@pytest.mark.parametrize("fault", FOR_EVER, ids=str)
def test_file_of_a_model_that_does_not_come_is_an_error_and_not_a_missing_file(model, hub, path, fault):
    hub.faults.add(path, **fault)
    with pytest.raises(SourceError, match=path.removeprefix("*/")):
        copied_from_hub(ModelPlace(*model))


def test_model_of_a_branch_is_not_the_one_in_the_cache(moved, hub):
    repo, now = moved
    hub.faults.add("/api/models/*", "status", times=1)
    place = copied_from_hub(ModelPlace(repo))
    assert place.name.endswith(f"/snapshots/{now}")


def test_sub_folder_of_a_repository_is_copied_alone(hub, tmp_path):
    repo = f"me/parts{next(_numbers)}"
    files = {f"{part}/{name}": content for part in ("one", "two") for name, content in FILES.items()}
    weights = (write_checkpoint(tmp_path / "m", make_tensors(1)) / "model.safetensors").read_bytes()
    hub.add_repo(repo, files={**files, "one/model.safetensors": weights, "two/model.safetensors": weights})
    place = copied_from_hub(ModelPlace(repo, hub.head(repo), "one"))
    folder = Path(place.name)
    assert place.options["subfolder"] == "one"
    assert {path.name for path in folder.iterdir()} == {"one"}
    assert {path.name for path in (folder / "one").iterdir()} == {*FILES, "model.safetensors"}


@pytest.fixture
def rows(hub, tmp_path):
    """A data set that was loaded, and changed afterwards: its name, and both commits."""
    repo = f"me/changed{next(_numbers)}"
    card = b"---\nconfigs:\n- config_name: default\n  data_files: mine.csv\n---\n"
    files = {"README.md": card, "other.csv": b"label,x\n9,9\n"}
    hub.add_repo(repo, repo_type="dataset", files={**files, "mine.csv": b"label,x\n1,2\n"})
    assert labels(repo, tmp_path) == [1]
    hub.add_repo(repo, repo_type="dataset", files={"README.md": card + b"new", "mine.csv": b"label,x\n5,6\n"})
    now, before = (commit.sha for commit in hub.commits(repo, repo_type="dataset")[:2])
    return repo, now, before


def labels(repo, folder, revision=None):
    return load_examples(Data(dataset=repo, split="train", revision=revision), folder)["label"][:]


@pytest.mark.parametrize("path", ["/api/datasets/*", "*/mine.csv", "*/README.md", "*/tree/*"])
@pytest.mark.parametrize("fault", [*ONCE, {"kind": "status", "status": 503, "times": 3}], ids=str)
def test_data_is_that_of_its_commit(rows, hub, tmp_path, path, fault):
    repo, now, _ = rows
    hub.faults.add(path, **fault)
    assert labels(repo, tmp_path) == [5]
    hub.faults.add(path, **fault)
    assert labels(repo, tmp_path, now) == [5]


@pytest.mark.parametrize("path", ["*", "/api/datasets/*", "*/mine.csv", "*/README.md", "*/tree/*"])
@pytest.mark.parametrize("fault", FOR_EVER, ids=str)
def test_data_that_was_prepared_earlier_does_not_stand_in_for_it(rows, hub, tmp_path, path, fault):
    repo, now, _ = rows
    hub.faults.add(path, **fault)
    for revision in (None, now):
        with pytest.raises((EvaluationError, SourceError)):
            labels(repo, tmp_path, revision)


def test_offline_data_of_another_commit_is_refused(rows, tmp_path, monkeypatch):
    repo, now, before = rows
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert labels(repo, tmp_path) == labels(repo, tmp_path, before) == [1]
    with pytest.raises(EvaluationError, match=f"prepared is of the commit {before}"):
        labels(repo, tmp_path, now)


def test_data_of_lm_eval_is_not_an_earlier_copy_either(rows, hub):
    hub.faults.add("*", "status", status=404, error_code="RepoNotFound")
    assert datasets.load_dataset(rows[0], split="train")["label"][:] == [1], "as the library does it"
    with without_prepared_copies(), pytest.raises(datasets.exceptions.DatasetNotFoundError):
        datasets.load_dataset(rows[0], split="train")


def test_two_threads_leave_the_library_as_it_was(monkeypatch):
    monkeypatch.setattr("hub_magmax.evaluation.hub_data.is_offline", lambda: False)
    usual = datasets.load.CachedDatasetModuleFactory
    is_inside, may_leave = threading.Event(), threading.Event()

    def second():
        with without_prepared_copies():
            is_inside.set()
            may_leave.wait(10)

    with without_prepared_copies():
        thread = threading.Thread(target=second)
        thread.start()
        is_inside.wait(0.2)  # it gets there now only where the threads do not wait for each other
    may_leave.set()
    thread.join()
    assert is_inside.is_set() and datasets.load.CachedDatasetModuleFactory is usual


def test_command_reads_the_cache_where_it_is_told_to(moved, hub, tmp_path):
    repo, now = moved
    before = hub.commits(repo)[1].sha
    write_family(tmp_path, "a")
    recipe = write_recipe(tmp_path, names=("a",), base_model=repo)
    hub.faults.add("*", "status")
    code, _, said = call("lock", recipe)
    assert code == 1 and "--from-cache sends nothing, and reads the local cache" in said
    hub.reset_log()
    code, out, _ = call("lock", recipe, "--from-cache", "--json")
    assert code == 0 and json.loads(out)["base_model"]["commit"] == before
    code, out, said = call("plan", recipe, "--from-cache", "--in-spite-of", "other-base:a")
    assert code == 0, out + said
    assert hub.log == ()
    hub.faults.clear()
    code, out, _ = call("lock", recipe, "--json")
    assert code == 0 and json.loads(out)["base_model"]["commit"] == now
