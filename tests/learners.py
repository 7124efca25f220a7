"""Tiny models that learn, with their data: a text classifier with dropout, and recipes that train it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

from tests.families import recipe_values
from tests.tiny_llama import tokenizer

CLASSES = ("odd", "good", "bad", "answer")

TEXTS = {
    "a": [("an odd film", "odd"), ("a good film", "good"), ("odd and odd", "odd"), ("so good", "good")],
    "b": [("a bad film", "bad"), ("the answer", "answer"), ("bad or bad", "bad"), ("answer it", "answer")],
}


def write_learner(folder: Path, *, dropout: float = 0.1, dtype: torch.dtype = torch.float32) -> Path:
    """Write `base`, a BERT of two layers with a head of four classes, and `a.jsonl`, `b.jsonl`."""
    torch.manual_seed(0)
    words = tokenizer(16)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, pad_token_id=words.pad_token_id,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, initializer_range=0.2,
        id2label=dict(enumerate(CLASSES)), label2id={name: i for i, name in enumerate(CLASSES)},
    )  # fmt: skip
    BertForSequenceClassification(config).to(dtype).save_pretrained(folder / "base")
    words.save_pretrained(folder / "base")
    for task, rows in TEXTS.items():
        lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
        (folder / f"{task}.jsonl").write_text("\n".join(lines))
    return folder


def training_recipe(changes: dict[str, Any] | None = None, **others: Any) -> dict[str, Any]:
    """Return a recipe that trains `a`, and `b` after it, and evaluates both; `changes` are to `training`."""
    data, held_out = ({task: {"dataset": f"./{task}.jsonl"} for task in TEXTS} for _ in range(2))
    training = {"data": data, "steps": 6, "batch_size": 3, "learning_rate": 0.01} | (changes or {})
    evaluation = {"evaluator": "text-classification", "tasks": held_out}
    return recipe_values(("a", "b"), training=training, evaluation=evaluation, **others)


class Stopped(Exception):
    pass


class stopping:
    """A progress bar that stops the program when so many steps were done, of all tasks."""

    def __init__(self, after, stop):
        self.left, self.stop = after, stop

    def __call__(self, total, doing, unit):
        return self

    def __enter__(self):
        return self.advance

    def __exit__(self, *error):
        return None

    def advance(self, count):
        self.left -= count
        if self.left == 0:
            self.stop()


def stop():
    raise Stopped
