"""Files of statistics of tasks' data: made where they are missing, pinned, and compared with their recipe."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Container, Mapping
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hub_magmax.checkpoints.data_statistics import AGAIN, KIND, facts_of
from hub_magmax.checkpoints.locations import locate
from hub_magmax.checkpoints.opening import open_checkpoints, open_source
from hub_magmax.checkpoints.pinning import file_sha256, pinned_files
from hub_magmax.checkpoints.source_cache import SourceCache
from hub_magmax.errors import LockError, RecipeError
from hub_magmax.evaluation.collecting import FileNames, collected
from hub_magmax.evaluation.data import fingerprint, load_examples, pinned
from hub_magmax.evaluation.data_keys import about_data
from hub_magmax.evaluation.evaluators import (
    Evaluator,
    brings_data,
    columns_of,
    make_evaluator,
    needs_labels,
    wanted_columns,
)
from hub_magmax.evaluation.evaluators.examples import check_columns
from hub_magmax.evaluation.evaluators.loading import LoadedModel
from hub_magmax.evaluation.evaluators.plugins import about
from hub_magmax.evaluation.merged_moments import TaskRun, merged_moments
from hub_magmax.evaluation.models import Loading, model_places
from hub_magmax.evaluation.representations import find_head, summed_products
from hub_magmax.files import canonical_json, digest, from_here, os_errors
from hub_magmax.kernels.lazy_imports import one_thread
from hub_magmax.methods.data_statistics import OF_THE_MERGE, REPRESENTATION, StatisticsKind
from hub_magmax.recipe.lockfile import Lock, LockedSource, own_base_name
from hub_magmax.recipe.model_names import expanded
from hub_magmax.recipe.schema import Recipe, Statistics
from hub_magmax.recipe.statistics_checks import files_of, is_local, statistics_kinds
from hub_magmax.text import Report, step

if TYPE_CHECKING:
    from torch import Tensor

#: Texts in the header of a file, besides its kind: digests of what it was made of.
CHECKPOINT, DATA, MERGE = "checkpoint", "data", "merge"

#: Dtypes of statistics, as safetensors calls them, by the bytes of an element.
_DTYPES = {4: "F32", 8: "F64"}


def locked_statistics(
    recipe: Recipe,
    lock: Lock,
    report: Report = lambda line: None,
    *,
    kinds: Collection[StatisticsKind] = ("gram", "fisher"),
    hash_files: bool = False,
    cache: SourceCache | None = None,
    merged_weights: Callable[[], Mapping[str, Tensor]] | None = None,
) -> dict[str, dict[str, LockedSource]]:
    """Return statistics that the recipe needs, pinned, by kind and task; missing ones are made.

    Args:
        recipe: Names folders of statistics, and the examples that missing ones are made of.
        lock: Of its checkpoints and data.
        report: Called with a line before each that is made.
        kinds: These and no others; by default those that do not depend on the preference.
        hash_files: Read local files whole, and lock their sha256 too.
        cache: Checkpoints that are open already.
        merged_weights: Merges by the lock in memory, for representations.

    Raises:
        RecipeError: If some are missing, and the recipe names no examples.
        LockError: If they are of another checkpoint, or of other examples, than the recipe names.
        CheckpointError, EvaluationError: If a file is no sound one, or cannot be made.
    """
    made = _Making(recipe, lock, report, cache or SourceCache(), merged_weights)
    found: dict[str, dict[str, LockedSource]] = {}
    for kind in statistics_kinds(recipe):
        if kind in kinds:
            files = files_of(recipe, kind)
            made.make_missing(kind, files)
            found[kind] = {
                task: made.pinned(kind, task, file, hash_files=hash_files) for task, file in files.items()
            }
    return found


@dataclass(frozen=True)
class _Making:
    """Makes and pins the statistics of a recipe."""

    recipe: Recipe
    lock: Lock
    report: Report
    cache: SourceCache
    merged_weights: Callable[[], Mapping[str, Tensor]] | None = None
    hashes: dict[str, list[str]] = field(default_factory=dict)

    def make_missing(self, kind: StatisticsKind, files: Mapping[str, str]) -> None:
        """Make the files that are missing here; those that depend on the preference only all together."""
        paths = {task: self.recipe.folder / expanded(file) for task, file in files.items()}
        here = {task for task, file in files.items() if is_local(self.recipe, file)}
        missing = {task: path for task, path in paths.items() if task in here and not path.is_file()}
        if kind in (OF_THE_MERGE, REPRESENTATION):
            self._make_together(kind, paths if missing else {}, here)
            return
        for task, path in missing.items():
            self._need_data(kind, task, path)
            self._make(kind, task, path)

    def _make_together(self, kind: StatisticsKind, paths: Mapping[str, Path], here: Container[str]) -> None:
        for task, path in paths.items():
            if task not in here:
                raise RecipeError(
                    f"{kind} statistics are made of all tasks together: some are missing here, and those of "
                    f"{task} are on the Hub",
                    key=self._key(task),
                    expected="folders here for all tasks, or statistics of one merge for all of them",
                    hint=f"Write statistics: ./statistics/{task}, and name examples: statistics.data.{task}.",
                )
            self._need_data(kind, task, path)
        if paths:
            (self._make_of_the_merge if kind == OF_THE_MERGE else self._make_representations)(paths)

    def pinned(self, kind: StatisticsKind, task: str, file: str, *, hash_files: bool) -> LockedSource:
        """Return the statistics of one task, pinned."""
        location = locate(file, self.recipe.folder).pinned().trusting(self.recipe.trusted_roots)
        with closing(self.cache.open(location)) as source:
            self._compare(facts_of(source, kind), task, file)
            files = pinned_files(source, hash_files=hash_files)
        return LockedSource(file, location.name, files=files, **location.pin._asdict())

    def _key(self, task: str) -> tuple[Any, ...]:
        return ("tasks", self.recipe.task_names.index(task), "statistics")

    def _compare(self, facts: Mapping[str, str], task: str, file: str) -> None:
        """Raise LockError for statistics of another checkpoint, or of other examples, where that is known."""
        key, known = self._key(task), facts.get(CHECKPOINT)
        if known is not None and known != self._checkpoint(task):
            raise LockError(
                f"these statistics are of another checkpoint than {self.lock.tasks[task].label}",
                where=file,
                hint=AGAIN,
                key=key,
            )
        is_known = MERGE in facts and all(map(self._has_data, self.lock.tasks))
        if is_known and facts[MERGE] != self._merge(facts[KIND]):
            raise LockError(
                "these statistics are of another merge: other checkpoints, examples, options or preference",
                where=file,
                hint="Remove the file, so that those of all tasks are made again, or name other folders.",
                key=key,
            )
        if self._has_data(task) and facts.get(DATA) != self._data(task):
            raise LockError(
                f"these statistics are of other examples than statistics.data.{task} names, or of another "
                "evaluator or batch size",
                where=file,
                hint=AGAIN,
                key=key,
            )

    def _has_data(self, task: str) -> bool:
        return self.recipe.statistics is not None and task in self.recipe.statistics.data

    @property
    def _spec(self) -> Statistics:
        """The recipe's examples and how they run, for a task that has some."""
        assert self.recipe.statistics is not None, "`_has_data` is asked first"
        return self.recipe.statistics

    def _checkpoint(self, task: str) -> str:
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

    def _data(self, task: str) -> str:
        """Return a digest of which examples run and how; local data is known by its content."""
        data = pinned(self._spec.data[task], self.lock.datasets)
        content = {part.dataset: self.lock.local_data.get(part.dataset) for part in data.parts}
        named = data.model_dump(mode="json")
        if content[data.dataset] is not None:
            named["dataset"] = content[data.dataset]
        evaluator, options = self._evaluator_choice()
        return digest([named, evaluator, options, self._spec.batch_size])

    def _evaluator_choice(self) -> tuple[str, dict[str, Any]]:
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

    def _evaluator(self) -> Evaluator:
        """Return what runs the models; raise RecipeError where it would run other examples than are named."""
        name, options = self._evaluator_choice()
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
        return Loading(self.recipe, self.lock, evaluator, purpose=self._evaluator_choice()[0])

    def _need_data(self, kind: StatisticsKind, task: str, path: Path) -> None:
        """Raise RecipeError where there are no examples to make statistics of."""
        if not self._has_data(task):
            raise RecipeError(
                f"there are no {kind} statistics of {task}: {from_here(path)} is missing",
                key=self._key(task),
                expected="a folder that holds them, or examples to make them of",
                hint=f"Name some of the examples it was trained on: statistics.data.{task}: {{dataset: ..., "
                "split: train[:256]}.",
            )

    def _make(self, kind: StatisticsKind, task: str, path: Path) -> None:
        """Run a task's own checkpoint on its examples, and write the statistics."""
        evaluator, data = self._evaluator(), self._spec.data[task]
        examples = self._examples(task, evaluator)
        doing = f"running {task} on {len(examples):,} of its examples, for {kind} statistics"
        with step(doing, self.report), open_checkpoints(self.recipe, self.lock, self.cache) as opened:
            places, base = model_places(self.recipe, self.lock), opened["base_model"]
            model = self._loading(evaluator).load(task, places[task])
            with one_thread():  # sums in an order that does not depend on how many there are
                tensors, told = collected(
                    kind, evaluator, model, examples, columns_of(data), self._spec.batch_size, base
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
            "evaluator": canonical_json(self._evaluator_choice()),
            CHECKPOINT: self._checkpoint(task),
            DATA: self._data(task),
            "values": _sha256_of(tensors),
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
                runs[task] = TaskRun(model.network, names, partial(run, model), weight)
            found = merged_moments(runs, method["off_diagonal"], method["ridge"])
        for task, (tensors, told) in found.items():
            facts = self._facts(OF_THE_MERGE, task, examples[task], tensors) | told
            write_statistics(paths[task], tensors, facts | {MERGE: self._merge(OF_THE_MERGE)})

    def _make_representations(self, paths: Mapping[str, Path]) -> None:
        """Merge in memory, run the merged model and each task's own, and write the statistics of each."""
        evaluator, places = self._evaluator(), model_places(self.recipe, self.lock)
        examples = {task: self._examples(task, evaluator) for task in paths}
        loading, run = self._loading(evaluator), partial(self._run, REPRESENTATION, evaluator)
        with step(f"merging {', '.join(paths)} in memory, for {REPRESENTATION} statistics", self.report):
            merged = self._merged_model(loading)
            with open_checkpoints(self.recipe, self.lock, self.cache) as opened:
                names = FileNames.find(merged.network, opened["base_model"])
            task, *_ = paths
            head = find_head(merged, names, partial(run, task, examples[task].select([0]), merged))
        for task, path in paths.items():
            doing = f"running the merged model and {task} on {len(examples[task]):,} of its examples"
            with step(f"{doing}, for {REPRESENTATION} statistics", self.report), one_thread():
                own = loading.load(task, places[task])
                tensors, told = summed_products(head, own, merged, partial(run, task, examples[task]))
            facts = self._facts(REPRESENTATION, task, examples[task], tensors) | told
            write_statistics(path, tensors, facts | {MERGE: self._merge(REPRESENTATION)})

    def _merged_model(self, loading: Loading) -> LoadedModel:
        assert self.merged_weights is not None
        name = self.recipe.output.files_from
        place = model_places(self.recipe, self.lock)[name]
        return replace(loading.load(name, place).with_weights(self.merged_weights()), name="the merged model")

    def _merge(self, kind: str) -> str:
        """Return a digest of all that statistics of a merge depend on."""
        of_tasks = [[self._checkpoint(task), self._data(task)] for task in self.lock.tasks]
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

    def _run(
        self, kind: StatisticsKind, evaluator: Evaluator, task: str, examples: Any, model: LoadedModel
    ) -> object:
        """Run a model on examples of a task."""
        spec = self._spec
        with about(evaluator, f"{kind} statistics"):
            batches = evaluator.encode(model, examples, columns_of(spec.data[task]), spec.batch_size)
            return evaluator.outcomes(model, batches)

    def _examples(self, task: str, evaluator: Evaluator) -> Any:
        data = self._spec.data[task]
        with about_data(self.recipe, data):
            place = pinned(data, self.lock.datasets)
            found = load_examples(place, self.recipe.folder, labelled=needs_labels(evaluator))
            check_columns(found, wanted_columns(evaluator, data))
        return found


def _sha256_of(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of values, so that the header, which locks pin, tells them apart too."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hasher.update(name.encode() + b"\0")
        hasher.update(tensor.contiguous().numpy().data)
    return hasher.hexdigest()


def write_statistics(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Write a file of statistics in one step; its bytes depend on the values alone.

    The library for safetensors writes texts of a header in any order.

    Raises:
        OutputError: If it cannot be written.
    """
    header: dict[str, Any]
    header, start = {"__metadata__": dict(sorted(facts.items()))}, 0
    for name, tensor in sorted(tensors.items()):
        size = tensor.element_size()
        stop = start + size * tensor.numel()
        header[name] = {"dtype": _DTYPES[size], "shape": [*tensor.shape], "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f"{path.name}.tmp")
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                for _, tensor in sorted(tensors.items()):
                    file.write(tensor.contiguous().numpy().data)
            temporary.rename(path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
