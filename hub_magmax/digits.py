"""The digits benchmark: a base model and the checkpoints of tasks learned one after the other.

Everything comes from scikit-learn's 1,797 handwritten digits of 8×8 pixels, so any machine can make it.
A small vision transformer learns which way up a digit is, and a little about which digit it is: the
base model. Then it learns the tasks, a few digits each, every task from the checkpoint before it, with
a frozen orthonormal head over all ten classes that all checkpoints share.

The same settings give the same bytes, whatever the number of threads and however often it was
interrupted; another processor or another version of PyTorch may round differently.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import datasets
import torch
import transformers
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification, get_cosine_schedule_with_warmup

from hub_magmax.distributed import find_processes
from hub_magmax.errors import (
    CheckpointError,
    DistributedError,
    MissingDependencyError,
    OutputError,
    RecipeError,
)
from hub_magmax.io.writer import os_errors, write_text

NUM_CLASSES = 10
SETTINGS_NAME = "family.json"

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_NAMES = tuple(str(digit) for digit in range(NUM_CLASSES))
_FORMAT = 1  # of the folder; counts up when the same settings would no longer give the same bytes

Report = Callable[[str], None]


@dataclass(frozen=True)
class Training:
    """One training run: AdamW, ten per cent warm-up, cosine to zero, gradient norm at most 1.

    Attributes:
        epochs: Passes over the examples.
        learning_rate: At its peak.
        batch_size: Examples in a step; the last step of an epoch may have fewer.
        weight_decay: AdamW's.
        label_smoothing: Share of a target that is spread over all classes. With none, a task of few
            classes drives the others so far away that MAGMAX falls below the base model.
    """

    epochs: int
    learning_rate: float
    batch_size: int
    weight_decay: float = 0.01
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class Settings:
    """Everything that shapes the checkpoints, besides the number of tasks and the seed.

    Attributes:
        hidden_size: Width of the transformer.
        num_layers: Its depth.
        head_scale: Length of each class's vector in the frozen head.
        num_supervised: Examples per digit that only the base model's supervised training sees.
        pretext: Which of four rotations; an epoch has every image four times.
        supervised: All ten digits, few examples.
        task: The digits of one task.
    """

    hidden_size: int = 96
    num_layers: int = 3
    head_scale: float = 4.0
    num_supervised: int = 20
    pretext: Training = Training(epochs=5, learning_rate=1e-3, batch_size=64)
    supervised: Training = Training(epochs=9, learning_rate=5e-4, batch_size=64)
    task: Training = Training(epochs=16, learning_rate=8e-5, batch_size=32, label_smoothing=0.05)


@dataclass(frozen=True)
class DigitsFamily:
    """Where the parts of a finished benchmark are.

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


@dataclass(frozen=True)
class _Examples:
    """Grey values from 0 to 255, and the digits that they show."""

    pixels: UInt8[Tensor, "examples 8 8"]
    labels: Int64[Tensor, " examples"]

    def at(self, indices: Tensor) -> _Examples:
        """Return the examples that indices or a mask choose."""
        return _Examples(self.pixels[indices], self.labels[indices])

    def of(self, digits: tuple[int, ...]) -> _Examples:
        """Return the examples of some digits, in the same order."""
        return self.at(torch.isin(self.labels, torch.tensor(digits)))

    @property
    def images(self) -> Float[Tensor, "examples 1 8 8"]:
        """Return what the image processor beside each checkpoint makes of them: -1 to 1."""
        return (self.pixels.unsqueeze(1).float() / 255 - 0.5) / 0.5


@dataclass(frozen=True)
class _Lesson:
    """What every part of one family is made from."""

    settings: Settings
    seed: int
    classes: Mapping[str, tuple[int, ...]]
    test: _Examples
    pretraining: _Examples
    train: _Examples


