"""The stored cards are what the program makes of the values stored beside them."""

import struct

import pytest
import yaml
from huggingface_hub import ModelCard, constants

from benchmarks.cards import CARDS, recipe_names
from hub_magmax.evaluation.scores import read_scores
from hub_magmax.merging.output.report import read_report
from hub_magmax.recipe.loading import load_recipe
from hub_magmax.recipe.lockfile import read_lock
from hub_magmax.recipe.matching import check_lock
from hub_magmax.reporting.card import render_card
from tests.local_hub.metadata import validate

NAMES = recipe_names()


def stored(name):
    folder = CARDS / name
    recipe, locked = load_recipe(folder / "recipe.yaml"), read_lock(folder / "recipe.lock.json")
    return recipe, locked, read_report(folder / "merge_report.json"), read_scores(folder)


def test_every_recipe_has_a_card_and_every_card_a_recipe():
    assert sorted(path.parent.name for path in CARDS.glob("*/README.md")) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_card_says_what_was_measured(name, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")
    rendered = render_card(*stored(name), picture="tradeoff.png")
    # Not `assert a == b`: the difference of two cards would fill the screen. `make cards` writes them anew.
    same = (CARDS / name / "README.md").read_text(encoding="utf-8") == rendered
    assert same, "render it again: python -m benchmarks.cards --render"


@pytest.mark.parametrize("name", NAMES)
def test_front_matter_passes_the_hubs_own_checks(name):
    text = (CARDS / name / "README.md").read_text(encoding="utf-8")
    assert validate(text).errors == ()
    assert ModelCard(text).data.library_name == "transformers"


@pytest.mark.parametrize("name", NAMES)
def test_values_belong_to_the_shipped_recipe(name):
    recipe, locked, report, scores = stored(name)
    shipped = load_recipe(CARDS.parent / "recipes" / f"{name}.yaml")
    assert recipe.to_dict() == shipped.to_dict()
    check_lock(recipe, locked, name)
    assert scores.evaluation_digest == recipe.evaluation.digest
    assert sum(report.shares.values()) == pytest.approx(1 if report.shares else 0)


@pytest.mark.parametrize("name", NAMES)
def test_picture_is_a_small_png(name):
    content = (CARDS / name / "tradeoff.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">I", content[16:20])[0] == 800
    assert len(content) < 30_000


@pytest.mark.parametrize("name", NAMES)
def test_nothing_stored_names_another_machine(name):
    for path in (CARDS / name).iterdir():
        if path.suffix != ".png":
            text = path.read_text(encoding="utf-8")
            assert "127.0.0.1" not in text and "localhost" not in text
            assert not any(place in text for place in ("/tmp", "/home", "/root", "/Users"))


def test_the_data_of_the_cards_is_data_that_the_recipes_name():
    recipe = yaml.safe_load((CARDS.parent / "recipes" / "quickstart.yaml").read_text())
    _, _, _, scores = stored("quickstart")
    assert {task: entry["dataset"] for task, entry in scores.data.items()} == {
        task: entry["dataset"] for task, entry in recipe["evaluation"]["tasks"].items()
    }
