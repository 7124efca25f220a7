"""Causal language models, scored by the probabilities they give, without generating."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.evaluators.examples import batches_of
from hub_magmax.evaluation.evaluators.registry import Columns, Outcome, evaluator

if TYPE_CHECKING:
    from datasets import Dataset

    from hub_magmax.evaluation.evaluators.loading import LoadedModel


@evaluator("log-likelihood")
@dataclass(frozen=True)
class LogLikelihood:
    """Texts to their mean log-probability per token, which is minus the loss (natural logarithm).

    The first token has nothing before it and does not count. Texts longer than the model's context
    are cut off there.
    """

    metric: ClassVar[str] = "log-likelihood"
    unit: ClassVar[str] = "nats per token"
    labelled: ClassVar[bool] = False
    is_share: ClassVar[bool] = False
    pipeline_tag: ClassVar[str] = "text-generation"
    model_class: ClassVar[str] = "AutoModelForCausalLM"
    processor_class: ClassVar[str] = "AutoTokenizer"

    def encode(
        self, model: LoadedModel, examples: Dataset, columns: Columns, batch_size: int
    ) -> Iterator[list[tuple[list[int], int]]]:
        for (texts,) in batches_of(examples, (columns.input or "text",), batch_size):
            yield [(_tokens(model, text), 1) for text in texts]

    def outcomes(self, model: LoadedModel, batches: Iterable[list[tuple[list[int], int]]]) -> list[Outcome]:
        found = []
        for rows in batches:
            for (tokens, first), total in zip(rows, _log_likelihoods(model, rows), strict=True):
                mean = total / max(1, len(tokens) - first)
                found.append(Outcome(mean, math.exp(mean)))
        return found


@evaluator("multiple-choice")
@dataclass(frozen=True)
class MultipleChoice:
    """Questions with some answers each, right where the likeliest answer is the labelled one.

    The question and a space come before every answer. Equal likelihoods go to the first answer.

    Attributes:
        choices_column: Holds the list of answers. The label is the number of the right one, or its text.
        per_token: Divide an answer's log-likelihood by its number of tokens.
    """

    _: KW_ONLY
    choices_column: str = "choices"
    per_token: bool = False

    metric: ClassVar[str] = "accuracy"
    is_share: ClassVar[bool] = True
    pipeline_tag: ClassVar[str] = "text-generation"
    model_class: ClassVar[str] = "AutoModelForCausalLM"
    processor_class: ClassVar[str] = "AutoTokenizer"

    def encode(
        self, model: LoadedModel, examples: Dataset, columns: Columns, batch_size: int
    ) -> Iterator[list[tuple[list[tuple[list[int], int]], int]]]:
        wanted = (columns.input or "question", self.choices_column, columns.label)
        for questions, choices, labels in batches_of(examples, wanted, batch_size):
            yield [
                (_continuations(model, question, answers), _number_of(label, answers))
                for question, answers, label in zip(questions, choices, labels, strict=True)
            ]

    def outcomes(
        self, model: LoadedModel, batches: Iterable[list[tuple[list[tuple[list[int], int]], int]]]
    ) -> list[Outcome]:
        found = []
        for questions in batches:
            totals = iter(_log_likelihoods(model, [row for rows, _ in questions for row in rows]))
            for rows, right in questions:
                scores = list(islice(totals, len(rows)))
                if self.per_token:
                    lengths = [len(tokens) - first for tokens, first in rows]
                    scores = [score / length for score, length in zip(scores, lengths, strict=True)]
                found.append(_chosen(scores, right))
        return found


def _chosen(scores: Sequence[float], right: int) -> Outcome:
    """Return whether the highest score is the right one, its share of exp(score), and its margin."""
    highest = max(scores)
    shares = [math.exp(score - highest) for score in scores]
    others = [score for number, score in enumerate(scores) if number != right]
    margin = scores[right] - max(others) if others else None
    return Outcome(float(scores.index(highest) == right), shares[right] / math.fsum(shares), margin)


def _number_of(label: Any, answers: Sequence[str]) -> int:
    if isinstance(label, int) and 0 <= label < len(answers):
        return label
    if label in answers:
        return list(answers).index(label)
    raise EvaluationError(
        f"the label {label!r} is none of the answers",
        where="label column",
        expected=f"a number from 0 to {len(answers) - 1}, or one of {', '.join(map(repr, answers))}",
    )


def _tokens(model: LoadedModel, text: str) -> list[int]:
    """Return a text's tokens, cut off where the model's context ends."""
    tokens: list[int] = model.processor(text)["input_ids"]
    return tokens[: getattr(model.network.config, "max_position_embeddings", None)]


def _continuations(model: LoadedModel, question: str, answers: Sequence[str]) -> list[tuple[list[int], int]]:
    """Return the tokens of question and answer together, and where the answer starts.

    The question is tokenised together with the answer, since a token may span the space between them:
    the answer starts where the two first differ from the question alone, and at least one token counts.
    """
    alone: list[int] = model.processor(question, add_special_tokens=True)["input_ids"]
    rows = []
    for answer in answers:
        tokens = _tokens(model, f"{question} {answer}")
        shared = next((i for i, (a, b) in enumerate(zip(alone, tokens, strict=False)) if a != b), len(alone))
        rows.append((tokens, max(1, min(shared, len(tokens) - 1))))
    return rows


def _log_likelihoods(model: LoadedModel, rows: Sequence[tuple[list[int], int]]) -> list[float]:
    """Return the summed log-probability of each row's tokens from its `first` one on.

    Rows are run together, filled up at the end, where attention does not reach back from.
    """
    import torch

    length = max(len(tokens) for tokens, _ in rows)
    ids = torch.tensor([tokens + [0] * (length - len(tokens)) for tokens, _ in rows], device=model.device)
    mask = torch.tensor([[1] * len(t) + [0] * (length - len(t)) for t, _ in rows], device=model.device)
    with torch.inference_mode():
        logits = model.network(input_ids=ids, attention_mask=mask).logits[:, :-1]
        chosen = logits.double().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return [
        float(row[first - 1 : len(tokens) - 1].sum())
        for row, (tokens, first) in zip(chosen, rows, strict=True)
    ]
