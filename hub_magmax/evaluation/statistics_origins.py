"""Origins of statistics: digests of the checkpoints, examples and merge that a file was made of."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

from hub_magmax.checkpoints.opening import open_source
from hub_magmax.checkpoints.pinning import file_sha256
from hub_magmax.checkpoints.source_cache import SourceCache
from hub_magmax.errors import KeyPath, RecipeError
from hub_magmax.evaluation.data import pinned
from hub_magmax.files import digest
from hub_magmax.methods.data_statistics import OF_THE_MERGE, REPRESENTATION
from hub_magmax.recipe.examples import Statistics
from hub_magmax.recipe.lockfile import Lock, own_base_name
from hub_magmax.recipe.schema import Recipe

#: Texts in the header of a file, besides its kind: digests of what it was made of.
CHECKPOINT, DATA, MERGE = "checkpoint", "data", "merge"


@dataclass(frozen=True)
class Origins:
    """What the statistics of a recipe are made of, as digests.

    Attributes:
        recipe: Names the examples, and what runs on them.
        lock: Of the recipe's checkpoints and data.
        cache: Checkpoints that are open already.
        hashes: Of files of weights, by source, once they were asked for.
    """

    recipe: Recipe
    lock: Lock
    cache: SourceCache
    hashes: dict[str, list[str]] = field(default_factory=dict)

    def key(self, task: str) -> KeyPath:
        """Return the path of the key that names a task's statistics."""
        return ("tasks", self.recipe.task_names.index(task), "statistics")

    def has_data(self, task: str) -> bool:
        """Say whether the recipe names examples of a task."""
        return self.recipe.statistics is not None and task in self.recipe.statistics.data

    @property
    def spec(self) -> Statistics:
        """The recipe's examples and how they run, for a task that has some."""
        assert self.recipe.statistics is not None, "`has_data` is asked first"
        return self.recipe.statistics

    def checkpoint(self, task: str) -> str:
        """Return a digest of the weights that a task's model has: its own, and those below an adapter."""
        names, lock = [task], self.lock
        if lock.tasks[task].adapter_config:
            before = [*lock.tasks][: [*lock.tasks].index(task)] if lock.adapters == "sequence" else []
            names += [own_base_name(task) if task in lock.bases else "base_model", *before]
        return digest([self._hashes_of(name) for name in names])

    def _hashes_of(self, name: str) -> list[str]:
        """Return hashes of a source's files of weights; what no lock holds is read once."""
        if name not in self.hashes:
            locked = self.lock.every_source[name]
            with closing(open_source(self.recipe, locked, self.cache)) as source:
                self.hashes[name] = [file.sha256 or file_sha256(source, file.path) for file in locked.files]
        return self.hashes[name]

    def data(self, task: str) -> str:
        """Return a digest of which examples run and how; local data is known by its content."""
        data = pinned(self.spec.data[task], self.lock.datasets)
        content = {part.dataset: self.lock.local_data.get(part.dataset) for part in data.parts}
        named = data.model_dump(mode="json")
        if content[data.dataset] is not None:
            named["dataset"] = content[data.dataset]
        evaluator, options = self.evaluator_choice()
        return digest([named, evaluator, options, self.spec.batch_size])

    def evaluator_choice(self) -> tuple[str, dict[str, Any]]:
        """Return name and options of the evaluator that runs the models; raise RecipeError without one."""
        spec, evaluation = self.recipe.statistics, self.recipe.evaluation
        choice = spec.evaluator if spec else None
        choice = choice or (evaluation.evaluator if evaluation else None)
        if choice is None:
            raise RecipeError(
                "nothing says how the models run",
                key=("statistics", "evaluator"),
                expected="an evaluator here, or an evaluation",
                hint="Write statistics: {evaluator: image-classification, data: ...}.",
            )
        return choice.name, choice.options

    def merge(self, kind: str) -> str:
        """Return a digest of all that statistics of a merge depend on."""
        of_tasks = [[self.checkpoint(task), self.data(task)] for task in self.lock.tasks]
        counts = kind == OF_THE_MERGE or self.lock.values.how.uses_preference or self.lock.lengths
        known: list[Any] = [of_tasks, list(self.lock.weights) if counts else [], dict(self.lock.method)]
        return digest(known if kind == OF_THE_MERGE else [*known, *self._more_of_merge()])

    def _more_of_merge(self) -> list[Any]:
        """Return what representations depend on besides, as they are of any merge by any recipe."""
        lock = self.lock
        sources = {name: self._hashes_of(name) for name in lock.every_source}
        headers = {
            kind: {task: [file.header_sha256 for file in one.files] for task, one in by_task.items()}
            for kind, by_task in lock.statistics.items()
            if kind != REPRESENTATION
        }
        lengths = asdict(lock.lengths) if lock.lengths else None
        aside = [lock.rules, lock.seed, lock.adapters, lock.token_rows, lengths, dict(lock.plugin)]
        return [sources, headers, aside, self.recipe.output.dtype, self.recipe.output.files_from]
