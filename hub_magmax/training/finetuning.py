"""Checkpoints of a recipe's tasks, trained one after the other; those that are there stay."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hub_magmax.checkpoints.identity import state_of
from hub_magmax.checkpoints.locations import ModelPlace, location_of
from hub_magmax.checkpoints.opening import open_source
from hub_magmax.checkpoints.pinning import copied_files, copy_side_file, lock_source
from hub_magmax.errors import RecipeError
from hub_magmax.evaluation.columns import examples_for
from hub_magmax.evaluation.data import fingerprint
from hub_magmax.evaluation.data_keys import about_data
from hub_magmax.evaluation.evaluators import Evaluator, make_evaluator
from hub_magmax.evaluation.evaluators.loading import (
    LoadedModel,
    MissingParametersError,
    load_model,
    without_bars,
)
from hub_magmax.evaluation.needs import may_lack_head
from hub_magmax.evaluation.shared_examples import tell_shared
from hub_magmax.files import from_here, os_errors, write_text
from hub_magmax.processes import Processes, find_processes
from hub_magmax.recipe.arguments import checked, opened
from hub_magmax.recipe.loading import RecipeLike, as_recipe
from hub_magmax.recipe.lockfile import LockedSource
from hub_magmax.recipe.model_names import expanded, is_there
from hub_magmax.recipe.schema import Recipe, Task
from hub_magmax.recipe.statistics_checks import is_local
from hub_magmax.recipe.training import Training
from hub_magmax.recipe.training_checks import training_evaluator
from hub_magmax.recipe.values import Data
from hub_magmax.text import ProgressBar, Report, number_of, step, unseen
from hub_magmax.training.forgetting import Forgetting, Measuring, Row
from hub_magmax.training.record import RECORD_NAME, TrainingRecord, check_same, in_parts, read_record
from hub_magmax.training.starts import Start, known_starts, locked_start, start_name
from hub_magmax.training.states import TrainingFolder

if TYPE_CHECKING:
    from datasets import Dataset

    from hub_magmax.training.adapters import TrainedAdapter
    from hub_magmax.training.step_examples import StepExamples


#: Values of `training` that decide no byte of a checkpoint.
_WITHOUT_EFFECT = ("alternate", "data", "checkpoint_every", "evaluator")

#: Packages whose versions can change the bytes of a checkpoint.
_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "numpy")


@dataclass(frozen=True)
class Trained:
    """Checkpoint of one task after `finetune`.

    Attributes:
        task: Its name.
        model: Its checkpoint, as the recipe names it.
        is_new: Whether it was trained just now.
        loss: Means over successive parts of its training; empty for one that was not trained by us.
        held_out: Losses of held-out examples and the step of the lowest, as its record has them.
        scores: Of the tasks until it, where they are a sequence and the recipe says how to score them.
    """

    task: str
    model: str
    is_new: bool
    loss: tuple[float, ...] = ()
    held_out: Mapping[str, Any] = field(default_factory=dict, hash=False)
    scores: Row = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Finetuned:
    """Checkpoints of all tasks of a recipe, in order, and what a sequence of them forgot."""

    tasks: tuple[Trained, ...]
    forgetting: Forgetting | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the values as JSON has them."""
        tasks = [
            {
                "task": one.task,
                "model": one.model,
                "is_new": one.is_new,
                "loss": [*one.loss],
                "held_out": dict(one.held_out),
            }
            for one in self.tasks
        ]
        return {"tasks": tasks, "forgetting": self.forgetting.to_dict() if self.forgetting else None}


