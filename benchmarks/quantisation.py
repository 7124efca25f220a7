"""Quantisation vectors between tasks of one base model, beside rounding alone, own training and GPTQ.

    python -m benchmarks.quantisation digits FOLDER --write
    python -m benchmarks.quantisation definitions FOLDER --encoder MODEL --nouns data.noun --write
    python -m benchmarks.quantisation --render      write the tables of docs/quantisation.md

`digits` are all ten digits as they are, turned, mirrored or negative, learned by a small vision transformer;
`definitions` are the first tasks of `benchmarks.wordnet`, which says what MODEL and data.noun are. Every task
is fine-tuned from the base model without rounding, and with 4, 3 and 2 bits. Checkpoints in FOLDER are kept.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice, permutations
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image, ImageOps
from torch import Tensor

import hub_magmax as hm
from benchmarks import wordnet
from benchmarks.quantisation_tables import RESULTS, render
from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.evaluation.evaluators import Columns, Evaluator, make_evaluator
from hub_magmax.evaluation.evaluators.loading import LoadedModel, load_model
from hub_magmax.evaluation.gptq import rounded_by_gptq
from hub_magmax.evaluation.quantizing import rounded, rounded_layers
from hub_magmax.files import write_text
from hub_magmax.quickstart.family import make_family
from hub_magmax.recipe.loading import parse_recipe

BITS = (4, 3, 2)

#: Without data λ is 1; with some, the best of these on them. Of equal ones the first.
SCALINGS = (0.0, 0.25, -0.25, 0.5, -0.5, 1.0, -1.0, 1.5)

#: Examples of the receiver that GPTQ sees; no labels.
NUM_CALIBRATION = 128

IMAGES: Mapping[str, Callable[[Image.Image], Image.Image]] = {
    "upright": lambda image: image,
    "turned": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "mirrored": ImageOps.mirror,
    "negative": ImageOps.invert,
}

#: Definitions of each class that choose λ.
NUM_TUNE = 20


@dataclass(frozen=True)
class Study:
    """Tasks of one base model, for one seed.

    Attributes:
        folder: Has `base`, `data/TASK/{train,tune,test}`, and gets the checkpoints.
        tasks: Names.
        evaluator: Its name.
        ending: Of the files of examples.
        training: How tasks are trained.
        seed: Of base model, examples and training.
    """

    folder: Path
    tasks: tuple[str, ...]
    evaluator: str
    ending: str
    training: Mapping[str, Any]
    seed: int

    def train(self, bits: int | None) -> None:
        """Train the checkpoints of all tasks that are not there yet."""
        data = {task: {"dataset": f"./data/{task}/train.{self.ending}"} for task in self.tasks}
        training = {**self.training, "data": data, "order": "from_base", "evaluator": self.evaluator}
        training |= {"quantization_aware": f"int{bits}"} if bits else {}
        recipe = {
            "schema": 1,
            "base_model": "./base",
            "tasks": [{"name": task, "model": f"./{self.name(task, bits)}"} for task in self.tasks],
            "training": training,
            "method": "average",
            "seed": self.seed,
        }
        hm.finetune(parse_recipe(recipe, folder=self.folder), report=print)

    @staticmethod
    def name(task: str, bits: int | None) -> str:
        return f"{task}-int{bits}" if bits else task

    @cached_property
    def maker(self) -> Evaluator:
        return make_evaluator(self.evaluator, {})

    def model(self, task: str, bits: int | None = None) -> LoadedModel:
        kinds = self.maker.model_class, self.maker.processor_class
        return load_model(ModelPlace(str(self.folder / self.name(task, bits))), *kinds, "a benchmark")

    def batches(self, model: LoadedModel, task: str, part: str, most: int | None = None) -> list[Any]:
        path = self.folder / "data" / task / f"{part}.{self.ending}"
        kind = "parquet" if self.ending == "parquet" else "json"
        rows = datasets.load_dataset(kind, data_files=str(path), split="train")
        rows = rows.select(range(min(most or len(rows), len(rows))))
        return list(self.maker.encode(model, rows, Columns(), 64))


class Receiver:
    """A task's model, which gets vectors of others, with examples of its own.

    Args:
        study: Has them.
        task: Its name.
        vectors: By task and bits, what training for rounded weights added.
    """

    def __init__(self, study: Study, task: str, vectors: Mapping[tuple[str, int], dict[str, Tensor]]) -> None:
        self.study, self.task, self.vectors = study, task, vectors
        self.model = study.model(task)
        self._state = {name: value.clone() for name, value in self.model.network.state_dict().items()}
        self._batches = {part: study.batches(self.model, task, part) for part in ("tune", "test")}
        self._calibration = study.batches(self.model, task, "train", NUM_CALIBRATION)

    def accuracy(self, network: Any, part: str = "test") -> float:
        outcomes = study_outcomes(self.study, replace(self.model, network=network), self._batches[part])
        return sum(outcome.score for outcome in outcomes) / len(outcomes)

    def patched(self, vector: Mapping[str, Tensor], scaling: float) -> Any:
        """Return the network with a vector, in place."""
        added = {name: self._state[name] + scaling * value for name, value in vector.items()}
        self.model.network.load_state_dict({**self._state, **added})
        return self.model.network

    def by_gptq(self, network: Any, bits: int) -> Any:
        def run(other: Any) -> object:
            return study_outcomes(self.study, replace(self.model, network=other), self._calibration)

        return rounded_by_gptq(network, bits, run)

    def measured(self, bits: int) -> dict[str, Any]:
        """Return the accuracies of the receiver without vectors, and with its own."""
        own = self.study.model(self.task, bits).network
        plain = self.patched({}, 0)
        return {
            "task": self.task,
            "bits": bits,
            "whole": self.accuracy(plain),
            "rounded": self.accuracy(rounded(plain, bits)),
            "gptq": self.accuracy(self.by_gptq(plain, bits)),
            "own": self.accuracy(rounded(own, bits)),
        }

    def measured_with(self, donor: str, bits: int) -> dict[str, Any]:
        """Return the accuracies with the vector of a donor."""
        vector = self.vectors[donor, bits]

        def score(scaling: float, part: str) -> float:
            return self.accuracy(rounded(self.patched(vector, scaling), bits), part)

        tuned = max(SCALINGS, key=lambda scaling: score(scaling, "tune"))
        return {
            "donor": donor,
            "task": self.task,
            "bits": bits,
            "whole": self.accuracy(self.patched(vector, 1)),
            "one": score(1, "test"),
            "minus": score(-0.5, "test"),
            "tuned": score(tuned, "test"),
            "scaling": tuned,
            "gptq": self.accuracy(self.by_gptq(self.patched(vector, 1), bits)),
            "cosine": cosine(vector, self.vectors[self.task, bits]),
        }


def study_outcomes(study: Study, model: LoadedModel, batches: Sequence[Any]) -> Sequence[Any]:
    with torch.inference_mode():
        return list(study.maker.outcomes(model, batches))


def cosine(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    pair = [
        torch.cat([vector[name].flatten().double() for name in sorted(first)]) for vector in (first, second)
    ]
    return float(torch.nn.functional.cosine_similarity(*pair, dim=0))


def vector(study: Study, task: str, bits: int) -> dict[str, Tensor]:
    """Return what training for rounded weights added to the weights that are rounded and were trained."""
    plain, aware = study.model(task).network, study.model(task, bits).network
    states = plain.state_dict(), aware.state_dict()
    layers = {f"{name}.weight" for name in rounded_layers(plain)}
    found = {name: states[1][name] - value for name, value in states[0].items()}
    return {name: value for name, value in found.items() if name in layers or value.abs().max() > 0}


def measured(study: Study) -> dict[str, Any]:
    """Train what is missing, and return a row for each receiver and for each pair, by number of bits."""
    for bits in (None, *BITS):
        study.train(bits)
    vectors = {(task, bits): vector(study, task, bits) for task in study.tasks for bits in BITS}
    alone, pairs = [], []
    for task in study.tasks:
        receiver = Receiver(study, task, vectors)
        for bits in BITS:
            alone.append(receiver.measured(bits))
            others = [donor for donor, other in permutations(study.tasks, 2) if other == task]
            pairs += [receiver.measured_with(donor, bits) for donor in others]
            print(json.dumps({"seed": study.seed, **alone[-1]}), flush=True)
    return {"seed": study.seed, "alone": alone, "pairs": pairs}


def digits(folder: Path, seed: int, steps: int) -> Study:
    """Return the digits' tasks; base model and examples are those of the quickstart."""
    place = folder / f"digits-{seed}"
    family = make_family(folder / f"family-{seed}", num_tasks=1, seed=seed)
    if not (place / "base").exists():
        place.mkdir(parents=True, exist_ok=True)
        (place / "base").symlink_to(family.base_model.resolve())
    parts = datasets.load_dataset("parquet", data_dir=str(family.data / "all"))
    cut = len(parts["train"]) * 9 // 10
    whole = {"train": parts["train"].select(range(cut)), "test": parts["test"]}
    whole["tune"] = parts["train"].select(range(cut, len(parts["train"])))
    for task, change in IMAGES.items():
        for part, rows in whole.items():
            path = place / "data" / task / f"{part}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            images = [change(image) for image in rows["image"]]
            columns = {"image": images, "label": rows["label"]}
            datasets.Dataset.from_dict(columns, features=rows.features).to_parquet(path)
    training = {"steps": steps, "learning_rate": 3e-4, "frozen": ["classifier.*"]}
    return Study(place, tuple(IMAGES), "image-classification", "parquet", training, seed)


