"""Causal language models, scored by the probabilities they give, without generating."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.evaluators.examples import rows_of
from hub_magmax.evaluation.evaluators.likelihoods import (
    Row,
    answer_row,
    log_likelihoods,
    row_log_likelihood,
    row_losses,
    text_row,
)
from hub_magmax.evaluation.evaluators.prompts import Prompter, Solved, describe_joint, shots_of
from hub_magmax.evaluation.evaluators.registry import Columns, Outcome, Sample, evaluator
from hub_magmax.evaluation.evaluators.texts import text_in

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

    from hub_magmax.evaluation.evaluators.loading import LoadedModel


class _Prompted:
    """Parts that evaluators of prompts and answers share.

    Attributes:
        delimiter: Between prompt and answer; by default a space where neither has white space there.
        chat_template: Put prompts as a user's turns into the chat template of each model's tokenizer.
    """

    has_prompts: ClassVar[bool] = True
    pipeline_tag: ClassVar[str] = "text-generation"
    model_class: ClassVar[str] = "AutoModelForCausalLM"
    processor_class: ClassVar[str] = "AutoTokenizer"
    delimiter: str | None
    chat_template: bool

    def describe_inputs(self) -> dict[str, str]:
        return {"joint": describe_joint(self.delimiter, chat=self.chat_template)}


class Text(NamedTuple):
    """One text to score: its row, what came before it, and itself."""

    row: Row
    prompt: str
    answer: str


@evaluator("log-likelihood")
@dataclass(frozen=True)
class LogLikelihood(_Prompted):
    """Texts to their mean log-probability per token, which is minus the loss (natural logarithm).

    After a prompt only the text's own tokens count. Without one the first token has nothing before it and
    does not count. What is longer than the model's context is cut: texts at the end, prompts at the start.
    """

    _: KW_ONLY
    delimiter: str | None = None
    chat_template: bool = False

    metric: ClassVar[str] = "log-likelihood"
    unit: ClassVar[str] = "nats per token"
    labelled: ClassVar[bool] = False
    is_share: ClassVar[bool] = False

    def wanted(self, columns: Columns) -> list[str]:
        return [name for name in (columns.input or "text", columns.prompt, columns.shots) if name]

    def encode(
        self, model: LoadedModel, examples: Dataset, columns: Columns, batch_size: int
    ) -> Iterator[list[Text]]:
        column = columns.input or "text"
        prompter = Prompter(model.processor, model.name, self.delimiter, chat=self.chat_template)

        def solve(row: Mapping[str, Any]) -> Solved:
            return text_in(row, columns.prompt) if columns.prompt else "", text_in(row, column)

        for rows in rows_of(examples, self.wanted(columns), batch_size):
            batch = []
            for row in rows:
                prompt, answer = solve(row)
                shots = shots_of(row[columns.shots], solve) if columns.shots else []
                if columns.prompt or shots:
                    prompt, answer = prompter.joined(shots, prompt, answer)
                    batch.append(Text(answer_row(model, prompt, answer), prompt, answer))
                else:
                    batch.append(Text(text_row(model, answer), "", answer))
            yield batch

    def outcomes(self, model: LoadedModel, batches: Iterable[list[Text]]) -> list[Outcome]:
        found = []
        for texts in batches:
            totals = log_likelihoods(model, [text.row for text in texts])
            for text, total in zip(texts, totals, strict=True):
                mean = total / text.row.num_counted
                found.append(Outcome(mean, math.exp(mean), is_cut=text.row.is_cut))
        return found

    def log_likelihoods(self, model: LoadedModel, batch: list[Text]) -> Iterator[tuple[float, Tensor]]:
        """Yield the log-likelihood of each text to be differentiated; its probability is 1."""
        for text in batch:
            yield 1.0, row_log_likelihood(model, text.row)

    def losses(self, model: LoadedModel, batch: list[Text], smoothing: float) -> Tensor:
        """Return minus the mean log-probability per token of each text."""
        return row_losses(model, [text.row for text in batch], smoothing)

    def samples(self, model: LoadedModel, batches: Iterable[list[Text]]) -> list[Sample]:
        """Return the texts with their scores, and what the model itself goes on with after a prompt."""
        found = []
        for texts in batches:
            for text, outcome in zip(texts, self.outcomes(model, [texts]), strict=True):
                answer = continued(model, text.row) if text.prompt else None
                found.append(Sample(text.prompt, answer, text.answer, outcome.score))
        return found


class Question(NamedTuple):
    """One question: a row for each answer, the number of the right one, and the texts."""

    rows: list[Row]
    right: int
    prompt: str
    answers: list[str]


@evaluator("multiple-choice")
@dataclass(frozen=True)
class MultipleChoice(_Prompted):
    """Questions with some answers each, right where the likeliest answer is the labelled one.

    Equal likelihoods go to the first answer.

    Attributes:
        choices_column: Holds the list of answers. The label is the number of the right one, or its text.
        per_token: Divide an answer's log-likelihood by its number of tokens.
    """

    _: KW_ONLY
    choices_column: str = "choices"
    per_token: bool = False
    delimiter: str | None = None
    chat_template: bool = False

    metric: ClassVar[str] = "accuracy"
    is_share: ClassVar[bool] = True

    @property
    def judged(self) -> str:
        how = (
            "mean of its tokens' log-probabilities"
            if self.per_token
            else "sum of its tokens' log-probabilities"
        )
        return f"the choice with the highest {how}"

    def describe_examples(self, examples: Dataset, columns: Columns) -> dict[str, str]:
        """Return how many choices there are, and where the questions come from."""
        counts = {len(_answers(choices)) for choices in examples[self.choices_column]}
        told = str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
        question = {} if columns.prompt else {"question": columns.input or "question"}
        return {"choices": told, **question}

    def wanted(self, columns: Columns) -> list[str]:
        question = columns.prompt or columns.input or "question"
        return [question, self.choices_column, columns.label, *([columns.shots] if columns.shots else [])]

    def encode(
        self, model: LoadedModel, examples: Dataset, columns: Columns, batch_size: int
    ) -> Iterator[list[Question]]:
        column = columns.prompt or columns.input or "question"
        prompter = Prompter(model.processor, model.name, self.delimiter, chat=self.chat_template)

        def solve(row: Mapping[str, Any]) -> Solved:
            answers = _answers(row[self.choices_column])
            return text_in(row, column), answers[_number_of(row[columns.label], answers)]

        for rows in rows_of(examples, self.wanted(columns), batch_size):
            batch = []
            for row in rows:
                answers = _answers(row[self.choices_column])
                shots = shots_of(row[columns.shots], solve) if columns.shots else []
                pairs = [prompter.joined(shots, text_in(row, column), answer) for answer in answers]
                texts = [answer_row(model, *pair) for pair in pairs]
                right = _number_of(row[columns.label], answers)
                batch.append(Question(texts, right, pairs[0][0], [answer for _, answer in pairs]))
            yield batch

    def outcomes(self, model: LoadedModel, batches: Iterable[list[Question]]) -> list[Outcome]:
        return [
            _chosen(scores, question.right)._replace(is_cut=any(row.is_cut for row in question.rows))
            for questions in batches
            for question, scores in zip(questions, self._scores(model, questions), strict=True)
        ]

    def losses(self, model: LoadedModel, batch: list[Question], smoothing: float) -> Tensor:
        """Return minus the mean log-probability per token of each question's right answer."""
        return row_losses(model, [question.rows[question.right] for question in batch], smoothing)

    def samples(self, model: LoadedModel, batches: Iterable[list[Question]]) -> list[Sample]:
        """Return the questions, the answer that was chosen, and the right one."""
        return [
            Sample(
                question.prompt,
                question.answers[scores.index(max(scores))],
                question.answers[question.right],
                _chosen(scores, question.right).score,
            )
            for questions in batches
            for question, scores in zip(questions, self._scores(model, questions), strict=True)
        ]

    def _scores(self, model: LoadedModel, questions: Sequence[Question]) -> Iterator[list[float]]:
        """Yield what each question's answers are compared by."""
        totals = iter(log_likelihoods(model, [row for question in questions for row in question.rows]))
        for question in questions:
            scores = list(islice(totals, len(question.rows)))
            if self.per_token:
                scores = [s / row.num_counted for s, row in zip(scores, question.rows, strict=True)]
            yield scores


def continued(model: LoadedModel, row: Row) -> str:
    """Return the model's own likeliest tokens, one at a time, in place of those that count."""
    import torch

    ids = torch.tensor([row.tokens[: row.first]], device=model.device)
    with torch.inference_mode(), model.errors():
        made = model.network.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=row.num_counted,
            do_sample=False,
            num_beams=1,
            pad_token_id=model.processor.pad_token_id or model.processor.eos_token_id or 0,
        )
    text: str = model.processor.decode(made[0, row.first :], skip_special_tokens=True)
    return text


def _answers(cell: Any) -> list[str]:
    """Return the answers of a cell as texts."""
    if not isinstance(cell, Sequence) or isinstance(cell, str) or not cell:
        raise EvaluationError(
            f"{cell!r:.100} is no list of answers",
            where="choices column",
            hint="Name it with choices_column.",
        )
    return [str(answer) for answer in cell]


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
    for written in (list(answers), [answer.strip() for answer in answers]):
        if written.count(str(label)) == 1 or str(label) in answers:
            return written.index(str(label))
    raise EvaluationError(
        f"the label {label!r} is none of the answers",
        where="label column",
        expected=f"a number from 0 to {len(answers) - 1}, or one of {', '.join(map(repr, answers))}",
    )
