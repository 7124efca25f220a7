"""Digit images: from scikit-learn, split for each purpose, and as a data set that `datasets` loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import yaml
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor

from hub_magmax.errors import MissingDependencyError, RecipeError
from hub_magmax.quickstart.settings import Settings, generator_of

NUM_CLASSES = 10
NAMES = tuple(str(digit) for digit in range(NUM_CLASSES))
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SOURCE = """The images are those of scikit-learn's `load_digits`, licensed CC BY 4.0:
E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998,
https://doi.org/10.24432/C50P49.
"""


@dataclass(frozen=True)
class Examples:
    """Grey values from 0 to 255, and the digits that they show."""

    pixels: UInt8[Tensor, "examples 8 8"]
    labels: Int64[Tensor, " examples"]

    def at(self, indices: Tensor) -> Examples:
        """Return the examples that indices or a mask choose."""
        return Examples(self.pixels[indices], self.labels[indices])

    def of(self, digits: tuple[int, ...]) -> Examples:
        """Return the examples of some digits, in the same order."""
        return self.at(torch.isin(self.labels, torch.tensor(digits)))

    @property
    def images(self) -> Float[Tensor, "examples 1 8 8"]:
        """Return the images as the image processor beside each checkpoint scales them: -1 to 1."""
        return (self.pixels.unsqueeze(1).float() / 255 - 0.5) / 0.5


@dataclass(frozen=True)
class Lesson:
    """Images and labels behind every part of one family."""

    settings: Settings
    seed: int
    classes: Mapping[str, tuple[int, ...]]
    test: Examples
    pretraining: Examples
    train: Examples


def divide(num_tasks: int) -> dict[str, tuple[int, ...]]:
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


def load_examples() -> Examples:
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
    return Examples(pixels.round().to(torch.uint8), torch.from_numpy(bunch.target).to(torch.int64))


def prepare(
    digits: Examples, classes: Mapping[str, tuple[int, ...]], settings: Settings, seed: int
) -> Lesson:
    """Split the examples: three in ten of each digit to test, a few for the base model, the rest to train."""
    generator = generator_of(seed, "split")
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
    return Lesson(settings, seed, classes, test, pretraining, train)


def make_data(lesson: Lesson, folder: Path) -> str:
    """Write a data set with the configurations `all`, `pretraining` and one for each task."""
    files = {"all/train": lesson.train, "all/test": lesson.test, "pretraining/train": lesson.pretraining}
    for task, digits in lesson.classes.items():
        files |= {f"{task}/train": lesson.train.of(digits), f"{task}/test": lesson.test.of(digits)}
    label = datasets.ClassLabel(names=list(NAMES))
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

{SOURCE}
`all` has every digit, `pretraining` the few examples that only the base model learned from, and each
other configuration the digits of one task.
"""
