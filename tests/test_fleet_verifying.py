"""What `verify` compares: every file that a merge wrote, and nothing that people write afterwards."""

import itertools

import pytest

from hub_magmax.errors import OutputError, PublishError
from hub_magmax.fleet.verifying import verify
from hub_magmax.merging.output.report import read_report
from hub_magmax.pipeline import run
from hub_magmax.publishing.pushing import push
from hub_magmax.recipe.loading import load_recipe
from tests.families import write_recipe

_numbers = itertools.count()


@pytest.fixture
def merged(family):
    (family / "base" / "tokenizer.json").write_text("{}")
    run(load_recipe(write_recipe(family, output={"shard_size": "1KB"})))
    return family / "merged"


def test_every_file_of_the_merge_has_its_hash_in_the_report(merged):
    report = read_report(merged / "merge_report.json")
    assert set(report.files) == {
        "config.json",
        "model.safetensors.index.json",
        "provenance.json",
        "recipe.lock.json",
        "recipe.yaml",
        "tokenizer.json",
    }
    assert verify(str(merged)) == report.sha256
    assert report.sha256.keys() == {path.name for path in merged.iterdir()} - {
        "README.md",
        "merge_report.json",
    }


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "recipe.yaml", "provenance.json", "model.safetensors.index.json"],
)
def test_side_file_that_changed_is_named(merged, name):
    (merged / name).write_text((merged / name).read_text() + " ")
    with pytest.raises(OutputError, match="the merge report says") as caught:
        verify(str(merged))
    assert caught.value.where == f"{merged}, {name}"


def test_all_files_that_changed_are_named(merged):
    (merged / "config.json").unlink()
    (merged / "tokenizer.json").write_text("[]")
    with pytest.raises(
        OutputError, match=r"config\.json: sha256 is missing.*; also changed: tokenizer\.json"
    ):
        verify(str(merged))


@pytest.mark.parametrize(
    "name", ["extra.safetensors", "pytorch_model.bin", "modeling.py", "chat_template.jinja"]
)
def test_added_file_that_a_loader_reads_is_named(merged, name):
    (merged / name).write_bytes(b"x")
    with pytest.raises(OutputError, match="the merge did not write this file") as caught:
        verify(str(merged))
    assert caught.value.where == f"{merged}, {name}"


@pytest.mark.parametrize(
    "name", ["README.md", "scores.json", "outcomes.json", "tradeoff.png", "model.sig", "notes.md"]
)
def test_what_people_write_afterwards_is_not_compared(merged, name):
    (merged / name).write_bytes(b"mine")
    assert name not in verify(str(merged))


def test_the_same_is_compared_on_the_hub(merged, hub):
    repo = f"me/verified{next(_numbers)}"
    push(merged, repo)
    assert verify(repo) == verify(str(merged))
    good = hub.head(repo)
    hub.add_repo(repo, files={"README.md": b"my words", "config.json": b"{}"})
    with pytest.raises(PublishError, match=r", config\.json: sha256 is"):
        verify(repo)
    hub.add_repo(repo, files={"config.json": (merged / "config.json").read_bytes(), "vocab.txt": b"x"})
    with pytest.raises(PublishError, match=r", vocab\.txt: the merge did not write"):
        verify(repo)
    assert verify(repo, revision=good)


def test_report_of_an_earlier_version_lists_the_weights_only(merged):
    import json

    path = merged / "merge_report.json"
    values = json.loads(path.read_text())
    del values["files"], values["notices"]
    path.write_text(json.dumps(values))
    (merged / "vocab.txt").write_bytes(b"x")
    assert set(verify(str(merged))) == {p.name for p in merged.glob("*.safetensors")}
    (merged / "extra.safetensors").write_bytes(b"x")
    with pytest.raises(OutputError, match="did not write"):
        verify(str(merged))
