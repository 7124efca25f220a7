"""Scores of an evaluation: stored, read, shown."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hub_magmax.checkpoints.pinning import read_small_file
from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.evaluators import Outcome
from hub_magmax.evaluation.intervals import mean_interval
from hub_magmax.evaluation.tables import Format, Measured, Table, Tabular
from hub_magmax.files import digest, json_text, write_text
from hub_magmax.text import at_most, cut_names

if TYPE_CHECKING:
    from hub_magmax.checkpoints.source import TensorSource
    from hub_magmax.recipe.schema import Recipe

SCORES_NAME = "scores.json"

#: Beside it: the score of every model on every example.
OUTCOMES_NAME = "outcomes.json"

#: Files that `write_scores` writes.
FILES = (SCORES_NAME, OUTCOMES_NAME)


def is_of_another(name: str) -> bool:
    """Say whether a file in a model's folder has scores of another evaluation than its own."""
    return name.endswith(tuple(f".{file}" for file in FILES))


#: More tasks than this are the rows of a table in the terminal, and not its columns.
MAX_COLUMNS = 8

#: Characters of a line in the terminal: of a table, and of one with intervals.
MAX_WIDTH, MAX_WIDTH_WITH_INTERVALS = 80, 120

#: Heading of the scores that each task's own checkpoint has on it.
OWN = "own"

#: Name of the merged model among the scored models.
MERGED = "merged"


def quantized_name(kind: str, model: str = MERGED) -> str:
    """Return the name of a model with quantised weights, such as `merged:int4`."""
    return f"{model}:{kind}"


@dataclass(frozen=True)
class Score:
    """One model on one task.

    Attributes:
        model: `base_model`, `merged`, the name of the task whose own checkpoint it is, or what
            `quantized_name` says.
        task: Whose examples these are: of a task, or of a guard.
        value: Mean outcome.
        low, high: 95 % interval of the mean: Wilson for shares, Student's t otherwise.
        num_examples: How many examples it is a mean of.
        outcomes: What the model scored on each of them, in order; empty where that was not kept.
        probabilities: Of the right answers, likewise; also empty where the evaluator tells none.
        num_cut: Examples that were longer than the model's context, so that a part was left out.
    """

    model: str
    task: str
    value: float
    low: float
    high: float
    num_examples: int
    outcomes: tuple[float, ...] = field(default=(), repr=False)
    probabilities: tuple[float, ...] = field(default=(), repr=False)
    num_cut: int = 0