def definitions(folder: Path, seed: int, steps: int, encoder: Path, nouns: Path, num_tasks: int) -> Study:
    """Return tasks of WordNet's definitions; the base model is that of `benchmarks.wordnet`."""
    place = folder / f"definitions-{seed}"
    wordnet.make_family(place, encoder, nouns, seed, 0)
    texts = wordnet.read(nouns, seed)
    tasks = dict(islice(wordnet.TASKS.items(), num_tasks))
    for task, classes in tasks.items():
        parts: dict[str, list[tuple[str, str]]] = {"train": [], "tune": [], "test": []}
        for name in classes:
            parts["train"] += [(text, name) for text in texts.train[name][NUM_TUNE:]]
            parts["tune"] += [(text, name) for text in texts.train[name][:NUM_TUNE]]
            parts["test"] += [(text, name) for text in texts.test[name]]
        for part, rows in parts.items():
            random.Random(f"{seed} {task} {part}").shuffle(rows)
            path = place / "data" / task / f"{part}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps({"text": text, "label": name}) + "\n" for text, name in rows))
    training = {"steps": steps, "batch_size": 16, "learning_rate": 2e-4}
    training["frozen"] = ["*embeddings*", "classifier.*"]
    return Study(place, tuple(tasks), "text-classification", "jsonl", training, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", choices=["digits", "definitions"])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("experiments"))
    parser.add_argument("--encoder", type=Path, help="of definitions")
    parser.add_argument("--nouns", type=Path, help="of definitions")
    parser.add_argument("--tasks", type=int, default=2, help="of definitions: the first of them")
    parser.add_argument("--steps", type=int, help="of each training")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--write", action="store_true", help="store the numbers")
    parser.add_argument("--render", action="store_true", help="write the tables from what is stored")
    options = parser.parse_args()
    if options.render:
        render()
        return
    torch.set_num_threads(1)
    steps = options.steps or {"digits": 200, "definitions": 30}[options.data]
    found = []
    for seed in options.seeds:
        if options.data == "digits":
            study = digits(options.folder, seed, steps)
        else:
            place, nouns = options.encoder, options.nouns
            study = definitions(options.folder, seed, steps, place, nouns, options.tasks)
        found.append(measured(study))
        if options.write:  # after each seed, so that what is measured is kept
            RESULTS.mkdir(parents=True, exist_ok=True)
            lines = ",\n".join(map(json.dumps, found))
            write_text(RESULTS / f"{options.data}.json", f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
