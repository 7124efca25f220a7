"""Families learned from data sets of any size: images by CLIP, texts by T5.

Data are named as recipes name them, so a local folder with the same columns goes the same way as a data
set on the Hub.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from benchmarks.continual.learning import Course, Learner, image_learner, learn_sequence
from benchmarks.continual.sources import Family, joined
from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.errors import EvaluationError, OutputError
from hub_magmax.evaluation.data import load_examples
from hub_magmax.evaluation.evaluators.examples import label_names, label_text
from hub_magmax.evaluation.evaluators.loading import load_model
from hub_magmax.evaluation.evaluators.zero_shot import ZeroShotImageClassification
from hub_magmax.files import write_text
from hub_magmax.preference.safeguards import draw
from hub_magmax.recipe.values import Data

if TYPE_CHECKING:
    from datasets import Dataset

Report = Callable[[str], None]

#: Sequences of data sets that come with the benchmark.
LANGUAGE = Path(__file__).parent / "language"

#: Share of the examples that becomes the test split of a data set without one.
TEST_SHARE = 0.2

#: Training examples of all tasks together, for the preference by transport.
NUM_TRAIN = 2500


@dataclass(frozen=True)
class Images:
    """A data set of images in classes.

    Attributes:
        train: Images and labels; labels are texts, or numbers with names.
        test: Another split of it, or None where one has to be made.
        templates: Texts around a class's name.
    """

    train: Data
    test: Data | None
    templates: tuple[str, ...] = ("a photo of a {}.",)

    def at(self, dataset: str) -> Images:
        """Return the same in another place."""
        moved = [data and data.model_copy(update={"dataset": dataset}) for data in (self.train, self.test)]
        return Images(*moved, self.templates)


_CIFAR = Data(dataset="uoft-cs/cifar100", split="train", input_column="img", label_column="fine_label")
_RENDITIONS = Data(dataset="axiong/imagenet-r", split="test", input_column="image", label_column="class_name")

IMAGES: Mapping[str, Images] = {
    "cifar100": Images(_CIFAR, _CIFAR.model_copy(update={"split": "test"})),
    "imagenet-r": Images(_RENDITIONS, None, ("a rendition of a {}.",)),
}


def image_family(
    images: Images,
    folder: Path,
    num_tasks: int,
    seed: int,
    *,
    model: ModelPlace,
    course: Course,
    report: Report = lambda line: None,
) -> Family:
    """Learn classes in `num_tasks` groups, drawn at random, and return the family.

    Args:
        images: The data.
        folder: The family goes to `t{num_tasks}s{seed}` in it.
        num_tasks: At most the number of classes.
        seed: Of the groups, of the split where one is made, and of learning.
        model: A CLIP.
        course: How each task is learned.
        report: Called with a line of text after each task.

    Raises:
        EvaluationError: If the data do not fit.
        OutputError: If the folder was begun with other settings.
    """
    name, columns = f"t{num_tasks}s{seed}", images.train
    _claim(folder / name, {"images": repr(images), "model": asdict(model), "course": asdict(course)})
    train, test = _splits(images, seed)
    names = tuple(train.features[columns.label_column].names)
    groups = _groups(len(names), num_tasks, seed)
    parts = [
        {task: _of(split, columns.label_column, group) for task, group in groups.items()}
        for split in (train, test)
    ]
    evaluator = ZeroShotImageClassification(classes=names, templates=images.templates)
    learner = image_learner(evaluator, columns)
    base, learned = learn_sequence(
        learner, model, parts[0], folder / name / "checkpoints", course=course, seed=seed, report=report
    )
    examples, owners = joined(parts[1])
    return Family(
        name,
        seed,
        base,
        learned,
        examples,
        owners,
        columns,
        {
            "name": "zero-shot-image-classification",
            "classes": list(names),
            "templates": list(images.templates),
        },
        classes=groups,
        train=parts[0],
        features=lambda place, part: _image_features(place, part, columns.input_column or "image"),
        num_train=NUM_TRAIN,
    )


def _claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Store the settings in `folder`, or check that they are those it was begun with."""
    path, text = folder / "family.json", json.dumps(settings, indent=2, default=str) + "\n"
    if path.is_file() and path.read_text() != text:
        raise OutputError(
            "the folder was begun with other settings", where=str(path), hint="Choose another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def _splits(images: Images, seed: int) -> tuple[Dataset, Dataset]:
    """Return training and test examples whose labels are numbers with readable names."""
    column = images.train.label_column
    train = load_examples(images.train, Path())
    if not label_names(train, column) and any(not isinstance(label, str) for label in train[column][:1]):
        raise EvaluationError("classes have no names", where=images.train.dataset, expected="a ClassLabel")
    names = label_names(train, column) or sorted(set(train[column]))
    if images.test is not None:
        test = load_examples(images.test, Path())
    else:
        chosen = set(draw(len(train), round(TEST_SHARE * len(train)), seed, "test split"))
        rest = [row for row in range(len(train)) if row not in chosen]
        train, test = train.select(rest), train.select(sorted(chosen))
    return _readable(train, column, names), _readable(test, column, names)


def _readable(examples: Dataset, column: str, names: Sequence[str]) -> Dataset:
    from datasets import ClassLabel

    if label_names(examples, column) is None:
        examples = examples.cast_column(column, ClassLabel(names=list(names)))
    return examples.cast_column(column, ClassLabel(names=[name.replace("_", " ") for name in names]))


def _groups(num_classes: int, num_tasks: int, seed: int) -> dict[str, tuple[int, ...]]:
    if num_tasks > num_classes:
        raise EvaluationError(
            f"{num_classes} classes cannot be divided into {num_tasks} tasks", where="--tasks"
        )
    drawn = np.random.default_rng([seed, 2]).permutation(num_classes)
    return {
        f"task-{number:02d}": tuple(sorted(group.tolist()))
        for number, group in enumerate(np.array_split(drawn, num_tasks), 1)
    }


def _of(examples: Dataset, column: str, classes: Sequence[int]) -> Dataset:
    return examples.select(np.flatnonzero(np.isin(examples[column][:], classes)).tolist())


def _image_features(place: Path, examples: Dataset, column: str) -> np.ndarray:
    """Return the image embeddings, which are what the frozen head reads."""
    import torch

    kind = ZeroShotImageClassification
    model = load_model(ModelPlace(str(place)), kind.model_class, kind.processor_class, "comparing features")
    rows = []
    with torch.inference_mode():
        for start in range(0, len(examples), 64):
            images = [image.convert("RGB") for image in examples[start : start + 64][column]]
            encoded = model.processor(images=images, return_tensors="pt").to(model.device)
            rows.append(model.network.get_image_features(**encoded).pooler_output)
    return torch.cat(rows).double().cpu().numpy()


def text_family(
    sequence: Path,
    folder: Path,
    seed: int,
    *,
    model: ModelPlace,
    learner: Learner,
    course: Course,
    report: Report = lambda line: None,
) -> Family:
    """Learn the data sets that a file lists, in its order, and return the family.

    The preference is the known mixing ratio, as published; labels of different data sets may be the same.

    Args:
        sequence: YAML such as those in `language/`.
        folder: The family goes to `t{number of tasks}s{seed}` in it.
        seed: Of the examples that are drawn, and of learning.
        model: A text-to-text model.
        learner: Full or with adapters.
        course: How each task is learned.
        report: Called with a line of text after each task.

    Raises:
        EvaluationError: If the data do not fit.
        OutputError: If the folder was begun with other settings.
    """
    listed = yaml.safe_load(sequence.read_text(encoding="utf-8"))
    name = f"t{len(listed['tasks'])}s{seed}"
    settings = {
        "sequence": listed,
        "model": asdict(model),
        "course": asdict(course),
        "learner": repr(learner),
    }
    _claim(folder / name, settings)
    parts = {
        split: {
            task["name"]: labelled_texts(
                task, task.get(split, split), listed[f"{split}_examples"], seed, sequence.parent
            )
            for task in listed["tasks"]
        }
        for split in ("train", "test")
    }
    base, learned = learn_sequence(
        learner, model, parts["train"], folder / name / "checkpoints", course=course, seed=seed, report=report
    )
    examples, owners = joined(parts["test"])
    evaluator = {"name": "text-to-text", "max_new_tokens": listed.get("max_new_tokens", 16)}
    return Family(name, seed, base, learned, examples, owners, Data(dataset="-"), evaluator, kinds=("known",))


def labelled_texts(
    task: Mapping[str, Any], split: str, num_examples: int, seed: int, folder: Path
) -> Dataset:
    """Return at most so many examples as a text, which names its parts, and the text of its label."""
    from datasets import Dataset, Features, Value

    label = task.get("label", "label")
    data = Data(dataset=task["dataset"], config=task.get("config"), split=split, label_column=label)
    found = load_examples(data, folder)
    found = found.select(draw(len(found), num_examples, seed, f"{split}/{task['name']}"))
    names = task.get("answers") or label_names(found, label)
    rows = [
        {
            "text": "\n".join([task["name"], *(f"{column}: {row[column]}" for column in task["inputs"])]),
            "label": label_text(row[label], names),
        }
        for row in found
    ]
    return Dataset.from_list(rows, Features({"text": Value("string"), "label": Value("string")}))