def make_family(
    folder: Path,
    *,
    num_tasks: int = 5,
    seed: int = 0,
    settings: Settings = Settings(),
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
    classes = _divide(num_tasks)
    if find_processes().count > 1:
        raise DistributedError(
            "the digits are trained by one process",
            where="WORLD_SIZE",
            hint="Make them first, without a launcher; the merge may use many processes.",
        )
    lesson = _prepare(_load_digits(), classes, settings, seed)
    _claim(folder, {"format": _FORMAT, "num_tasks": num_tasks, "seed": seed, "settings": asdict(settings)})
    family = DigitsFamily(
        folder=folder,
        base_model=folder / "checkpoints" / "base",
        tasks={task: folder / "checkpoints" / task for task in classes},
        classes=classes,
        data=folder / "data",
    )
    with _undisturbed():
        _once(family.data, partial(_make_data, lesson), report)
        _once(family.base_model, partial(_make_base, lesson), report)
        previous = family.base_model
        for task, checkpoint in family.tasks.items():
            _once(checkpoint, partial(_make_task, lesson, task, previous), report)
            previous = checkpoint
    return family


def _seed_of(seed: int, purpose: str) -> int:
    """Derive an independent seed, so that a resumed call draws what an uninterrupted one drew."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:7], "little")


def _generator(seed: int, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(_seed_of(seed, purpose))


def _divide(num_tasks: int) -> dict[str, tuple[int, ...]]:
    """Return the digits of each task, by a name such as `two-three`."""
    if num_tasks < 1 or NUM_CLASSES % num_tasks:
        raise RecipeError(
            f"ten digits cannot be divided into {num_tasks} tasks of equal size",
            where="num_tasks",
            expected="1, 2, 5 or 10",
        )
    size = NUM_CLASSES // num_tasks
    groups = (tuple(range(start, start + size)) for start in range(0, NUM_CLASSES, size))
    return {"-".join(_WORDS[digit] for digit in group): group for group in groups}


def _load_digits() -> _Examples:
    """Return scikit-learn's digits."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError(
            "scikit-learn, which brings the handwritten digits, is not installed",
            hint='Install it with: pip install "hub-magmax[quickstart]"',
        ) from error
    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images) * (255 / 16)  # stored as whole numbers from 0 to 16
    return _Examples(pixels.round().to(torch.uint8), torch.from_numpy(bunch.target).to(torch.int64))


def _prepare(
    digits: _Examples, classes: Mapping[str, tuple[int, ...]], settings: Settings, seed: int
) -> _Lesson:
    """Split the examples: three in ten of each digit to test, a few for the base model, the rest to train."""
    generator = _generator(seed, "split")
    parts: tuple[list[Tensor], ...] = ([], [], [])
    for digit in range(NUM_CLASSES):
        indices = torch.nonzero(digits.labels == digit).flatten()
        indices = indices[torch.randperm(len(indices), generator=generator)]
        num_test = 3 * len(indices) // 10
        cuts = (num_test, num_test + settings.num_supervised)
        for part, chosen in zip(parts, torch.tensor_split(indices, cuts), strict=True):
            part.append(chosen)
    joined = [torch.cat(part) for part in parts]
    # Mixed, so that the first hundred examples of a file are of all digits.
    mixed = [part[torch.randperm(len(part), generator=generator)] for part in joined]
    test, pretraining, train = (digits.at(part) for part in mixed)
    return _Lesson(settings, seed, classes, test, pretraining, train)


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