@dataclass(frozen=True, repr=False)
class Scores(Tabular):
    """All that was measured.

    Attributes:
        metric: What the values are, such as "accuracy".
        pipeline_tag: The Hub's name for the kind of model.
        scores: Every model on every task that has examples.
        data: By task, the data set, split and revision that were used, and a fingerprint of the examples.
        evaluation_digest: Of the recipe's `evaluation` that asked for them.
        is_share: Values are shares, to be shown in per cent.
        unit: Of the values, such as "nats per token"; empty where the metric says it.
        higher_is_better: Always true for now: an evaluator of which less is better is refused.
    """

    metric: str
    pipeline_tag: str
    scores: tuple[Score, ...]
    data: Mapping[str, Mapping[str, Any]] = field(hash=False)
    evaluation_digest: str = ""
    is_share: bool = True
    unit: str = ""
    higher_is_better: bool = True

    def get(self, model: str, task: str) -> Score | None:
        return self._by_cell.get((model, task))

    @cached_property
    def _by_cell(self) -> dict[tuple[str, str], Score]:
        return {(score.model, score.task): score for score in reversed(self.scores)}

    def table(self, form: Format = "text") -> str:
        """Return what was measured: as text every model on every task, or of many tasks a line for each.

        CSV has a line for every model and task, Markdown and LaTeX one for each task.
        """
        if form == "csv":
            return self.as_table().write(form)
        return self._fitting() if form == "text" else self._by_task().write(form)

    def _fitting(self) -> str:
        """Return a text whose lines fit the terminal, with as much as there is room for."""
        rows: dict[str, dict[str, float]] = {}
        for score in self.scores:
            rows.setdefault(score.model, {})[score.task] = score.value
        tasks, end = tuple(self.data), ["", self.legend, *self.cuts]
        everything = score_table(self.metric, rows, tasks)
        if len(tasks) <= MAX_COLUMNS and _width(everything) <= MAX_WIDTH:
            return "\n".join([everything, *end])
        with_intervals = self._by_task().write("text")
        if _width(with_intervals) <= MAX_WIDTH_WITH_INTERVALS:
            return with_intervals
        return "\n".join(
            [_short(self.metric, rows, tasks), *end, f"every model on every task: {SCORES_NAME}"]
        )

    def as_table(self) -> Table:
        """Return a row for every model and task."""
        rows = tuple((s.model, s.task, s.num_examples, measured(s)) for s in self.scores)
        return Table(("model", "task", "examples", self.metric), rows)

    def _repr_html_(self) -> str:
        return self._by_task()._repr_html_()

    def _by_task(self) -> Table:
        """Return a row for each task: base model, own checkpoint, and the merged model in all its forms."""
        columns = {"base model": "base_model", "own checkpoint": OWN, **self._merged}
        for kind in self.kinds if self.rounds_all else ():
            columns[f"base model:{kind}"] = quantized_name(kind, "base_model")
            columns[f"own checkpoint:{kind}"] = quantized_name(kind, OWN)
        rows = tuple(
            (task, *(measured(self.get(_of_task(model, task), task)) for model in columns.values()))
            for task in self.data
        )
        notes = (f"{self.legend}; intervals are of 95 %", *self.cuts)
        return Table(("task", *columns), rows, notes)

    @property
    def _merged(self) -> dict[str, str]:
        """Return the names of the merged model in all its forms, by themselves."""
        return {score.model: score.model for score in self.scores if score.model.startswith(MERGED)}

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return what the merged model's weights were rounded to, such as `int4`."""
        prefix = quantized_name("")
        return tuple(name.removeprefix(prefix) for name in self._merged if name.startswith(prefix))

    @property
    def rounds_all(self) -> bool:
        """Whether the base model and the tasks' checkpoints were scored with rounded weights too."""
        return any(score.model.startswith(quantized_name("", "base_model")) for score in self.scores)

    @property
    def legend(self) -> str:
        """Say what the values are, in which unit, and which of them are better."""
        unit = f" in {self.unit}" if self.unit else ", a share from 0 to 1" if self.is_share else ""
        return f"{self.metric}{unit}; {'higher' if self.higher_is_better else 'lower'} is better"

    @property
    def cuts(self) -> tuple[str, ...]:
        """Name the examples that did not fit a model's context, one line per model and task."""
        return tuple(
            f"{score.task}: {score.num_cut:,} of {score.num_examples:,} examples are beyond the context of "
            f"{score.model}, and a part of each was left out"
            for score in self.scores
            if score.num_cut
        )

    @property
    def digest(self) -> str:
        return digest(_values(self))

    def to_json(self) -> str:
        """Return everything but the single outcomes."""
        short = tuple(replace(score, outcomes=(), probabilities=()) for score in self.scores)
        values = _values(replace(self, scores=short))
        for score in values["scores"]:
            del score["outcomes"], score["probabilities"]
        return json_text({"digest": self.digest, **values})

    def outcomes_json(self) -> str:
        """Return the single outcomes, one model and task a line."""
        rows = []
        for score in self.scores:
            row: dict[str, Any] = {"model": score.model, "task": score.task, "outcomes": score.outcomes}
            if score.probabilities:
                row["probabilities"] = score.probabilities
            rows.append(json.dumps(row, ensure_ascii=False))
        return "[\n" + ",\n".join(rows) + "\n]\n"


