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
import io
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import torch
import transformers
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
            classes drives the others so far away that no merge of the checkpoints beats the base model.
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
    """Images as a model takes them, and their classes."""

    images: Float[Tensor, "examples 1 8 8"]
    labels: Int64[Tensor, " examples"]

    def of(self, digits: tuple[int, ...]) -> _Examples:
        """Return the examples of some digits, in the same order."""
        chosen = torch.isin(self.labels, torch.tensor(digits))
        return _Examples(self.images[chosen], self.labels[chosen])


def make_family(
    folder: Path,
    *,
    num_tasks: int = 5,
    seed: int = 0,
    settings: Settings = Settings(),  # noqa: B008: frozen, so that sharing it is harmless
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
    pixels, labels = _load_digits()
    _claim(folder, {"format": _FORMAT, "num_tasks": num_tasks, "seed": seed, "settings": asdict(settings)})
    parts = _split(labels, seed, settings.num_supervised)
    family = DigitsFamily(
        folder=folder,
        base_model=folder / "checkpoints" / "base",
        tasks={task: folder / "checkpoints" / task for task in classes},
        classes=classes,
        data=folder / "data",
    )
    with _undisturbed():
        _once(family.data, lambda partial: _write_data(partial, pixels, labels, parts, classes), report)
        examples = {
            part: _Examples(_pixel_values(pixels[indices]), labels[indices])
            for part, indices in parts.items()
        }
        _once(family.base_model, lambda partial: _make_base(partial, examples, settings, seed), report)
        previous = family.base_model
        for task, checkpoint in family.tasks.items():
            _once(checkpoint, _task_maker(task, previous, examples, classes, settings, seed), report)
            previous = checkpoint
    return family


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
    partial = target.with_name(target.name + ".partial")
    with os_errors(target):
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        summary = make(partial)
        partial.rename(target)
    report(f"{target.name}: {summary} ({time.perf_counter() - started:.1f} s)")


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Compute with one thread, without progress bars, and leave the process as it was."""
    num_threads, shows_bars = torch.get_num_threads(), transformers.utils.logging.is_progress_bar_enabled()
    states = [(kind, dict(kind._shared_state)) for kind in (PartialState, AcceleratorState, GradientState)]
    torch.set_num_threads(1)  # the number of threads decides in which order sums are rounded
    if shows_bars:
        transformers.utils.logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(num_threads)
        if shows_bars:
            transformers.utils.logging.enable_progress_bar()
        for kind, state in states:  # an Accelerator would otherwise keep the process on the CPU
            kind._shared_state.clear()
            kind._shared_state.update(state)


def _seed_of(seed: int, purpose: str) -> int:
    """Derive an independent seed, so that a resumed call draws what an uninterrupted one drew."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:7], "little")


def _generator(seed: int, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(_seed_of(seed, purpose))


# Data


def _load_digits() -> tuple[UInt8[Tensor, "examples 8 8"], Int64[Tensor, " examples"]]:
    """Return the images as grey values from 0 to 255, and the digits that they show."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError(
            "scikit-learn, which brings the handwritten digits, is not installed",
            hint='Install it with: pip install "hub-magmax[quickstart]"',
        ) from error
    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images) * (255 / 16)  # stored as whole numbers from 0 to 16
    return pixels.round().to(torch.uint8), torch.from_numpy(bunch.target).to(torch.int64)


def _pixel_values(pixels: UInt8[Tensor, "examples 8 8"]) -> Float[Tensor, "examples 1 8 8"]:
    """Do what the image processor beside each checkpoint does: grey values to -1 ... 1."""
    return (pixels.unsqueeze(1).float() * _PROCESSOR["rescale_factor"] - 0.5) / 0.5


def _split(labels: Int64[Tensor, " examples"], seed: int, num_supervised: int) -> dict[str, Tensor]:
    """Return the indices of each part: three in ten of each digit to test, the rest to learn from."""
    generator = _generator(seed, "split")
    parts: dict[str, list[Tensor]] = {"test": [], "pretraining": [], "train": []}
    for digit in range(NUM_CLASSES):
        indices = torch.nonzero(labels == digit).flatten()
        indices = indices[torch.randperm(len(indices), generator=generator)]
        num_test = 3 * len(indices) // 10
        sizes = [num_test, num_supervised, len(indices) - num_test - num_supervised]
        for part, chosen in zip(parts.values(), indices.split(sizes), strict=True):
            part.append(chosen)
    shuffled = {}
    for name, chosen in parts.items():
        joined = torch.cat(chosen)
        shuffled[name] = joined[torch.randperm(len(joined), generator=generator)]
    return shuffled


def _write_data(
    folder: Path,
    pixels: UInt8[Tensor, "examples 8 8"],
    labels: Int64[Tensor, " examples"],
    parts: Mapping[str, Tensor],
    classes: Mapping[str, tuple[int, ...]],
) -> str:
    """Write a data set with the configurations `all`, `pretraining` and one for each task."""
    files = {
        "all/train": parts["train"],
        "all/test": parts["test"],
        "pretraining/train": parts["pretraining"],
    }
    for task, digits in classes.items():
        for split in ("train", "test"):
            chosen = torch.isin(labels[parts[split]], torch.tensor(digits))
            files[f"{task}/{split}"] = parts[split][chosen]
    for name, indices in files.items():
        path = folder / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(_table(pixels[indices], labels[indices]), path)
    (folder / "README.md").write_text(_data_card(tuple(files)), encoding="utf-8")
    return f"{len(parts['train'])} images to learn from, {len(parts['test'])} to test with"


def _table(pixels: UInt8[Tensor, "examples 8 8"], labels: Int64[Tensor, " examples"]) -> pyarrow.Table:
    """Return the examples with the schema by which `datasets` knows images and class names."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(d) for d in range(NUM_CLASSES)])}
    )
    columns = {"image": [{"bytes": _png(image), "path": None} for image in pixels], "label": labels.tolist()}
    return pyarrow.table(columns, schema=features.arrow_schema)


def _png(image: UInt8[Tensor, "8 8"]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image.numpy()).save(stream, format="png")
    return stream.getvalue()


def _data_card(files: tuple[str, ...]) -> str:
    configs: dict[str, list[str]] = {}
    for name in files:
        config, split = name.split("/")
        configs.setdefault(config, []).append(f"      - {{split: {split}, path: {name}.parquet}}")
    lines = []
    for config, splits in configs.items():
        default = ["    default: true"] if config == "all" else []
        lines += [f"  - config_name: {config}", *default, "    data_files:", *splits]
    return f"""---
license: cc-by-4.0
task_categories: [image-classification]
configs:
{chr(10).join(lines)}
---

# Handwritten digits, by task

{_SOURCE}
`all` has every digit, `pretraining` the few examples that only the base model learned from, and each
other configuration the digits of one task.
"""


# Checkpoints


def _make_base(folder: Path, examples: Mapping[str, _Examples], settings: Settings, seed: int) -> str:
    """Train from random weights: first the rotation of all images, then the digits of a few."""
    torch.manual_seed(_seed_of(seed, "weights"))
    model = _new_model(settings)
    pretext = _Rotations(model.vit, settings.hidden_size)
    seen = torch.cat([examples["pretraining"].images, examples["train"].images])
    rotated = _Examples(
        torch.cat([torch.rot90(seen, turns, (2, 3)) for turns in range(4)]),
        torch.arange(4).repeat_interleave(len(seen)),
    )
    _fit(pretext, pretext, rotated, settings.pretext, _generator(seed, "pretext"))
    _fit(
        model,
        lambda images: model(pixel_values=images).logits,
        examples["pretraining"],
        settings.supervised,
        _generator(seed, "supervised"),
    )
    _save(model, folder, "the base model", "all ten digits, from few examples")
    return f"accuracy over all ten digits {_accuracy(model, examples['test']):.2f}"


def _task_maker(
    task: str,
    previous: Path,
    examples: Mapping[str, _Examples],
    classes: Mapping[str, tuple[int, ...]],
    settings: Settings,
    seed: int,
) -> Callable[[Path], str]:
    """Return what learns one task from the checkpoint before it and saves the result in a folder."""
    digits = classes[task]

    def make(folder: Path) -> str:
        model = _load(previous)
        _fit(
            model,
            lambda images: model(pixel_values=images).logits,
            examples["train"].of(digits),
            settings.task,
            _generator(seed, f"task {task}"),
        )
        learned = f"the digits {', '.join(map(str, digits))}, continuing from `{previous.name}`"
        _save(model, folder, f"`{task}`", learned)
        return f"accuracy on its own digits {_accuracy(model, examples['test'].of(digits)):.2f}"

    return make


class _Rotations(nn.Module):
    """The transformer with a head for the pretext task, which is thrown away afterwards."""

    def __init__(self, transformer: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.transformer = transformer
        self.head = nn.Linear(hidden_size, 4)

    def forward(self, images: Float[Tensor, "examples 1 8 8"]) -> Float[Tensor, "examples 4"]:
        logits: Tensor = self.head(self.transformer(pixel_values=images).last_hidden_state[:, 0])
        return logits


def _new_model(settings: Settings) -> ViTForImageClassification:
    names = [str(digit) for digit in range(NUM_CLASSES)]
    config = ViTConfig(
        image_size=8,
        num_channels=1,
        patch_size=2,
        hidden_size=settings.hidden_size,
        intermediate_size=2 * settings.hidden_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=4,
        id2label=dict(enumerate(names)),
        label2id={name: digit for digit, name in enumerate(names)},
    )
    model = ViTForImageClassification(config)
    orthonormal = torch.linalg.qr(torch.randn(settings.hidden_size, NUM_CLASSES)).Q.T
    with torch.no_grad():
        model.classifier.weight.copy_(orthonormal * settings.head_scale)
        model.classifier.bias.zero_()
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
            hint="Delete this folder and start again: it is made anew, and so must be those after it.",
        ) from error
    model.classifier.requires_grad_(False)
    return model


def _fit(
    network: nn.Module,
    logits: Callable[[Tensor], Tensor],
    examples: _Examples,
    training: Training,
    generator: torch.Generator,
) -> None:
    """Train the parameters of `network` that are not frozen, in place."""
    # device_placement=False: the tensors stay on the CPU even where accelerate has settled on a GPU.
    accelerator = Accelerator(cpu=True, device_placement=False, mixed_precision="no")
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    num_steps = training.epochs * -(-len(examples.labels) // training.batch_size)
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=training.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_steps // 10, num_steps)
    network, optimizer, schedule = accelerator.prepare(network, optimizer, schedule)
    network.train()
    for _ in range(training.epochs):
        order = torch.randperm(len(examples.labels), generator=generator)
        for batch in order.split(training.batch_size):
            loss = cross_entropy(
                logits(examples.images[batch]),
                examples.labels[batch],
                label_smoothing=training.label_smoothing,
            )
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()


@torch.no_grad()
def _accuracy(model: ViTForImageClassification, examples: _Examples) -> float:
    """Return the share of examples whose class has the largest of all ten logits."""
    predicted = model.eval()(pixel_values=examples.images).logits.argmax(dim=1)
    return float((predicted == examples.labels).double().mean())


def _save(model: ViTForImageClassification, folder: Path, title: str, learned: str) -> None:
    """Write a checkpoint as `from_pretrained` reads it, with its image processor and a card."""
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_PROCESSOR, indent=2) + "\n")
    (folder / "README.md").write_text(
        f"""---
license: cc-by-4.0
library_name: transformers
pipeline_tag: image-classification
---

# Handwritten digits: {title}

A vision transformer of {sum(p.numel() for p in model.parameters()):,} parameters for images of 8×8 grey
values. It learned {learned}. Its head over the ten digits is orthonormal and was never trained.

{_SOURCE}"""
    )


#: Read by AutoImageProcessor. Written by hand because the class that would write it depends on whether
#: torchvision is installed; an image of another size is scaled to 8×8.
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

_SOURCE = """The images are those of scikit-learn's `load_digits`: E. Alpaydin and C. Kaynak, Optical Recognition of
Handwritten Digits, UCI Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49, CC BY 4.0.
"""