def _once(target: Path, make: Callable[[Path], str], report: Report) -> None:
    """Let `make` fill a folder that becomes `target` when it is complete, unless that is there already."""
    if target.exists():
        report(f"{target.name}: already there")
        return
    started = time.perf_counter()
    unfinished = target.with_name(target.name + ".partial")
    with os_errors(target):
        if unfinished.exists():
            shutil.rmtree(unfinished)
        unfinished.mkdir(parents=True)
        summary = make(unfinished)
        unfinished.rename(target)
    report(f"{target.name}: {summary} ({time.perf_counter() - started:.1f} s)")


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Compute with one thread, without progress bars, and leave the process as it was."""
    num_threads = torch.get_num_threads()
    states = [(kind, dict(kind._shared_state)) for kind in (PartialState, AcceleratorState, GradientState)]
    torch.set_num_threads(1)  # the number of threads decides in which order sums are rounded
    try:
        with torch.random.fork_rng(devices=[]), _no_progress_bars():
            yield
    finally:
        torch.set_num_threads(num_threads)
        for kind, state in states:  # an Accelerator would otherwise keep the process on the CPU
            kind._shared_state.clear()
            kind._shared_state.update(state)


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


def _make_data(lesson: _Lesson, folder: Path) -> str:
    """Write a data set with the configurations `all`, `pretraining` and one for each task."""
    files = {"all/train": lesson.train, "all/test": lesson.test, "pretraining/train": lesson.pretraining}
    for task, digits in lesson.classes.items():
        files |= {f"{task}/train": lesson.train.of(digits), f"{task}/test": lesson.test.of(digits)}
    label = datasets.ClassLabel(names=list(_NAMES))
    features = datasets.Features({"image": datasets.Image(), "label": label})
    for name, examples in files.items():
        path = folder / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        images = [Image.fromarray(pixels.numpy()) for pixels in examples.pixels]
        columns = {"image": images, "label": examples.labels.tolist()}
        datasets.Dataset.from_dict(columns, features).to_parquet(path)
    (folder / "README.md").write_text(_data_card(tuple(files)), encoding="utf-8")
    return f"{len(lesson.train.labels)} images to learn from, {len(lesson.test.labels)} to test with"


def _data_card(files: tuple[str, ...]) -> str:
    """Return the README by which `datasets` finds the configurations; `all` is the default one."""
    configs: dict[str, list[dict[str, str]]] = {}
    for name in files:
        config, split = name.split("/")
        configs.setdefault(config, []).append({"split": split, "path": f"{name}.parquet"})
    named = [{"config_name": config, "data_files": splits} for config, splits in configs.items()]
    header = {
        "license": "cc-by-4.0",
        "task_categories": ["image-classification"],
        "configs": [named[0] | {"default": True}, *named[1:]],
    }
    return f"""---
{yaml.safe_dump(header, sort_keys=False)}---

# Handwritten digits, by task

{_SOURCE}
`all` has every digit, `pretraining` the few examples that only the base model learned from, and each
other configuration the digits of one task.
"""


def _make_base(lesson: _Lesson, folder: Path) -> str:
    """Train from random weights: first the rotation of all images, then the digits of a few."""
    settings = lesson.settings
    torch.manual_seed(_seed_of(lesson.seed, "weights"))
    model = _new_model(settings)
    seen = torch.cat([lesson.pretraining.images, lesson.train.images])
    rotated = torch.cat([torch.rot90(seen, turns, (2, 3)) for turns in range(4)])
    turns = torch.arange(4).repeat_interleave(len(seen))
    _fit(
        _Rotations(model.vit, settings.hidden_size),
        rotated,
        turns,
        settings.pretext,
        _generator(lesson.seed, "pretext"),
    )
    few = lesson.pretraining
    _fit(_Digits(model), few.images, few.labels, settings.supervised, _generator(lesson.seed, "supervised"))
    _save(
        model, folder, "the base model", "which way up digits are, and a little about which digits they are"
    )
    return f"accuracy over all ten digits {_accuracy(model, lesson.test):.2f}"


def _make_task(lesson: _Lesson, task: str, previous: Path, folder: Path) -> str:
    """Learn one task from the checkpoint before it."""
    model = _load(previous)
    digits = lesson.classes[task]
    own = lesson.train.of(digits)
    _fit(
        _Digits(model), own.images, own.labels, lesson.settings.task, _generator(lesson.seed, f"task {task}")
    )
    shown = ", ".join(_NAMES[digit] for digit in digits)
    _save(model, folder, f"`{task}`", f"the digits {shown}, continuing from `{previous.name}`")
    return f"accuracy on its own digits {_accuracy(model, lesson.test.of(digits)):.2f}"


class _Digits(nn.Module):
    """Images to the logits of the ten digits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Float[Tensor, "examples 1 8 8"]) -> Float[Tensor, "examples 10"]:
        logits: Tensor = self.model(pixel_values=images).logits
        return logits