def _of_task(model: str, task: str) -> str:
    """Return the name of a model, where `OWN` is a task's own checkpoint."""
    name, colon, kind = model.partition(":")
    return f"{task if name == OWN else name}{colon}{kind}"


def _values(scores: Scores) -> dict[str, Any]:
    """Return plain values; a field that came later is left out at its default, as in older files."""
    values = asdict(scores)
    for name in ("unit", "higher_is_better"):
        if values[name] == Scores.__dataclass_fields__[name].default:
            del values[name]
    for score in values["scores"]:
        if not score["num_cut"]:
            del score["num_cut"]
    return values


def measured(score: Score | None, spread: float | None = None) -> Measured | None:
    """Return a score as a cell of a table, with its standard deviation over seeds where there is one."""
    return None if score is None else Measured(score.value, score.low, score.high, spread)


def write_scores(scores: Scores, folder: Path, prefix: str = "") -> None:
    """Write the scores and their single outcomes into `folder`, under names that begin with `prefix`."""
    write_text(folder / f"{prefix}{OUTCOMES_NAME}", scores.outcomes_json())
    write_text(folder / f"{prefix}{SCORES_NAME}", scores.to_json())


def score_table(corner: str, rows: Mapping[str, Mapping[str, float]], tasks: Sequence[str]) -> str:
    """Return scores as text: a row per model, a column per task, a dash where nothing was measured."""
    width = max(len(name) for name in (*rows, corner))
    columns = {task: max(len(task), 5) for task in tasks}
    lines = ["  ".join([f"{corner:<{width}}", *(f"{task:>{c}}" for task, c in columns.items())])]
    for name, values in rows.items():
        cells = (f"{values[task]:>{c}.3f}" if task in values else "-" * c for task, c in columns.items())
        lines.append("  ".join([f"{name:<{width}}", *cells]))
    return "\n".join(lines)


def _short(corner: str, rows: Mapping[str, Mapping[str, float]], tasks: Sequence[str]) -> str:
    """Return a row per task, with the models that are of all tasks and the task's own checkpoint."""
    columns = dict.fromkeys(["base_model", OWN, *(name for name in rows if name not in tasks)])
    room = MAX_WIDTH - sum(max(len(name), 5) + 2 for name in columns)
    turned: dict[str, dict[str, float]] = {}
    for name, task in zip(cut_names(tasks, at_most(room)), tasks, strict=True):
        found = ((column, rows.get(task if column == OWN else column, {})) for column in columns)
        turned[name] = {column: values[task] for column, values in found if task in values}
    return score_table(corner[:room], turned, tuple(columns))


def _width(text: str) -> int:
    return max(map(len, text.split("\n")))


def read_scores(folder: Path, prefix: str = "") -> Scores:
    """Return the scores that `write_scores` stored in `folder`, under names that begin with `prefix`.

    Raises:
        EvaluationError: If a file is missing, or not what `write_scores` writes.
    """
    try:
        scores, outcomes = ((folder / f"{prefix}{name}").read_bytes() for name in FILES)
    except OSError as error:
        raise _unreadable(str(folder)) from error
    return parse_scores(scores, outcomes, str(folder))


def stored_scores(source: TensorSource) -> Scores:
    """Return the scores that are stored with a checkpoint, a folder or a revision on the Hub.

    Raises:
        EvaluationError: If a file is missing, or not what `write_scores` writes.
    """
    for name in (SCORES_NAME, OUTCOMES_NAME):
        if name not in source.sizes:
            raise EvaluationError(
                f"there is no {name}, so there are no results to compare with",
                where=source.label,
                hint="Give a model whose recipe has an `evaluation`, after `hub-magmax run` or `evaluate`.",
            )
    scores, outcomes = (read_small_file(source, name) for name in (SCORES_NAME, OUTCOMES_NAME))
    return parse_scores(scores, outcomes, source.label)


