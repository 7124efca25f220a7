"""Scores of earlier evaluations: a checkpoint that did not change is not scored again.

What a model answers on each example of a task is kept in a cache folder, under a digest of everything that it
depends on: the checkpoint's commit or the content of its files, the examples, the evaluator with its options,
software, this package's code and the processor. Nothing there can be out of date, since whatever changes has
another digest; the folder can be deleted at any time. The merged model's answers are kept until its
evaluation is done, so that an interrupted one goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hub_magmax.checkpoints.identity import folder_state, identity_of, state_of
from hub_magmax.errors import HubMagmaxError
from hub_magmax.evaluation.evaluators import Outcome
from hub_magmax.evaluation.journal import Outcomes, restored, stored
from hub_magmax.evaluation.software import software_used
from hub_magmax.files import digest, user_cache
from hub_magmax.processes import Processes
from hub_magmax.recipe.examples import Evaluation
from hub_magmax.recipe.lockfile import Lock, own_base_name
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.values import GPTQ
from hub_magmax.registry import EVALUATORS
from hub_magmax.text import Report, number_of, step

#: A model's name and a task's.
Cell = tuple[str, str]

#: Names the folder, in place of the user's cache; empty: nothing is kept or reused.
FOLDER_VARIABLE = "HUB_MAGMAX_SCORES"

#: Scores that were not used for so long are removed.
MAX_AGE_SECONDS = 90 * 24 * 3600

#: Names of the files that are written here, finished and not; the user's folder may hold others.
_TEMPORARY_PREFIX = "hub_magmax-"
_OURS = re.compile(rf"[0-9a-f]{{64}}\.json|{_TEMPORARY_PREFIX}\w+")

#: Keys of data that say where examples lie; what they are is their fingerprint.
_PLACES = {"dataset", "config", "split", "revision"}

#: Keys of an evaluation that do not change what a model answers.
_ASIDE = {"tasks", "guard", "margin", "quantized", "quantized_models", "calibration", "cells"}

#: What a lock found out about a source by comparing it with the base model.
_FACTS = ("adapter_config", "places", "added_rows", "renamed", "ties", "label_rows")


def score_folder() -> Path | None:
    """Return the folder of kept scores, `hub_magmax/scores` in the user's cache; None for none."""
    return user_cache("scores", FOLDER_VARIABLE)


class KeptScores:
    """Answers of models on tasks, by digest, a file each; where the disk fails, nothing is known or kept."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    @property
    def is_on(self) -> bool:
        return self._folder is not None

    def get(self, key: str | None) -> Outcomes | None:
        """Return what was kept under a key, None where it is not there."""
        if self._folder is None or key is None:
            return None
        path = self._folder / f"{key}.json"
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["digest"] == digest(values["outcomes"]):
                os.utime(path)
                return restored(values["outcomes"])
        return None

    def put(self, key: str | None, outcomes: Sequence[Outcome]) -> None:
        """Keep what a model answered."""
        if self._folder is None or key is None:
            return
        values = stored(outcomes)
        with contextlib.suppress(OSError, ValueError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", prefix=_TEMPORARY_PREFIX, dir=self._folder, delete=False
            ) as temporary:
                json.dump({"digest": digest(values), "outcomes": values}, temporary)
            Path(temporary.name).replace(self._folder / f"{key}.json")

    def forget(self, keys: Iterable[str | None]) -> None:
        """Remove what is kept under some keys, and all scores that were not used for long."""
        if self._folder is None or not self._folder.is_dir():
            return
        with contextlib.suppress(OSError):
            for key in keys:
                (self._folder / f"{key}.json").unlink(missing_ok=True)
            oldest = time.time() - MAX_AGE_SECONDS
            for entry in os.scandir(self._folder):
                if _OURS.fullmatch(entry.name) and entry.stat().st_mtime < oldest:
                    Path(entry.path).unlink(missing_ok=True)


class Reuse:
    """Stored answers of an evaluation's models, and their identities, before it begins.

    Args:
        recipe, lock: Of the evaluation.
        merged: Folder of the merged model.
        described: As `Scores.data`. Answers on examples without a fingerprint are never kept.
        processes: The first one reads and writes, and all get the same.
        is_on: Otherwise everything is measured, and nothing kept.

    Attributes:
        known: Answers by model and task.
    """

    def __init__(
        self,
        recipe: Recipe,
        lock: Lock,
        merged: Path,
        described: Mapping[str, Mapping[str, Any]],
        processes: Processes,
        *,
        is_on: bool,
    ) -> None:
        self._kept = KeptScores(score_folder() if is_on and processes.is_first else None)
        self._keys = _Keys(recipe, lock, merged, described) if self._kept.is_on else None
        self._processes, self._made = processes, set(lock.sources)
        self._wanted: list[Cell] = []
        self.known: dict[Cell, Outcomes] = {}

    def find(self, wanted: Mapping[str, Sequence[Cell]], report: Report) -> None:
        """Look up the models and tasks of the evaluation, by place, and report how many are known."""
        self._wanted = [cell for cells in wanted.values() for cell in cells]
        self.known = self._processes.first_decides(self._look)
        if not self.known:
            return
        whole = [
            name for name, cells in wanted.items() if cells and all(cell in self.known for cell in cells)
        ]
        count = f"{len(self.known)} of {len(self._wanted)} scores are there"
        kept = number_of(len(whole), "checkpoint")
        report(f"scores of {kept} are reused: {count}" if whole else f"scores measured before: {count}")

    @step("looking for scores of earlier")
    def _look(self) -> dict[Cell, Outcomes]:
        if self._keys is None:
            return {}
        found = {cell: self._kept.get(self._keys.key(*cell)) for cell in self._wanted}
        return {cell: outcomes for cell, outcomes in found.items() if outcomes is not None}

    def keep(self, model: str, task: str, outcomes: Sequence[Outcome]) -> Outcomes:
        """Return what was measured as it will come back, and keep it if the model's files are the same still.

        What was hashed at first may not be what was loaded later.
        """
        found = restored(stored(outcomes))
        if self._keys is not None and self._keys.is_current(model):
            self._kept.put(self._keys.key(model, task), found)
        return found

    def done(self) -> None:
        """Forget the merged model's answers: they are in the scores."""
        if self._keys is not None:
            made = [cell for cell in self._wanted if cell[0].partition(":")[0] not in self._made]
            self._kept.forget(self._keys.key(*cell) for cell in made)


