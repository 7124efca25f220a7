"""Classifiers of texts with a frozen head, made of a sentence encoder and learned in its uppermost layers.

A head of logistic regression reads the pooled output of the base model and stays as it is; tasks are learned
in the two uppermost layers alone: a minute on one core.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoTokenizer, BertForSequenceClassification

from hub_magmax.evaluation.evaluators.loading import without_bars
from hub_magmax.training.loop import Optimization, fit

NUM_STEPS, BATCH_SIZE, LEARNING_RATE, MAX_TOKENS = 40, 32, 2e-4, 48

#: Uppermost layers that are learned.
NUM_LEARNED = 2

#: Texts by class.
Classes = Mapping[str, Sequence[str]]


def make_tasks(
    folder: Path,
    encoder: Path,
    head: Classes,
    tasks: Mapping[str, Classes],
    seed: int,
    *,
    num_steps: int = NUM_STEPS,
    in_sequence: bool = True,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Make the checkpoints that are not in a folder yet: `base`, and one of each task by its name.

    Args:
        folder: Of the checkpoints.
        encoder: Sentence encoder that `base` is made of.
        head: Texts by class that its head is fitted to.
        tasks: Texts by class that each task learns.
        seed: Of what is drawn, with the task's name.
        num_steps: Of each task.
        in_sequence: Whether each task begins at the checkpoint of the one before it, not at `base`.
        report: Called with a line of text after each task.
    """
    torch.set_num_threads(1)
    previous = folder / "base"
    if not previous.is_dir():
        make_base(encoder, head, previous)
    for task, texts in tasks.items():
        target = folder / task
        if not target.is_dir():
            learn(previous, texts, target, f"{seed} {task}", num_steps)
            report(f"{target}: learned")
        previous = target if in_sequence else previous


def make_base(encoder: Path, texts: Classes, target: Path) -> None:
    """Save the encoder with a head that is fitted to texts of each class, in the order of the classes."""
    from sklearn.linear_model import LogisticRegression

    tokenizer, classes = AutoTokenizer.from_pretrained(encoder), [*texts]
    with without_bars():
        model = BertForSequenceClassification.from_pretrained(
            encoder,
            num_labels=len(classes),
            id2label=dict(enumerate(classes)),
            label2id={name: number for number, name in enumerate(classes)},
        ).eval()
    pairs = _pairs(texts, model)
    rows = []
    with torch.inference_mode():
        for start in range(0, len(pairs), 64):
            batch = _encoded(tokenizer, [text for text, _ in pairs[start : start + 64]])
            rows.append(model.bert(**batch).pooler_output)
    fitted = LogisticRegression(max_iter=1000).fit(torch.cat(rows).numpy(), [label for _, label in pairs])
    weight, bias = torch.from_numpy(fitted.coef_), torch.from_numpy(fitted.intercept_)
    if len(classes) == 2:  # of two classes it has the one row of the second
        weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
    with torch.no_grad():
        model.classifier.weight.copy_(weight)
        model.classifier.bias.copy_(bias)
    save(model, tokenizer, target)


def learn(previous: Path, texts: Classes, target: Path, seed: str, num_steps: int) -> None:
    """Fine-tune a checkpoint on texts of some of its classes, and save it."""
    tokenizer = AutoTokenizer.from_pretrained(previous)
    draws = random.Random(seed)
    torch.manual_seed(draws.randrange(2**63))
    with without_bars():
        model = BertForSequenceClassification.from_pretrained(previous).train()
    for part in (model.bert.embeddings, *model.bert.encoder.layer[:-NUM_LEARNED], model.classifier):
        part.requires_grad_(False)
    pairs = _pairs(texts, model)

    def batch(step: int) -> tuple[Any, Tensor]:
        chosen = draws.sample(pairs, BATCH_SIZE)
        labels = torch.tensor([label for _, label in chosen])
        return _encoded(tokenizer, [text for text, _ in chosen]), labels

    fit(_Loss(model), batch, Optimization(num_steps, LEARNING_RATE, schedule="linear", on_cpu=True))
    save(model, tokenizer, target)


def unlearned(base: Path) -> tuple[str, ...]:
    """Return globs over the tensors of the base model that `learn` leaves as they are."""
    num_layers = AutoConfig.from_pretrained(base).num_hidden_layers
    lower = (f"bert.encoder.layer.{number}.*" for number in range(num_layers - NUM_LEARNED))
    return "bert.embeddings.*", *lower, "classifier.*"


def _pairs(texts: Classes, model: Any) -> list[tuple[str, int]]:
    numbers = model.config.label2id
    return [(text, numbers[name]) for name, found in texts.items() for text in found]


def _encoded(tokenizer: Any, texts: list[str]) -> Any:
    return tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")


class _Loss(nn.Module):
    """Mean cross-entropy of texts."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, encoded: Any, labels: Tensor) -> Tensor:
        return cross_entropy(self.network(**encoded).logits, labels)


def save(model: Any, tokenizer: Any, target: Path) -> None:
    unfinished = target.with_name(f"{target.name}.partial")
    with without_bars():
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    unfinished.rename(target)