def stored_means(source: TensorSource) -> Scores | None:
    """Return the scores that are stored with a checkpoint, without single outcomes, which are large.

    None where there are none that can be read. Whether somebody changed them is not known.
    """
    if SCORES_NAME not in source.sizes:
        return None
    with suppress(EvaluationError):
        return _parse_means(read_small_file(source, SCORES_NAME), source.label)[0]
    return None


def scores_for(recipe: Recipe) -> Scores | None:
    """Return the scores in the recipe's folder, if they are of the evaluation that it asks for."""
    with suppress(EvaluationError):
        stored = read_scores(recipe.output_path)
        if recipe.evaluation is not None and stored.evaluation_digest == recipe.evaluation.digest:
            return stored
    return None


def other_scores(folder: Path) -> dict[str, Scores]:
    """Return the scores of other evaluations that are kept with a model, by the recipes that name them.

    Raises:
        EvaluationError: If a file is not what `write_scores` writes.
    """
    paths = sorted(path for path in folder.glob(f"*.{SCORES_NAME}") if path.is_file())
    prefixes = (path.name.removesuffix(SCORES_NAME) for path in paths)
    return {prefix.removesuffix("."): read_scores(folder, prefix) for prefix in prefixes}


def parse_scores(scores: bytes, outcomes: bytes, where: str) -> Scores:
    """Return the scores in the contents of both files that `write_scores` stored.

    Raises:
        EvaluationError: If a content is not what `write_scores` writes; `where` names the place.
    """
    means, stored = _parse_means(scores, where)
    try:
        single: dict[tuple[str, str], dict[str, Any]] = {
            (row["model"], row["task"]): {
                "outcomes": tuple(row["outcomes"]),
                "probabilities": tuple(row.get("probabilities", ())),
            }
            for row in json.loads(outcomes)
        }
        whole = tuple(replace(score, **single[score.model, score.task]) for score in means.scores)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(where) from error
    found = replace(means, scores=whole)
    if found.digest != stored:
        raise EvaluationError(
            "the digest does not fit the scores, so one of the files was changed",
            where=f"{SCORES_NAME} and {OUTCOMES_NAME} in {where}",
            hint="Evaluate again.",
        )
    return found


def _parse_means(content: bytes, where: str) -> tuple[Scores, str]:
    """Return the scores in the content of `SCORES_NAME`, and the digest that is stored with them.

    Raises:
        EvaluationError: If it is not what `write_scores` writes.
    """
    try:
        values = json.loads(content)
        stored: str = values.pop("digest")
        found = Scores(scores=tuple(Score(**score) for score in values.pop("scores")), **values)
        numbers = all(isinstance(score.value, int | float) for score in found.scores)
        if not numbers or not all(isinstance(data, dict) for data in found.data.values()):
            raise TypeError("a mean is no number, or data has no facts")
        return found, stored
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(where) from error


def _unreadable(where: str) -> EvaluationError:
    what = f"{SCORES_NAME} and {OUTCOMES_NAME} do not hold scores"
    return EvaluationError(what, where=where, hint="Evaluate again.")


def make_score(model: str, task: str, outcomes: Sequence[Outcome], *, is_share: bool) -> Score:
    """Return the mean outcome with its interval."""
    values = tuple(outcome.score for outcome in outcomes)
    low, high = mean_interval(values, is_share=is_share)
    # Six digits: nobody reads more, and the file is a third as long.
    probabilities = tuple(round(o.probability, 6) for o in outcomes if o.probability is not None)
    if len(probabilities) < len(values):
        probabilities = ()
    mean, num_cut = math.fsum(values) / len(values), sum(outcome.is_cut for outcome in outcomes)
    return Score(model, task, mean, low, high, len(values), values, probabilities, num_cut)


def deviation(by_seed: Mapping[int, float]) -> float | None:
    """Return the standard deviation of scores over seeds (n − 1); None where there are fewer than two."""
    return statistics.stdev(by_seed.values()) if len(by_seed) > 1 else None
