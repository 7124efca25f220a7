"""Statistics of tasks' data, made of each kind by runs of the tasks' models."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from hub_magmax.checkpoints.config import stated_config
from hub_magmax.checkpoints.data_statistics import KIND
from hub_magmax.checkpoints.names.model_classes import tied_head
from hub_magmax.checkpoints.opening import open_checkpoints, open_source
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.checkpoints.source_cache import SourceCache
from hub_magmax.errors import RecipeError
from hub_magmax.evaluation.collecting import FileNames, collected, likelihoods_of
from hub_magmax.evaluation.columns import examples_for
from hub_magmax.evaluation.data import fingerprint
from hub_magmax.evaluation.evaluators import (
    Evaluator,
    brings_data,
    columns_of,
    encode_unlabelled,
    make_evaluator,
)
from hub_magmax.evaluation.evaluators.loading import LoadedModel
from hub_magmax.evaluation.evaluators.plugins import about
from hub_magmax.evaluation.merged_moments import TaskRun, merged_moments
from hub_magmax.evaluation.models import Loading, model_places
from hub_magmax.evaluation.representations import TIED, find_head, no_head, summed_products
from hub_magmax.evaluation.statistics_origins import CHECKPOINT, DATA, MERGE, Origins
from hub_magmax.evaluation.statistics_sizes import tell_sizes
from hub_magmax.evaluation.statistics_writing import sha256_of, write_statistics
from hub_magmax.files import canonical_json, from_here
from hub_magmax.kernels.lazy_imports import Tensor, one_thread
from hub_magmax.methods.data_statistics import OF_THE_MERGE, REPRESENTATION, StatisticsKind
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.model_names import expanded
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.statistics_checks import is_local
from hub_magmax.text import Report, step


@dataclass(frozen=True)
class Making:
    """Makes the statistics of a recipe.

    Attributes:
        recipe: Names folders of statistics, and the examples that missing ones are made of.
        lock: Of its checkpoints and data.
        origins: What they are made of.
        report: Called with a line before each that is made.
        cache: Checkpoints that are open already.
        merged_weights: Merges by the lock in memory, for representations.
    """

    recipe: Recipe
    lock: Lock
    origins: Origins
    report: Report
    cache: SourceCache
    merged_weights: Callable[[], Mapping[str, Tensor]] | None = None

    def missing(self, kind: StatisticsKind, files: Mapping[str, str]) -> dict[str, Path]:
        """Return the files that have to be made, by task; those of a merge only all together.

        Raises:
            RecipeError, EvaluationError: If it is known without running a model that they cannot be made.
        """
        paths = {task: self.recipe.folder / expanded(file) for task, file in files.items()}
        here = {task for task, file in files.items() if is_local(self.recipe, file)}
        found = {task: path for task, path in paths.items() if task in here and not path.is_file()}
        if found and kind in (OF_THE_MERGE, REPRESENTATION):
            self._need_all_here(kind, paths, here)
            found = paths
        if found:
            self._need_fit(kind, found)
        return found

    def make_missing(self, kind: StatisticsKind, files: Mapping[str, str]) -> None:
        """Make the files that are missing here."""
        paths = self.missing(kind, files)
        if not paths:
            return
        with open_checkpoints(self.recipe, self.lock, self.cache) as opened:
            changed = changed_tensors(self.lock, opened)
            tell_sizes(kind, opened["base_model"], changed, paths, self.report)
        if kind == OF_THE_MERGE:
            self._make_of_the_merge(paths)
        elif kind == REPRESENTATION:
            self._make_representations(paths)
        else:
            for task, path in paths.items():
                self._make(kind, task, path)

    def _need_fit(self, kind: StatisticsKind, paths: Mapping[str, Path]) -> None:
        """Raise an error where examples, evaluator or configuration do not fit such statistics."""
        for task, path in paths.items():
            self._need_data(kind, task, path)
        evaluator = self._evaluator()
        for task in paths:
            self._examples(task, evaluator)
        if kind == "fisher":
            likelihoods_of(evaluator)
        if kind == REPRESENTATION:
            self._need_own_head(evaluator)

    def _need_own_head(self, evaluator: Evaluator) -> None:
        """Raise EvaluationError for a model whose configuration ties its head, unless it is stored apart."""
        locked = self.lock.sources[self.recipe.output.files_from]
        with closing(open_source(self.recipe, locked, self.cache)) as source:
            found = tied_head(stated_config(source), evaluator.model_class)
            stored = [name for name in source.index.tensors if found and f".{name}".endswith(f".{found[0]}")]
        if found and not any(name not in (locked.ties or {}) for name in stored):
            raise no_head(locked.label, TIED.format(found[1]))

    def _need_all_here(self, kind: StatisticsKind, paths: Iterable[str], here: Container[str]) -> None:
        for task in paths:
            if task not in here:
                raise RecipeError(
                    f"{kind} statistics are made of all tasks together: some are missing here, and those of "
                    f"{task} are on the Hub",
                    key=self.origins.key(task),
                    expected="folders here for all tasks, or statistics of one merge for all of them",
                    hint=f"Write statistics: ./statistics/{task}, and name examples: statistics.data.{task}.",
                )

    def _evaluator(self) -> Evaluator:
        """Return what runs the models; raise RecipeError where it would run other examples than are named."""
        name, options = self.origins.evaluator_choice()
        found = make_evaluator(name, options)
        if brings_data(found):
            raise RecipeError(
                f"{name} brings its own examples, and statistics are of those that the recipe names",
                key=("statistics", "evaluator"),
                expected="an evaluator that takes examples",
                hint="Write statistics: {evaluator: log-likelihood, data: ...}.",
            )
        return found

    def _loading(self, evaluator: Evaluator) -> Loading:
        return Loading(self.recipe, self.lock, evaluator, purpose=self.origins.evaluator_choice()[0])

    def _need_data(self, kind: StatisticsKind, task: str, path: Path) -> None:
        """Raise RecipeError where there are no examples to make statistics of."""
        if not self.origins.has_data(task):
            raise RecipeError(
                f"there are no {kind} statistics of {task}: {from_here(path)} is missing",
                key=self.origins.key(task),
                expected="a folder that holds them, or examples to make them of",
                hint=f"Name some of the examples it was trained on: statistics.data.{task}: {{dataset: ..., "
                "split: train[:256]}.",
            )

    def _make(self, kind: StatisticsKind, task: str, path: Path) -> None:
        """Run a task's own checkpoint on its examples, and write the statistics."""
        evaluator, data = self._evaluator(), self.origins.spec.data[task]
        examples = self._examples(task, evaluator)
        doing = f"running {task} on {len(examples):,} of its examples, for {kind} statistics"
        with step(doing, self.report), open_checkpoints(self.recipe, self.lock, self.cache) as opened:
            places, base = model_places(self.recipe, self.lock), opened["base_model"]
            model = self._loading(evaluator).load(task, places[task])
            with one_thread():  # sums in an order that does not depend on how many there are
                tensors, told = collected(
                    kind,
                    evaluator,
                    model,
                    examples,
                    columns_of(data),
                    self.origins.spec.batch_size,
                    base,
                    changed_tensors(self.lock, opened),
                )
        write_statistics(path, tensors, self._facts(kind, task, examples, tensors) | told)

    def _facts(
        self, kind: StatisticsKind, task: str, examples: Any, tensors: Mapping[str, Tensor]
    ) -> dict[str, str]:
        """Return the texts for the header of a task's file."""
        return {
            "format": "pt",
            KIND: kind,
            "task": task,
            "examples": str(len(examples)),
            "fingerprint": fingerprint(examples, examples.column_names),
            "evaluator": canonical_json(self.origins.evaluator_choice()),
            CHECKPOINT: self.origins.checkpoint(task),
            DATA: self.origins.data(task),
            "values": sha256_of(tensors),
        }

    def _make_of_the_merge(self, paths: Mapping[str, Path]) -> None:
        """Merge all tasks' models block after block in memory, and write the statistics of each."""
        method = self.lock.method
        evaluator, places = self._evaluator(), model_places(self.recipe, self.lock)
        examples = {task: self._examples(task, evaluator) for task in paths}
        loading = self._loading(evaluator)
        doing = f"merging {', '.join(paths)} block after block, for {OF_THE_MERGE} statistics"
        with (
            step(doing, self.report),
            open_checkpoints(self.recipe, self.lock, self.cache) as opened,
            one_thread(),
        ):
            runs = {}
            for task, weight in zip(self.lock.tasks, self.lock.weights, strict=True):
                model = loading.load(task, places[task])
                run = partial(self._run, OF_THE_MERGE, evaluator, task, examples[task])
                names = FileNames.find(model.network, opened["base_model"])
                names = names.only(changed_tensors(self.lock, opened))
                runs[task] = TaskRun(model.network, names, partial(run, model), weight)
            found = merged_moments(runs, method["off_diagonal"], method["ridge"])
        for task, (tensors, told) in found.items():
            facts = self._facts(OF_THE_MERGE, task, examples[task], tensors) | told
            write_statistics(paths[task], tensors, facts | {MERGE: self.origins.merge(OF_THE_MERGE)})

    def _make_representations(self, paths: Mapping[str, Path]) -> None:
        """Merge in memory, run the merged model and each task's own, and write the statistics of each."""
        evaluator, places = self._evaluator(), model_places(self.recipe, self.lock)
        examples = {task: self._examples(task, evaluator) for task in paths}
        loading, run = self._loading(evaluator), partial(self._run, REPRESENTATION, evaluator)
        with step(f"merging {', '.join(paths)} in memory, for {REPRESENTATION} statistics", self.report):
            name = self.recipe.output.files_from
            model = loading.load(name, places[name])
            with open_checkpoints(self.recipe, self.lock, self.cache) as opened:
                names = FileNames.find(model.network, opened["base_model"])
            task, *_ = paths
            head = find_head(model, names, partial(run, task, examples[task].select([0]), model))
            assert self.merged_weights is not None
            merged = replace(model.with_weights(self.merged_weights()), name="the merged model")
        for task, path in paths.items():
            doing = f"running the merged model and {task} on {len(examples[task]):,} of its examples"
            with step(f"{doing}, for {REPRESENTATION} statistics", self.report), one_thread():
                own = loading.load(task, places[task])
                tensors, told = summed_products(head, own, merged, partial(run, task, examples[task]))
            facts = self._facts(REPRESENTATION, task, examples[task], tensors) | told
            write_statistics(path, tensors, facts | {MERGE: self.origins.merge(REPRESENTATION)})

    def _run(
        self, kind: StatisticsKind, evaluator: Evaluator, task: str, examples: Any, model: LoadedModel
    ) -> object:
        """Run a model on examples of a task."""
        spec = self.origins.spec
        with about(evaluator, f"{kind} statistics"):
            encode = encode_unlabelled(evaluator) or evaluator.encode
            batches = encode(model, examples, columns_of(spec.data[task]), spec.batch_size)
            return evaluator.outcomes(model, batches)

    def _examples(self, task: str, evaluator: Evaluator) -> Any:
        data, labelled = self.origins.spec.data[task], encode_unlabelled(evaluator) is None
        return examples_for(evaluator, data, self.recipe, self.lock.datasets, labelled=labelled)


def changed_tensors(lock: Lock, opened: Mapping[str, TensorSource]) -> frozenset[str]:
    """Return the names of the tensors that some task changes, as far as headers tell.

    Args:
        lock: Names the tasks.
        opened: Their checkpoints and the base model, by name.
    """
    base, tasks = opened["base_model"], [opened[task] for task in lock.tasks]
    names = base.index.tensors
    return frozenset(name for name in names if not all(task is base or task.keeps(name) for task in tasks))
