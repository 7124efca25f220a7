"""Forgetting in a sequence of tasks: scores of every task after every task, their average and transfer.

Source: Gradient Episodic Memory (arXiv:1706.08840), section 2: with R_ij the score of task j after learning
task i of T, the average is the mean of R_Tj over j, and backward transfer the mean of R_Tj - R_jj over j < T.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.evaluation.columns import examples_for
from hub_magmax.evaluation.data import fingerprint
from hub_magmax.evaluation.evaluators import Evaluator, brings_data, evaluator_of, unit_of
from hub_magmax.evaluation.evaluators.loading import LoadedModel, load_model
from hub_magmax.evaluation.models import Loading
from hub_magmax.evaluation.scoring import run_evaluator
from hub_magmax.files import digest, write_json
from hub_magmax.pipeline import lock
from hub_magmax.processes import Processes
from hub_magmax.recipe.examples import Evaluation
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.recipe.result_files import ResultFiles
from hub_magmax.recipe.schema import Recipe, Task
from hub_magmax.reporting.figures import Scale
from hub_magmax.reporting.figures.forgetting import draw_forgetting
from hub_magmax.text import Report, aligned, step

#: Scores of one checkpoint: mean, number of examples and digest of the data, by task.
Row = Mapping[str, Mapping[str, Any]]

#: Files of a forgetting; the picture is an SVG too.
FILES = ("forgetting.json", "forgetting.png")


@dataclass(frozen=True)
class Forgetting:
    """Scores of tasks while a sequence was learned.

    Attributes:
        metric, unit, is_share: What the scores are.
        scores: After each task, in order: the mean score of each task learned by then that is evaluated.
    """

    metric: str
    unit: str
    is_share: bool
    scores: Mapping[str, Mapping[str, float]]

    @property
    def last(self) -> Mapping[str, float]:
        """The scores after the last task."""
        return list(self.scores.values())[-1]

    @property
    def average(self) -> float:
        """Mean score of all tasks after the last one."""
        return sum(self.last.values()) / len(self.last)

    @property
    def backward_transfer(self) -> float | None:
        """Mean of what each earlier task gained since it was learned, negative where it was forgotten.

        None where there is no earlier task.
        """
        *earlier, _ = self.scores
        gains = [self.last[task] - self.scores[task][task] for task in earlier if task in self.last]
        return sum(gains) / len(gains) if gains else None

    def to_dict(self) -> dict[str, Any]:
        """Return the values as JSON has them."""
        return {**asdict(self), "average": self.average, "backward_transfer": self.backward_transfer}

    def table(self) -> str:
        """Return the scores as text: a line after each task, a column for each."""
        names = [task for task in self.scores if task in self.last]
        rows = [[f"{self.metric} after", *names]]
        for after, row in self.scores.items():
            rows.append([after, *(f"{row[name]:.3f}" if name in row else "" for name in names)])
        return "\n".join(
            [
                *aligned(rows, [False] * len(rows[0])),
                f"average after the last task {self.average:.3f}{self._transfer}",
            ]
        )

    @property
    def _transfer(self) -> str:
        found = self.backward_transfer
        return "" if found is None else f", backward transfer {found:+.3f}"


def write_forgetting(found: Forgetting, place: ResultFiles) -> list[Any]:
    """Write the scores as JSON and as a picture, and return the files.

    Raises:
        OutputError: If they cannot be written.
    """
    values, picture = (place.path(name) for name in FILES)
    write_json(values, found.to_dict())
    scale = Scale(found.metric, found.is_share, found.unit)
    return [values, *draw_forgetting(found.scores, scale, picture)]


@dataclass(frozen=True)
class Measuring:
    """Measures each task learned so far by the recipe's evaluation.

    Attributes:
        recipe, spec: What is evaluated.
        evaluator: How models run.
        examples: Of each task that has some, with a digest of what they are.
        processes: Which share a model's batches.
        report: Called with a line before a model.
    """

    recipe: Recipe
    spec: Evaluation
    evaluator: Evaluator
    examples: Mapping[str, tuple[Any, str]]
    processes: Processes
    report: Report

    @classmethod
    def find(cls, recipe: Recipe, processes: Processes, report: Report) -> Measuring | None:
        """Load the examples; return None where tasks are no sequence, or nothing says how they are scored."""
        spec = recipe.evaluation
        if spec is None or recipe.training is None or recipe.training.order != "sequential":
            return None
        evaluator = evaluator_of(spec)
        if brings_data(evaluator):
            return None
        examples = {}
        for task in recipe.task_names:
            if (data := spec.tasks.get(task)) is not None:
                rows = examples_for(evaluator, data, recipe, {})
                told = data.model_dump(mode="json"), spec.evaluator.model_dump(mode="json")
                examples[task] = rows, digest([*told, fingerprint(rows, rows.column_names)])
        return cls(recipe, spec, evaluator, examples, processes, report) if examples else None

    def _until(self, task: str) -> list[str]:
        names = self.recipe.task_names
        return [name for name in names[: names.index(task) + 1] if name in self.examples]

    def is_same(self, task: str, row: Row) -> bool:
        """Say whether stored scores of a task's checkpoint are of this evaluation."""
        known = {name: cell.get("data") for name, cell in row.items() if "mean" in cell}
        return known == {name: self.examples[name][1] for name in self._until(task)}

    def row(self, task: Task, place: ModelPlace, *, is_adapter: bool = False) -> Row:
        """Score a task's checkpoint, or what its adapter makes of its base model, on every task until it."""
        names = self._until(task.name)
        if not names:
            return {}
        with step(f"scoring {task.name} on {', '.join(names)}", self.report):
            run = partial(run_evaluator, self.evaluator, self._loaded(task, place, is_adapter))
            found = {}
            for name in names:
                rows, known = self.examples[name]
                data = self.spec.tasks[name]
                outcomes = run(rows, data, self.spec.batch_size, self.processes, name)
                mean = sum(outcome.score for outcome in outcomes) / len(outcomes)
                found[name] = {"mean": mean, "examples": len(outcomes), "data": known}
        return found

    def _loaded(self, task: Task, place: ModelPlace, is_adapter: bool) -> LoadedModel:
        if not is_adapter:
            return load_model(place, self.evaluator.model_class, self.evaluator.processor_class, "scoring")
        # A recipe of this adapter alone, so that it is placed and added as in the merge.
        kept = {"schema_version", "base_model", "trusted_links"}
        values = self.recipe.model_dump(mode="json", by_alias=True, include=kept)
        values["tasks"] = [{"name": task.name, "model": place.name, "base": task.base}]
        values["method"] = {"name": "task_arithmetic", "scaling": 1.0}
        recipe = parse_recipe(values, folder=self.recipe.folder)
        locked = lock(recipe)
        return Loading(recipe, locked, self.evaluator, purpose="scoring").load(task.name, place)

    def forgetting(self, rows: Mapping[str, Row]) -> Forgetting | None:
        """Return the scores of all tasks' checkpoints; None where the last one has none."""
        scores = {task: {name: cell["mean"] for name, cell in row.items()} for task, row in rows.items()}
        if not scores or not list(scores.values())[-1]:
            return None
        return Forgetting(self.evaluator.metric, unit_of(self.evaluator), self.evaluator.is_share, scores)