class _Rotations(nn.Module):
    """Images to the logits of four rotations. The head is thrown away afterwards."""

    def __init__(self, transformer: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.transformer = transformer
        self.head = nn.Linear(hidden_size, 4)

    def forward(self, images: Float[Tensor, "examples 1 8 8"]) -> Float[Tensor, "examples 4"]:
        logits: Tensor = self.head(self.transformer(pixel_values=images).last_hidden_state[:, 0])
        return logits


def _new_model(settings: Settings) -> ViTForImageClassification:
    config = ViTConfig(
        image_size=8,
        num_channels=1,
        patch_size=2,
        hidden_size=settings.hidden_size,
        intermediate_size=2 * settings.hidden_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=4,
        id2label=dict(enumerate(_NAMES)),
        label2id={name: digit for digit, name in enumerate(_NAMES)},
    )
    model = ViTForImageClassification(config)
    orthonormal = torch.linalg.qr(torch.randn(settings.hidden_size, NUM_CLASSES)).Q.T
    head = {"weight": orthonormal * settings.head_scale, "bias": torch.zeros(NUM_CLASSES)}
    model.classifier.load_state_dict(head)
    model.classifier.requires_grad_(False)
    return model


def _load(folder: Path) -> ViTForImageClassification:
    """Return the model of an earlier step, its head frozen."""
    try:
        model = ViTForImageClassification.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint cannot be loaded ({str(error).strip().splitlines()[0]})",
            where=str(folder),
            hint="Delete it and the checkpoints learned after it, and start again.",
        ) from error
    model.classifier.requires_grad_(False)
    return model


def _fit(
    network: nn.Module,
    images: Float[Tensor, "examples 1 8 8"],
    labels: Int64[Tensor, " examples"],
    training: Training,
    order: torch.Generator,
) -> None:
    """Train the parameters of `network` that are not frozen, in place."""
    # device_placement=False: the tensors stay on the CPU even where accelerate has settled on a GPU.
    accelerator = Accelerator(cpu=True, device_placement=False, mixed_precision="no")
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    num_steps = training.epochs * math.ceil(len(labels) / training.batch_size)
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=training.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_steps // 10, num_steps)
    network, optimizer, schedule = accelerator.prepare(network, optimizer, schedule)
    network.train()
    for _ in range(training.epochs):
        for batch in torch.split(torch.randperm(len(labels), generator=order), training.batch_size):
            loss = cross_entropy(
                network(images[batch]), labels[batch], label_smoothing=training.label_smoothing
            )
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()


@torch.no_grad()
def _accuracy(model: nn.Module, examples: _Examples) -> float:
    """Return the share of examples whose class has the largest of all ten logits."""
    predicted = _Digits(model).eval()(examples.images).argmax(dim=1)
    return float((predicted == examples.labels).double().mean())


def _save(model: ViTForImageClassification, folder: Path, title: str, learned: str) -> None:
    """Write a checkpoint as `from_pretrained` reads it, with its image processor and a card."""
    model.save_pretrained(folder)
    processor = json.dumps(_PROCESSOR, indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(processor, encoding="utf-8")
    (folder / "README.md").write_text(_model_card(model.num_parameters(), title, learned), encoding="utf-8")


def _model_card(num_parameters: int, title: str, learned: str) -> str:
    return f"""---
license: cc-by-4.0
library_name: transformers
pipeline_tag: image-classification
---

# Handwritten digits: {title}

A vision transformer of {num_parameters:,} parameters for images of 8 by 8 grey values.
It learned {learned}.
Its head over the ten digits is orthonormal and was never trained.

{_SOURCE}"""


#: Read by AutoImageProcessor. Written by hand because the class that would write it depends on whether
#: torchvision is installed. An image of another size is scaled to 8 by 8.
_PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_convert_rgb": False,
    "do_resize": True,
    "size": {"height": 8, "width": 8},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5],
    "image_std": [0.5],
}

_SOURCE = """The images are those of scikit-learn's `load_digits`, licensed CC BY 4.0:
E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998,
https://doi.org/10.24432/C50P49.
"""
