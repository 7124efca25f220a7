"""Learn tasks one after the other, merge them for targets that mix a few, and measure every method.

    python -m benchmarks.continual                            the digits: five seeds, 5 and 10 tasks
    accelerate launch -m benchmarks.continual --data cifar100 --tasks 5 20 50
    accelerate launch -m benchmarks.continual --data language --sequence four --adapters
    python -m benchmarks.continual --render                   the page again, from the stored results

What is finished is kept, so that an interrupted command goes on where it stopped. Every command writes
docs/experiments.md anew, from all stored results.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from benchmarks.continual.pages import render, store
from benchmarks.continual.protocol import Protocol
from benchmarks.continual.results import commit, measure
from benchmarks.continual.sources import Family
from benchmarks.continual.workers import Progress, measure_digits

#: Examples in a target, where there are enough of them.
LARGE = 1000

#: With adapters, which start from nothing; a choice of ours.
ADAPTER_LEARNING_RATE = 1e-3


def all_digits(options: argparse.Namespace) -> Iterator[str]:
    """Yield the names of the families of digits as they are stored."""
    at = commit()
    jobs = [
        (options.folder, num_tasks, seed, at)
        for seed in range(options.seeds)
        for num_tasks in options.tasks or (5, 10)
    ]
    if options.workers == 1:
        yield from (measure_digits(*job) for job in jobs)
        return
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        yield from pool.map(measure_digits, *zip(*jobs, strict=True))


def all_learned(options: argparse.Namespace) -> Iterator[str]:
    """Yield the names of the families of images or texts as they are stored.

    All processes learn all families first; then the main one measures, and the others are done.
    """
    from accelerate import PartialState

    at, report = commit(), Progress()
    name, flags = _named(options)
    protocol = Protocol(largest=LARGE)
    families = list(_families(options, options.folder / name, report))
    for family in families if PartialState().is_main_process else ():
        result = measure(family, protocol, options.folder / name / "scores", at=at, report=report)
        store(name, flags, result)
        yield family.name


def _named(options: argparse.Namespace) -> tuple[str, str]:
    """Return what results are stored under, and the options that asked for them."""
    if options.data != "language":
        return options.data, f"--data {options.data} --model {options.model or _CLIP}"
    kind = "-adapters" if options.adapters else ""
    flag = " --adapters" if options.adapters else ""
    model = options.model or _T5
    sequence = Path(options.sequence).stem
    return f"language-{sequence}{kind}", f"--data language --model {model} --sequence {sequence}{flag}"


_CLIP, _T5 = "openai/clip-vit-base-patch16", "google-t5/t5-large"


# Complex because each kind of data has options of its own.
def _families(options: argparse.Namespace, folder: Path, report: Progress) -> Iterator[Family]:
    from benchmarks.continual.learning import Course, TextLearner
    from benchmarks.continual.sequences import IMAGES, LANGUAGE, image_family, text_family
    from hub_magmax.checkpoints.locations import ModelPlace

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
            model, learner = ModelPlace(options.model or _T5), TextLearner(rank=8 if options.adapters else 0)
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
    add("--data", choices=("digits", "cifar100", "imagenet-r", "language"), default="digits")
    add("--folder", type=Path, default=Path("experiments"), help="checkpoints and outcomes")
    add("--tasks", type=int, nargs="+", help="numbers of tasks, by default 5 10, or 5 20 50 for images")
    add("--seeds", type=int, default=5)
    add("--workers", type=int, default=os.cpu_count(), help="digits: processes of one thread each")
    add("--model", help=f"by default {_CLIP} or {_T5}")
    add("--dataset", help="images from another place, such as a folder, with the same columns")
    add("--sequence", default="four", help="language: four, fifteen, or a YAML file like those")
    add("--adapters", action="store_true", help="language: adapters of rank 8 on queries and values")
    add("--epochs", type=int)
    add("--batch-size", type=int)
    add("--learning-rate", type=float)
    add("--render", action="store_true", help="write the page from the stored results alone")
    return parser.parse_args(words)


def main() -> None:
    options = parse()
    if not options.render:
        for name in all_digits(options) if options.data == "digits" else all_learned(options):
            print(f"{name}: stored", flush=True)
    if os.environ.get("RANK", "0") == "0":
        render()


if __name__ == "__main__":
    main()
