"""Examples for preferences and evaluation, as `datasets` reads them."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from hub_magmax.checkpoints.missing_folders import taken_for_repository
from hub_magmax.errors import EvaluationError, HubMagmaxError, LockError
from hub_magmax.evaluation.data_keys import about_data
from hub_magmax.evaluation.evaluators import brings_data, evaluator_of
from hub_magmax.evaluation.evaluators.loading import without_bars
from hub_magmax.evaluation.evaluators.prompts import with_prompts
from hub_magmax.evaluation.hub_data import commit_of, load_from_hub
from hub_magmax.evaluation.image_columns import with_images
from hub_magmax.files import canonical_json, from_here, sha256_of
from hub_magmax.hub import is_offline, is_passing
from hub_magmax.recipe.lockfile import LOCK_NAME, Lock, read_lock
from hub_magmax.recipe.model_names import is_there
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.values import Data
from hub_magmax.text import step

if TYPE_CHECKING:
    from datasets import Dataset

#: Single files by ending, and the `datasets` reader for each.
READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}

#: Separators of the values in files of rows.
SEPARATORS = {".csv": ",", ".tsv": "\t"}


@step("pinning the data sets")
def pin_datasets(recipe: Recipe, known: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Return the commit that each data set on the Hub stands for now, by its name and revision.

    Local folders and files have no commits (`pin_local_data`), and offline nothing can be asked: these are
    left out.

    Args:
        recipe: Names the data sets.
        known: Commits that stay as they are.

    Raises:
        EvaluationError: If the Hub has no such data set, or does not show it.
    """
    pins: dict[str, str] = {}
    for spec in data_of(recipe):
        key = spec.pin_key
        if key in known:
            pins[key] = known[key]
        if key in pins or _is_local(spec, recipe.folder) or is_offline():
            continue
        with about_data(recipe, spec), taken_for_repository(spec.dataset, recipe.folder):
            pins[key] = commit_of(spec)
    return pins


@step("reading the data, for its sha256")
def pin_local_data(recipe: Recipe) -> dict[str, str]:
    """Return a digest of each local folder or file of examples that `recipe` names, by its name there.

    It is `sha256:` of a file's content, or `tree:` of the names and contents of a folder's files. All of
    them are read whole. What is not there is left out.

    Raises:
        EvaluationError: If a file cannot be read.
    """
    with about_data(recipe):
        return dict(_local_digests(data_of(recipe), recipe.folder))


@step("reading the data, for its sha256")
def check_local_data(specs: Iterable[Data], recipe: Recipe, locked: Mapping[str, str]) -> None:
    """Raise LockError at the first local data whose files are not those of which `locked` has the digest.

    Data that the lock does not name, or that is not there, is not looked at.

    Args:
        specs: The data that will be read.
        recipe: Names it.
        locked: From `pin_local_data`.
    """
    named = [part for spec in specs for part in spec.parts if part.dataset in locked]
    with about_data(recipe):
        for name, found in _local_digests(named, recipe.folder):
            if found != locked[name]:
                raise _changed(name, locked[name])


def _changed(name: str, locked: str) -> LockError:
    return LockError(
        "this data is no longer what was locked, so scores on it cannot be compared",
        where=name,
        expected=f"files with the digest {locked}",
        hint="Bring them back; or score a finished merge on the new data, as its lock then says "
        "(hub-magmax evaluate RECIPE --new-data); or write a new lock and merge into another folder.",
    )


def with_present_data(recipe: Recipe, locked: Lock) -> Lock:
    """Return the lock of a finished merge with the evaluation's data as it is now, and what that replaces.

    Raises:
        LockError: If the data decided the merge too.
        EvaluationError: If it cannot be read.
    """
    now, pins = _present(recipe)
    before = {**locked.local_data, **locked.datasets}
    present = {**before, **now, **pins}
    changed = {name: known for name, known in before.items() if known != present[name]}
    _refuse_decided(changed, recipe, locked)
    # The oldest digest stays, however often data is corrected; data may also be again what it was.
    replaced = {**changed, **locked.replaced_data}
    return replace(
        locked,
        local_data={**locked.local_data, **now},
        datasets={**locked.datasets, **pins},
        replaced_data={name: known for name, known in replaced.items() if known != present.get(name)},
    )


def _present(recipe: Recipe) -> tuple[dict[str, str], dict[str, str]]:
    """Return the digests of the evaluation's local data, and the commits of its data on the Hub."""
    specs = [part for spec in _evaluation_data(recipe) for part in spec.parts]
    now = dict(_local_digests(specs, recipe.folder))
    wanted = {spec.pin_key for spec in specs if spec.dataset not in now}
    return now, {key: commit for key, commit in pin_datasets(recipe).items() if key in wanted}


def _refuse_decided(changed: Iterable[str], recipe: Recipe, locked: Lock) -> None:
    fixed = {part.dataset for spec in _deciding_data(recipe, locked) for part in spec.parts}
    if decided := [name for name in changed if name in fixed or name.rpartition("@")[0] in fixed]:
        raise LockError(
            "this data decided the preference or the method too, so the model is not that of the new data",
            where=decided[0],
            hint="Merge into another folder, with a new lock.",
        )


