"""Family of checkpoints in a folder: parts are made in order, and finished parts kept."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import datasets
import torch
import transformers

from hub_magmax.errors import DistributedError, OutputError
from hub_magmax.files import os_errors, write_text
from hub_magmax.processes import find_processes
from hub_magmax.quickstart.digits import divide, load_examples, make_data, prepare
from hub_magmax.quickstart.settings import DEFAULTS, Settings
from hub_magmax.quickstart.training import make_base, make_task
from hub_magmax.text import Report, step
from hub_magmax.training import loop

SETTINGS_NAME = "family.json"
_FORMAT = 1  # of the folder; counts up when the same settings would no longer give the same bytes


@dataclass(frozen=True)
class DigitsFamily:
    """Paths of a finished benchmark.

    Attributes:
        folder: Holds all of it.
        base_model: Checkpoint that the first task was learned from.
        tasks: Checkpoint of each task, in the order they were learned.
        classes: The digits of each task, in the same order.
        data: Data set folder with a configuration `all` and one for each task, which can also be loaded
            as folders of their own: splits `train` and `test`, columns `image` and `label`.
    """

    folder: Path
    base_model: Path
    tasks: Mapping[str, Path] = field(hash=False)
    classes: Mapping[str, tuple[int, ...]] = field(hash=False)
    data: Path


def make_family(
    folder: Path,
    *,
    num_tasks: int = 5,
    seed: int = 0,
    settings: Settings = DEFAULTS,
    report: Report = lambda line: None,
) -> DigitsFamily:
    """Make the data, the base model and the tasks' checkpoints in `folder`, and say where they are.

    Parts that an earlier call finished are used again, so an interrupted call goes on where it stopped
    and ends with the same bytes. Trains on the CPU, with one thread.

    Args:
        folder: Created if it is not there.
        num_tasks: 1, 2, 5 or 10; the digits are divided evenly, in ascending order.
        seed: Of the split, the initial weights and the order of the examples.
        settings: How to train.
        report: Called with a line of text as each part is finished.

    Raises:
        RecipeError: If ten digits cannot be divided evenly into `num_tasks`.
        OutputError: If `folder` holds something else, or cannot be written.
        CheckpointError: If a checkpoint of an earlier call is damaged.
        MissingDependencyError: If scikit-learn is not installed.
        DistributedError: If several processes were launched.
    """
    classes = divide(num_tasks)
    if find_processes().count > 1:
        raise DistributedError(
            "the digits are trained by one process",
            where="WORLD_SIZE",
            hint="Make them first, without a launcher; the merge may use many processes.",
        )
    lesson = prepare(load_examples(), classes, settings, seed)
    _claim(folder, {"format": _FORMAT, "num_tasks": num_tasks, "seed": seed, "settings": asdict(settings)})
    family = DigitsFamily(
        folder=folder,
        base_model=folder / "checkpoints" / "base",
        tasks={task: folder / "checkpoints" / task for task in classes},
        classes=classes,
        data=folder / "data",
    )
    with undisturbed():
        _once(family.data, partial(make_data, lesson), "writing examples", report)
        _once(family.base_model, partial(make_base, lesson), "training, half of all the time", report)
        previous = family.base_model
        for task, checkpoint in family.tasks.items():
            doing = f"training, from {previous.name}"
            _once(checkpoint, partial(make_task, lesson, task, previous), doing, report)
            previous = checkpoint
    return family


def _claim(folder: Path, made_with: Mapping[str, object]) -> None:
    """Store the settings in `folder`, or check that they are the ones it was begun with."""
    path = folder / SETTINGS_NAME
    text = json.dumps(made_with, indent=2) + "\n"
    if path.is_file():
        found = path.read_text(encoding="utf-8", errors="replace")
        if found != text:
            raise OutputError(
                f"the folder was made with other settings ({_differing_line(found, text)})",
                where=str(path),
                hint="Choose another folder, or delete this one.",
            )
        return
    for name in ("checkpoints", "data"):
        if (folder / name).exists():
            raise OutputError(
                f"the folder already has something called {name}, and no {SETTINGS_NAME}",
                where=str(folder),
                expected="a new folder, or one that an earlier call made",
                hint="Choose another folder.",
            )
    with os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def _differing_line(found: str, wanted: str) -> str:
    """Say where two files of settings first differ."""
    for old, new in zip(found.splitlines(), wanted.splitlines(), strict=False):
        if old != new:
            return f"{old.strip(' ,')} there, {new.strip(' ,')} now"
    return "one of them is cut off"


def _once(target: Path, make: Callable[[Path], str], doing: str, report: Report) -> None:
    """Let `make` fill a folder that becomes `target` when it is complete, unless that is there already."""
    if target.exists():
        report(f"{target.name}: already there")
        return
    started = time.perf_counter()
    unfinished = target.with_name(target.name + ".partial")
    with os_errors(target), step(f"{target.name}: {doing}", report):
        if unfinished.exists():
            shutil.rmtree(unfinished)
        unfinished.mkdir(parents=True)
        summary = make(unfinished)
        unfinished.rename(target)
    report(f"{target.name}: {summary} ({time.perf_counter() - started:.1f} s)")


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Compute with one thread, without progress bars, and leave the process as it was."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the number of threads decides in which order sums are rounded
    try:
        with loop.undisturbed(gpus=()), _no_progress_bars():
            yield
    finally:
        torch.set_num_threads(num_threads)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silence the bars of saving and loading, each of which takes milliseconds here."""
    logging = transformers.utils.logging
    restore: list[Callable[[], None]] = []
    if logging.is_progress_bar_enabled():
        logging.disable_progress_bar()
        restore.append(logging.enable_progress_bar)
    if not datasets.are_progress_bars_disabled():
        datasets.disable_progress_bars()
        restore.append(datasets.enable_progress_bars)
    try:
        yield
    finally:
        for enable in restore:
            enable()