@checked
def finetune(
    recipe: RecipeLike,
    *,
    processes: Processes | None = None,
    report: Report = lambda line: None,
    progress: ProgressBar = unseen,
) -> Finetuned:
    """Train the checkpoint of each task whose folder is not there yet, in the recipe's order.

    What is there is not touched, and has to be of the training that the recipe describes, if it was made by
    this function. An interrupted call goes on after the last state that it kept, and on a CPU ends with the
    same bytes. Where tasks are a sequence and the recipe has an `evaluation`, each checkpoint is scored on
    all tasks until it. Under `accelerate launch` or torchrun every process computes a share of each step.

    Args:
        recipe: Its `training` says how; its tasks say where.
        processes: Which of how many processes this is; found from the launcher by default.
        report: Called with a line before each step of the work, and about the loss.
        progress: Called with each task's steps, what is done and the unit; opens what is called with the
            steps that are done.

    Returns:
        All tasks of the recipe, and how their scores went.

    Raises:
        RecipeError: If the recipe has no `training`, or nothing to train a missing checkpoint on.
        EvaluationError: If a model or examples cannot be used.
        OutputError: If a folder was trained otherwise, or cannot be written.
        NonFiniteError: If a loss is not finite.
    """
    from hub_magmax.training.loop import undisturbed

    found = as_recipe(recipe)
    spec = found.training
    if spec is None:
        raise RecipeError(
            "the recipe has no `training`, so there is nothing to do",
            key=("training",),
            hint="Write training: {epochs: 3, data: {TASK: {dataset: ..., split: train}}}.",
        )
    trainer = _TaskTrainer(found, spec, processes or find_processes(report), report, progress)
    with undisturbed():
        measuring = Measuring.find(found, trainer.processes, report)
        made = trainer.made(measuring)
        forgetting = measuring.forgetting({one.task: one.scores for one in made}) if measuring else None
        return Finetuned(made, forgetting)