def _deciding_data(recipe: Recipe, locked: Lock) -> list[Data]:
    """Return the data that a merged model depends on: of its preference, and of a comparison that chose."""
    found = [*recipe.preference.data] if recipe.preference is not None else []
    found += recipe.statistics.data.values() if recipe.statistics is not None else ()
    tuning = recipe.tuning_data
    return [*found, tuning] if locked.chosen and tuning is not None else found


def changed_local_data(recipe: Recipe, locked: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of local data that differs from its lock."""
    specs = [spec for spec in data_of(recipe) if spec.dataset in locked]
    return tuple(name for name, found in _local_digests(specs, recipe.folder) if found != locked[name])


def _local_digests(specs: Iterable[Data], folder: Path) -> Iterator[tuple[str, str]]:
    for name, path in {spec.dataset: _local_path(spec, folder) for spec in specs}.items():
        if is_there(path):
            try:
                yield name, _content_digest(path)
            except OSError as error:
                raise EvaluationError(
                    f"the data cannot be read ({error.strerror})", where=name, hint="Check its permissions."
                ) from error


def _content_digest(path: Path) -> str:
    """Return a digest of a file's content, or of the names and contents of all files in a folder."""
    if not path.is_dir():
        return f"sha256:{sha256_of(path)}"
    hasher = hashlib.sha256()
    for file in sorted(_files_below(path)):
        # Names as bytes: not every one is text.
        hasher.update(os.fsencode(file.relative_to(path)) + b"\0" + bytes.fromhex(sha256_of(file)))
    return f"tree:{hasher.hexdigest()}"


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield the files that `datasets` may read: not the hidden ones; links count, each folder once."""
    seen = {os.path.realpath(folder)}
    for place, folders, files in os.walk(folder, followlinks=True):
        below = {name: os.path.realpath(Path(place, name)) for name in folders if not name.startswith(".")}
        folders[:] = sorted(name for name, real in below.items() if real not in seen)
        seen.update(below.values())
        paths = (Path(place, name) for name in files if not name.startswith("."))
        yield from (path for path in paths if path.is_file())


def pinned(spec: Data, pins: Mapping[str, str]) -> Data:
    """Return `spec` with its revision replaced by the commit it was pinned to, if it was."""
    changes: dict[str, Any] = {}
    if commit := pins.get(spec.pin_key):
        changes["revision"] = commit
    if spec.few_shot and spec.shots and (commit := pins.get(spec.shots.pin_key)):
        changes["few_shot"] = spec.few_shot.model_copy(update={"revision": commit})
    return spec.model_copy(update=changes) if changes else spec


def with_pinned_data(recipe: Recipe, pins: Mapping[str, str]) -> Recipe:
    """Return a recipe whose preference takes its examples from the pinned commits."""
    if recipe.preference is None or not recipe.preference.is_estimated:
        return recipe
    spec = recipe.preference.spec
    changes: dict[str, Any] = {"target": pinned(spec.target, pins)}
    if hasattr(spec, "train"):
        changes["train"] = {task: pinned(data, pins) for task, data in spec.train.items()}
    kind = recipe.preference.kind
    preference = recipe.preference.model_copy(update={kind: spec.model_copy(update=changes)})
    return recipe.model_copy(update={"preference": preference})


def data_of(recipe: Recipe) -> list[Data]:
    """Return every data set that the recipe names, in order, those of solved examples included."""
    return [part for data in _named_data(recipe) for part in data.parts]


def _named_data(recipe: Recipe) -> list[Data]:
    found: list[Data] = []
    if recipe.preference is not None:
        found += recipe.preference.data
    if recipe.compare is not None:
        found += [data for data in (recipe.compare.tune, recipe.compare.report) if data is not None]
        for preference in recipe.compare.preferences.values():
            found += preference.data
    if recipe.statistics is not None:
        found += recipe.statistics.data.values()
    if recipe.routing is not None:
        found += recipe.routing.tasks.values()
    return found + _evaluation_data(recipe)


def _evaluation_data(recipe: Recipe) -> list[Data]:
    """Return the data of the evaluation; none of an evaluator that brings its own."""
    if recipe.evaluation is None or brings_data(evaluator_of(recipe.evaluation)):
        return []
    calibration = recipe.evaluation.calibration
    return [*recipe.evaluation.data.values(), *([calibration] if calibration else [])]


def local_file(spec: Data, folder: Path) -> Path | None:
    """Return the path of data in a single local file of a known kind, there or not; None of other data."""
    path = _local_path(spec, folder)
    return path if path.suffix in READERS and not path.is_dir() else None


def _is_local(spec: Data, folder: Path) -> bool:
    path = _local_path(spec, folder)
    return is_there(path) or path.suffix in READERS or spec.dataset.startswith((".", "/", "~"))


def _local_path(spec: Data, folder: Path) -> Path:
    return (folder / os.path.expanduser(spec.dataset)).absolute()  # noqa: PTH111  (it never raises)


def load_examples(spec: Data, folder: Path, *, labelled: bool = True) -> Dataset:
    """Return the examples that `spec` names; relative paths start at `folder`.

    Args:
        spec: Which examples.
        folder: Where relative paths start.
        labelled: Whether the label column has to be there.

    Raises:
        EvaluationError: If they cannot be loaded, are empty, or lack a named column.
        SourceError: If the Hub does not answer.
    """
    where = f"{spec.dataset}, split {spec.split}"
    _refuse_missing(spec, folder)
    try:
        with without_bars(), step(f"loading the examples of {where}"):
            examples = with_images(_load(spec, folder))
    except (MemoryError, HubMagmaxError):
        raise
    except Exception as error:  # datasets raises many kinds, most of them for a wrong name
        raise EvaluationError(
            f"the data cannot be loaded ({_reasons(error)})", where=where, hint=_way_out(error)
        ) from error
    named = ("input_column", "prompt_column", *(["label_column"] if labelled else []))
    for key in named:
        column = getattr(spec, key)
        if column is not None and column not in examples.column_names:
            raise EvaluationError(
                f"there is no column {column!r}",
                where=where,
                key=(key,),
                expected=f"one of {', '.join(examples.column_names)}",
                hint=f"Name one of them with {key}, beside the dataset.",
            )
    if len(examples) == 0:
        raise EvaluationError("the split is empty", where=where)
    return with_prompts(examples, spec, partial(load_examples, folder=folder, labelled=labelled))


def _reasons(error: BaseException) -> str:
    """Return an error with what caused it: `datasets` often says in the outermost only that it failed."""
    found = [error]
    while cause := found[-1].__cause__:
        found.append(cause)
    shown = found if len(found) < 3 else [found[0], found[-1]]
    return "; ".join(
        f"{type(e).__name__}: {str(e).strip().splitlines()[0][:300] if str(e).strip() else ''}" for e in shown
    )


def _refuse_missing(spec: Data, folder: Path) -> None:
    """Raise EvaluationError for a name that can only be a folder's or a file's, and is not there."""
    if _is_local(spec, folder) and not is_there(_local_path(spec, folder)):
        raise EvaluationError(
            "there is no such file or folder",
            where=f"{spec.dataset}, in {from_here(folder)}",
            expected="examples that the recipe names",
            hint="Relative paths start at the folder of the recipe. `canary` and `verify --rebuild` read the "
            "recipe that is stored with the model, and start here, or at --from FOLDER.",
        )


def _way_out(error: Exception) -> str:
    from datasets import config

    refused = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC)
    prepared = Path(config.HF_DATASETS_CACHE)
    if isinstance(error, OSError) and (
        error.errno in refused or Path(error.filename or "") in prepared.parents
    ):
        return (
            f"Data is prepared in {prepared}: name a folder that can be written and has room, as HF_HOME or "
            "HF_DATASETS_CACHE; `hub-magmax doctor` looks at each."
        )
    if isinstance(error, ConnectionError) or is_passing(error):
        return "Check the connection and HF_ENDPOINT, then run the same command again."
    return "Check the name, the split and the columns with datasets.load_dataset."


def _load(spec: Data, folder: Path) -> Dataset:
    from datasets import load_dataset

    path = _local_path(spec, folder)
    if path.is_file() and path.suffix in READERS:
        separator: dict[str, Any] = {"sep": SEPARATORS[path.suffix]} if path.suffix == ".tsv" else {}
        split = spec.split.replace(
            "test", "train", 1
        )  # a single file is one split, which datasets calls train
        return load_dataset(READERS[path.suffix], data_files=str(path), split=split, **separator)
    if path.is_dir():
        return load_dataset(str(path), spec.config, split=spec.split)
    return load_from_hub(spec)


@step("reading the examples, for their sha256")
def fingerprint(examples: Dataset, columns: Sequence[str]) -> str:
    """Return a digest of the columns' content: the same for the same examples, wherever they are stored.

    Images count by their pixels, so that a copy in another format without loss is the same data.
    """
    hasher = hashlib.sha256(canonical_json(list(columns)).encode())
    for example in examples.select_columns(list(columns)):
        for column in columns:
            for part in content_parts(example[column]):
                hasher.update(len(part).to_bytes(8, "little") + part)
    return "sha256:" + hasher.hexdigest()


def content_parts(value: Any) -> tuple[bytes, ...]:
    """Return a value as bytes; an image as its mode and size, and its pixels."""
    if hasattr(value, "tobytes") and hasattr(value, "mode"):
        return f"{value.mode} {value.size}".encode(), value.tobytes()
    return (canonical_json(value).encode(),)


def with_kept_data(locked: Lock, output: Path) -> Lock:
    """Return `locked` with the data of the lock that a finished merge keeps: its scores are of that."""
    with suppress(LockError):
        kept = read_lock(output / LOCK_NAME)
        if kept.digest == locked.digest:
            return replace(
                locked,
                datasets={**locked.datasets, **kept.datasets},
                local_data={**locked.local_data, **kept.local_data},
            )
    return locked