class _Keys:
    """Digests under which answers are kept."""

    def __init__(
        self, recipe: Recipe, lock: Lock, merged: Path, described: Mapping[str, Mapping[str, Any]]
    ) -> None:
        assert recipe.evaluation is not None
        self._recipe, self._lock, self._spec, self._merged = recipe, lock, recipe.evaluation, merged
        self._fingerprints = {task: facts.get("fingerprint") for task, facts in described.items()}
        self._common = _common(recipe.evaluation)
        self._models: dict[str, Any] = {}
        self._states: dict[str, Any] = {}

    def key(self, model: str, task: str) -> str | None:
        """Return the digest of a model's answers on a task; None where they may not be kept."""
        if self._fingerprints.get(task) is None:
            return None
        name, _, kind = model.partition(":")
        identity = self._model(name)
        if identity is None or kind.endswith(GPTQ):  # what that answers depends on other examples too
            return None
        data = self._spec.data[task].model_dump(mode="json", exclude=_PLACES)
        parts = [identity, self._fingerprints[task], data, self._common, *([kind] if kind else [])]
        return digest(parts).removeprefix("sha256:")

    def _model(self, name: str) -> Any:
        if name not in self._models:
            is_source = name in self._lock.sources
            self._states[name] = self._state(name)  # first: a change while files are hashed counts too
            self._models[name] = self._source(name) if is_source else self._made(name)
        return self._models[name]

    def is_current(self, name: str) -> bool:
        """Say whether the files of a model are those that its key was made of."""
        name = name.partition(":")[0]
        before = self._states.get(name)
        return before is not None and self._state(name) == before

    def _state(self, name: str) -> Any:
        """Return the state of all files that a model's answers depend on; None where they cannot be read."""
        with contextlib.suppress(OSError, HubMagmaxError):
            if name not in self._lock.sources:
                return folder_state(self._merged)
            sources = self._lock.every_source
            return [state_of(sources[part], self._recipe.folder) for part in self._parts(name)]
        return None

    def _made(self, name: str) -> Any:
        """Return the state of the merged model's files, which changes with whatever is done to them."""
        files = self._states[name]
        if files is None:
            return None
        how = {"is_adapter": self._recipe.output.is_adapter, "lock": self._lock.digest}
        return [name, os.path.abspath(self._merged), files, how]  # noqa: PTH100

    def _source(self, name: str) -> Any:
        """Return what tells a checkpoint from all others, with what it is added to or named after."""
        names = self._parts(name)
        contents = {part: self._content(part) for part in names}
        if None in contents.values():
            return None
        facts = [{key: asdict(self._lock.every_source[part])[key] for key in _FACTS} for part in names]
        return [name, contents, facts, self._lock.tensors, self._lock.token_rows]

    def _parts(self, name: str) -> list[str]:
        """Return the base model, the adapters that come before a source in a sequence, and the source."""
        before = [*self._lock.tasks][: [*self._lock.sources].index(name)]
        in_sequence = self._lock.sources[name].adapter_config and self._lock.adapters == "sequence"
        below = own_base_name(name) if name in self._lock.bases else "base_model"
        return [*dict.fromkeys([below, *(before if in_sequence else []), name])]

    def _content(self, name: str) -> Any:
        with contextlib.suppress(OSError, HubMagmaxError):  # what loads it says what is wrong
            return identity_of(self._lock.every_source[name], self._recipe.folder)
        return None


def _common(spec: Evaluation) -> Any:
    plugin = EVALUATORS.plugin(spec.evaluator.name)
    how = spec.model_dump(mode="json", exclude=_ASIDE)
    return [how, asdict(plugin) if plugin else None, software_used()]