@dataclass(frozen=True)
class _TaskTrainer:
    """Trains tasks of one recipe."""

    recipe: Recipe
    spec: Training
    processes: Processes
    report: Report
    progress: ProgressBar
    #: Starts whose files were hashed, by name, each with the state of the files then.
    starts: dict[str, tuple[Start, Sequence[Any]]] = field(default_factory=dict)

    def made(self, measuring: Measuring | None) -> tuple[Trained, ...]:
        """Train what is missing, all of whose examples are loaded first, and return all tasks."""
        missing = self.processes.first_decides(self.missing)
        self._check_starts(missing)
        rows = self._read([name for name in self.recipe.task_names if name in missing])
        steps = {name: self._step_examples(name, own) for name, own in rows.items()}
        return tuple(
            self.train(task, rows[task.name], steps[task.name], measuring)
            if task.name in missing
            else self.present(task, measuring)
            for task in self.recipe.tasks
        )

    def _read(self, names: Sequence[str]) -> dict[str, list[Dataset]]:
        """Load the examples of tasks, each with those of the capability; tell which are evaluated too."""
        kept, specs = self.spec.capability, [self.spec.data[name] for name in names]
        specs += [kept.data] if kept and names else []
        read = [(data, self.examples(data)) for data in specs]
        tell_shared(self.recipe, read, self.report)
        aside = [found for _, found in read[len(names) :]]
        return {name: [found, *aside] for name, (_, found) in zip(names, read, strict=False)}

    def missing(self) -> frozenset[str]:
        """Return the tasks that have to be trained."""
        tasks = [task for task in self.recipe.tasks if is_local(self.recipe, task.model)]
        tasks = [task for task in tasks if not is_there(self._path(task))]
        for task in tasks:
            if task.name not in self.spec.data:
                raise RecipeError(
                    f"there is neither a checkpoint of {task.name} nor data to train it on",
                    key=("training", "data"),
                    expected=f"{from_here(self._path(task))}, or examples",
                    hint=f"Name them: training.data.{task.name}: {{dataset: ..., split: train}}.",
                )
        if tasks and self.spec.batch_size < self.processes.count:
            raise RecipeError(
                f"{self.processes.count} processes share a step of {self.spec.batch_size} examples",
                key=("training", "batch_size"),
                hint="Start fewer processes, or give each step more examples.",
            )
        return frozenset(task.name for task in tasks)

    def _check_starts(self, missing: frozenset[str]) -> None:
        """Raise for a checkpoint to begin at that is not there, or lacks a head, before examples are read."""
        trained = [task for task in self.recipe.tasks if task.name in missing]
        for locked in known_starts(self.recipe, trained):
            if not locked.adapter_config and may_lack_head(self._evaluator.model_class, locked):
                self._model(locked)

    def _path(self, task: Task) -> Path:
        return (self.recipe.folder / expanded(task.model)).absolute()

    def _settings(self, task: Task) -> dict[str, Any]:
        settings = self.spec.model_dump(mode="json", exclude={*_WITHOUT_EFFECT})
        choice = training_evaluator(self.recipe)
        evaluator = {"name": choice.name, **choice.options}
        data = self.spec.data[task.name].model_dump(mode="json", exclude_none=True)
        return {
            **settings,
            "seed": self.seed,
            "evaluator": evaluator,
            "start": start_name(self.recipe, task),
            "data": data,
        }

    @property
    def seed(self) -> int:
        return self.recipe.seed if self.spec.seed is None else self.spec.seed

    def present(self, task: Task, measuring: Measuring | None) -> Trained:
        """Return a checkpoint that is there; raise OutputError if the recipe describes another one."""
        record = None
        if is_local(self.recipe, task.model):
            record = read_record(self._path(task) / RECORD_NAME)
        if record is not None and task.name in self.spec.data:
            check_same(record.identity, {"settings": self._settings(task)}, self._path(task))
        if record is not None and self.processes.is_first:
            TrainingFolder(self._path(task)).remove()  # what a process left that was killed at the very end
        self.report(f"{task.name}: {task.model} is there{'' if record else ', trained elsewhere'}")
        scores = self._scores(task, record.scores if record else {}, measuring)
        if record is None:
            return Trained(task.name, task.model, False, scores=scores)
        return Trained(task.name, task.model, False, record.loss, record.held_out, scores)

    def _scores(self, task: Task, known: Row, measuring: Measuring | None) -> Row:
        """Return the scores of a checkpoint that is there, measured if the known ones are of others."""
        if measuring is None:
            return {}
        if measuring.is_same(task.name, known):
            return known
        locked = lock_source(self.recipe, task.model)
        return measuring.row(task, self._place(locked), is_adapter=locked.adapter_config is not None)

    @property
    def _evaluator(self) -> Evaluator:
        choice = training_evaluator(self.recipe)
        return make_evaluator(choice.name, choice.options)

    def examples(self, data: Data) -> Dataset:
        """Load the examples of a task, or of the capability."""
        return examples_for(self._evaluator, data, self.recipe, {})

    def _step_examples(self, task: str, rows: Sequence[Dataset]) -> StepExamples:
        """Return the examples of each step of a task, from those of the task and of the capability."""
        from hub_magmax.training.step_examples import step_examples_of

        return step_examples_of(self.spec, task, rows, self._evaluator, self.seed)

    def train(
        self,
        task: Task,
        rows: Sequence[Dataset],
        step_examples: StepExamples,
        measuring: Measuring | None,
    ) -> Trained:
        """Train one task on its own examples and those of the capability, and write its checkpoint."""
        from hub_magmax.training.loop import frozen_parameters, train

        folder = TrainingFolder(self._path(task))
        num_steps = self.spec.steps or step_examples.mixture.num_steps(
            self.spec.epochs or 1, len(step_examples.parts[0].rows)
        )
        begun = start_name(self.recipe, task)
        doing = f"training {task.name} for {number_of(num_steps, 'step')}, from {begun}"
        with step(doing, self.report):
            start = self._start(task)
            record = self._record(task, start, rows, num_steps)
            with folder.claimed(record) if self.processes.is_first else nullcontext():
                model = self._model(start.model)
                dtype = model.network.dtype
                model.network.float()
                adapter = self._adapter(task, model, start)
                if adapter is None:
                    frozen_parameters(model, self.spec.frozen)
                with (
                    about_data(self.recipe, self.spec.data[task.name]),
                    opened(self.progress, num_steps, doing, "steps") as advance,
                ):
                    course = train(
                        model,
                        step_examples,
                        self.spec,
                        num_steps,
                        folder,
                        self.processes,
                        self._told(task),
                        advance,
                    )
                if self.processes.is_first:
                    with os_errors(folder.finished):
                        shutil.rmtree(folder.finished, ignore_errors=True)
                    if adapter is not None:
                        adapter.write(folder.finished, start.model)
                    else:
                        model.network.to(dtype)
                        self._write(model, start.model, folder.finished)
                self.processes.wait()
                place, is_adapter = ModelPlace(str(folder.finished)), adapter is not None
                scores = measuring.row(task, place, is_adapter=is_adapter) if measuring else {}
                record = replace(
                    record, loss=in_parts(course.losses), held_out=course.held_out, scores=scores
                )
                if self.processes.is_first:
                    write_text(folder.finished / RECORD_NAME, record.to_json())
                    folder.publish()
            self.processes.wait()
        return Trained(task.name, task.model, True, record.loss, record.held_out, scores)

    def _start(self, task: Task) -> Start:
        """Return what a task begins at; files are hashed once for several tasks, unless they change."""
        name, folder = start_name(self.recipe, task), self.recipe.folder
        if name not in self.starts or self.starts[name][1] != state_of(self.starts[name][0].model, folder):
            start = locked_start(self.recipe, task)
            self.starts[name] = start, state_of(start.model, folder)
        return self.starts[name][0]

    def _told(self, task: Task) -> Report:
        return lambda line: self.report(f"{task.name}: {line}")

    def _model(self, locked: LockedSource) -> LoadedModel:
        evaluator = self._evaluator
        classes = evaluator.model_class, evaluator.processor_class
        try:
            return load_model(self._place(locked), *classes, "training")
        except MissingParametersError as error:
            error.take_from_hints(error.hint)
            error.add_hint(
                "Give the base model a head for the classes of all tasks first, as docs/training.md shows "
                'under "A head for the base model", or choose an evaluator that fits it.'
            )
            raise

    def _place(self, locked: LockedSource) -> ModelPlace:
        return location_of(locked, self.recipe.folder).model_place

    def _adapter(self, task: Task, model: LoadedModel, start: Start) -> TrainedAdapter | None:
        """Put an adapter into a model, where the recipe trains adapters."""
        from hub_magmax.training.adapters import add_adapter
        from hub_magmax.training.order import seed_of

        if self.spec.lora is None:
            return None
        seed = seed_of(self.seed, f"task {task.name}, lora")
        found = add_adapter(model, self._evaluator.model_class, self.spec.lora, seed)
        if start.adapter is not None:
            found.begin_at(self.recipe, start.adapter)
        return found

    def _record(self, task: Task, start: Start, rows: Sequence[Dataset], num_steps: int) -> TrainingRecord:
        prints = [fingerprint(found, found.column_names) for found in rows]
        known = {"examples": [len(found) for found in rows], "fingerprint": prints}
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        run = {"steps": num_steps, "processes": self.processes.count, "precision": precision}
        packages = (*_PACKAGES, "peft") if self.spec.lora else _PACKAGES
        versions = {name: version(name) for name in packages}
        return TrainingRecord(task.name, self._settings(task), start.hashes, known, run | versions)

    def _write(self, model: LoadedModel, locked: LockedSource, finished: Path) -> None:
        """Write weights, and the files beside those of the start."""
        with os_errors(finished), without_bars():
            model.network.save_pretrained(finished)
        with closing(open_source(self.recipe, locked)) as source:
            for path in copied_files(source, locked):
                copy_side_file(source, path, locked, finished)
