"""A few examples as the models see and answer them, for people to look at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.evaluators import Evaluator, brings_data, columns_of, evaluator_of, unit_of
from hub_magmax.evaluation.evaluators.examples import label_names, label_text
from hub_magmax.evaluation.evaluators.loading import LoadedModel
from hub_magmax.evaluation.evaluators.plugins import about, answers
from hub_magmax.evaluation.evaluators.registry import Sample
from hub_magmax.evaluation.models import Loading, model_places
from hub_magmax.evaluation.scores import MERGED
from hub_magmax.evaluation.scoring import Examples, load_evaluation_data
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.values import Data
from hub_magmax.text import Report, printable, step, without_secrets

#: Characters of a text that are shown; of a longer one the end, where prompt and answer meet.
_SHOWN_CHARACTERS = 1_000


@dataclass(frozen=True)
class Seen:
    """One example of a task and what a model made of it; texts without secrets and control characters.

    Attributes:
        task, index: The example: its number in the data, from 0.
        model: `base_model`, `merged`, or the task, whose own checkpoint it is.
        prompt: What the model was given.
        answer: What it answered or chose; None where it only judged the expected text.
        expected: The right answer.
        score: As evaluated.
        judged: The same in words: "right" or "wrong", or else the score with its unit.
    """

    task: str
    index: int
    model: str
    prompt: str
    answer: str | None
    expected: str
    score: float
    judged: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def samples(
    recipe: Recipe, lock: Lock, merged: Path | str, count: int, *, report: Report = lambda line: None
) -> tuple[Seen, ...]:
    """Return the first examples of every task, as base model, own checkpoint and merge see them.

    Args:
        recipe: Its `evaluation` names the data and the evaluator.
        lock: Pins the checkpoints and the data.
        merged: Folder (or repository id) of the merged model.
        count: Examples of each task, or all where there are fewer.
        report: Called with a line before each model.

    Raises:
        EvaluationError: If the recipe names no data, or the evaluator brings its own.
    """
    spec = recipe.evaluation
    if spec is None or brings_data(evaluator_of(spec)):
        raise EvaluationError(
            "the recipe names no examples that could be shown",
            where="evaluation",
            hint="Name each task's examples under `evaluation`.",
        )
    evaluator, data = evaluator_of(spec), load_evaluation_data(recipe, lock)
    first = {task: data[task].select(range(min(count, len(data[task])))) for task in spec.tasks}
    loading = Loading(recipe, lock, evaluator, report=report)
    found: list[Seen] = []
    for name, place in {**model_places(recipe, lock), MERGED: ModelPlace(str(merged))}.items():
        tasks = [task for task in spec.tasks if name in ("base_model", MERGED, task)]
        if tasks:
            with step(f"asking {name}", report):
                found += _asked(
                    evaluator, loading.load(name, place), name, {t: first[t] for t in tasks}, spec.data
                )
    order = list(spec.tasks)
    return tuple(sorted(found, key=lambda seen: (order.index(seen.task), seen.index)))


def _asked(
    evaluator: Evaluator, model: LoadedModel, name: str, examples: dict[str, Examples], data: dict[str, Data]
) -> Iterator[Seen]:
    for task, chosen in examples.items():
        with about(evaluator, task):
            found = _samples(evaluator, model, chosen, data[task])
        for index, sample in enumerate(found):
            prompt, expected = _clean(sample.prompt), _clean(sample.expected)
            answer = None if sample.answer is None else _clean(sample.answer)
            judged = _judged(evaluator, sample.score)
            yield Seen(task, index, name, prompt, answer, expected, sample.score, judged)


def _judged(evaluator: Evaluator, score: float) -> str:
    """Return a score in words."""
    if evaluator.is_share and score in (0, 1):
        return "right" if score else "wrong"
    return f"{score:.4g} {unit_of(evaluator) or f'({evaluator.metric})'}"


def _samples(evaluator: Evaluator, model: LoadedModel, examples: Examples, data: Data) -> list[Sample]:
    """Return what the evaluator shows of examples, or what the data says of them and their scores."""
    batches = list(evaluator.encode(model, examples, columns_of(data), len(examples)))
    if show := getattr(evaluator, "samples", None):
        found: list[Sample] = show(model, batches)
        return found
    column = data.input_column or getattr(evaluator, "input_column", "text")
    inputs = examples[column] if column in examples.column_names else [""] * len(examples)
    names = label_names(examples, data.label_column)
    labels = (
        examples[data.label_column] if data.label_column in examples.column_names else [""] * len(examples)
    )
    outcomes = answers(evaluator, model, batches, "samples", len(examples))
    return [
        Sample(
            text if isinstance(text, str) else f"({column})", None, label_text(label, names), outcome.score
        )
        for text, label, outcome in zip(inputs, labels, outcomes, strict=True)
    ]


def _clean(text: str) -> str:
    return printable(without_secrets(text))


def table(seen: Sequence[Seen]) -> str:
    """Return samples as text, example by example."""
    blocks = []
    for (task, index), group in groupby(seen, key=lambda s: (s.task, s.index)):
        models = list(group)
        rows: list[tuple[str, str | None, str]] = [("expected", models[0].expected, "")]
        if len({model.prompt for model in models}) == 1:
            rows.insert(0, ("prompt", models[0].prompt, ""))
        else:
            rows = [*((f"prompt of {m.model}", m.prompt, "") for m in models), *rows]
        rows += [(m.model, m.answer, m.judged) for m in models]
        blocks.append("\n".join([f"{task}, example {index}", *_lines(rows)]))
    return "\n\n".join(blocks)


def _lines(rows: Sequence[tuple[str, str | None, str]]) -> Iterator[str]:
    """Yield rows of a label, a text and a judgement as lines, each part below the one before."""
    width, room = max(len(label) for label, _, _ in rows), max(len(judged) for _, _, judged in rows)
    for label, text, judged in rows:
        yield f"  {label:<{width}}  {_cell(text, f'{judged:<{room}}' if judged else '', width)}"


def _cell(text: str | None, judged: str, width: int) -> str:
    """Return a text between quotation marks, later lines below the first one, and the judgement before it."""
    if text is None:
        return judged.rstrip()
    shown = text if len(text) <= _SHOWN_CHARACTERS else "…" + text[-_SHOWN_CHARACTERS:]
    lines = f'"{shown}"'.replace("\n", "\n" + " " * (width + 5))
    return f"{judged}  {lines}" if judged else lines
