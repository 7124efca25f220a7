"""Learn tasks one after the other, merge them for targets that mix a few, and measure every method.

    python -m benchmarks.continual                            the digits: five seeds, 5 and 10 tasks
    python -m benchmarks.continual --data definitions --encoder MINILM --source data.noun
    accelerate launch -m benchmarks.continual --data cifar100 --tasks 5 20 50
    accelerate launch -m benchmarks.continual --data language --sequence four --adapters
    python -m benchmarks.continual --checkpoints mine.yaml --output mine
    python -m benchmarks.continual --render                   the page again, from the stored results

What is finished is kept, so that an interrupted command goes on where it stopped. Every command on the data
of this repository writes docs/experiments.md anew, from all stored results; data and checkpoints of your own
(--dataset, --checkpoints, a file for --sequence), and other settings, have results and page in --output.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from benchmarks.continual.own import own_family
from benchmarks.continual.packaged import PROTOCOL, packaged_family
from benchmarks.continual.pages import PAGE, RESULTS, render, store, stored
from benchmarks.continual.protocol import Protocol
from benchmarks.continual.results import commit, measure
from benchmarks.continual.sources import Family, digits
from benchmarks.continual.workers import Job, Progress, measure_job
from hub_magmax.methods import method_names

#: Examples in a target, where there are enough of them.
LARGE = 1000

#: With adapters, which start from nothing; a choice of ours.
ADAPTER_LEARNING_RATE = 1e-3

#: Numbers of tasks of the data that need a minute and no network.
NUM_TASKS = {"digits": (5, 10), "definitions": (5,), "sentiment": (4,), "languages": (6,)}


def all_small(options: argparse.Namespace) -> Iterator[str]:
    """Yield the names of the families of digits or packaged texts as they are stored."""
    jobs = [*_jobs(options)]
    if options.workers == 1:
        yield from map(measure_job, jobs)
        return
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        yield from pool.map(measure_job, jobs)


def _jobs(options: argparse.Namespace) -> Iterator[Job]:
    at, results = commit(), results_of(options)[0]
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for num_tasks in options.tasks or NUM_TASKS[options.data]:
            protocol, folder = Protocol(), options.folder
            make: Callable[..., Family] = partial(digits, folder, num_tasks, seed)
            if options.data != "digits":
                protocol, folder = PROTOCOL, options.folder / options.data
                what = options.data, options.source, options.encoder, folder, num_tasks, seed
                make = partial(packaged_family, *what)
            flags = f"--data {options.data}"
            flags += f" --first-seed {options.first_seed}" if options.first_seed else ""
            flags += f" --methods {' '.join(options.methods)}" if options.methods else ""
            only = tuple(options.methods or ())
            yield Job(options.data, flags, make, protocol, folder / "scores", results, at, only)


def all_learned(options: argparse.Namespace) -> Iterator[str]:
    """Yield the names of the families of images or texts as they are stored.

    All processes learn all families first; then the main one measures, and the others are done.
    """
    from accelerate import PartialState

    at, report = commit(), Progress()
    name, flags = named(options)
    protocol = Protocol(largest=LARGE)
    families = list(_families(options, options.folder / name, report))
    for family in families if PartialState().is_main_process else ():
        results, scores = results_of(options)[0], options.folder / name / "scores"
        before = stored(name, family.name, results)
        result = measure(family, protocol, scores, at=at, stored=before, report=report)
        store(name, flags, result, results)
        yield family.name


# Complex, and flat: one condition for each option that is stated.
def named(options: argparse.Namespace) -> tuple[str, str]:
    """Return what results are stored under, and the options that asked for them, without paths."""
    if options.checkpoints:
        files = [path.name for path in options.checkpoints]
        return f"own-{_slug(Path(files[0]).stem)}", " ".join(["--checkpoints", *files])
    flags = [f"--data {options.data}"]
    if options.data == "language":
        name = f"language-{_slug(Path(options.sequence).stem)}{'-adapters' if options.adapters else ''}"
        flags += [f"--model {_shown(options.model or _T5)}", f"--sequence {_shown(options.sequence)}"]
    else:
        name = f"own-{_slug(Path(options.dataset).name)}" if options.dataset else options.data
        flags.append(f"--model {_shown(options.model or _CLIP)}")
        flags += [f"--dataset {_shown(options.dataset)}"] if options.dataset else []
    flags += ["--adapters"] if options.adapters else []
    learning = ("epochs", "batch_size", "learning_rate")
    given = {key: getattr(options, key) for key in learning if getattr(options, key) is not None}
    flags += [f"--{key.replace('_', '-')} {value:g}" for key, value in given.items()]
    return name, " ".join(flags)


def _shown(value: str) -> str:
    """Return a value of an option for the page: of a path only its last part."""
    is_path = value.startswith((".", "/", "~")) or Path(value).expanduser().exists()
    return Path(value).name if is_path else value


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "data"


def results_of(options: argparse.Namespace) -> tuple[Path, Path]:
    """Return the folder of results, and the page: this repository's for its own data and settings only."""
    changed = (getattr(options, key) for key in _CHANGES)
    is_own = any(value is not None for value in changed) or not _is_shipped(options.sequence)
    if options.output is None and not is_own:
        return RESULTS, PAGE
    folder = options.output or options.folder / "results"
    return folder, folder / PAGE.name


