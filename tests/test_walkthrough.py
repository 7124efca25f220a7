"""The walk-through of the documentation: its recipe and commands, with a tiny encoder and few definitions."""

import itertools
import json
import re
import shlex

import pytest
import torch
from click.testing import CliRunner
from transformers import BertConfig, BertModel

from benchmarks import walkthrough, wordnet
from hub_magmax.cli import main
from tests.tiny_llama import tokenizer

PAGE = walkthrough.PAGE.read_text(encoding="utf-8")

WORDS = ("a", "the", "good", "bad", "odd", "film", "answer", "so", "it", "or")


def make_sources(folder):
    """Return an encoder of six layers, and a `data.noun` with 100 definitions of each class."""
    torch.manual_seed(0)
    words = tokenizer(16)
    config = BertConfig(
        vocab_size=len(words), hidden_size=8, intermediate_size=8, num_hidden_layers=6, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / "encoder")
    words.save_pretrained(folder / "encoder")
    glosses = (" ".join(words) for words in itertools.product(WORDS, repeat=4))
    numbers = [number for classes in wordnet.TASKS.values() for number in classes.values()]
    lines = [
        f'{place:08} {number:02} n 01 word 0 000 | {gloss}; "an example"'
        for place, (number, gloss) in enumerate(zip(100 * numbers, glosses, strict=False))
    ]
    (folder / "data.noun").write_text("  1 the licence\n" + "\n".join(lines) + "\n")
    return folder / "encoder", folder / "data.noun"


@pytest.fixture
def sources(tmp_path):
    threads = torch.get_num_threads()
    yield make_sources(tmp_path)
    torch.set_num_threads(threads)


def few(folder):
    """Leave two definitions of each class in every file, and two steps of training."""
    for path in (folder / "data").glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [row for name in wordnet.CLASSES for row in [row for row in rows if row["label"] == name][:2]]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(recipe.replace("steps: 40 ", "steps: 2 "))


def test_the_recipe_and_the_commands_of_the_page_make_a_card(sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    walkthrough.prepare(tmp_path / "work", *sources)
    data = {
        path.stem: {*path.read_text().splitlines()} for path in (tmp_path / "work" / "data").glob("*.jsonl")
    }
    report = data.pop("report")
    assert report == set().union(*(rows for name, rows in data.items() if name.endswith("-test")))
    assert sum(map(len, data.values())) == len(set().union(*data.values())) == 20 * 70
    few(tmp_path / "work")
    lines = re.findall(r"^hub-magmax (.*)$", PAGE, re.M)
    assert [tuple(shlex.split(line)) for line in lines] == [
        (verb, f"work/{recipe}") for verb, recipe in walkthrough.COMMANDS
    ]
    for line in lines:
        done = CliRunner().invoke(main, shlex.split(line))
        assert done.exit_code == 0, done.stderr
        assert "are training examples too" not in done.stderr
    found = walkthrough.collected(tmp_path / "work")
    assert [*found["scores"]] == ["base_model", *wordnet.TASKS, "merged"] and found["comparison"]["methods"]
    times = {verb: {"seconds": 60.0, "processor_seconds": 6.0} for verb, _ in walkthrough.COMMANDS}
    text = walkthrough.section(found | {"commands": times, "processors": 2, "load": 1.0, "threads": 1})
    assert "| together | 3.0 | 0.3 |" in text
    assert (tmp_path / "work" / "merged-winner" / "README.md").is_file()


def test_the_page_has_the_recipe_and_what_was_stored():
    assert f"```yaml\n{walkthrough.RECIPE.read_text()}```" in PAGE
    stored = json.loads(walkthrough.RESULTS.read_text())
    assert f"<!-- measured -->\n{walkthrough.section(stored)}<!-- /measured -->" in PAGE
