import hashlib
import json
import subprocess
from dataclasses import replace

import pytest

from hub_magmax.checkpoints.side_files import content_hashes, is_side_file, same_content, tokenizer_notices
from hub_magmax.errors import LockError, MismatchError
from hub_magmax.merging.execution import merge
from hub_magmax.pipeline import lock, plan
from hub_magmax.planning.summary import describe, explain, notices
from hub_magmax.recipe.loading import load_recipe
from tests.families import write_recipe

ONE, OTHER = content_hashes(b"one"), content_hashes(b"other")


def configure(family, name, **values):
    (family / name / "config.json").write_text(json.dumps(values))


def test_hashes_are_sha256_and_gits_own(tmp_path):
    (tmp_path / "x").write_bytes(b"content")
    done = subprocess.run(
        ["git", "hash-object", "x"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert content_hashes(b"content").split() == [
        f"sha256:{hashlib.sha256(b'content').hexdigest()}",
        f"git:{done.stdout.strip()}",
    ]


def test_contents_compare_by_the_hashes_that_both_have():
    large, small = ONE.split()
    assert same_content(ONE, large) is True
    assert same_content(ONE, small) is True
    assert same_content(OTHER, small) is False
    assert same_content(large, small) is None


@pytest.mark.parametrize(
    ("path", "belongs"),
    [
        ("config.json", True),
        ("tokenizer.model", True),
        ("chat_template.jinja", True),
        ("model.safetensors.index.json", False),
        ("scores.json", False),
        ("choices.scores.json", False),
        ("choices.outcomes.json", False),
        ("provenance.json", False),
        ("README.md", False),
        ("training.bin", False),
        ("a\n.json", False),
        ("..\\x.json", False),
        ("c:x.json", False),
        ("aux.json", False),
        ("auxiliary.json", True),
        ("\udcff.json", False),
    ],
)
def test_side_files_are_those_that_make_a_model_usable(path, belongs):
    assert is_side_file(path) is belongs


HOSTILE = (
    "../outside.json", "/tmp/hub_magmax_outside.json", "a/../../outside.json", "..\\outside.json",
    "C:\\outside.json", "c:outside.json", "CON.json", "nul.tar.json", "lpt1.txt", ".json", "x\n.json",
    "\u202e.json", "recipe.lock.json", "merge_report.json", "-rf.json", "$(id).txt",
)  # fmt: skip


def test_files_with_hostile_names_stay_inside_the_output_or_are_left_out(family, hub):
    good = {path.name: path.read_bytes() for path in (family / "base").iterdir()}
    hub.add_repo("me/hostile-names", files=good | dict.fromkeys(HOSTILE, b"hostile"))
    before = {path for path in family.rglob("*") if path.is_file()}
    recipe = load_recipe(write_recipe(family, base_model="me/hostile-names"))
    merge(plan(recipe))
    left = {path for path in family.rglob("*") if path.is_file()} - before - {family / "recipe.yaml"}
    assert all(path.parent == family / "merged" for path in left)
    hostile = {path.name for path in left if path.read_bytes() == b"hostile"}
    assert hostile == {"-rf.json", "$(id).txt"}, "odd names, but names of files in a folder"


def test_sources_with_the_same_difference_share_a_notice():
    copied = {"tokenizer.json": ONE, "vocab.txt": ONE, "config.json": ONE}
    other = {"tokenizer.json": OTHER, "config.json": OTHER, "merges.txt": ONE}
    (notice,) = tokenizer_notices({"base_model": copied, "a": other, "b": other, "c": {}}, "base_model")
    assert notice == (
        "the tokenizer of a, b differs from that of base_model, which the merged model gets: "
        "merges.txt (added), tokenizer.json (other content), vocab.txt (missing)"
    )
    assert (
        tokenizer_notices({"base_model": copied, "a": copied, "b": {"config.json": OTHER}}, "base_model")
        == ()
    )


def test_tokenizer_that_differs_is_noted_in_plan_report_and_card(family):
    for name in ("base", "a", "b"):
        (family / name / "tokenizer.json").write_text("{}")
    (family / "b" / "chat_template.jinja").write_text("{{ messages }}")
    recipe = load_recipe(write_recipe(family))
    made = plan(recipe)
    expected = (
        "the tokenizer of b differs from that of base_model, which the merged model gets: "
        "chat_template.jinja (added)"
    )
    assert notices(made) == (expected,)
    assert describe(made)["notices"] == [expected]
    assert f"note         {expected}" in explain(made)
    report = merge(made)
    assert report.notices == (expected,)
    from hub_magmax.reporting.card import render_card

    assert expected in render_card(recipe, made.lock, report)


def test_checkpoints_of_two_model_types_are_refused_before_anything_is_read(family):
    configure(family, "base", model_type="llama")
    configure(family, "a", model_type="llama")
    configure(family, "b", model_type="mistral")
    configure(family, "c")
    with pytest.raises(MismatchError) as caught:
        lock(load_recipe(write_recipe(family)))
    assert caught.value.where == "./b, config.json"
    assert caught.value.what == "`model_type` is mistral, and llama in ./base"


def test_heads_that_differ_are_refused_unless_rules_say_which_to_keep(family):
    configure(family, "base", model_type="bert", architectures=["BertForMaskedLM"])
    for name in "abc":
        configure(family, name, model_type="bert", architectures=["BertForTokenClassification"])
    with pytest.raises(MismatchError, match="is BertForTokenClassification, and BertForMaskedLM in"):
        plan(load_recipe(write_recipe(family)))
    made = plan(load_recipe(write_recipe(family, tensors=[{"match": "scale", "take": "a"}])))
    assert any("BertForMaskedLM, a BertForTokenClassification" in notice for notice in notices(made))


@pytest.mark.parametrize("stated", [["x"], 7, "a b", "\ud800", "x" * 101, None])
def test_model_type_that_is_no_name_counts_as_absent(family, stated):
    configure(family, "b", model_type=stated, architectures=stated)
    locked = lock(load_recipe(write_recipe(family)))
    assert locked.tasks["b"].model_type is None


def test_side_file_that_changed_since_the_lock_is_refused_before_the_merge(family):
    recipe = load_recipe(write_recipe(family))
    locked = lock(recipe)
    (family / "base" / "tokenizer.json").write_text("{}")
    configure(family, "base", model_type="test", changed=True)
    with pytest.raises(LockError, match=r"^\./base: config\.json, tokenizer\.json changed since"):
        plan(recipe, locked)


def test_side_file_that_changes_between_plan_and_copy_is_refused(family):
    made = plan(load_recipe(write_recipe(family)))
    configure(family, "base", model_type="test", changed=True)
    with pytest.raises(LockError, match=r"^\./base: config\.json changed since"):
        merge(made)
    assert not (family / "merged").exists()


def test_side_files_of_other_sources_may_change(family):
    recipe = load_recipe(write_recipe(family))
    locked = lock(recipe)
    (family / "b" / "notes.txt").write_text("more training")
    merge(plan(recipe, locked))


def test_versions_are_in_the_lock_and_not_in_its_digest(family):
    locked = lock(load_recipe(write_recipe(family)))
    assert {"python", "torch", "transformers", "datasets"} <= json.loads(locked.to_json())["versions"].keys()
    later = replace(locked, versions={"torch": "99"})
    assert later.digest == locked.digest
    assert (
        plan(load_recipe(family / "recipe.yaml"), later).digest
        == plan(load_recipe(family / "recipe.yaml"), locked).digest
    )