def _is_shipped(sequence: str) -> bool:
    from benchmarks.continual.sequences import LANGUAGE

    return (LANGUAGE / f"{sequence}.yaml").is_file()


#: Options whose results are not those of this repository's page.
_CHANGES = ("checkpoints", "dataset", "model", "epochs", "batch_size", "learning_rate")

_CLIP, _T5 = "openai/clip-vit-base-patch16", "google-t5/t5-large"


# Complex because each kind of data has options of its own.
def _families(options: argparse.Namespace, folder: Path, report: Progress) -> Iterator[Family]:
    from benchmarks.continual.learning import Course, text_learner
    from benchmarks.continual.sequences import IMAGES, LANGUAGE, image_family, text_family
    from hub_magmax.checkpoints.locations import ModelPlace

    if options.checkpoints:
        yield from (own_family(path, seed) for seed, path in enumerate(options.checkpoints))
        return
    given = {
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
    }
    course = replace(
        Course(learning_rate=ADAPTER_LEARNING_RATE if options.adapters else Course.learning_rate),
        **{name: value for name, value in given.items() if value is not None},
    )
    for seed in range(options.seeds):
        if options.data == "language":
            model, learner = ModelPlace(options.model or _T5), text_learner(8 if options.adapters else 0)
            shipped = LANGUAGE / f"{options.sequence}.yaml"
            sequence = shipped if shipped.is_file() else Path(options.sequence)
            yield text_family(
                sequence, folder, seed, model=model, learner=learner, course=course, report=report
            )
            continue
        images, model = IMAGES[options.data], ModelPlace(options.model or _CLIP)
        images = images.at(options.dataset) if options.dataset else images
        for num_tasks in options.tasks or (5, 20, 50):
            yield image_family(images, folder, num_tasks, seed, model=model, course=course, report=report)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.continual",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = parser.add_argument
    add("--data", choices=(*NUM_TASKS, "cifar100", "imagenet-r", "language"), default="digits")
    add("--folder", type=Path, default=Path("experiments"), help="checkpoints and outcomes")
    add("--tasks", type=int, nargs="+", help="numbers of tasks, by default 5 10, or 5 20 50 for images")
    add("--seeds", type=int, default=5)
    add("--first-seed", type=int, default=0)
    add(
        "--workers",
        type=int,
        default=os.cpu_count(),
        help="digits and packaged texts: processes of one thread",
    )
    add("--methods", nargs="+", help="digits and packaged texts: only these now, react for the correction")
    add("--encoder", type=Path, help="packaged texts: all-MiniLM-L6-v2")
    add(
        "--source",
        type=Path,
        help="definitions: data.noun; sentiment: hutto_ICWSM_2014; languages: apt's lists",
    )
    add("--model", help=f"by default {_CLIP} or {_T5}")
    add("--dataset", help="images from another place, such as a folder, with the same columns")
    add("--sequence", default="four", help="language: four, fifteen, or a YAML file like those")
    add("--adapters", action="store_true", help="language: adapters of rank 8 on queries and values")
    add("--epochs", type=int)
    add("--batch-size", type=int)
    add("--learning-rate", type=float)
    add("--checkpoints", type=Path, nargs="+", metavar="RECIPE", help="your own, one recipe for each seed")
    add("--output", type=Path, help="folder of results and page, instead of this repository's")
    add("--render", action="store_true", help="write the page from the stored results alone")
    options = parser.parse_args(words)
    if options.data in NUM_TASKS.keys() - {"digits"} and not (options.encoder and options.source):
        parser.error(f"--data {options.data} needs --encoder and --source")
    if unknown := {*(options.methods or ())} - {*method_names(), "react"}:
        parser.error(f"--methods: there is no {', '.join(sorted(unknown))}")
    return options


def main() -> None:
    options = parse()
    if not options.render:
        is_small = options.data in NUM_TASKS and not options.checkpoints
        for name in all_small(options) if is_small else all_learned(options):
            print(f"{name}: stored", flush=True)
    if os.environ.get("RANK", "0") == "0":
        results, page = results_of(options)
        render(results, page)
        print(f"wrote {page}", flush=True)


if __name__ == "__main__":
    main()
