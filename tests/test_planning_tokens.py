"""What a plan says of sources and output: tokens by name, dtypes, adapters, path and room."""

import json

import pytest
import torch

from hub_magmax.pipeline import plan
from hub_magmax.planning.plan import SMALL_BYTES
from hub_magmax.planning.summary import describe, explain, notices
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.text import shown_apart
from tests.families import make_tensors, recipe_values, write_checkpoint

WORDS = ["a", "b", "c"]


def tokenizer(words: list[str]) -> str:
    return json.dumps({"model": {"vocab": {word: row for row, word in enumerate(words)}}, "added_tokens": []})


@pytest.fixture
def tokenized(family):
    for name in ("base", "a", "b"):
        (family / name / "tokenizer.json").write_text(tokenizer(WORDS))
    (family / "b" / "tokenizer.json").write_text(tokenizer(["a", "b", "<user>", "<assistant>"]))
    return family


def planned(folder, **changes):
    return plan(parse_recipe(recipe_values(**changes), folder=folder))


def told(folder, **changes) -> str:
    return "\n".join(notices(planned(folder, **changes)))


def test_tokens_are_named_and_so_is_what_becomes_of_them(tokenized):
    text = told(tokenized)
    assert (
        "b has 2 tokens ('<user>' and '<assistant>') that the base model lacks; the merged model does not"
        in text
    )
    assert "(tokenizer: union keeps those of all, tokenizer: b those of b)" in text
    assert "b lacks 1 token ('c') of the base model" in text


def test_tokens_of_the_task_whose_files_are_copied_are_kept(tokenized):
    assert "they are in the merged model's tokenizer" in told(tokenized, output={"files_from": "b"})


def test_tokens_whose_rows_are_matched_are_in_the_merge(tokenized):
    shapes = {"embed.weight": (4, 8)}
    for name in ("base", "a", "b", "c"):
        write_checkpoint(tokenized / name, make_tensors(ord(name[0]), shapes=shapes))
    text = told(tokenized, output={"files_from": "b"}, token_rows=["embed.weight"])
    assert "the merged model has them, each row the mean of the tasks that have it" in text


def test_the_same_tokens_in_another_file_are_no_notice(family):
    (family / "base" / "tokenizer.json").write_text(tokenizer(WORDS))
    (family / "a" / "tokenizer.json").write_text(tokenizer(WORDS) + "\n")
    assert planned(family).tokens == ()


def test_a_plan_shows_dtypes_output_and_room(family):
    write_checkpoint(family / "b", make_tensors(2, base=make_tensors(0), dtype=torch.bfloat16))
    made = planned(family, method={"name": "task_arithmetic", "scaling": 1.4}, output={"path": "here"})
    text = explain(made)
    assert "task 2       b: ./b (bfloat16)" in text
    assert f"output       {family / 'here'}" in text
    assert "room         20." in text and "are free" in text
    # Uniform weights of three tasks are multipliers of 1.
    assert "coefficients a 1.4, b 1.4, c 1.4 (what each task vector is multiplied by" in text
    values = describe(made)
    assert values["dtypes"]["b"] == ["bfloat16"]
    assert values["needed_bytes"] == made.bytes_out + made.copied_bytes + SMALL_BYTES


def test_values_that_differ_late_are_cut_alike_around_the_difference():
    one, other = ("x" * 50 + "1" + "y" * 50, "x" * 50 + "2" + "y" * 50)
    found = shown_apart(one, other, 20)
    assert found == ("...xxxxx1yyyyyyyyyyyyyy...", "...xxxxx2yyyyyyyyyyyyyy...")
    assert shown_apart(1, 2) == ("1", "2")
